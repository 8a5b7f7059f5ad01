"""Log lines on stderr, each with the id of the request it belongs to."""

import logging
from collections.abc import Sequence
from contextvars import ContextVar

from nsa_serve.log_format import LogFormat, configure

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")

_logger = logging.getLogger(__name__)


class _AddRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        return True


def configure_logging(level: str, log_format: LogFormat = "text") -> None:
    """Send records of `level` and above to stderr; libraries only from WARNING on."""
    configure(log_format, level, _AddRequestId())
    # Hostile bytes are no news: one line a bad request would fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def log_prompt(text: str | None, token_ids: Sequence[int]) -> None:
    """Log what a client sent (--log-prompts): its text, or the token ids when it sent those."""
    prompt: object = list(token_ids) if text is None else text
    fields = {"prompt": prompt, "num_prompt_tokens": len(token_ids)}
    _logger.info("prompt of %d tokens: %r", len(token_ids), prompt, extra={"fields": fields})
