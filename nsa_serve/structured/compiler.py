"""Grammars of requests, compiled in a process that can be killed, before the engine sees them."""

import logging
import math
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from nsa_serve.config import child_environment
from nsa_serve.errors import NSAServeError, QueueFullError
from nsa_serve.request import StructuredOutput
from nsa_serve.structured.grammar import compile_error
from nsa_serve.structured.matcher import GrammarError, TokenTable
from nsa_serve.structured.worker import Task, Verdict, make_frame

WORKER_COMMAND = (sys.executable, "-m", "nsa_serve.structured.worker")
TIME_LIMIT_S = 2.0
MAX_CACHE_BYTES = 4 * 2**20
# Grammars that wait for the one worker.
MAX_WAITING = 64

# To start Python and read the vocabulary, on a slow machine.
_START_LIMIT_S = 60.0
_HEADER = struct.Struct("<I")

logger = logging.getLogger(__name__)


class GrammarCompiler:
    """Says of each constraint whether the engine can follow it. Made and used by any thread.

    make_table: makes the vocabulary's table; called before the first grammar and may raise
    GrammarError. time_limit_s: for one grammar, after which the process is killed; the next
    grammar gets a new one.
    """

    def __init__(
        self,
        make_table: Callable[[], TokenTable],
        *,
        time_limit_s: float = TIME_LIMIT_S,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        max_waiting: int = MAX_WAITING,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._make_table = make_table
        self._time_limit_s = time_limit_s
        self._max_waiting = max_waiting
        self._command = tuple(command)
        self._cache = _VerdictCache(max_cache_bytes)
        # Not the event loop's pool: hostile grammars would keep its threads from other work.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._waiting: set[Future[StructuredOutput]] = set()
        self._worker: _Worker | None = None
        self._is_closed = False

    def find(self, structured: StructuredOutput, *, param: str) -> StructuredOutput | None:
        """Return what an earlier `submit` came to, at once; None when there was none."""
        verdict = self._cache.get(structured)
        return None if verdict is None else _accepted(verdict, structured, param)

    def submit(self, structured: StructuredOutput, *, param: str) -> Future[StructuredOutput]:
        """Return a future of the constraint in the form for the engine.

        The future raises RequestError when the constraint cannot be used; this call raises
        QueueFullError when too many wait.
        """
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError(
                f"{len(self._waiting)} grammars wait to be compiled; retry later",
                retry_after_s=math.ceil(self._time_limit_s),
            )
        if self._is_closed:
            raise NSAServeError("the server is shutting down")
        future = self._thread.submit(self._compile, structured, param)
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def close(self) -> None:
        """End the worker; grammars that wait for it are dropped."""
        self._is_closed = True
        worker = self._worker
        if worker is not None:
            worker.interrupt()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if worker is not None:
            worker.end()

    def _compile(self, structured: StructuredOutput, param: str) -> StructuredOutput:
        verdict = self._cache.get(structured)
        if verdict is None:
            verdict = self._judge(structured)
        return _accepted(verdict, structured, param)

    def _judge(self, structured: StructuredOutput) -> Verdict:
        try:
            if self._worker is None or not self._worker.is_alive:
                self._worker = _Worker(self._command, self._make_table())
            verdict = self._worker.ask(structured, self._time_limit_s)
        except GrammarError as error:
            return Verdict(reason=str(error))
        except TimeoutError:
            # Not remembered: the machine may have been busy.
            return Verdict(reason=f"it took more than {self._time_limit_s:g} s; simplify it")
        except EOFError:
            logger.warning("the grammar worker ended while it compiled a %s", structured.kind)
            verdict = Verdict(reason="it needs too much memory; simplify it")
        self._cache.put(structured, verdict)
        return verdict


def _accepted(verdict: Verdict, structured: StructuredOutput, param: str) -> StructuredOutput:
    if verdict.structured is None:
        raise compile_error(structured.kind, str(verdict.reason), param=param)
    return verdict.structured


class _VerdictCache:
    """The verdicts used last, bounded by the bytes of what they are about."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[StructuredOutput, Verdict] = OrderedDict()

    def get(self, structured: StructuredOutput) -> Verdict | None:
        with self._lock:
            verdict = self._verdicts.get(structured)
            if verdict is not None:
                self._verdicts.move_to_end(structured)
            return verdict

    def put(self, structured: StructuredOutput, verdict: Verdict) -> None:
        with self._lock:
            self._verdicts[structured] = verdict
            self._num_bytes += _num_bytes(structured, verdict)
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= _num_bytes(*self._verdicts.popitem(last=False))


def _num_bytes(structured: StructuredOutput, verdict: Verdict) -> int:
    result = "" if verdict.structured is None else verdict.structured.value
    # A character of a Python string takes up to four bytes.
    return 4 * (len(structured.value) + len(result) + len(verdict.reason or "")) + 512


class _Worker:
    """One worker process. Raises TimeoutError or EOFError, and is dead then."""

    def __init__(self, command: Sequence[str], table: TokenTable) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            bufsize=0,
        )
        # Also when nobody closes the compiler: no process is left behind, and no open pipe.
        self._finalizer = weakref.finalize(self, _end, self._process)
        verdict = self._exchange(make_frame(table), _START_LIMIT_S)
        assert verdict.reason is None, verdict

    @property
    def is_alive(self) -> bool:
        return self._finalizer.alive and self._process.poll() is None

    def ask(self, structured: StructuredOutput, limit_s: float) -> Verdict:
        task = Task(structured, alarm_s=math.ceil(limit_s) + 1)
        return self._exchange(make_frame(task), limit_s)

    def interrupt(self) -> None:
        """Kill the process; a thread that waits for its answer gets EOFError."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process and close its pipes, which no other thread may be using."""
        self._finalizer()

    def _exchange(self, frame: bytes, limit_s: float) -> Verdict:
        assert self._process.stdin is not None
        deadline_s = time.monotonic() + limit_s
        try:
            # Read whole by the worker before it does anything slow.
            rest = memoryview(frame)
            while rest:
                rest = rest[self._process.stdin.write(rest) or 0 :]
            (size,) = _HEADER.unpack(self._read(_HEADER.size, deadline_s))
            return msgspec.msgpack.decode(self._read(size, deadline_s), type=Verdict)
        except (TimeoutError, EOFError):
            self.end()
            raise
        except OSError:
            # The pipe broke.
            self.end()
            raise EOFError from None

    def _read(self, size: int, deadline_s: float) -> bytes:
        stream = self._process.stdout
        assert stream is not None
        # Not select(), which cannot take a descriptor above 1023.
        poll = select.poll()
        poll.register(stream, select.POLLIN)
        data = b""
        while len(data) < size:
            timeout_s = max(0.0, deadline_s - time.monotonic())
            if not poll.poll(timeout_s * 1000):
                raise TimeoutError
            part = stream.read(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
