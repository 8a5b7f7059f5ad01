"""What the server prints at start: settings, what was loaded, what fits, where it listens."""

import logging
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from nsa_serve.messages import DeviceMemory, EngineInfo, LoadProgress

_logger = logging.getLogger(__name__)

_LOG_EVERY_PERCENT = 25


class ProgressBar:
    """Shows `LoadProgress`: a bar on a terminal, a log line every quarter otherwise."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._last_percent = 0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def update(self, progress: LoadProgress) -> None:
        """Show how far the load is."""
        if progress.phase != self._phase:
            self._close()
            self._phase = progress.phase
            self._last_percent = 0
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(
                    total=progress.total,
                    desc=progress.phase,
                    unit="B" if progress.phase == "weights" else "",
                    unit_scale=True,
                )
            self._bar.update(progress.done - self._bar.n)
            return
        percent = 100 * progress.done // max(1, progress.total)
        if (
            percent >= self._last_percent + _LOG_EVERY_PERCENT
            or percent == 100 > self._last_percent
        ):
            self._last_percent = percent
            _logger.info("%s: %d%%", progress.phase, percent)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def log_settings(values: Mapping[str, Any]) -> None:
    """Log the settings that differ from the defaults."""
    text = ", ".join(f"{name}={value!r}" for name, value in values.items())
    _logger.info("settings: %s", text or "all defaults")


def describe_engine(info: EngineInfo) -> list[str]:
    """Return the lines of the start-up table."""
    num_tokens = info.num_pages * info.page_size
    lines = [
        f"model     {info.family}, {info.num_parameters / 1e6:,.1f} M parameters, {info.dtype} "
        f"on {info.device if info.memory is None else info.memory.name}",
        f"weights   {_size(info.weight_bytes)}"
        + (f", {info.quantization}" if info.quantization else ""),
        *(_describe_memory(info.memory) if info.memory is not None else ()),
        f"cache     {_size(sum(part.total_bytes for part in info.cache))}: {info.num_pages:,} "
        f"pages of {info.page_size} tokens = {num_tokens:,} tokens{_cache_dtype(info)}"
        + (f", {info.num_swa_pages:,} window pages" if info.num_swa_pages else ""),
    ]
    lines += [
        f"  {part.name:<11} {part.bytes_per_token:>9,.0f} bytes per token  "
        f"{_size(part.total_bytes)}"
        + (f", at most {part.max_tokens:,} tokens of a sequence" if part.max_tokens else "")
        for part in info.cache
    ]
    fits = ", ".join(
        f"{info.num_pages // -(-length // info.page_size):,} of {length:,} tokens"
        for length in _lengths(info.max_model_len)
    )
    lines.append(f"fits      {fits}")
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in info.phase_s.items())
    lines.append(f"start     {phases}")
    return lines


def _describe_memory(memory: DeviceMemory) -> list[str]:
    """Return the lines of what a GPU holds beside weights and pages."""
    lines = [f"step      {_size(memory.activation_bytes)} for activations and buffers"]
    if memory.num_graphs:
        lines.append(
            f"graphs    {_size(memory.graph_bytes)}: {memory.num_graphs} CUDA graphs, captured in "
            f"{memory.capture_s:.2f} s"
        )
    return [
        *lines,
        f"other     {_size(memory.other_bytes)} of the GPU's {_size(memory.total_bytes)}: the "
        "driver, kernels, other processes",
    ]


def log_ready(
    info: EngineInfo,
    *,
    url: str,
    model: str,
    sampling_defaults: Mapping[str, Any],
    has_key: bool,
    total_s: float,
) -> None:
    """Log the start-up table, the address and a first request to try."""
    for line in describe_engine(info):
        _logger.info("%s", line)
    if sampling_defaults:
        pairs = ", ".join(f"{name} {value:g}" for name, value in sampling_defaults.items())
        _logger.info("sampling  %s unless a request says otherwise", pairs)
    _logger.info("ready on %s after %.2f s; try:", url, total_s)
    key = ' -H "Authorization: Bearer KEY"' if has_key else ""
    _logger.info(
        "  curl %s/v1/completions -H 'Content-Type: application/json'%s "
        """-d '{"model": "%s", "prompt": "Once upon a time", "max_tokens": 32}'""",
        url,
        key,
        model,
    )


def _cache_dtype(info: EngineInfo) -> str:
    return "" if info.cache_dtype in ("", info.dtype) else f", {info.cache_dtype}"


def _lengths(max_model_len: int) -> list[int]:
    shorter = [length for length in (1024, 4096, 16384, 65536) if length < max_model_len]
    return [*shorter, max_model_len]


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
