"""Simulated engines run to failure, in the format of NASA's C-MAPSS: `simulated_engines.py FILE --engines 20 --seed 7`.

Columns are separated by blanks: engine number, cycle, 3 settings, 21 sensors. Read it with `--mapping cmapss`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cloud.demo.simulator import build_engine


def write(path: Path, engines: int, seed: int) -> int:
    """Write the file; the number of rows."""
    lines = []
    for number in range(1, engines + 1):
        rows = build_engine(f"engine-{number:03d}", seed).values.tolist()
        lines += [f"{number} {cycle} {' '.join(map(repr, row))}" for cycle, row in enumerate(rows, 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return len(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Simulated engines run to failure, in the format of NASA's C-MAPSS.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--engines", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    print(write(arguments.file, arguments.engines, arguments.seed))
