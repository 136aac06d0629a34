"""The release repository, over TUF: from the name of a bundle or a zone policy to bytes that the release keys have signed.

- Trust starts at the embedded root; all else is verified against it (python-tuf's ngclient).
- HTTPS; plain HTTP only to loopback. Redirects are not followed.
- Every download has a limit in bytes and in seconds, so a server that drips cannot hold the device.
- The server not answering, or answering with an HTTP error, is UnavailableError: try again later. Anything that it
  answers wrongly is RefusedError with the Reason.

python-tuf is imported with the first fetch: it is large, and most of a device's life needs none of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from edge_agent.contract.bundle import BUNDLE_BYTES_MAX
from edge_agent.contract.errors import BundleError, ConfigError, Reason, UnavailableError
from edge_agent.contract.state import BundleRef, ZonesRef

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
CHUNK_BYTES = 64 * 1024
ZONES_BYTES_MAX = 16 * 1024 * 1024
HEAD_S_MAX = 60.0


class RefusedError(BundleError):
    """A bundle was refused; `reason` says why."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class RepositoryConfig:
    """Where the repository is (`url` + `/metadata`, `/targets`), the trusted first root.json, and limits of one download."""

    url: str
    root: bytes
    ca_file: Path | None = None
    silence_s_max: float = 20.0
    download_s_max: float = 900.0
    bundle_bytes_max: int = BUNDLE_BYTES_MAX

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.url)
            port = url.port
        except ValueError as e:
            raise ConfigError(f"releases.url {self.url!r}: {e}") from e
        if not url.hostname or port == 0 or (url.scheme != "https" and not (url.scheme == "http" and url.hostname in LOOPBACK)):
            raise ConfigError(f"releases.url {self.url!r} must be https://…, or http:// to loopback ({', '.join(LOOPBACK)})")
        try:
            if self.ca_file is not None:
                ssl.create_default_context(cafile=self.ca_file)
        except OSError as e:
            raise ConfigError(f"releases.ca_file {self.ca_file} does not load: {e}; it must hold certificates in PEM") from e


class Repository:
    """The repository as this device trusts it; `cache` remembers the metadata seen, so that old ones are refused."""

    def __init__(self, config: RepositoryConfig, cache: Path) -> None:
        self._config, self._cache = config, cache

    def fetch(self, ref: BundleRef | ZonesRef, destination: Path) -> bytes:
        """The signed bytes of `ref`; `destination` keeps them, and is used instead of a download if it holds them already.

        Raises:
            UnavailableError: no answer, or no room on the disk.
            RefusedError: the answer is unsigned, tampered with, stale, or larger than the limit.
        """
        from tuf.api import exceptions as tuf

        try:
            return self._fetch(ref, destination)
        except (tuf.ExpiredMetadataError, tuf.BadVersionNumberError) as e:
            raise RefusedError(Reason.STALE, f"release metadata: {_text(e)}") from e
        except tuf.UnsignedMetadataError as e:
            raise RefusedError(Reason.UNSIGNED, f"release metadata: {_text(e)}") from e
        except (tuf.RepositoryError, tuf.DownloadLengthMismatchError) as e:
            raise RefusedError(Reason.TAMPERED, f"release of {ref.target}: {_text(e)}") from e
        except (tuf.DownloadError, OSError) as e:
            raise UnavailableError(f"release repository {self._config.url}: {_text(e)}") from e

    def _fetch(self, ref: BundleRef | ZonesRef, destination: Path) -> bytes:
        self._cache.mkdir(parents=True, exist_ok=True)
        client = self._client()
        client.refresh()
        info = client.get_targetinfo(ref.target)
        if info is None:
            raise RefusedError(Reason.UNSIGNED, f"{ref.target} is not in the signed list of releases")
        bytes_max = ZONES_BYTES_MAX if isinstance(ref, ZonesRef) else self._config.bundle_bytes_max
        if info.length > bytes_max:
            raise RefusedError(Reason.OVERSIZE, f"{ref.target} has {info.length} bytes; at most {bytes_max}")
        version = (info.custom or {}).get("version")
        if isinstance(ref, ZonesRef) and version != ref.version:
            raise RefusedError(Reason.TAMPERED, f"{ref.target} is signed as version {version}; want {ref.version}")
        if info.hashes.get("sha256") != ref.sha256:
            raise RefusedError(Reason.TAMPERED, f"{ref.target} is signed as sha256 {info.hashes.get('sha256')}; want {ref.sha256}")
        if client.find_cached_target(info, str(destination)) is None:
            client.download_target(info, str(destination))
        data = destination.read_bytes()
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise RefusedError(Reason.TAMPERED, f"{destination} does not hold sha256 {ref.sha256}")
        return data

    def _client(self) -> Any:
        from tuf.ngclient.fetcher import FetcherInterface
        from tuf.ngclient.updater import Updater

        download = self._download

        class Fetcher(FetcherInterface):
            def _fetch(self, url: str) -> Iterator[bytes]:
                return download(url)

        base = self._config.url.rstrip("/")
        return Updater(
            str(self._cache),
            f"{base}/metadata/",
            target_base_url=f"{base}/targets/",
            fetcher=Fetcher(),
            bootstrap=self._config.root,
        )

    def _download(self, url: str) -> Iterator[bytes]:
        """The body of `url` in pieces, within the time limits."""
        from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError

        deadline, got = time.monotonic() + self._config.download_s_max, 0
        try:
            with self._open(url, timeout=self._config.silence_s_max) as response, response.within(self._config.download_s_max):
                promised = response.headers.get("Content-Length")
                if promised is None and not response.chunked:  # or its head broke off, and what follows would count as tampered with
                    raise DownloadError(f"{url}: the answer does not say where it ends")
                while (chunk := response.read1(CHUNK_BYTES)) or time.monotonic() > deadline:  # what was cut off may look like an end
                    if time.monotonic() > deadline:
                        raise SlowRetrievalError(f"{url} took more than {self._config.download_s_max:g} s")
                    got += len(chunk)
                    yield chunk
            if promised is not None and got < int(promised):
                raise DownloadError(f"{url} broke off after {got} of {promised} bytes")
        except urllib.error.HTTPError as e:
            raise DownloadHTTPError(f"{url}: HTTP {e.code}", e.code) from e
        except (OSError, ValueError, http.client.HTTPException) as e:  # ValueError: a header that is no number
            raise DownloadError(f"{url}: {e}") from e

    @cached_property
    def _open(self) -> Callable[..., Any]:
        url = urlsplit(self._config.url)
        handlers: list[Any] = [_NoRedirect(), _Http()]
        if url.scheme == "https":
            handlers.append(_Https(ssl.create_default_context(cafile=self._config.ca_file)))
        if url.hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        return urllib.request.build_opener(*handlers).open


class _Response(http.client.HTTPResponse):
    """Has HEAD_S_MAX for its head, and what `within` says for the rest: the timeout of a socket bounds each silence, not their number."""

    def __init__(self, sock: socket.socket, *more: Any, **named: Any) -> None:
        super().__init__(sock, *more, **named)
        self._peer = sock

    def begin(self) -> None:
        with self.within(HEAD_S_MAX):
            super().begin()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Cut the connection off after so many seconds."""
        cut = threading.Timer(seconds, self._cut)
        cut.daemon = True
        cut.start()
        try:
            yield
        finally:
            cut.cancel()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # the server was faster
            socket.socket.shutdown(self._peer, socket.SHUT_RDWR)  # that of an SSL socket would have its bytes read without TLS


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _TlsConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._tls = context

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_TlsConnection, req, context=self._tls)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> None:
        return None  # urllib then raises HTTPError


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
