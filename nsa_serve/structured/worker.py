"""The process that compiles grammars of strangers: `python -m nsa_serve.structured.worker`.

It can be killed, it limits its own memory, and an alarm ends it when a grammar takes too long and
nobody is left to kill it. Frames on standard input and output: a 4-byte little-endian length and
msgpack. First comes the `TokenTable`, answered by an empty `Verdict`; then each `Task` gets one.
"""

import resource
import signal
import struct
import sys
from typing import BinaryIO

import msgspec

from nsa_serve.request import StructuredOutput
from nsa_serve.structured.matcher import (
    GrammarError,
    TokenTable,
    Vocabulary,
    check_matcher,
    to_lark,
)

# What one grammar may take beside the vocabulary.
_MEMORY_BYTES = 512 * 2**20
_HEADER = struct.Struct("<I")


class Task(msgspec.Struct, frozen=True):
    """One grammar to compile. alarm_s: whole seconds after which the process ends itself."""

    structured: StructuredOutput
    alarm_s: int


class Verdict(msgspec.Struct, frozen=True):
    """What came of a task: the constraint as the engine shall compile it, or why there is none."""

    structured: StructuredOutput | None = None
    reason: str | None = None


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer tasks until the other side closes."""
    payload = read_frame(source)
    if payload is None:
        return
    vocabulary = Vocabulary(msgspec.msgpack.decode(payload, type=TokenTable))
    _limit_memory()
    _write(sink, Verdict())
    while (payload := read_frame(source)) is not None:
        task = msgspec.msgpack.decode(payload, type=Task)
        # The default action of SIGALRM ends the process wherever it is.
        signal.alarm(task.alarm_s)
        verdict = _judge(vocabulary, task.structured)
        signal.alarm(0)
        _write(sink, verdict)


def _judge(vocabulary: Vocabulary, structured: StructuredOutput) -> Verdict:
    try:
        structured = to_lark(structured)
        matcher = vocabulary.compile(structured)
        # The first mask shows what a compiled grammar costs to follow.
        matcher.compute_bitmask()
        check_matcher(matcher)
    except GrammarError as error:
        return Verdict(reason=str(error))
    except (MemoryError, RecursionError):
        return Verdict(reason="it is too large")
    return Verdict(structured=structured)


def _limit_memory() -> None:
    """Bound the address space to what is in use now and the share of one grammar."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used_bytes + _MEMORY_BYTES
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def read_frame(source: BinaryIO) -> bytes | None:
    """Read one frame; None at the end of the stream."""
    header = source.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    (size,) = _HEADER.unpack(header)
    payload = source.read(size)
    return payload if len(payload) == size else None


def make_frame(message: TokenTable | Task | Verdict) -> bytes:
    """Return a message as one frame."""
    payload = msgspec.msgpack.encode(message)
    return _HEADER.pack(len(payload)) + payload


def _write(sink: BinaryIO, verdict: Verdict) -> None:
    sink.write(make_frame(verdict))
    sink.flush()


if __name__ == "__main__":
    # Ctrl-C is for the server, which closes standard input when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer)
