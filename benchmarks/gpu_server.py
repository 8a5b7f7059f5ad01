"""A server process for a benchmark: started, timed until it is healthy, stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from gpu_common import ROOT

_POLL_S = 0.01
_STOP_TIMEOUT_S = 60.0


@dataclass
class RunningServer:
    """A server that answers. Times in seconds since its process was started.

    listening_s: its port took a connection; healthy_s: /health said 200. info: /server_info.
    """

    url: str
    process: "subprocess.Popen[bytes]"
    start_s: float
    log: Path
    listening_s: float = 0.0
    healthy_s: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """What the API calls the model."""
        return str(self.info["served_model_names"][0])

    def age_s(self) -> float:
        """Return the seconds since the process was started."""
        return time.perf_counter() - self.start_s


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_server(
    model: Path,
    flags: list[str],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> Iterator[RunningServer]:
    """Serve a folder until the block ends; `environment` is added to this process's own.

    Raises SystemExit, with the end of the log, when the server does not get healthy.
    """
    port = free_port()
    command = [
        sys.executable, "-m", "nsa_http", "serve", str(model), "--port", str(port), *flags,
    ]  # fmt: skip
    start_s = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=output,
        )
    server = RunningServer(f"http://127.0.0.1:{port}", process, start_s, log)
    try:
        _wait_until_healthy(server, timeout_s)
        yield server
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server, with its engine, and wait until its memory is free."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def log_tail(path: Path, num_chars: int = 4000) -> str:
    """Return the end of a log."""
    return path.read_text(errors="replace")[-num_chars:]


def _wait_until_healthy(server: RunningServer, timeout_s: float) -> None:
    with httpx.Client(base_url=server.url, timeout=10.0, trust_env=False) as client:
        while server.age_s() < timeout_s:
            if server.process.poll() is not None:
                raise SystemExit(f"the server ended:\n{log_tail(server.log)}")
            try:
                status = client.get("/health").status_code
            except httpx.TransportError:
                time.sleep(_POLL_S)
                continue
            server.listening_s = server.listening_s or server.age_s()
            if status == 200:
                server.healthy_s = server.age_s()
                server.info = client.get("/server_info").raise_for_status().json()
                return
            time.sleep(_POLL_S)
    raise SystemExit(f"the server was not healthy in {timeout_s:g} s:\n{log_tail(server.log)}")
