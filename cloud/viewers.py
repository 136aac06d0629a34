"""Who looks at the lake: which zones the user of this process may see, in queries and in the quarantine.

- `[query.users]` of fenceline.toml lists the zones of each user of this machine (`"*"`: all), by name, or by number if he has no name.
  Without that section only the owner of the state directory may look, and sees all: the files are his anyway.
- The lake must lie where those users can read it: the state directory, where it lies unless `[lake] root` says otherwise, is closed to
  all but its owner.
- It is a fence for tools; who can read the files can read the files.

    zones = rights(settings)
    lanes = [lane for lane in lake.lanes("pump") if may_see(lane, zones)]
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence

from cloud.config import Settings
from cloud.gate import load_zones
from cloud.roots import ALL
from edge_agent.contract.errors import ConfigError
from edge_agent.core.settings import nearest


def user_name() -> str:
    """The user of this process; his number if the machine has no name for it, as in many containers."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def rights(settings: Settings, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The zones that this process's user may see; of these only `wanted`, if any are named. `*` stands for all.

    Raises:
        ConfigError: he may see none, or not all that are wanted, or there is none of such a name, or he cannot read where they lie.
    """
    user, users = user_name(), settings.query.users
    if users:
        granted = tuple(users.get(user, ()))
        if not granted:
            raise ConfigError(f"user {user!r} may see no zone; [query.users] of fenceline.toml names {', '.join(sorted(users))}")
    else:
        _check_owner(settings, user)
        granted = (ALL,)
    if refused := [zone for zone in wanted if ALL not in granted and zone not in granted]:
        raise ConfigError(f"user {user!r} may not see {', '.join(refused)}; only {', '.join(granted)}")
    if ALL in granted:
        _check_known(settings, wanted)
    zones = tuple(wanted) or granted
    _check_readable(settings, zones, user)
    return zones


def _check_known(settings: Settings, wanted: Sequence[str]) -> None:
    """Of a zone whose name is mistaken there would be nothing to see, and of several the others would be all."""
    known = [ALL, *settings.lake.zones, *(zone.name for zone in load_zones(settings).zones)]
    for zone in wanted:
        if zone not in known:
            raise ConfigError(f"there is no zone {zone!r}{nearest(zone, known)}")


def _check_owner(settings: Settings, user: str) -> None:
    try:
        owner = settings.state_dir.stat().st_uid
    except FileNotFoundError as e:
        raise ConfigError(f"there is no state directory {settings.state_dir}, so nothing was stored yet; start with: fenceline up") from e
    except PermissionError:  # whoever cannot even reach it does not own it
        owner = -1
    if owner != os.geteuid():
        raise ConfigError(
            f"user {user!r} does not own {settings.state_dir}, and fenceline.toml has no [query.users] that lets others see the lake"
        )


def _check_readable(settings: Settings, zones: Sequence[str], user: str) -> None:
    """What a user cannot read would look empty to him, or fail somewhere deep. Roots of other zones may well be closed to him."""
    for root in settings.lake.within(zones):
        if root.on_s3:
            continue
        try:
            os.scandir(root.uri).close()
        except FileNotFoundError:
            continue  # nothing is stored yet
        except OSError as e:
            raise ConfigError(
                f"user {user!r} cannot read the lake in {root}: {e.strerror}; let it lie where he can ([lake] root): "
                f"{settings.state_dir} is closed to all but its owner"
            ) from e
