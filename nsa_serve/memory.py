"""How much memory this process may still use."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Return the free memory in bytes: of the machine, or of the container if that is less.

    Raises OSError where the system does not say.
    """
    available = _meminfo_available(_MEMINFO.read_text())
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file():
        text = limit.read_text().strip()
        if text != "max":
            available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def _meminfo_available(text: str) -> int:
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line")
