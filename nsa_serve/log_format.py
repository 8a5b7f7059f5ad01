"""Log lines as text or as JSON, the same for the API process and the engine process."""

import json
import logging
import sys
import time
from typing import Literal

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)-7s [%(request_id)s] %(message)s"


class JSONFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message; request_id where there is one.

    A record's `fields` (a dict, given as `extra={"fields": ...}`) are added as they are.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        seconds, milliseconds = time.gmtime(record.created), int(record.msecs)
        entry: dict[str, object] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', seconds)}.{milliseconds:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = getattr(record, "request_id", "-")
        if request_id != "-":
            entry["request_id"] = request_id
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class _ProcessName(logging.Filter):
    """Stands where the request id stands in the API process."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = "engine"
        return True


def make_formatter(log_format: LogFormat) -> logging.Formatter:
    """Return the formatter of a format; records need a `request_id`."""
    return JSONFormatter() if log_format == "json" else logging.Formatter(_TEXT)


def configure(log_format: LogFormat, level: str, request_id_filter: logging.Filter) -> None:
    """Send our records of `level` and above to stderr; libraries' only from WARNING on.

    Python's warnings become records too, in the same format.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(log_format))
    handler.addFilter(request_id_filter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("nsa_http", "nsa_serve"):
        logging.getLogger(name).setLevel(level.upper())
    logging.captureWarnings(True)


def configure_engine_process(log_format: LogFormat, level: str) -> None:
    """Configure logging in the engine's own process."""
    configure(log_format, level, _ProcessName())
