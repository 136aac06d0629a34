"""TLS: to a broker, for sensors and endpoints alike, and of the listener."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from edge_agent.contract.errors import ConfigError

if TYPE_CHECKING:
    from edge_agent.config import Tls


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


def server_context(tls: Tls) -> ssl.SSLContext:
    """Show `cert_file`; with `ca_file`, take only clients that have a certificate of it.

    Raises:
        ConfigError: the files do not load.
    """
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(tls.cert_file or "", tls.key_file)
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(f"TLS files ca={tls.ca_file} cert={tls.cert_file} key={tls.key_file} do not load: {e}") from e
    context.verify_mode = ssl.CERT_REQUIRED if tls.ca_file is not None else ssl.CERT_NONE
    return context
