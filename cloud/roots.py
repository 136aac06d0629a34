"""Where the rows of a lane lie: the lake's root, or the root of its zone.

- A root is a directory, or `s3://BUCKET/PREFIX`. In it lie `<lane>/<stream>/`, one Delta table each.
- `[lake.zones]` gives a zone, or a lane of several zones, a root of its own.
- A lane of several zones holds records that may belong to any of them. It lies where its own entry says; without one, where all its
  zones lie. If they lie apart, it has no root and is refused: nobody has said who may hold such records.
- Secrets are never in fenceline.toml. S3 credentials come from the environment: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and
  `AWS_SESSION_TOKEN`, or, for a bucket whose settings say `credentials = "EU"`, from `EU_AWS_ACCESS_KEY_ID` and so on.
- A commit on S3 is a conditional write (`If-None-Match: *`): the server must honour it, or two writers take the same version.

    roots = Roots(Root("/var/lib/fenceline/lake"), {"europe": Root("s3://eu-bucket/lake", Bucket(region="eu-central-1"))})
    roots.of("europe").path("europe", "turbofan")      # s3://eu-bucket/lake/europe/turbofan
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.contract.errors import ConfigError, ContractError, UnavailableError
from edge_agent.contract.topics import check_lane

ALL = "*"
"""Stands for all zones."""
S3 = "s3://"
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
TOKEN = "AWS_SESSION_TOKEN"
UNSAFE = ("AWS_S3_ALLOW_UNSAFE_RENAME", "AWS_S3_LOCKING_PROVIDER")
"""Settings of delta-rs that replace the conditional write of a commit."""
LIMITS = {"connect_timeout": "5s", "timeout": "60s", "max_retries": "2", "retry_timeout": "20s"}
"""How long one request may take before the lake counts as not available, and the ingest waits and tries again."""


class Bucket(msgspec.Struct, frozen=True):
    """How a bucket is reached. `credentials` is the prefix of the environment variables that hold its keys."""

    endpoint: str = ""
    region: str = ""
    credentials: str = ""
    allow_http: bool = False


@dataclass(frozen=True)
class Root:
    """A place for tables: a directory or an S3 prefix."""

    uri: str
    bucket: Bucket = field(default_factory=Bucket)

    def __str__(self) -> str:
        return self.uri

    @property
    def on_s3(self) -> bool:
        return self.uri.startswith(S3)

    @property
    def store(self) -> str:
        """What answers for it: the name of its bucket; empty: the file system."""
        return self.uri[len(S3) :].split("/")[0] if self.on_s3 else ""

    def path(self, *parts: str) -> str:
        """The address of something in this root."""
        return "/".join((self.uri.rstrip("/"), *parts))

    def storage_options(self) -> dict[str, str] | None:
        """What deltalake, Polars and DataFusion need to reach it, secrets among them; None for a directory.

        Raises:
            ConfigError: credentials are missing, or the environment would make commits unsafe.
        """
        if not self.on_s3:
            return None
        if wrong := [name for name in UNSAFE if os.environ.get(name)]:
            raise ConfigError(f"{', '.join(wrong)} is set: two writers of {self.uri} could take the same commit; unset it")
        options = {"aws_conditional_put": "etag", **LIMITS}
        if self.bucket.endpoint:
            options["AWS_ENDPOINT_URL"] = self.bucket.endpoint
        if self.bucket.region:
            options["AWS_REGION"] = self.bucket.region
        if self.bucket.allow_http:
            options["AWS_ALLOW_HTTP"] = "true"
        return options | self._credentials()

    def _credentials(self) -> dict[str, str]:
        if not self.bucket.credentials:
            return {}  # object_store reads AWS_… itself
        names = {name: f"{self.bucket.credentials}_{name}" for name in (*CREDENTIALS, TOKEN)}
        if missing := [names[name] for name in CREDENTIALS if not os.environ.get(names[name])]:
            raise ConfigError(f"{self.uri}: the environment has no {' and no '.join(missing)}; fenceline.toml names that prefix")
        return {name: os.environ[theirs] for name, theirs in names.items() if os.environ.get(theirs)}

    def folders(self, *parts: str) -> list[str]:
        """The names of the folders below a path, sorted; none if there is no such path.

        Raises:
            UnavailableError: the storage does not answer.
        """
        if not self.on_s3:
            path = Path(self.path(*parts))
            try:
                return sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
            except OSError as e:
                raise UnavailableError(f"{path} does not list: {e.strerror}") from e
        import pyarrow.fs as pafs  # settings are read by every command; only this needs Arrow
        from deltalake.fs import DeltaStorageHandler

        try:
            store = pafs.PyFileSystem(DeltaStorageHandler(self.uri, self.storage_options()))
            found = store.get_file_info(pafs.FileSelector("/".join(parts), allow_not_found=True, recursive=False))
        except OSError as e:
            raise UnavailableError(f"{self.path(*parts)} does not list: {e}") from e
        return sorted(info.base_name for info in found if info.type is pafs.FileType.Directory)

    def describe(self) -> dict[str, Any]:
        """The same as plain values, without secrets."""
        return {"uri": self.uri, **({"bucket": msgspec.to_builtins(self.bucket)} if self.on_s3 else {})}


@dataclass(frozen=True)
class Roots:
    """The lake's root, and those of zones. Labels, which belong to no zone, lie in the default one."""

    default: Root
    zones: Mapping[str, Root] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(map(str, self.all))

    @classmethod
    def at(cls, where: Path | str | Roots) -> Roots:
        """A lake of one root."""
        return where if isinstance(where, Roots) else cls(Root(str(where)))

    @property
    def all(self) -> list[Root]:
        """Every root once, the default one first."""
        return list(dict.fromkeys((self.default, *self.zones.values())))

    def of(self, lane: str) -> Root:
        """The root of a lane.

        Raises:
            ConfigError: its zones lie apart, and it has no root of its own.
        """
        if lane in self.zones:
            return self.zones[lane]
        found = {zone: self.zones.get(zone, self.default) for zone in lane.split("_")}
        if len(set(found.values())) == 1:
            return next(iter(found.values()))
        places = ", ".join(f"{zone} in {root}" for zone, root in found.items())
        raise ConfigError(
            f"lane {lane!r} may belong to zones that lie apart ({places}), and nothing says who holds it; "
            f'give it a place: [lake.zones] {lane} = "…"'
        )

    def within(self, zones: Collection[str]) -> list[Root]:
        """The roots in which lanes of nothing but `zones` may lie."""
        if ALL in zones:
            return self.all
        single = [self.zones.get(zone, self.default) for zone in zones]
        return list(dict.fromkeys([*single, *(root for lane, root in self.zones.items() if may_see(lane, zones))]))

    def beside(self, lane: str) -> list[Root]:
        """The root of a lane, and those that need no other keys and answers than it: directories, and roots in its bucket.

        Raises:
            ConfigError: the lane has no root.
        """
        own = self.of(lane)
        return [own, *(root for root in self.all if root != own and root.store in ("", own.store))]

    def describe(self) -> dict[str, Any]:
        """The same as plain values, without secrets; `restore` reads it."""
        return {"default": self.default.describe(), "zones": {lane: root.describe() for lane, root in self.zones.items()}}

    @classmethod
    def restore(cls, tree: Mapping[str, Any]) -> Roots:
        """The roots that `describe` gave."""

        def root(found: Mapping[str, Any]) -> Root:
            return Root(found["uri"], msgspec.convert(found.get("bucket", {}), Bucket))

        return cls(root(tree["default"]), {lane: root(found) for lane, found in tree["zones"].items()})


