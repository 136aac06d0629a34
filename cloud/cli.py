"""`fenceline`: the commands of operators and of the cloud; `cloud.commands` has them, group by group.

Exit codes: 0 done, 1 it failed or a promise is broken, 2 a setting or the command line has to change. What reports something takes
`--json`: one document on stdout, everything else on stderr. Heavy modules are imported by the command that needs them.

What may go wrong is one line on stderr: our own errors, and what the operating system says of a file. Anything else is a mistake of
ours, and shows where (a traceback); `--log-level debug` shows where for the others too.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cloud.commands import data, features, fleet, ingest, lake, models, policy, quality, query, stack
from cloud.commands.output import say
from edge_agent.contract.errors import ConfigError, ContractError, FencelineError

log = logging.getLogger(__name__)

STOPPED = 128
"""With the number of a signal: what a shell says of a command that it ended."""
OURS = ("cloud", "edge_agent", "pipelines")
A_PERSONS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What the operating system says of a name that a person gave, or of rights that he lacks."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = _parser("demo" in words).parse_args(words)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        code = int(args.command(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has seen enough: `fenceline query … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds back
        return STOPPED + signal.SIGPIPE
    except KeyboardInterrupt:
        say("fenceline: stopped")
        return STOPPED + signal.SIGINT
    except FencelineError as e:
        _tell(str(e), e)
        return 2 if isinstance(e, (ConfigError, ContractError)) else 1
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] in OURS:
            raise
        _tell(f"the Python package {e.name!r} is not installed here; fenceline needs more than the edge agent: pip install '.[cloud]'", e)
        return 2
    except OSError as e:
        if e.errno is None or e.filename is None:
            raise
        _tell(f"{e.filename}: {e.strerror}", e)
        return 2 if isinstance(e, A_PERSONS) else 1


def _tell(text: str, error: Exception) -> None:
    say(f"fenceline: {text}")
    log.debug("command failed", exc_info=error)


def _parser(with_demo: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fenceline", description="Train in the cloud, run at the edge, keep data inside the fence.")
    parser.add_argument("--project", type=Path, help="directory with pipelines/dvc.yaml or fenceline.toml (default: here and upward)")
    parser.add_argument("--state", type=Path, help="state directory (default: FENCELINE_STATE, then fenceline.toml)")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (stack, ingest, data, lake, quality, query, features, models, fleet, policy):
        group.declare(commands)
    _add_demo(commands, with_demo)
    return parser


def _add_demo(commands: Any, wanted: bool) -> None:
    """The demo knows its own arguments; its modules are heavy, so only who calls it imports them."""
    text = "the whole journey on this machine, in a temporary directory"
    demo = commands.add_parser("demo", help=text, description=text)
    if wanted:
        from cloud.demo.runner import add_arguments, run

        add_arguments(demo)
        demo.set_defaults(command=run)


if __name__ == "__main__":
    sys.exit(main())
