"""Decode of the paper's model: K/V of its own for every branch, heads of 192/128 against 128/128.

Called by `decode.py --kv-per-branch`. Both shapes run in turn, with the mean and with the learned
compression, against dense decode of the same shape over one K/V set. What is judged is the ratio of
their speed-ups: keys wider than values must not cost more than their bytes. Torch's dense kernels
mostly know one width, and are slow or padded for two; so there is a second ratio, of the speed-ups
over a dense decode that runs at the copy bandwidth, which no peer flatters.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import peers
import torch
from problem import GEOMETRIES, Heads, decode_bytes, dense_decode_bytes, make_problem
from timing import copy_bytes_per_s, num_sets, time_graph
from trial import start_trial

BATCHES, CONTEXTS = (1, 8, 32), (8192, 65536)
# Keys and values; the first is judged by the last.
HEAD_DIMS = ((192, 128), (128, 128))
# Hidden width of the learned compression, as in the preset of 27B; 0 is the mean.
MLP_HIDDEN = {"mean": 0, "mlp": 256}
# Share of the speed-up of 128/128 that 192/128 has to keep.
LEAST_RATIO = 0.9
_TINY_BYTES_PER_S = 1e9


def run(
    batches: Sequence[int] | None,
    contexts: Sequence[int] | None,
    *,
    skip: Sequence[str],
    quick: bool,
    tiny: bool,
) -> dict[str, Any]:
    """Measure, print and return every shape, and the comparison of the two head shapes.

    tiny: small sizes on the CPU, in Triton's interpreter.

    Raises SystemExit for a trial without TRITON_INTERPRET=1, or a run without a GPU.
    """
    heads = Heads(kv_per_branch=True)
    if tiny:
        start_trial()
        heads = replace(heads, num_q_heads=32, num_kv_heads=2, dtype=torch.float32)
        batches, contexts = batches or (2,), contexts or (130,)
        bytes_per_s = _TINY_BYTES_PER_S
    else:
        if not torch.cuda.is_available():
            raise SystemExit("no GPU here; --tiny is a trial without one")
        batches, contexts = batches or BATCHES, contexts or CONTEXTS
        bytes_per_s = copy_bytes_per_s()
    print(f"copy {bytes_per_s / 1e12:.2f} TB/s; us of a call, share of the byte floor, speed-ups")
    budget_s = 0.08 if quick else 0.2
    errors = {
        _name(dims): peers.check_decode_peers(_with_dims(heads, dims), context=64 if tiny else 1024)
        for dims in HEAD_DIMS
        if "peers" not in skip
    }
    print("peers' relative error:", errors)
    rows, compared = [], []
    for batch in batches:
        for context in contexts:
            cell = []
            for dims in HEAD_DIMS:
                cell += _measure(
                    _with_dims(heads, dims), batch, context, bytes_per_s, budget_s, skip=skip
                )
            rows += cell
            compared += [_compare(cell, compression) for compression in MLP_HIDDEN]
            for row in compared[-len(MLP_HIDDEN) :]:
                _print(row)
    return {
        "copy_bytes_per_s": bytes_per_s,
        "peer_relative_errors": errors,
        "least_ratio": LEAST_RATIO,
        "rows": rows,
        "compared": compared,
    }


def _name(dims: tuple[int, int]) -> str:
    return "/".join(map(str, dims))


def _with_dims(heads: Heads, dims: tuple[int, int]) -> Heads:
    return replace(heads, head_dim=dims[0], v_head_dim=dims[1])


def _measure(
    heads: Heads,
    batch: int,
    context: int,
    bytes_per_s: float,
    budget_s: float,
    *,
    skip: Sequence[str],
) -> list[dict[str, Any]]:
    """Time one shape with either compression, and the dense peers once."""
    spec = GEOMETRIES["paper"]
    moved = decode_bytes(spec, heads, batch, context)
    dense_floor_ms = dense_decode_bytes(heads, batch, context) / bytes_per_s * 1e3
    dense: dict[str, dict[str, Any]] = {}
    rows = []
    for compression, hidden in MLP_HIDDEN.items():
        problem = make_problem(
            spec,
            replace(heads, mlp_hidden_size=hidden),
            starts=[context - 1] * batch,
            query_lens=[1] * batch,
            num_sets=num_sets(moved) if torch.cuda.is_available() else 1,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        timing = time_graph(problem.calls(), budget_s=budget_s)
        if not dense and "peers" not in skip:
            for name, build in peers.dense_decode(heads, problem, batch, context).items():
                if name not in skip:
                    dense[name] = peers.measure(build, budget_s=budget_s)
        del problem
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        bar = peers.fastest(dense)
        rows.append(
            {
                "head_dims": _name((heads.head_dim, heads.v_head_dim)),
                "compression": compression,
                "batch": batch,
                "context": context,
                **asdict(timing),
                "floor_bytes": moved,
                "of_floor": moved / bytes_per_s * 1e3 / timing.ms,
                "peers": dense,
                "bar": None if bar is None else {"name": bar[0], "ms": bar[1]},
                "speedup": None if bar is None else bar[1] / timing.ms,
                "speedup_of_dense_floor": dense_floor_ms / timing.ms,
            }
        )
    return rows


def _compare(rows: Sequence[dict[str, Any]], compression: str) -> dict[str, Any]:
    """Set the two head shapes of one cell side by side."""
    wide, narrow = (row for row in rows if row["compression"] == compression)
    result = {name: wide[name] for name in ("compression", "batch", "context")}
    for measure, ratio in (("speedup", "ratio"), ("speedup_of_dense_floor", "ratio_of_floors")):
        values = wide[measure], narrow[measure]
        result[measure] = {wide["head_dims"]: values[0], narrow["head_dims"]: values[1]}
        result[ratio] = None if None in values else values[0] / values[1]
    result["us"] = {row["head_dims"]: row["ms"] * 1e3 for row in (wide, narrow)}
    result["of_floor"] = {row["head_dims"]: row["of_floor"] for row in (wide, narrow)}
    result["bar"] = {
        row["head_dims"]: None if row["bar"] is None else row["bar"]["name"]
        for row in (wide, narrow)
    }
    return result


def _print(row: dict[str, Any]) -> None:
    text = f"b{row['batch']:<3} {row['context']:6} {row['compression']:4} "
    for name in row["us"]:
        speedup, bar = row["speedup"][name], row["bar"][name]
        against = "no dense peer" if speedup is None else f"{speedup:.2f}x {bar}"
        text += f"| {name} {row['us'][name]:8.1f} us, {row['of_floor'][name]:4.0%}, {against} "
    ratios = [row["ratio"], row["ratio_of_floors"]]
    first, second = ("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    print(f"{text}| ratio {first} (least {LEAST_RATIO}), over floors {second}", flush=True)
