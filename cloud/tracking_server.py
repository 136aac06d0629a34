"""What MLflow refuses, at the start or in the midst of it: one line that says where, why and what to do, without passwords."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from edge_agent.contract.errors import UnavailableError

REASON_LENGTH_MAX = 400
AWAY = "start it with `fenceline up`, look into its log, or correct or unset MLFLOW_TRACKING_URI; then try again"
DENIED = "let the user of MLFLOW_TRACKING_USERNAME or ~/.mlflow/credentials do that, or name another, then try again"


@contextmanager
def errors_told(url: str | None = None, failed: str = "failed") -> Iterator[None]:
    """Around work with MLflow, or as a decorator of it: what MLflow, or the way to it, refuses.

    Args:
        url: where it is; None: MLflow's current tracking URI.
        failed: what it did, in a word or two.

    Raises:
        UnavailableError: says what was refused, where, and what to do.
    """
    try:
        yield
    except _refusals() as e:
        import mlflow

        raise _refused(f"MLflow at {url or mlflow.get_tracking_uri()} {failed}", e) from e


def public(text: str) -> str:
    """A text without the users and passwords of the URLs in it: they must not reach a log or a job summary."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def _refusals() -> tuple[type[Exception], ...]:
    """The errors of MLflow itself, of HTTP (artifacts) and of the database; none where nobody has imported MLflow: that takes seconds."""
    if "mlflow" not in sys.modules:
        return ()
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError


def _refused(what: str, error: Exception) -> UnavailableError:
    """An error of MLflow in a line. A page of HTML, or the SQL that a database did not like, is cut."""
    why = public(" ".join(str(error).split()))
    why = why if len(why) <= REASON_LENGTH_MAX else f"{why[:REASON_LENGTH_MAX]}…"
    answer = getattr(error, "response", None)  # of an HTTP error
    status = error.get_http_status_code() if hasattr(error, "get_http_status_code") else getattr(answer, "status_code", None)
    return UnavailableError(f"{public(what)} ({why}); {DENIED if status in (401, 403) else AWAY}")
