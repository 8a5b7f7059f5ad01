"""Readable log lines on stderr, each with the id of the request it belongs to."""

import logging
import sys
from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")

_FORMAT = "%(asctime)s %(levelname)-7s [%(request_id)s] %(message)s"


class _AddRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        return True


def configure_logging(level: str) -> None:
    """Send records of `level` and above to stderr; libraries only from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_AddRequestId())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("nsa_http", "nsa_serve"):
        logging.getLogger(name).setLevel(level.upper())
    # Hostile bytes are no news: one line a bad request would fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
