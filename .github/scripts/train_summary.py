"""A training run as a job summary: `train_summary.py RESULT.json [--artifact NAME] >> "$GITHUB_STEP_SUMMARY"`.

RESULT.json is what `fenceline train --json` prints. A run on a tracking server that others can reach becomes a link; one on the runner's
own server becomes a hint on how to look at the artifact that holds its database.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def summary(result: dict[str, Any], artifact: str) -> str:
    """The result as Markdown."""
    gate, promoted = result["gate"], result["promoted"]
    outcome = "champion" if promoted else "not champion" if gate["passed"] else "challenger only"
    lines = [f"## {result['model']} version {result['model_version']}: {outcome}", ""]
    if gate["passed"] and not promoted:
        now = f"version {result['champion_version']}" if result["champion_version"] else "none"
        lines.append(f"- it passed its gate, but somebody has changed the alias since, and champion is {now}")
    lines += [f"- not promoted: {reason}" for reason in gate["reasons"] if not gate["passed"] and not promoted]
    if result["unchanged"]:
        lines.append("- nothing has changed since the last run; these are its results")
    lines += [f"- MLflow run: {where(result, artifact)}", "", "| metric | value |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.4g} |" for name, value in sorted(result["metrics"].items())]
    lines += ["", "| stage | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {'unchanged' if seconds is None else f'{seconds:.1f}'} |" for name, seconds in result["stages"].items()]
    lines += ["", "| lake table | version |", "| --- | ---: |"]
    lines += [f"| {lane} | {version} |" for lane, version in sorted(result["lake_version"].items())]
    return "\n".join(lines) + "\n"


def where(result: dict[str, Any], artifact: str) -> str:
    """A link to the run, or how to open it."""
    run, url = f"`{result['run_id']}`", result["run_url"]
    address = urlsplit(url)
    if address.scheme in ("http", "https") and address.hostname not in ("127.0.0.1", "localhost", "::1"):
        return f"[{run}]({url})"
    look = "mlflow server --backend-store-uri sqlite:///mlflow.db --artifacts-destination artifacts"
    return f"{run}, on this job's own server; unpack artifact `{artifact}` and there run `{look}`"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A training run as a job summary.")
    parser.add_argument("result", type=Path)
    parser.add_argument("--artifact", default="mlflow")
    arguments = parser.parse_args()
    print(summary(json.loads(arguments.result.read_text()), arguments.artifact), end="")
