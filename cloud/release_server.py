"""The release server: TUF metadata and bundles over HTTP, from `<releases>/metadata/` and `<releases>/targets/` only.

Nothing here is secret and nothing is trusted: devices check signatures, not the server. `python -m cloud.release_server --project DIR`.
"""

from __future__ import annotations

import argparse
import logging
import re
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cloud import config

log = logging.getLogger(__name__)

TIMEOUT_S = 30
_SERVED = re.compile(r"/(metadata|targets)/[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,4}")


class _Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of files whose path is plainly one of ours; no directories, no links out, no dot files."""

    timeout = TIMEOUT_S
    protocol_version = "HTTP/1.1"

    def send_head(self) -> Any:
        if not _SERVED.fullmatch(self.path) or Path(self.translate_path(self.path)).is_dir():
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("request answered %s", format % args)


def serve(directory: Path, host: str, port: int) -> None:
    """Serve until the process ends."""

    def handler(*args: Any) -> _Handler:
        return _Handler(*args, directory=str(directory))

    with ThreadingHTTPServer((host, port), handler) as server:
        server.daemon_threads = True
        server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve TUF metadata and bundles.")
    parser.add_argument("--project", type=Path)
    parser.add_argument("--state", type=Path)
    arguments = parser.parse_args()
    settings = config.load(arguments.project, arguments.state)
    for part in ("metadata", "targets"):
        (settings.releases_dir / part).mkdir(parents=True, exist_ok=True)
    serve(settings.releases_dir, settings.release.host, settings.release.port)


if __name__ == "__main__":
    main()
