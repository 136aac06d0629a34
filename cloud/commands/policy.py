"""`fenceline policy`: where records may go."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cloud import config
from cloud.commands.output import add_command, add_group, print_json, print_table


def declare(commands: Any) -> None:
    """Declare the commands of this group."""
    policy = add_group(commands, "policy", "the zone policy: where records may go")
    publish = add_command(policy, "publish", _policy_publish, "sign a zones document, put it into force, and ask every device for it")
    publish.add_argument("file", type=Path)
    add_command(policy, "show", _policy_show, "the policy in force, and the devices that do not work under it yet")


def _policy_publish(args: argparse.Namespace) -> int:
    from cloud import policy
    from cloud.fleet import Fleet

    settings = config.load(args.project, args.state)
    ref = policy.publish(settings, Fleet(settings.fleet_db), args.file, now=datetime.now(UTC))
    if args.json:
        print_json(ref)
    else:
        print(f"policy version {ref.version} is in force here, and every device is asked for it\nsha256 {ref.sha256}")
    return 0


def _policy_show(args: argparse.Namespace) -> int:
    from cloud import policy
    from cloud.fleet import Fleet

    settings = config.load(args.project, args.state)
    found = policy.show(settings, Fleet(settings.fleet_db))
    zones = {z.name: z.endpoints for z in found.zones.zones}
    if args.json:
        version = found.ref.version if found.ref else None
        print_json(
            {
                "version": version,
                "sha256": found.zones.digest,
                "file": found.path,
                "zones": zones,
                "devices": found.devices,
                "behind": found.behind,
            }
        )
        return 0
    print(f"policy {f'version {found.ref.version}' if found.ref else 'of the project, never published'} sha256 {found.zones.digest}")
    print_table(("zone", "endpoints, the preferred first"), [(name, ", ".join(ends) or "none: held") for name, ends in zones.items()])
    print(f"devices that work under another policy: {', '.join(found.behind) or 'none'}")
    return 0
