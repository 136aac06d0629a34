"""TLS: to a broker, for sensors and endpoints alike, and of the listener."""

from __future__ import annotations

import logging
import ssl
from typing import TYPE_CHECKING

from edge_agent.contract.errors import ConfigError
from edge_agent.whole_file import stamp

if TYPE_CHECKING:
    from edge_agent.config import Tls

log = logging.getLogger(__name__)


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Verify the broker, against `ca_file` or the system's authorities, and show a client certificate if one is named.

    Raises:
        ConfigError: the files do not load.
    """
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        if tls.cert_file is not None:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(f"TLS files ca={tls.ca_file} cert={tls.cert_file} key={tls.key_file} do not load: {e}") from e
    return context


class ServerTls:
    """Shows `cert_file`; with `ca_file`, takes only clients that have a certificate of it.

    The files are read again when they have changed, since certificates are renewed; while they do not load, those from before stay.
    """

    def __init__(self, tls: Tls) -> None:
        """ConfigError if the files do not load."""
        self._tls = tls
        self._stamps = self._stamps_now()
        self._context = _server_context(tls)

    def context(self) -> ssl.SSLContext:
        """For the next connection."""
        stamps = self._stamps_now()
        if stamps != self._stamps:
            self._stamps = stamps
            try:
                self._context = _server_context(self._tls)
                log.info("listener certificate read file=%s", self._tls.cert_file)
            except ConfigError as e:
                log.error("listener certificate not read, the one from before stays error=%s", e)
        return self._context

    def _stamps_now(self) -> list[tuple[int, int, int]]:
        return [stamp(file) for file in (self._tls.ca_file, self._tls.cert_file, self._tls.key_file)]


def _server_context(tls: Tls) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(tls.cert_file or "", tls.key_file)
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(f"TLS files ca={tls.ca_file} cert={tls.cert_file} key={tls.key_file} do not load: {e}") from e
    context.verify_mode = ssl.CERT_REQUIRED if tls.ca_file is not None else ssl.CERT_NONE
    return context
