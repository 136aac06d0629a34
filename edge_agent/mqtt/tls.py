"""TLS to a broker, for sensors and endpoints alike."""

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
