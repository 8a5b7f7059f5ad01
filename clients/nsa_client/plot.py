"""The latencies of a benchmark as a PNG. Needs matplotlib, the extra `plot`."""

from itertools import accumulate
from pathlib import Path
from typing import Any

from nsa_client.bench_stats import BenchResult, percentile

_PANELS = {
    "ttft": "Time to first token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
_COLOR, _P50_COLOR, _P99_COLOR = "#2563a8", "#3d8b5f", "#c2452d"
_GRID_COLOR, _TEXT_COLOR = "#dddddd", "#444444"


def check_plot(path: Path) -> None:
    """Raise ValueError, before anything is measured, when `path` could not be written as a plot."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"a plot is a PNG; name a file that ends in .png, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.absolute().parent} is no directory; create it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"a plot needs matplotlib; install it: pip install matplotlib ({error})"
        ) from None


def write_plot(result: BenchResult, path: Path, *, title: str) -> None:
    """Draw the distributions of three latencies and the load over time.

    Raises ValueError when no request succeeded.
    """
    # Not at the top: only a plot needs matplotlib. `Figure` alone touches no global state.
    from matplotlib.figure import Figure

    if not result.completed:
        raise ValueError(f"no request succeeded, so there is nothing to draw to {path}")
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(2, 2).flat
    for axis, (metric, name) in zip(axes, _PANELS.items(), strict=False):
        _draw_distribution(axis, name, result.samples_s(metric))
    _draw_load(axes[3], result)
    figure.savefig(path, dpi=120, format="png")


def _draw_distribution(axis: Any, name: str, samples_s: list[float]) -> None:
    """Draw which share of the samples is at most as long as x."""
    _prepare(axis, name, x_label="ms", y_label="share of samples (%)")
    if not samples_s:
        axis.text(0.5, 0.5, "no samples", ha="center", va="center", transform=axis.transAxes)
        return
    xs_ms = sorted(sample_s * 1e3 for sample_s in samples_s)
    shares = [100 * (i + 1) / len(xs_ms) for i in range(len(xs_ms))]
    axis.step([xs_ms[0], *xs_ms], [0.0, *shares], where="post", color=_COLOR, linewidth=1.8)
    values_ms = {q: percentile(xs_ms, q) for q in (50, 99)}
    for value_ms, color in zip(values_ms.values(), (_P50_COLOR, _P99_COLOR), strict=True):
        axis.axvline(value_ms, color=color, linestyle="--", linewidth=1.2)
    # Above the curve, which may run anywhere below.
    text = "   ".join(f"p{q} {_milliseconds(value_ms)}" for q, value_ms in values_ms.items())
    axis.set_title(text, loc="right", fontsize=10, color=_TEXT_COLOR)
    axis.set_ylim(0, 103)
    axis.set_xlim(left=0)


def _milliseconds(value_ms: float) -> str:
    return f"{value_ms:,.0f} ms" if value_ms >= 100 else f"{value_ms:.3g} ms"


def _draw_load(axis: Any, result: BenchResult) -> None:
    """Draw how many requests were in flight at every moment."""
    _prepare(axis, "Requests in flight", x_label="s since the first request", y_label="requests")
    times_s, counts = requests_in_flight(result)
    axis.step(times_s, counts, where="post", color=_COLOR, linewidth=1.5)
    axis.fill_between(times_s, counts, step="post", color=_COLOR, alpha=0.15)
    axis.set_ylim(0, max(counts) * 1.1)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xlim(0, max(times_s))


def requests_in_flight(result: BenchResult) -> tuple[list[float], list[int]]:
    """Return the moments at which the number of requests in flight changed, and the new numbers."""
    first_s = min(record.start_s for record in result.records)
    changes = [(record.start_s - first_s, 1) for record in result.records]
    changes += [(record.start_s + record.e2el_s - first_s, -1) for record in result.records]
    changes.sort()
    return [time_s for time_s, _ in changes], list(accumulate(step for _, step in changes))


def _prepare(axis: Any, title: str, *, x_label: str, y_label: str) -> None:
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(color=_GRID_COLOR, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
