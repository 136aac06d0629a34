"""The release server: TUF metadata and bundles over HTTP, from `<releases>/metadata/` and `<releases>/targets/` only.

Nothing here is secret and nothing is trusted: devices check signatures, not the server. `python -m cloud.release_server --project DIR`.
"""

from __future__ import annotations

import argparse
import logging
import re
import threading
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cloud import config

log = logging.getLogger(__name__)

TIMEOUT_S = 30
CONNECTIONS_MAX = 256
_SERVED = re.compile(r"/(metadata|targets)/[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,4}")


class _Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of files whose path is plainly one of ours; no directories, no links out, no dot files."""

    timeout = TIMEOUT_S
    protocol_version = "HTTP/1.1"

    def send_head(self) -> Any:
        if not _SERVED.fullmatch(self.path) or not self._is_ours(Path(self.translate_path(self.path))):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def _is_ours(self, path: Path) -> bool:
        return path.is_file() and path.resolve().is_relative_to(Path(self.directory).resolve())

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("request answered %s", format % args)


class _Server(ThreadingHTTPServer):
    """A thread for each of at most CONNECTIONS_MAX connections; more are closed at once, and devices try again."""

    daemon_threads = True
    request_queue_size = CONNECTIONS_MAX  # of connections that wait to be taken

    def __init__(self, *args: Any) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


def open_server(directory: Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens; `serve_forever` serves."""

    def handler(*args: Any) -> _Handler:
        return _Handler(*args, directory=str(directory))

    return _Server((host, port), handler)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve TUF metadata and bundles.")
    parser.add_argument("--project", type=Path)
    parser.add_argument("--state", type=Path)
    arguments = parser.parse_args()
    settings = config.load(arguments.project, arguments.state)
    for part in ("metadata", "targets"):
        (settings.releases_dir / part).mkdir(parents=True, exist_ok=True)
    with open_server(settings.releases_dir, settings.release.host, settings.release.port) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
