"""The GPU kernels' part of docs/performance.md, from benchmarks/results/kernels-*.json."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Peers in the order of their columns; packed: the heads of a group as rows of one KV head.
_DECODE_PEERS = ("flash", "cudnn", "flashinfer", "fla")
_PREFILL_PEERS = ("flash", "cudnn", "fla")


def kernel_section(results: Path) -> str:
    """Return the Markdown of the kernels' results that are there."""
    parts = [
        ("kernels-decode.json", _decode),
        ("kernels-decode-branches.json", _branches),
        ("kernels-prefill.json", _prefill),
        ("kernels-moe.json", _moe),
        ("kernels-context.json", _context),
        ("kernels-accuracy.json", _accuracy),
        ("kernels-resources.json", _resources),
    ]
    texts = [
        make(json.loads((results / name).read_text()))
        for name, make in parts
        if (results / name).is_file()
    ]
    if not texts:
        return ""
    return "## GPU: the attention kernels\n\n" + "\n".join(texts)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _origin(result: dict[str, Any]) -> str:
    return (
        f"{result['gpu']}, torch {result['torch']}, triton {result['triton']}, commit "
        f"{(result['commit'] or 'unknown')[:7]}. Command: `{result['command']}`."
    )


def _peer(row: dict[str, Any], name: str, scale: float, form: str) -> str:
    peer = row.get("peers", {}).get(name, {})
    return form.format(peer["ms"] * scale) if "ms" in peer else "-"


def _decode(result: dict[str, Any]) -> str:
    header = ["geometry", "head dims", "batch", "context", "ours, us", "of the byte floor"]
    header += [f"{name}, us" for name in _DECODE_PEERS] + ["against the fastest dense"]
    rows = []
    for row in result["rows"]:
        cells = [row["geometry"], "/".join(map(str, row["head_dims"]))]
        cells += [str(row["batch"]), str(row["context"])]
        cells += [f"{row['ms'] * 1e3:.1f}", f"{row['of_floor']:.0%}"]
        cells += [_peer(row, name, 1e3, "{:.1f}") for name in _DECODE_PEERS]
        bar = row.get("bar")
        cells.append(f"{bar['speedup']:.2f}x ({bar['name']})" if bar else "-")
        rows.append(cells)
    return (
        "### Decode\n\n"
        f"{_origin(result)}\n\n"
        "One layer's step, from appending the token to the gated sum, in bf16 with 64 query and 4 "
        "KV heads; paper geometry (l 32, d 16, block 64, 16 blocks, window 512) and fla's "
        "(l = d = block = 64). CUDA graphs over rotated inputs larger than L2, shuffled pages, "
        "averaged over the cadence at which compression windows close; medians. The floor is the "
        "bytes that have to move over the copy bandwidth of the same run, "
        f"{result['copy_bytes_per_s'] / 1e12:.2f} TB/s. Dense peers attend to contiguous (torch "
        "SDPA) or paged (FlashInfer) caches, and append nothing; fla pools all keys at each step "
        "and has no window here.\n\n" + _table(header, rows)
    )


def _branches(result: dict[str, Any]) -> str:
    dims = list(result["compared"][0]["us"])
    header = ["compression", "batch", "context"]
    header += [f"{name}, us" for name in dims] + [f"{name} of the byte floor" for name in dims]
    header += [f"{name} against dense" for name in dims] + ["ratio", "ratio over floors"]
    rows = []
    for row in result["compared"]:
        cells = [row["compression"], str(row["batch"]), str(row["context"])]
        cells += [f"{row['us'][name]:.1f}" for name in dims]
        cells += [f"{row['of_floor'][name]:.0%}" for name in dims]
        for name in dims:
            speedup = row["speedup"][name]
            cells.append("-" if speedup is None else f"{speedup:.2f}x ({row['bar'][name]})")
        for ratio in (row["ratio"], row["ratio_of_floors"]):
            cells.append("-" if ratio is None else f"{ratio:.2f}")
        rows.append(cells)
    return (
        "### Decode with K/V of its own for every branch\n\n"
        f"{_origin(result)}\n\n"
        "One layer's step as above, paper geometry, with the mean and with the learned compression "
        "(hidden 256). Dense: the fastest of torch SDPA and FlashInfer over one K/V set of the "
        "same heads; padded: values stored as wide as keys, for kernels that know one width; "
        "packed: a group's heads as rows of one KV head. Ratio: the first shape's speed-up over "
        f"the second's, to be at least {result['least_ratio']}; over floors: the same against a "
        "dense decode at the copy bandwidth, "
        f"{result['copy_bytes_per_s'] / 1e12:.2f} TB/s.\n\n" + _table(header, rows)
    )


def _moe(result: dict[str, Any]) -> str:
    header = ["tokens", "experts used", "layer, us", "of its floor", "dense, us"]
    header += ["dense / layer", "experts, us", "loop, us", "loop / experts", "torch grouped, us"]
    rows = []
    for row in result["rows"]:
        us = row["us"]
        layer = us.get("early") or us["layer"]
        share = f"{row['floor_us'] / layer:.0%}" if layer else "-"
        cells = [str(row["rows"]), f"{row['distinct_experts']:.1f}", _us(layer), share]
        cells += [_us(us["dense"]), _times(us["dense"], layer), _us(us["experts"])]
        cells += [_us(us["loop"]), _times(us["loop"], us["experts"]), _us(us["torch"])]
        rows.append(cells)
    return (
        "### A mixture-of-experts layer\n\n"
        f"{_origin(result)}\n\n"
        "The shape of the 27B preset: hidden 2560, 72 experts of width 1472, 6 a token, 2 shared; "
        "random weights and routing, CUDA graphs over several layers. Layer: norm, routing, shared "
        "and routed experts, sum; dense: an MLP of the parameters that a token uses. Experts: the "
        "routed experts and their sum alone; loop: two cuBLAS products for each expert that is "
        "used, known beforehand; torch grouped: `torch._grouped_mm`. The floor is the larger of "
        "the used weights over 4.25 TB/s and the products over 800 TFLOP/s.\n\n"
        + _table(header, rows)
    )


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _times(value: float | None, base: float | None) -> str:
    return "-" if not value or not base else f"{value / base:.2f}x"


