"""`fenceline device|broker`: gateways and the brokers that they speak to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud import config
from cloud.commands.output import add_command, add_group, print_devices, print_json, say

if TYPE_CHECKING:
    from cloud.enrol import Position


def declare(commands: Any) -> None:
    """Declare the commands of this group."""
    device = add_group(commands, "device", "the fleet")
    add = add_command(device, "add", _device_add, "register a device and write its agent.toml")
    add.add_argument("name")
    add.add_argument("--out", type=Path, metavar="FILE", help="agent.toml (default: STATE/devices/NAME/agent.toml)")
    add.add_argument("--home", type=_position, metavar="LAT,LON", help="where the gateway stands (default: it moves)")
    add_command(device, "list", _device_list, "all devices and what they run")
    password = add_command(device, "password", _device_password, "give a device another broker password; the old one is none any more")
    password.add_argument("name")
    password.add_argument("--out", type=Path, metavar="FILE", help="the password file (default: STATE/devices/NAME/NAME.password)")
    remove = add_command(
        device, "remove", _device_remove, "take a lost device out of the fleet: it may not connect any more, its data stays"
    )
    remove.add_argument("name")
    broker = add_group(commands, "broker", "brokers of your own")
    acl = add_command(broker, "acl", _broker_acl, "print the ACL file of a region's Mosquitto: who may publish and subscribe what")
    acl.add_argument("--region", required=True, help="an endpoint name of zones.geojson")
    acl.add_argument(
        "--cloud",
        action="append",
        default=[],
        metavar="CN",
        help="a certificate of the cloud; may be repeated (default: ingest-1, control-1)",
    )


def _device_add(args: argparse.Namespace) -> int:
    from cloud.enrol import enrol
    from cloud.fleet import Fleet

    settings = config.load(args.project, args.state)
    path = enrol(settings, Fleet(settings.fleet_db), args.name, args.out, args.home)
    if args.json:
        print_json({"device": args.name, "config": path})
    else:
        print(f"device {args.name} added\nedge-agent run --config {path}")
    return 0


def _device_password(args: argparse.Namespace) -> int:
    from cloud.enrol import renew
    from cloud.fleet import Fleet

    settings = config.load(args.project, args.state)
    path = renew(settings, Fleet(settings.fleet_db), args.name, args.out)
    if args.json:
        print_json({"device": args.name, "password_file": path})
    else:
        print(f"device {args.name} has a new password; put this file in the place of its old one and start its agent again\n{path}")
    return 0


def _device_remove(args: argparse.Namespace) -> int:
    from cloud.fleet import Fleet
    from cloud.removal import remove
    from cloud.viewers import user_name

    settings = config.load(args.project, args.state)
    removed = remove(settings, Fleet(settings.fleet_db), args.name, user_name())
    untold = [region.name for region in settings.regions if region.tls is not None]
    if args.json:
        print_json({"device": args.name, "removed": removed, "brokers_to_tell": untold})
        return 0
    print(f"device {args.name} {'removed' if removed else 'was removed before'}")
    for name in untold:
        say(f"the broker of {name} is your own and has to be told: fenceline broker acl --region {name}, and deploy/README.md")
    return 0


def _broker_acl(args: argparse.Namespace) -> int:
    from cloud.fleet import Fleet
    from cloud.gate import load_zones
    from cloud.rights import CLOUD, mosquitto_acl

    settings = config.load(args.project, args.state)
    removed = [name for name, removal in Fleet(settings.fleet_db).removals().items() if not removal.back]
    acl = mosquitto_acl(load_zones(settings), args.region, args.cloud or CLOUD, removed)
    if args.json:
        print_json({"region": args.region, "acl": acl})
    else:
        print(acl, end="")
    return 0


def _device_list(args: argparse.Namespace) -> int:
    from cloud.fleet import Fleet
    from cloud.status import devices

    found = devices(Fleet(config.load(args.project, args.state).fleet_db))
    if args.json:
        print_json(found)
    else:
        print_devices(found)
    return 0


def _position(text: str) -> Position:
    from cloud.enrol import Position

    lat, _, lon = text.partition(",")
    try:
        return Position(float(lat), float(lon))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAT,LON in degrees, such as 48.1,11.5") from e
