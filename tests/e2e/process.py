"""Server processes, above all `python -m nsa_http serve`: log, end, and what the system says."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]
_LISTEN = "0A"


class Process:
    """A Python process that serves. `url` is its address once `wait_ready` returned."""

    def __init__(self, *arguments: str) -> None:
        path = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "server"))
        self.popen = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.url = ""
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def log(self) -> str:
        """What the process wrote so far."""
        return "".join(self._lines)

    def wait_ready(self) -> Self:
        """Wait for the address in the log."""
        wait_until(lambda: "ready on" in self.log or self.popen.poll() is not None)
        match = re.search(r"ready on (https?://\S+)", self.log)
        assert match is not None, self.log
        self.url = match[1]
        return self

    def wait_exit(self) -> int:
        """Return the exit code; the log is complete then."""
        code = self.popen.wait(timeout=30)
        self._reader.join(timeout=10)
        assert not self._reader.is_alive(), "a child of the process still holds its output"
        return code

    def kill(self) -> None:
        """End the process, whatever it does, and release its pipe."""
        self.popen.kill()
        self.wait_exit()
        assert self.popen.stdout is not None
        self.popen.stdout.close()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.append(line)


class Server(Process):
    """A server of a model, with an engine process."""

    def __init__(self, model: str, *flags: str) -> None:
        super().__init__("-m", "nsa_http", "serve", model, "--port", "0", *flags)

    def engine_pid(self) -> int:
        """Return the process id of the one child, the engine."""
        pid = self.popen.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def metrics(self) -> dict[str, float]:
        """Return all samples of /metrics, without the labels that each of them has."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        samples = {}
        for line in text.splitlines():
            if line.startswith("nsa_serve:"):
                name, value = line.rsplit(" ", 1)
                name = re.sub(r'(engine|model_name)="[^"]*",?', "", name).replace("{}", "")
                samples[name.removeprefix("nsa_serve:").replace(",}", "}")] = float(value)
        return samples


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    """Wait for something that must happen."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def kill_process(pid: int) -> None:
    """Send SIGKILL to one process."""
    os.kill(pid, signal.SIGKILL)


def tcp_listeners(*pids: int) -> list[str]:
    """Return the local addresses, in the kernel's notation, on which the processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except FileNotFoundError:
                continue
            if match := re.fullmatch(r"socket:\[(\d+)\]", target):
                inodes.add(match[1])
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in inodes:
                addresses.append(fields[1])
    return addresses
