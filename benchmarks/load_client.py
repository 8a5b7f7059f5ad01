"""A cheap client for many event streams: one thread, raw sockets, epoll; it parses nothing."""

import os
import selectors
import socket
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

import orjson

_EVENT = b"data: "
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class StreamLoad:
    """Which streams to open, and the process whose CPU time is counted."""

    port: int
    path: str
    num_streams: int
    seconds: float
    max_tokens: int
    pid: int


@dataclass
class LoadResult:
    """What came in the measured time."""

    num_streams: int
    seconds: float = 0.0
    cpu_s: float = 0.0
    num_events: int = 0
    num_bytes: int = 0
    num_reads: int = 0
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures: rates, CPU per event, and the gaps between reads of one stream."""
        gaps = sorted(self.gaps_s)
        return {
            "events_per_s": self.num_events / self.seconds,
            "events_per_read": self.num_events / max(1, self.num_reads),
            "bytes_per_event": self.num_bytes / max(1, self.num_events),
            "cpu_us_per_event": 1e6 * self.cpu_s / max(1, self.num_events),
            "cpu_share": self.cpu_s / self.seconds,
            "gap_ms": {
                name: 1000 * gaps[min(len(gaps) - 1, int(len(gaps) * share))]
                for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0))
            },
        }


def run_load(load: StreamLoad) -> LoadResult:
    """Open the streams, wait until each has sent something, and count for `load.seconds`."""
    selector = selectors.EpollSelector()
    streams = [_open(load) for _ in range(load.num_streams)]
    last_s = [0.0] * len(streams)
    for number, stream in enumerate(streams):
        selector.register(stream, selectors.EVENT_READ, number)
    result = LoadResult(len(streams))
    buffer = bytearray(1 << 18)
    view = memoryview(buffer)
    silent = set(range(len(streams)))
    start_s = end_s = 0.0
    deadline_s = time.perf_counter() + _START_TIMEOUT_S
    while not start_s or time.perf_counter() < end_s:
        ready = selector.select(1.0)
        for key, _ in ready:
            num_bytes = key.fileobj.recv_into(view)  # type: ignore[union-attr]
            if not num_bytes:
                raise SystemExit("the server closed a stream")
            now_s = time.perf_counter()
            number = key.data
            if not start_s:
                if buffer.find(_EVENT, 0, num_bytes) >= 0:
                    silent.discard(number)
                elif buffer.find(b'"error"', 0, num_bytes) >= 0:
                    raise SystemExit(bytes(view[:num_bytes]).decode())
                continue
            result.num_reads += 1
            result.num_bytes += num_bytes
            result.num_events += buffer.count(_EVENT, 0, num_bytes)
            if last_s[number]:
                result.gaps_s.append(now_s - last_s[number])
            last_s[number] = now_s
        if not start_s and not silent:
            start_s = time.perf_counter()
            end_s = start_s + load.seconds
            cpu_s = _cpu_seconds(load.pid)
        elif not start_s and time.perf_counter() > deadline_s:
            raise SystemExit(f"{len(silent)} streams sent nothing")
    result.seconds = time.perf_counter() - start_s
    result.cpu_s = _cpu_seconds(load.pid) - cpu_s
    for stream in streams:
        stream.close()
    return result


def _open(load: StreamLoad) -> socket.socket:
    body: dict[str, Any] = {"max_tokens": load.max_tokens, "stream": True}
    if "chat" in load.path:
        body["messages"] = [{"role": "user", "content": "Hello"}]
    else:
        body["prompt"] = "Hello"
    payload = orjson.dumps(body)
    head = (
        f"POST {load.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    deadline_s = time.perf_counter() + _START_TIMEOUT_S
    while True:
        try:
            stream = socket.create_connection(("127.0.0.1", load.port))
            stream.sendall(head.encode() + payload)
            break
        except ConnectionError:
            # The process may have ended: then there is nothing to wait for.
            if time.perf_counter() > deadline_s or _has_ended(load.pid):
                raise
            time.sleep(0.1)
    # The server answers 503 until it has loaded; a stream is open when its first event came.
    return _reopen_while_loading(stream, load, head.encode() + payload, deadline_s)


def _reopen_while_loading(
    stream: socket.socket, load: StreamLoad, request: bytes, deadline_s: float
) -> socket.socket:
    while time.perf_counter() < deadline_s:
        start = stream.recv(15, socket.MSG_PEEK)
        if b" 200 " in start:
            stream.setblocking(False)
            return stream
        if b" 503 " not in start:
            raise SystemExit(f"the server answered {start!r}")
        stream.close()
        time.sleep(0.1)
        stream = socket.create_connection(("127.0.0.1", load.port))
        stream.sendall(request)
    raise SystemExit("the server did not get ready")


def _has_ended(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS
