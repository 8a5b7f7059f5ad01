"""The engine's own process: `python -m nsa_serve.engine_process [--log-... X] FD`.

FD is one end of a socket pair, inherited from the API process. The first frame on it is the
`EngineConfig` as JSON. The process answers with `LoadProgress`, then `EngineReady` or
`EngineFailed`, then a `StepOutputs` a step; without work it sends an empty one every second, so
that silence means trouble. It ends on `Shutdown` or when the API process is gone; SIGINT and
SIGTERM are for the API process and ignored here.
"""

import argparse
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, Protocol

from nsa_serve.collector import tame_collector
from nsa_serve.config import EngineConfig
from nsa_serve.errors import NSAServeError
from nsa_serve.ipc import Channel, FrameError
from nsa_serve.log_format import LogFormat, configure_engine_process
from nsa_serve.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineInfo,
    EngineReady,
    EngineStats,
    LoadProgress,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from nsa_serve.request import EngineRequest, TokenOutput
from nsa_serve.request_check import make_refusal

HEARTBEAT_S = 1.0
# A step that schedules nothing while requests are unfinished must not spin.
EMPTY_STEP_PAUSE_S = 0.01
# How long a step may go on after the API process is gone.
ORPHAN_GRACE_S = 1.5

_PR_SET_PDEATHSIG = 1

logger = logging.getLogger("nsa_serve.engine_process")


class SteppedEngine(Protocol):
    """What the loop needs of `nsa_serve.engine.Engine`."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def has_unfinished(self) -> bool: ...

    @property
    def has_step_in_flight(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...

    def add(self, request: EngineRequest) -> None: ...

    def abort(self, request_ids: Iterable[str]) -> None: ...

    def step(self) -> list[TokenOutput]: ...

    def close(self) -> None: ...


EngineFactory = Callable[[EngineConfig, Callable[[LoadProgress], None]], SteppedEngine]


def serve(
    sock: socket.socket,
    make_engine: EngineFactory,
    *,
    on_orphaned: Callable[[], None] | None = None,
    heartbeat_s: float = HEARTBEAT_S,
) -> int:
    """Load an engine and run it until it is told to stop; return the exit code.

    on_orphaned is called in the reader thread when the API process is gone.
    """
    channel = Channel(sock)
    try:
        payload = channel.receive_bytes()
        if payload is None:
            return 0
        config = EngineConfig.model_validate_json(payload)
        inbox = _Inbox(channel, on_orphaned)
        engine = make_engine(config, channel.send)
    except Exception as error:
        return _fail(channel, error)
    try:
        channel.send(EngineReady(engine.info))
        _Loop(engine, channel, inbox, heartbeat_s).run()
    except Exception as error:
        if inbox.is_closed:
            # Nobody is left to tell.
            return 0
        return _fail(channel, error)
    finally:
        engine.close()
    return 0


def _fail(channel: Channel, error: Exception) -> int:
    """Tell the API process in one line why the engine ends; return the exit code."""
    if not isinstance(error, NSAServeError):
        logger.error("the engine failed", exc_info=error)
    text = " ".join(str(error).split())
    message = text if isinstance(error, NSAServeError) else f"{type(error).__name__}: {text}"
    try:
        channel.send(EngineFailed(message=message, kind=type(error).__name__))
    except OSError:
        logger.warning("the API process was gone before it could be told: %s", message)
    return 1


class _Inbox:
    """Messages from the API process, read by a thread so that a step never waits for them."""

    def __init__(self, channel: Channel, on_orphaned: Callable[[], None] | None) -> None:
        self._channel = channel
        self._on_orphaned = on_orphaned
        self._messages: queue.SimpleQueue[ToEngine | FrameError | None] = queue.SimpleQueue()
        self.is_closed = False
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._messages.put(message)
        except FrameError as error:
            self._messages.put(error)
            return
        self.is_closed = True
        self._messages.put(None)
        if self._on_orphaned is not None:
            self._on_orphaned()

    def drain(self, *, timeout_s: float) -> list[ToEngine]:
        """Return what has come, waiting up to `timeout_s` for a first message.

        The end of the stream reads as `Shutdown`. Raises FrameError.
        """
        messages: list[ToEngine] = []
        try:
            if timeout_s > 0:
                messages.append(_checked(self._messages.get(timeout=timeout_s)))
            while True:
                messages.append(_checked(self._messages.get_nowait()))
        except queue.Empty:
            return messages


def _checked(message: ToEngine | FrameError | None) -> ToEngine:
    if isinstance(message, FrameError):
        raise message
    return Shutdown() if message is None else message


class _Loop:
    """Take messages, step, report: until `Shutdown`."""

    def __init__(
        self, engine: SteppedEngine, channel: Channel, inbox: _Inbox, heartbeat_s: float
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._inbox = inbox
        self._heartbeat_s = heartbeat_s
        self._refused: list[TokenOutput] = []

    def run(self) -> None:
        engine = self._engine
        pause_s = 0.0
        while True:
            timeout_s = pause_s if engine.has_unfinished else self._heartbeat_s
            for message in self._inbox.drain(timeout_s=timeout_s):
                if isinstance(message, Shutdown):
                    return
                self._handle(message)
            outputs = engine.step() if engine.has_unfinished else []
            stats = engine.stats
            # A step in flight is waited for in the next one.
            is_busy = bool(outputs or stats.num_step_tokens) or engine.has_step_in_flight
            pause_s = 0.0 if is_busy else EMPTY_STEP_PAUSE_S
            self._channel.send(StepOutputs(self._refused + outputs, stats))
            self._refused = []

    def _handle(self, message: AddRequest | AbortRequests) -> None:
        if isinstance(message, AbortRequests):
            self._engine.abort(message.request_ids)
            return
        request_id = message.request.request_id
        try:
            self._engine.add(message.request)
        except NSAServeError as error:
            self._refused.append(make_refusal(request_id, error))
        except Exception as error:
            # A request that the engine did not foresee is that request's failure, not everyone's.
            logger.exception("request %s could not be added", request_id)
            self._refused.append(make_refusal(request_id, error))


def _exit_orphaned() -> NoReturn:
    """End the process if the loop does not do so itself, stuck in a long step."""
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)


def _die_with_parent() -> None:
    """Ask Linux to kill this process with its parent: the last resort behind the closed socket."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            logger.warning("PR_SET_PDEATHSIG failed: %s", os.strerror(ctypes.get_errno()))


