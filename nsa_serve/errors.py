"""Every exception of the engine.

NSAServeError
├── ConfigError            a flag, environment variable or config file is wrong (exit 2)
├── ModelError             a checkpoint cannot be loaded or served as it is
├── CapacityError          the model or the request does not fit the memory there is
├── RequestError           one request is invalid: HTTP 400, `param` names the field
├── QueueFullError         too many requests are queued: HTTP 503 with Retry-After
└── EngineDeadError        the engine process is gone; every request in flight gets this
"""


class NSAServeError(Exception):
    """Base of all errors that nsa-serve raises on purpose."""


class ConfigError(NSAServeError, ValueError):
    """A setting is invalid; the message names it, what was expected and what came."""


class ModelError(NSAServeError):
    """A checkpoint is incomplete, damaged or of a kind that cannot be served."""


class CapacityError(NSAServeError):
    """Something does not fit in memory; the message has the numbers and a remedy."""


class RequestError(NSAServeError, ValueError):
    """A request is invalid. `param` is the field at fault, as the client wrote it."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(NSAServeError):
    """The bounded queue is full. `retry_after_s` is the estimate that the client is told."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(NSAServeError):
    """The engine process ended; the message says how."""