def may_see(lane: str, zones: Collection[str]) -> bool:
    """Whether every zone of a lane is among `zones`."""
    return ALL in zones or set(lane.split("_")) <= set(zones)


def parse_roots(default: str, zones: Mapping[str, str], buckets: Mapping[str, Bucket], project: Path, origin: str) -> Roots:
    """The roots that fenceline.toml names; paths are relative to the project.

    Raises:
        ConfigError: a name is no lane, an address is none that works, or one root lies in another.
    """

    def root(text: str) -> Root:
        if text.startswith(S3):
            found = Root(text.rstrip("/"))
            if {"", ".", ".."} & set(found.uri[len(S3) :].split("/")):
                raise ConfigError(f"{origin}: lake root {text!r} has an empty step, . or .. in it")
            return replace(found, bucket=buckets.get(found.store, Bucket()))
        if "://" in text:
            raise ConfigError(f"{origin}: lake root {text!r} is neither a path nor s3://BUCKET/PREFIX")
        return Root(os.path.normpath((project / text).absolute()))

    try:
        found = Roots(root(default), {check_lane(lane): root(text) for lane, text in zones.items()})
    except ContractError as e:
        raise ConfigError(f"{origin}: [lake.zones] {e}") from e
    for inner in found.all:
        for outer in found.all:
            if inner != outer and inner.path("").startswith(outer.path("")):
                raise ConfigError(f"{origin}: lake root {inner} lies in {outer}; roots of zones lie apart")
    return found