def run_process(
    fd: int, make_engine: EngineFactory, *, log_format: LogFormat = "text", log_level: str = "info"
) -> int:
    """Serve on an inherited descriptor as a process of its own; return the exit code."""
    # Ctrl-C, and supervisors that stop a process group, reach this process too. The API process
    # decides what that means: it drains first, and ends this one by `Shutdown` or by its own end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    configure_engine_process(log_format, log_level)
    with socket.socket(fileno=fd) as sock:
        return serve(sock, make_engine, on_orphaned=_exit_orphaned)


def _load_engine(
    config: EngineConfig, on_progress: Callable[[LoadProgress], None]
) -> SteppedEngine:
    # Importing torch takes seconds: only this process pays, and only once it is supervised.
    start = time.perf_counter()
    from nsa_serve.engine import Engine

    import_s = time.perf_counter() - start
    engine = Engine(config, on_progress=on_progress, import_s=import_s)
    # 200,000 objects of modules and model stay for good; a full collection that goes through them
    # all takes 0.2 s.
    tame_collector()
    return engine


def main(arguments: Sequence[str]) -> int:
    """Run the engine process; `arguments` holds the number of the inherited descriptor."""
    parser = argparse.ArgumentParser(
        prog="python -m nsa_serve.engine_process", description="Started by the server."
    )
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("fd", type=int, help="inherited descriptor of the channel")
    parsed = parser.parse_args(arguments)
    return run_process(
        parsed.fd, _load_engine, log_format=parsed.log_format, log_level=parsed.log_level
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
