"""The HTTP API: what the stack knows, as JSON, for whoever has the token. Runs the control loop too: `python -m cloud.api`.

- Bound to loopback. Every route but `/healthz` wants `Authorization: Bearer <token>`; the token lies in `<state>/api-token` (0600).
- GET /healthz, /v1/status, /v1/devices, /v1/devices/{device}, /v1/events, /v1/audit, /v1/rollouts, /metrics (Prometheus).
  `/v1/events?device=NAME` gives those of one device.
- Reading only: what changes the fleet is done by commands, on the machine that holds the keys.
"""

from __future__ import annotations

import argparse
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cloud import config, rollout
from cloud.audit import Audit
from cloud.config import Settings
from cloud.control import Control
from cloud.files import secret
from cloud.fleet import Fleet
from cloud.status import collect, devices, exposition
from edge_agent.contract.errors import ConfigError, UnavailableError

TOKEN_BYTES = 32
LIMIT_MAX = 1_000
OPEN_PATHS = ("/healthz",)


def token(settings: Settings) -> str:
    """The API's token, made when first asked for."""
    return secret(settings.token_path, TOKEN_BYTES)


class RequireToken:
    """Refuses requests without the token, before anything else looks at them."""

    def __init__(self, app: Any, secret: str) -> None:
        self._app = app
        self._wanted = f"Bearer {secret}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                refusal = JSONResponse({"error": "a bearer token is needed; it lies in the state directory, file api-token"}, 401)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def build(settings: Settings, control: Control | None = None) -> Any:
    """The ASGI application; with `control`, it runs as long as the application does."""
    fleet, audit = Fleet(settings.fleet_db), Audit(settings.audit_db)

    def status(request: Request) -> Any:
        return collect(settings)

    def one_device(request: Request) -> Any:
        name = request.path_params["device"]
        found = [d for d in devices(fleet) if d["device"] == name]
        if not found:
            raise HTTPException(404, f"there is no device {name!r}")
        return found[0]

    def health(request: Request) -> Any:
        return {"ok": True, "connected": control.connected if control else False}

    routes = [
        Route("/healthz", _json(health)),
        Route("/v1/status", _json(status)),
        Route("/v1/devices", _json(lambda request: devices(fleet))),
        Route("/v1/devices/{device}", _json(one_device)),
        Route("/v1/events", _json(lambda request: fleet.events(_limit(request), request.query_params.get("device")))),
        Route("/v1/audit", _json(lambda request: {"broken_at": audit.verify(), "entries": audit.entries(_limit(request))})),
        Route("/v1/rollouts", _json(lambda request: rollout.history(settings))),
        Route("/metrics", _endpoint(lambda request: PlainTextResponse(exposition(settings)))),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if control:
            control.start()
        try:
            yield
        finally:
            if control:
                await run_in_threadpool(control.stop)

    return RequireToken(Starlette(routes=routes, lifespan=lifespan), token(settings))


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", "100")
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(LIMIT_MAX))) or not 1 <= int(text) <= LIMIT_MAX:
        raise ConfigError(f"limit {text!r} is not between 1 and {LIMIT_MAX}")
    return int(text)


def _json(answer: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
    return _endpoint(lambda request: Response(msgspec.json.encode(answer(request)), media_type="application/json"))


def _endpoint(answer: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await run_in_threadpool(answer, request)
        except ConfigError as e:
            return JSONResponse({"error": str(e)}, 400)
        except UnavailableError as e:
            return JSONResponse({"error": str(e)}, 503)
        except HTTPException as e:
            return JSONResponse({"error": e.detail}, e.status_code)

    return endpoint


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="The HTTP API and the control loop.")
    parser.add_argument("--project", type=Path)
    parser.add_argument("--state", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = config.load(arguments.project, arguments.state)
    application = build(settings, Control(settings))
    uvicorn.run(application, host=settings.api.host, port=settings.api.port, log_level="warning", timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main()
