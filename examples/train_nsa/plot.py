"""Curves of a run as a PNG: losses by kind and length, branch shares, learning rate.

    python examples/train_nsa/plot.py --log OUT/log.jsonl --out curves.png

Needs matplotlib.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")

import matplotlib.pyplot as plt

BRANCHES = ("cmp", "slc", "swa")
MIN_SPAN = 5
"""Steps that a curve averages over at least, where it has as many."""


def draw(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a log's entries."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    (kl, ce), (shares, rates) = axes
    _losses(kl, log, "kl", "KL from the teacher (nats a token)")
    _losses(ce, [e for e in log if e["ce"] is not None], "ce", "Next-token loss (nats a token)")
    steps = [entry["step"] for entry in log]
    for index, branch in enumerate(BRANCHES):
        mean = [entry["shares"][index] for entry in log]
        line = shares.plot(steps, _smooth(mean), label=f"{branch}, mean")[0]
        least = [entry["least_shares"][index] for entry in log]
        style = {"linestyle": ":", "color": line.get_color()}
        shares.plot(steps, _smooth(least), label=f"{branch}, least layer", **style)
    shares.set_title("Share of the attention's output norm")
    shares.set_ylim(0, 1)
    rates.plot(steps, [entry["lr"] for entry in log], label="learning rate")
    rates.set_title("Learning rate")
    second = rates.twinx()
    second.plot(steps, _smooth([e["tokens_per_s"] for e in log]), color="C1", label="tokens/s")
    second.set_ylim(bottom=0)
    second.legend(loc="lower left")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(axis: Any, log: Sequence[dict[str, Any]], name: str, title: str) -> None:
    curves: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    for entry in log:
        if entry[name] is not None:
            curves[entry["kind"], entry["length"]].append((entry["step"], entry[name]))
    for (kind, length), points in sorted(curves.items()):
        steps, values = zip(*points, strict=True)
        axis.plot(steps, _smooth(values), label=f"{kind} {length}")
    if any(value > 0 for points in curves.values() for _, value in points):
        axis.set_yscale("log")
    axis.set_title(title)


def _smooth(values: Sequence[float]) -> Any:
    """Average over neighbours: a twentieth of the curve, fewer at its ends."""
    span = min(len(values), max(MIN_SPAN, len(values) // 20))
    window = np.ones(span)
    sums = np.convolve(values, window, mode="same")
    return sums / np.convolve(np.ones(len(values)), window, mode="same")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the curves of one log."""
    parser = argparse.ArgumentParser(description="Draw the log of a run of train.py.")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if not args.log.is_file():
        raise SystemExit(f"{args.log} does not exist: expected the log.jsonl of a run")
    draw([json.loads(line) for line in args.log.read_text().splitlines()], args.out)
    print(args.out)


if __name__ == "__main__":
    main()