def _prefill(result: dict[str, Any]) -> str:
    header = ["geometry", "tokens", "ours, ms", "TFLOP/s", "dense equivalent", "workspace, MiB"]
    header += [f"{name}, ms" for name in _PREFILL_PEERS] + ["against flash, cudnn, fla"]
    rows = []
    for row in result["rows"]:
        ratios = [
            f"{row['peers'][name]['ms'] / row['ms']:.2f}x"
            for name in _PREFILL_PEERS
            if "ms" in row.get("peers", {}).get(name, {})
        ]
        cells = [row["geometry"], str(row["context"]), f"{row['ms']:.2f}"]
        cells += [f"{row['flops_per_s'] / 1e12:.0f}", f"{row['dense_flops_per_s'] / 1e12:.0f}"]
        cells += [f"{row['workspace_bytes'] / 2**20:.0f}"]
        cells += [_peer(row, name, 1.0, "{:.2f}") for name in _PREFILL_PEERS]
        rows.append([*cells, ", ".join(ratios)])
    last = result["rows"][-1]
    paper = [row for row in result["rows"] if row["geometry"] == "paper"]
    shown = max(paper, key=lambda row: row["context"]) if paper else last
    shares = [[name.strip("_").removesuffix("_kernel").replace("_", " "), f"{ms:.2f}"]
              for name, ms in shown["kernels_ms"].items() if ms >= 0.05]  # fmt: skip
    return (
        "### Prefill\n\n"
        f"{_origin(result)} bf16 matrix product in the same run: "
        f"{result['bf16_matmul_flops_per_s'] / 1e12:.0f} TFLOP/s.\n\n"
        "The whole operator over one prompt in one step. TFLOP/s counts the visible pairs of the "
        "three branches; the dense equivalent is what dense attention would have to reach for the "
        "same time. Selections of random data share nothing, the worst case for reuse. fla's "
        "kernel runs without its window branch, ours with it.\n\n"
        + _table(header, rows)
        + f"\nKernels of {shown['context']} tokens, {shown['geometry']} geometry:\n\n"
        + _table(["kernel", "ms"], shares)
    )


def _context(result: dict[str, Any]) -> str:
    fit = result["fit"]
    rows = [
        [str(row["context"]), f"{row['ms'] * 1e3:.1f}", f"{row['of_floor']:.0%}",
         f"{row['dense']['ms'] * 1e3:.0f}" if "ms" in row["dense"] else "-"]
        for row in result["rows"]
    ]  # fmt: skip
    return (
        "### Decode against context\n\n"
        f"{_origin(result)} Batch {result['batch']}, paper geometry.\n\n"
        + _table(["context", "ours, us", "of the byte floor", "dense (torch flash), us"], rows)
        + f"\nAgainst the model s/16 + 1536 tokens: {fit['fixed_ms'] * 1e3:.1f} us and "
        f"{fit['bytes_per_s'] / 1e12:.2f} TB/s, R^2 {fit['r_squared']:.4f}.\n\n"
        "![decode time against context](../benchmarks/results/kernels-context.png)\n"
    )


def _accuracy(result: dict[str, Any]) -> str:
    header = ["phase", "geometry", "head dims", "dtype", "context", "relative error",
              "chosen score / best, mean", "min"]  # fmt: skip
    rows = [
        [row["phase"], row["geometry"], "/".join(map(str, row["head_dims"])),
         row["dtype"].removeprefix("torch."), str(row["context"]), f"{row['error']:.1e}",
         f"{row['score_share_mean']:.6f}", f"{row['score_share_min']:.6f}"]
        for row in result["rows"]
    ]  # fmt: skip
    return (
        "### Accuracy\n\n"
        f"{_origin(result)}\n\n"
        "Against the fp32 specification on the same inputs and the kernels' own choice of blocks "
        "(norm of the difference over the norm); the choice is judged by its fp32 score.\n\n"
        + _table(header, rows)
    )


def _resources(result: dict[str, Any]) -> str:
    header = ["step", "kernel", "warps", "registers", "spilled, bytes", "shared memory, bytes",
              "programs an SM", "wgmma / mma"]  # fmt: skip
    rows = [
        [step, kernel["name"].strip("_").removesuffix("_kernel"), str(kernel["num_warps"]),
         str(kernel["registers"]), str(kernel["spill_store_bytes"]), str(kernel["shared_bytes"]),
         str(kernel["programs_per_sm"]), f"{kernel['wgmma']} / {kernel['mma']}"]
        for step, kernels in result["kernels"].items()
        for kernel in kernels
    ]  # fmt: skip
    return (
        "### Resources\n\n"
        f"Compiled for {result['arch']} by triton {result['triton']}, paper geometry, bf16, batch "
        "8 (decode), 32k tokens (prefill): `python kernels/bench/offline.py`. A kernel that was "
        "compiled for several shapes has several rows.\n\n" + _table(header, rows)
    )
