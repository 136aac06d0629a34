"""`edge-agent`: run, check and look at the agent of one gateway.

Exit codes: 0 done, 1 it failed while running, 2 a setting or the command line has to change, 128 and the number of a signal: that ended it.
Heavy modules are imported by the command that needs them, so that `--help` and `status` answer at once on small hardware.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from edge_agent import __version__
from edge_agent.contract.errors import ConfigError, FencelineError, UnavailableError

STOPPED = 128  # and the signal's number, as shells say it


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        code = int(args.command(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has seen enough: `edge-agent export … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds back
        return STOPPED + signal.SIGPIPE
    except KeyboardInterrupt:
        print("edge-agent: stopped", file=sys.stderr)
        return STOPPED + signal.SIGINT
    except ConfigError as e:
        print(f"edge-agent: {e}", file=sys.stderr)
        return 2
    except FencelineError as e:
        print(f"edge-agent: {e}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-agent", description="Fenceline's agent: sensors in, scored and fenced blocks out.")
    parser.add_argument("--version", action="version", version=f"edge-agent {__version__}")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, text in (
        ("run", _run, "read sensors, score, store and send, until SIGTERM or Ctrl-C"),
        ("check", _check, "read agent.toml and all it names, and say what would run"),
        ("status", _status, "what the running agent is doing"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        command.add_argument("--config", type=Path, default=Path("agent.toml"), help="default: agent.toml")
        if name == "run":
            command.add_argument("--profile", action="store_true", help="print where the time goes, every few seconds and at the end")
        else:
            command.add_argument("--json", action="store_true", help="print JSON")
    _add_buffer_commands(commands)
    passwd = commands.add_parser("passwd", help="let a user connect to the sensor listener: add, or change, a line of its users_file")
    passwd.set_defaults(command=_passwd)
    passwd.add_argument("file", type=Path, metavar="FILE", help="the users_file of [sensors]; made if missing")
    passwd.add_argument("user", metavar="USER")
    return parser


def _add_buffer_commands(commands: Any) -> None:
    fsck = commands.add_parser("fsck", help="check the buffer of an agent that does not run, or a copy; exit code 1 if it is damaged")
    fsck.set_defaults(command=_fsck)
    fsck.add_argument("--json", action="store_true", help="print JSON")
    fsck.add_argument("--repair", action="store_true", help="rebuild a damaged file from its whole blocks; the old one stays beside it")
    export = commands.add_parser("export", help="write the readings that a buffer still holds, of a dead device too")
    export.set_defaults(command=_export)
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--csv", action="store_true")
    form.add_argument("--jsonl", action="store_true", help="one JSON document per line")
    export.add_argument("--stream", metavar="NAME", help="only this stream (needed with --csv if there are several)")
    export.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: standard output")
    for command in (fsck, export):
        command.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a buffer.db (default: the one of --config)")
        command.add_argument("--config", type=Path, default=Path("agent.toml"), help="default: agent.toml")
        command.add_argument("--key-file", type=Path, metavar="FILE", help="the keys, if the blocks of FILE are encrypted")


def _run(args: argparse.Namespace) -> int:
    from edge_agent.agent import Agent
    from edge_agent.config import load

    config = load(args.config)
    if not args.profile:
        return Agent(config).run()
    from edge_agent.profile import Profile, report_regularly

    with Profile() as profile, report_regularly(profile, lambda text: print(text, file=sys.stderr, flush=True)):
        return Agent(config, profile).run()


def _check(args: argparse.Namespace) -> int:
    from edge_agent.agent import Agent
    from edge_agent.config import load

    config = load(args.config)
    Agent(config)  # refuses what reading the file cannot see, such as TLS files that do not load
    position = config.settings.position
    _print(
        {
            "device": config.device,
            "state_dir": str(config.state_dir),
            "sensors": [side.name for side in config.sensors],
            "streams": {c.stream: f"{c.version}, {c.encoding} on {c.topic}" for c in config.contracts},
            "position": f"in {config.fixed_lane}"
            if config.fixed_lane
            else f"from {position.url if position.source == 'gpsd' else position.topic}, home {position.home or 'none'}",
            "zones": {z.name: list(z.endpoints) for z in config.zones.zones},
            "endpoints": {name: f"{e.host}:{e.port}{' (TLS)' if e.tls else ''}" for name, e in config.endpoints.items()},
            "releases": config.settings.releases.url if config.settings.releases else None,
        },
        args.json,
    )
    return 0


def _passwd(args: argparse.Namespace) -> int:
    import getpass

    from edge_agent.mqtt.passwords import set_password

    password = getpass.getpass(f"Password of {args.user}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    new = set_password(args.file, args.user, password)
    print(f"{args.file}: user {args.user} {'added' if new else 'changed'}")
    return 0


def _status(args: argparse.Namespace) -> int:
    import tomllib

    from edge_agent.status import ask

    # Only the state directory is needed: `status` must work, and fast, while other settings are being mended.
    try:
        state_dir = args.config.resolve().parent / tomllib.loads(args.config.read_text("utf-8"))["state_dir"]
    except OSError as e:
        raise ConfigError(f"cannot read {args.config}: {e.strerror}; give the agent's settings with --config FILE") from e
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as e:  # TypeError: it is no text
        raise ConfigError(f"cannot read state_dir from {args.config}: {e}; `edge-agent check` tells more") from e
    _print(ask(state_dir), args.json)
    return 0


def _fsck(args: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from edge_agent.inspection import alone, inspect, repair

    path, keys, _ = _buffer(args)
    if args.repair:
        found = repair(path, keys)
    else:
        with nullcontext() if args.file else alone(path.parent):
            found = inspect(path, keys)
    _print(found.document(), args.json)
    return 0 if found.clean else 1


def _export(args: argparse.Namespace) -> int:
    from edge_agent.buffer_file import BufferFile
    from edge_agent.export import export

    path, keys, contracts = _buffer(args)
    file = BufferFile(path, keys)
    if next(file.blocks(), None) is None and file.carved:
        raise ConfigError(f"{path} holds no block; it is no buffer, or nothing of it can be read")
    if args.output:
        try:
            with args.output.open("w", newline="", encoding="utf-8") as out:
                readings = export(file, out, as_csv=args.csv, stream=args.stream, contracts=contracts)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as e:
            raise ConfigError(f"export cannot write {args.output}: {e.strerror}; name another file with -o") from e
        except OSError as e:  # the disk is full, for instance
            raise UnavailableError(f"export ended early: cannot write {args.output}: {e.strerror}") from e
    else:
        readings = export(file, sys.stdout, as_csv=args.csv, stream=args.stream, contracts=contracts)
    damaged = f"; {file.damaged} blocks are damaged" if file.damaged else ""
    carved = "; its tables could not be followed to the end: more may be missing" if file.carved else ""
    print(f"{readings} readings{damaged}{carved}", file=sys.stderr)
    return 1 if damaged or carved else 0


def _buffer(args: argparse.Namespace) -> tuple[Path, Any, tuple[Any, ...]]:
    """The buffer's file, its keys, and the contracts as far as they are known."""
    from edge_agent.sealed import load_keys

    if args.file and not args.config.exists():
        return args.file, load_keys(args.key_file), ()
    from edge_agent.config import load

    config = load(args.config)
    return args.file or config.state_dir / "buffer.db", load_keys(args.key_file or config.key_file), config.contracts


def _print(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
        return
    for key, value in document.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, item in value.items():
                print(f"  {name}: {_text(item)}")
        else:
            print(f"{key}: {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value) or "none"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
