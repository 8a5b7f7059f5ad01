"""What a trace of the profiler says about a step: busy and idle time, and the kernels by time.

Kernels may overlap (several streams, programmatic dependent launch), so busy time is the length of
the union of their intervals, beside the sum of their times. Times in microseconds, as in a trace.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_MAX_NAME_CHARS = 72
_NUM_GAPS = 8


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel or copy: [start, end) in microseconds."""

    name: str
    start: float
    end: float


def read_trace(path: Path, categories: frozenset[str] = DEVICE_CATEGORIES) -> list[Span]:
    """Return the complete events of a Chrome trace that are of these categories, by start."""
    events = json.loads(path.read_text())["traceEvents"]
    spans = [
        Span(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in categories
    ]
    return sorted(spans, key=lambda span: (span.start, span.end))


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Return how much is covered by intervals that may overlap."""
    total = 0.0
    until = float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def longest_gaps(spans: Sequence[Span], count: int) -> list[dict[str, Any]]:
    """Return the longest times in which nothing ran: how long, when, and between which kernels."""
    ordered = sorted(spans, key=lambda span: span.start)
    gaps: list[dict[str, Any]] = []
    last = ordered[0] if ordered else None
    for span in ordered[1:]:
        assert last is not None
        if span.start > last.end:
            gaps.append(
                {
                    "us": span.start - last.end,
                    "at_us": last.end - ordered[0].start,
                    "after": short_name(last.name),
                    "before": short_name(span.name),
                }
            )
        if span.end > last.end:
            last = span
    return sorted(gaps, key=lambda gap: -gap["us"])[:count]


def short_name(name: str) -> str:
    """Return a kernel's name without return type, namespaces, template and call arguments."""
    name = re.sub(r"^(void|static)\s+", "", name.strip())
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    base = re.split(r"[<(]", name, maxsplit=1)[0] or name
    # Of an elementwise kernel only its arguments say what it does.
    detail = re.search(r"(\w+Functor\w*|\w+_kernel_cuda\w*)", name[len(base) :])
    base = base.rpartition("::")[2]
    return (f"{base} {detail[1]}" if detail else base)[:_MAX_NAME_CHARS]


def summarize(
    spans: Sequence[Span], num_steps: int, wall_us: float, *, num_top: int = 20
) -> dict[str, Any]:
    """Return the figures of `num_steps` steps that took `wall_us` without the profiler.

    kernel_sum_us, busy_us: a step's sum and union. idle_share: of the time from the first kernel's
    start to the last one's end, in which none ran. wall_of_sum, wall_of_busy: 1 is a GPU that never
    waits. top: kernels by time, their calls and microseconds a step. gaps: see `longest_gaps`.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        times[short_name(span.name)].append(span.end - span.start)
    total = sum(sum(values) for values in times.values())
    busy = union_length((span.start, span.end) for span in spans)
    extent = max((s.end for s in spans), default=0.0) - min((s.start for s in spans), default=0.0)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    return {
        "num_steps": num_steps,
        "wall_us": wall_us,
        "kernel_sum_us": total / num_steps,
        "busy_us": busy / num_steps,
        "traced_us": extent / num_steps,
        "idle_share": 1 - busy / extent if extent else None,
        "wall_of_sum": wall_us * num_steps / total if total else None,
        "wall_of_busy": wall_us * num_steps / busy if busy else None,
        "kernels_per_step": len(spans) / num_steps,
        "top": [
            {
                "name": name,
                "calls_per_step": len(values) / num_steps,
                "us_per_step": sum(values) / num_steps,
                "us_per_call": sum(values) / len(values),
                "share": sum(values) / total if total else 0.0,
            }
            for name, values in ranked[:num_top]
        ],
        "gaps": longest_gaps(spans, _NUM_GAPS),
    }


def table(stats: dict[str, Any], num_top: int = 15) -> str:
    """Return the figures for a terminal."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = [
        f"  wall {stats['wall_us']:.0f} us a step, kernels {stats['kernel_sum_us']:.0f} us (sum), "
        f"{stats['busy_us']:.0f} us (union), {stats['kernels_per_step']:.1f} kernels; idle "
        f"{percent(stats['idle_share'])} of the trace ({stats['traced_us']:.0f} us a step); wall / "
        f"sum {ratio(stats['wall_of_sum'])}, wall / union {ratio(stats['wall_of_busy'])}"
    ]
    lines += [
        f"  {top['share']:6.1%} {top['us_per_step']:9.1f} us  {top['calls_per_step']:7.1f} x "
        f"{top['us_per_call']:8.2f} us  {top['name']}"
        for top in stats["top"][:num_top]
    ]
    lines += [
        f"  nothing for {gap['us']:.0f} us at {gap['at_us']:.0f}, between {gap['after']} and "
        f"{gap['before']}"
        for gap in stats["gaps"]
    ]
    return "\n".join(lines)
