"""A progress line for a terminal: overwritten as requests end, gone from pipes and logs."""

import time
from typing import TextIO

from nsa_client.bench_stats import RequestRecord

_BAR_WIDTH = 24
_MIN_GAP_S = 0.1


class ProgressBar:
    """Count requests as they end. On anything but a terminal it writes nothing."""

    def __init__(self, total: int, out: TextIO) -> None:
        self._total = total
        self._out = out
        self._is_shown = out.isatty()
        self._num_ended = 0
        self._num_failed = 0
        self._num_output_tokens = 0
        self._start_s = self._drawn_s = time.perf_counter()
        self._width = 0

    def update(self, record: RequestRecord) -> None:
        """Count one request and redraw, at most ten times a second."""
        self._num_ended += 1
        self._num_failed += record.error is not None
        self._num_output_tokens += record.num_output_tokens
        now_s = time.perf_counter()
        if self._is_shown and (
            now_s - self._drawn_s >= _MIN_GAP_S or self._num_ended == self._total
        ):
            self._drawn_s = now_s
            self._draw(now_s - self._start_s)

    def close(self) -> None:
        """Erase the line."""
        if self._is_shown and self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._out.flush()

    def _draw(self, elapsed_s: float) -> None:
        line = progress_line(
            self._num_ended,
            self._total,
            num_failed=self._num_failed,
            num_output_tokens=self._num_output_tokens,
            elapsed_s=elapsed_s,
        )
        self._out.write("\r" + line.ljust(self._width))
        self._out.flush()
        self._width = max(self._width, len(line))


def progress_line(
    num_ended: int, total: int, *, num_failed: int, num_output_tokens: int, elapsed_s: float
) -> str:
    """Return the line: a bar, counts, rates so far, and the time left at this rate."""
    num_full = _BAR_WIDTH * num_ended // total
    bar = "█" * num_full + "░" * (_BAR_WIDTH - num_full)
    left_s = round(elapsed_s / num_ended * (total - num_ended))
    elapsed_s = max(elapsed_s, 1e-9)
    failed = f", {num_failed} failed" if num_failed else ""
    return (
        f"{bar} {num_ended}/{total}{failed}  {num_ended / elapsed_s:.2f} requests/s  "
        f"{num_output_tokens / elapsed_s:.0f} tokens/s  {left_s // 60}:{left_s % 60:02d} left"
    )
