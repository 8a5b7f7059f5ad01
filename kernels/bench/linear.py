"""The linear layers of a decode step, against PyTorch and against reading the weights.

    python kernels/bench/linear.py [--tune | --tune2] [--models A B] [--rows 1 8 32] [--out FILE]

Every layer of two models, with what is fused into it, from a CUDA graph over rotated weights that
L2 does not hold: `ours` by the table of `nsa_kernels.gpu.linear`, `torch` the matrix library with
separate kernels around it, `floor` the bytes of the weights over --bandwidth. `l2`: ours where the
weights are in L2, what a prefetch can win at most. --tune times every candidate tile for one row
count of each class and prints the fastest; the first lines are then its table. The chain is the
four linears of a decoder layer in turn, 16 layers in one graph, per layer.

--tune2 instead times the kernels of `gemm.py` and `gemv.py` against the table and PyTorch, names
them as `gemm BLOCK_N x block_k x warps / stages`, and runs the chain of the fastest without early
launch, with it, and with weights that are loaded before the wait.

Kernels are compiled first, by --workers processes (`--part i/n` compiles one share and ends).
"""

import argparse
import functools
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timing import finish, make_parser, num_sets, time_graph
from torch import Tensor
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nsa_kernels.gpu import linear as skinny
from nsa_kernels.gpu.gemm import GEMM_ROW_CLASSES, GemmConfig
from nsa_kernels.gpu.gemv import LANES_K, GemvConfig, can_gemv
from nsa_kernels.gpu.linear import Rotary, SkinnyConfig, choose_config, row_class, skinny_config

NUM_LAYERS = 16
EPS = 1e-5
ROWS = (1, 2, 4, 8, 16, 24, 32, 64)
TUNED_ROWS = (1, 8, 16, 32, 64)
# Weights of a measurement from L2 are at most so large: half of an H200's.
L2_BYTES = 25e6
# (block_n, slice_k, num_warps, num_stages) by class of rows, without and with splits.
TILES = {
    8: [
        (16, 128, 4, 4),
        (16, 128, 4, 3),
        (16, 64, 4, 6),
        (16, 256, 2, 4),
        (16, 64, 8, 4),
        (16, 128, 8, 3),
        (32, 64, 4, 4),
        (32, 128, 4, 3),
        (32, 64, 4, 6),
        (64, 64, 4, 3),
    ],
    16: [
        (16, 128, 4, 3),
        (16, 128, 4, 4),
        (16, 64, 4, 5),
        (16, 64, 8, 4),
        (32, 64, 4, 3),
        (32, 64, 4, 4),
        (32, 128, 4, 3),
        (64, 64, 4, 3),
    ],
    32: [
        (16, 64, 4, 4),
        (16, 64, 8, 3),
        (32, 64, 4, 3),
        (32, 64, 4, 4),
        (32, 64, 8, 3),
        (64, 64, 4, 3),
        (64, 32, 8, 4),
        (128, 32, 4, 4),
    ],
    64: [
        (16, 64, 4, 3),
        (32, 64, 4, 3),
        (32, 32, 8, 4),
        (32, 64, 8, 3),
        (64, 32, 4, 4),
        (64, 32, 8, 3),
        (64, 64, 8, 2),
    ],
}
SPLIT_TILES = {
    8: [(32, 64, 4, 4, 2), (16, 128, 4, 4, 2)],
    16: [(32, 64, 4, 4, 2), (32, 64, 4, 4, 4)],
    32: [(32, 64, 4, 4, 2), (32, 64, 4, 3, 4), (64, 64, 4, 3, 2), (64, 64, 4, 3, 4)],
    64: [(32, 64, 4, 3, 2), (64, 32, 4, 4, 2), (64, 32, 4, 4, 4), (64, 32, 8, 3, 4)],
}
# For --tune2: rows, rows of its chain, and tiles (block_n, block_k, num_warps, num_stages) of gemm.
TUNED2_ROWS = (1, 4, 8, 16, 32)
CHAIN2_ROWS = (1, 8, 32)
GEMM_TILES = {
    16: [(64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 5), (128, 64, 4, 4)],
    32: [(64, 128, 4, 4), (64, 64, 4, 5), (128, 64, 4, 4), (128, 64, 4, 3), (128, 128, 8, 3)],
    64: [(64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3)],
}
# (pairs, unroll, num_warps) of gemv.
GEMV_TILES = [(1, 4, 1), (4, 4, 4), (8, 2, 4)]
NUM_SMS, SM_SHARED = 132, 233472
MAX_SPLITS, MIN_SPLIT_STEPS = 16, 4
# Layers of more weights have programs enough.
MAX_SPLIT_BYTES = 130e6


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: weight [num_weights, num_in], and the name of what is fused."""

    name: str
    num_weights: int
    num_in: int
    fused: str
    num_rotated: int = 0
    head_dim: int = 0

    @property
    def weight_bytes(self) -> int:
        return 2 * self.num_weights * self.num_in

    @property
    def num_out(self) -> int:
        return self.num_weights // 2 if self.fused == "norm+swiglu" else self.num_weights


MODELS = {
    "A": (
        Layer("A.qkvg", 2400, 2048, "norm+rotary", 34, 64),
        Layer("A.o", 2048, 2048, "residual"),
        Layer("A.gate_up", 16384, 2048, "norm+swiglu"),
        Layer("A.down", 2048, 8192, "residual"),
        Layer("A.head", 128256, 2048, "norm+logits"),
    ),
    "B": (
        Layer("B.qkvg", 9408, 4096, "norm+rotary", 68, 128),
        Layer("B.o", 4096, 8192, "residual"),
        Layer("B.gate_up", 28672, 4096, "norm+swiglu"),
        Layer("B.down", 4096, 14336, "residual"),
        Layer("B.head", 128256, 4096, "norm+logits"),
    ),
}

Config = SkinnyConfig | GemvConfig | GemmConfig


class Inputs:
    """What a layer takes beside its weight, for M rows, in bf16 on `device`."""

    def __init__(self, layer: Layer, num_rows: int, device: str) -> None:
        def some(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=device)

        self.x = some(num_rows, layer.num_in)
        norm = (some(layer.num_in), EPS) if "norm" in layer.fused else None
        rotary = None
        if "rotary" in layer.fused:
            positions = torch.arange(num_rows, dtype=torch.int32, device=device)
            cos, sin = some(4096, layer.head_dim), some(4096, layer.head_dim)
            rotary = Rotary(cos, sin, positions, layer.num_rotated, layer.head_dim, is_settled=True)
        residual = some(num_rows, layer.num_out) if "residual" in layer.fused else None
        self.norm, self.rotary, self.residual = norm, rotary, residual
        self.swiglu = "swiglu" in layer.fused
        self.dtype = torch.float32 if "logits" in layer.fused else torch.bfloat16

    def ours(
        self,
        weight: Tensor,
        config: Config | None,
        *,
        x: Tensor | None = None,
        launch_pdl: bool = True,
    ) -> Tensor:
        return skinny.linear(
            self.x if x is None else x,
            weight,
            norm=self.norm,
            residual=self.residual,
            swiglu=self.swiglu,
            rotary=self.rotary,
            out_dtype=self.dtype,
            config=config,
            launch_pdl=launch_pdl,
        )

    def by_torch(self, weight: Tensor, *, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return skinny.linear_by_torch(
            x, weight, None, self.norm, self.residual, self.swiglu, self.rotary, self.dtype
        )


def table_config(layer: Layer, num_rows: int) -> Config | None:
    """The configuration that `linear` would choose."""
    sizes = (num_rows, layer.num_weights, layer.num_in)
    return choose_config(*sizes, torch.bfloat16)


def candidates(layer: Layer, size: int) -> list[SkinnyConfig]:
    """Every configuration to try for a class of rows, that of the table first."""
    default = skinny_config(size, layer.num_weights, layer.num_in, torch.bfloat16)
    found = [] if default is None else [default]
    has_norm = "norm" in layer.fused
    for tile in TILES[size]:
        found.append(SkinnyConfig(*tile, fold_norm=size <= skinny.MAX_FOLDED_NORM_ROWS))
    if layer.weight_bytes <= MAX_SPLIT_BYTES and not has_norm:
        for block_n, slice_k, num_warps, num_stages, splits in SPLIT_TILES[size]:
            found.append(
                SkinnyConfig(
                    block_n, slice_k, num_warps, num_stages, fold_norm=False, splits=splits
                )
            )
    if default is not None:
        found.append(replace(default, prefetch=not default.prefetch))
        if has_norm:
            found.append(replace(default, fold_norm=not default.fold_norm))
    return list(dict.fromkeys(found))


def candidates2(layer: Layer, num_rows: int) -> list[Config]:
    """Every configuration that --tune2 tries, that of the table first."""
    found: list[Config] = []
    sizes = (num_rows, layer.num_weights, layer.num_in)
    for default in (table_config(layer, num_rows), skinny_config(*sizes, torch.bfloat16)):
        if default is not None:
            found.append(default)
    if can_gemv(*sizes, torch.bfloat16):
        for pairs, unroll, num_warps in GEMV_TILES:
            if layer.num_in % (unroll * LANES_K) == 0:
                found.append(GemvConfig(pairs, unroll, num_warps, early=False))
    size = next(size for size in GEMM_ROW_CLASSES if size >= num_rows)
    for block_n, block_k, num_warps, num_stages in GEMM_TILES[size]:
        # As many programs as are resident at once, and half of them.
        resident = SM_SHARED // ((block_n + size) * block_k * 2 * num_stages + 1024)
        steps = layer.num_in // block_k
        most = max(1, min(MAX_SPLITS, steps // MIN_SPLIT_STEPS))
        wave = NUM_SMS * resident // -(-layer.num_weights // block_n)
        for splits in (min(most, max(1, wave)), min(most, max(1, wave // 2))):
            found.append(GemmConfig(block_n, block_k, num_warps, num_stages, splits))
    return list(dict.fromkeys(found))


def with_early_weights(config: Config | None) -> Config | None:
    """The same, and the first weights are loaded before the wait where the kernel can."""
    return replace(config, early=True) if isinstance(config, GemvConfig | GemmConfig) else config


@contextmanager
def compile_only() -> Iterator[None]:
    """Let kernel launches compile and not run, so that inputs may be without memory."""
    if not torch.cuda.is_available():
        import offline

        with offline.capture():
            yield
        return
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = warm_up
    try:
        yield
    finally:
        JITFunction.run = run


def jobs2(layers: list[Layer], rows: list[int]) -> list[tuple[Layer, int, Any, bool]]:
    """(layer, rows, configuration, launch_pdl) of every kernel that --tune2 will run."""
    found: dict[tuple[Layer, int, Any, bool], None] = {}
    compiled: set[tuple[Layer, int, Any, bool]] = set()
    for layer, num_rows in itertools.product(layers, rows):
        for config in candidates2(layer, num_rows):
            kinds: list[tuple[Config | None, bool]] = [(config, True)]
            if num_rows in CHAIN2_ROWS and not layer.name.endswith("head"):
                kinds += [(config, False), (with_early_weights(config), True)]
            for kind in kinds:
                # One kernel of gemm does for all rows of a class.
                size = 16 if isinstance(config, GemmConfig) and num_rows <= 16 else num_rows
                if (layer, size, *kind) not in compiled:
                    compiled.add((layer, size, *kind))
                    found[layer, num_rows, *kind] = None
    return list(found)


def jobs(layers: list[Layer], rows: list[int], *, tune: bool) -> list[tuple[Layer, int, Any, bool]]:
    """(layer, rows, configuration, launch_pdl) of every kernel that the bench will run."""
    found: dict[tuple[Layer, int, Any, bool], None] = {}
    for layer, num_rows in itertools.product(layers, rows):
        size = row_class(num_rows)
        default = table_config(layer, num_rows)
        for config in [default, *(candidates(layer, size) if tune else ())]:
            if config is not None:
                found[layer, size, config, True] = None
                if config == default:
                    found[layer, size, config, False] = None
    return list(found)


def compile_share(work: list[tuple[Layer, int, Any, bool]], part: str) -> None:
    """Compile the kernels number i, i + n, ... of `work`, where part is "i/n"."""
    index, count = (int(number) for number in part.split("/"))
    with compile_only():
        for layer, num_rows, config, launch_pdl in work[index::count]:
            weight = torch.empty(
                layer.num_weights, layer.num_in, dtype=torch.bfloat16, device="meta"
            )
            try:
                Inputs(layer, num_rows, "meta").ours(weight, config, launch_pdl=launch_pdl)
            except Exception as error:  # the bench will meet it again, and say so
                print(f"{layer.name} {num_rows} {config}: {type(error).__name__}: {error}"[:300])


def compile_all(arguments: list[str], num_workers: int) -> float:
    """Compile in so many processes; return the seconds that it took."""
    started = time.perf_counter()
    command = [sys.executable, __file__, *arguments]
    workers = [
        subprocess.Popen([*command, "--part", f"{i}/{num_workers}"]) for i in range(num_workers)
    ]
    for worker in workers:
        worker.wait()
    return time.perf_counter() - started


def time_us(call: Any, weights: list[Tensor]) -> float:
    """Microseconds of call(weight), in a graph over all weights."""
    calls = [(lambda weight=weight: call(weight)) for weight in weights]
    is_large = weights[0].numel() > 64e6
    timing = time_graph(calls, min_calls=4 if is_large else 16, budget_s=0.005)
    if timing.how != "graph":
        print(f"not in a graph: {timing.how}")
    return timing.ms * 1e3


def describe(config: Config | None) -> str:
    """A configuration as in `SkinnyConfig(...)`, short."""
    if config is None:
        return "torch"
    if isinstance(config, GemvConfig):
        early = " early" if config.early else ""
        return f"gemv {config.pairs}x{config.unroll}x{config.num_warps}{early}"
    if isinstance(config, GemmConfig):
        tile = f"gemm {config.block_n}x{config.block_k}x{config.num_warps}/{config.num_stages}"
        return f"{tile} split {config.splits}{' early' if config.early else ''}"
    flags = ("" if config.fold_norm else " norm apart") + (
        "" if config.prefetch else " no prefetch"
    )
    if config.splits > 1:
        flags = f" split {config.splits}{flags}"
    return f"{config.block_n}x{config.slice_k}x{config.num_warps}/{config.num_stages}{flags}"


def make_weights(layer: Layer) -> list[Tensor]:
    """As many weights as L2 cannot hold."""
    shape = (layer.num_weights, layer.num_in)
    scale = layer.num_in**-0.5
    return [
        torch.randn(shape, dtype=torch.bfloat16, device="cuda") * scale
        for _ in range(num_sets(layer.weight_bytes))
    ]


def tune_layer(
    layer: Layer, weights: list[Tensor], rows: list[int], *, second: bool = False
) -> list[dict[str, Any]]:
    """Time every candidate, those of --tune2 if `second`, and print the fastest of each rows."""
    records: list[dict[str, Any]] = []
    for num_rows in rows:
        inputs = Inputs(layer, num_rows, "cuda")
        times: list[tuple[float, Config | None]] = []
        tried: list[Any] = (
            candidates2(layer, num_rows) if second else candidates(layer, row_class(num_rows))
        )
        for config in tried:
            try:
                us = time_us(lambda w, c=config, i=inputs: i.ours(w, c), weights)
            except Exception as error:
                print(f"{layer.name} {num_rows} {describe(config)}: {error}"[:200])
                torch.cuda.synchronize()
                continue
            times.append((us, config))
        times.append((time_us(inputs.by_torch, weights), None))
        ranked = sorted(times, key=lambda item: item[0])
        shown = ", ".join(
            f"{describe(config)} {us:.2f}" for us, config in ranked[: 3 if second else 4]
        )
        default = next(
            (us for us, config in times if config == table_config(layer, num_rows)), float("nan")
        )
        print(f"{layer.name:10} M {num_rows:3}: {shown}; table {default:.2f}", flush=True)
        records.append(
            {
                "layer": layer.name,
                "rows": num_rows,
                "us": {describe(config): round(us, 3) for us, config in ranked},
            }
        )
    return records


def measure_layer(
    layer: Layer, weights: list[Tensor], rows: list[int], bandwidth: float
) -> list[dict[str, Any]]:
    """Time the table's configuration against PyTorch and the floor, and print a line each."""
    records: list[dict[str, Any]] = []
    floor = layer.weight_bytes / bandwidth * 1e6
    for num_rows in rows:
        inputs = Inputs(layer, num_rows, "cuda")
        ours = time_us(lambda w, i=inputs: i.ours(w, None), weights)
        by_torch = time_us(inputs.by_torch, weights)
        l2 = None
        if layer.weight_bytes <= L2_BYTES:
            l2 = time_us(lambda w, i=inputs: i.ours(w, None), weights[:1])
        config = describe(table_config(layer, num_rows))
        print(
            f"{layer.name:10} {num_rows:3} {ours:8.2f} {by_torch:8.2f} {floor:8.2f} "
            f"{ours - floor:7.2f} {'-' if l2 is None else f'{l2:.2f}':>7}  {config}",
            flush=True,
        )
        records.append(
            {
                "layer": layer.name,
                "rows": num_rows,
                "us": round(ours, 3),
                "torch_us": round(by_torch, 3),
                "floor_us": round(floor, 3),
                "l2_us": None if l2 is None else round(l2, 3),
                "config": config,
            }
        )
    return records


def measure_chain(
    model: str, rows: list[int], bandwidth: float, best: dict[tuple[str, int], SkinnyConfig | None]
) -> list[dict[str, Any]]:
    """Time a decoder layer's four linears in turn, per layer of 16, and print a line each.

    best: configurations by (layer, class of rows) to run beside those of the table.
    """
    layers = MODELS[model][:4]
    weights = {
        (layer, i): torch.randn(
            layer.num_weights, layer.num_in, dtype=torch.bfloat16, device="cuda"
        ).mul_(layer.num_in**-0.5)
        for layer in layers
        for i in range(NUM_LAYERS)
    }
    floor = sum(layer.weight_bytes for layer in layers) / bandwidth * 1e6
    records: list[dict[str, Any]] = []
    for num_rows in rows:
        inputs = [Inputs(layer, num_rows, "cuda") for layer in layers]
        configs = {
            "table": [table_config(layer, num_rows) for layer in layers],
            "tuned": [best.get((layer.name, row_class(num_rows))) for layer in layers],
        }
        configs["no early launch"] = configs["table"]

        def chain(how: str, inputs: Any = inputs, configs: Any = configs) -> Tensor:
            x: Tensor = inputs[0].x
            for i in range(NUM_LAYERS):
                for j, (layer, given) in enumerate(zip(layers, inputs, strict=True)):
                    weight = weights[layer, i]
                    # Attention would stand before o: its output is as wide as o takes.
                    x = x[:, : layer.num_in]
                    if how == "torch":
                        x = given.by_torch(weight, x=x)
                    else:
                        early = how != "no early launch"
                        x = given.ours(weight, configs[how][j], x=x, launch_pdl=early)
            return x

        kinds = ["table", "no early launch", "torch", *(["tuned"] if best else [])]
        us = {}
        for how in kinds:
            timing = time_graph([functools.partial(chain, how)], min_calls=1, budget_s=0.02)
            us[how] = round(timing.ms * 1e3 / NUM_LAYERS, 2)
        shown = ", ".join(f"{how} {value:.2f}" for how, value in us.items())
        print(f"{model} layer x{num_rows:<3} us: {shown}; floor {floor:.2f}", flush=True)
        records.append({"model": model, "rows": num_rows, "floor_us": round(floor, 2), "us": us})
    return records


def measure_chain2(
    model: str, bandwidth: float, best: dict[tuple[str, int], Config | None]
) -> list[dict[str, Any]]:
    """Time a decoder layer's four linears in turn by the fastest kernels, and print a line each.

    best: by (layer, rows), None for PyTorch.
    """
    layers = MODELS[model][:4]
    weights = {
        layer: [
            torch.randn(layer.num_weights, layer.num_in, dtype=torch.bfloat16, device="cuda").mul_(
                layer.num_in**-0.5
            )
            for _ in range(NUM_LAYERS)
        ]
        for layer in layers
    }
    floor = sum(layer.weight_bytes for layer in layers) / bandwidth * 1e6
    records: list[dict[str, Any]] = []
    for num_rows in CHAIN2_ROWS:
        inputs = [Inputs(layer, num_rows, "cuda") for layer in layers]
        fastest = [best[layer.name, num_rows] for layer in layers]
        early = [with_early_weights(config) for config in fastest]
        table = [table_config(layer, num_rows) for layer in layers]
        kinds: dict[str, tuple[list[Config | None], bool]] = {
            "no early launch": (fastest, False),
            "early launch": (fastest, True),
            "early weights": (early, True),
            "table": (table, True),
            "torch": ([None] * len(layers), False),
        }

        def chain(configs: list[Config | None], launch_pdl: bool, inputs: Any = inputs) -> Tensor:
            x: Tensor = inputs[0].x
            for i in range(NUM_LAYERS):
                for layer, given, config in zip(layers, inputs, configs, strict=True):
                    # Attention would stand before o: its output is as wide as o takes.
                    x, weight = x[:, : layer.num_in], weights[layer][i]
                    if config is None:
                        x = given.by_torch(weight, x=x)
                    else:
                        x = given.ours(weight, config, x=x, launch_pdl=launch_pdl)
            return x

        us = {}
        for how, kind in kinds.items():
            timing = time_graph([functools.partial(chain, *kind)], min_calls=1, budget_s=0.02)
            us[how] = round(timing.ms * 1e3 / NUM_LAYERS, 2)
        shown = ", ".join(f"{how} {value:.2f}" for how, value in us.items())
        print(f"{model} layer x{num_rows:<3} us: {shown}; floor {floor:.2f}", flush=True)
        records.append(
            {
                "model": model,
                "rows": num_rows,
                "floor_us": round(floor, 2),
                "us": us,
                "configs": [describe(config) for config in fastest],
            }
        )
    return records


@torch.inference_mode()
def run_second(args: argparse.Namespace, layers: list[Layer], rows: list[int]) -> dict[str, Any]:
    """Everything of --tune2 that runs on the GPU."""
    tuned: list[dict[str, Any]] = []
    best: dict[tuple[str, int], Config | None] = {}
    for layer in layers:
        by_name = {describe(c): c for num_rows in rows for c in candidates2(layer, num_rows)}
        weights = make_weights(layer)
        for record in tune_layer(layer, weights, rows, second=True):
            tuned.append(record)
            best[layer.name, record["rows"]] = by_name.get(next(iter(record["us"])))
        del weights
    chains: list[dict[str, Any]] = []
    if not args.no_chain and not args.layers and set(CHAIN2_ROWS) <= set(rows):
        for model in args.models:
            chains += measure_chain2(model, args.bandwidth, best)
    return {"tuned": tuned, "chains": chains}


def main() -> None:
    """Compile, tune if asked, measure, and print tables and JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--layers", nargs="+", help="names such as A.o; all if absent")
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--tune", action="store_true", help="time every candidate tile")
    parser.add_argument("--tune2", action="store_true", help="time gemm and gemv only")
    parser.add_argument("--no-chain", action="store_true")
    parser.add_argument("--bandwidth", type=float, default=4.25e12, help="bytes a second")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--part", help="i/n: only compile this share")
    args = parser.parse_args()
    started = time.perf_counter()
    layers = [
        layer
        for model in args.models
        for layer in MODELS[model]
        if not args.layers or layer.name in args.layers
    ]
    rows = args.rows or list(TUNED_ROWS[:3] if args.quick else ROWS)
    tuned_rows = [m for m in (args.rows or TUNED_ROWS) if m in rows]
    if args.tune2:
        rows = args.rows or list(TUNED2_ROWS)
    if args.part:
        work = jobs2(layers, rows) if args.tune2 else jobs(layers, rows, tune=args.tune)
        compile_share(work, args.part)
        return
    torch.manual_seed(0)
    compile_s = compile_all(sys.argv[1:], args.workers)
    print(f"compiled in {compile_s:.1f} s")
    if args.tune2:
        results = run_second(args, layers, rows)
    else:
        results = run_all(args, layers, rows, tuned_rows)
    finish("linear", {"compile_s": round(compile_s, 1), **results}, out=args.out, started=started)


@torch.inference_mode()
def run_all(
    args: argparse.Namespace, layers: list[Layer], rows: list[int], tuned_rows: list[int]
) -> dict[str, Any]:
    """Everything that runs on the GPU."""
    tuned: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    chains: list[dict[str, Any]] = []
    best: dict[tuple[str, int], SkinnyConfig | None] = {}
    for layer in layers:
        weights = make_weights(layer)
        if args.tune:
            tuned += tune_layer(layer, weights, tuned_rows)
            by_name = {
                describe(config): config for size in TILES for config in candidates(layer, size)
            }
            for record in tuned:
                if record["layer"] == layer.name:
                    fastest = next((n for n in record["us"] if n != "torch"), None)
                    best[layer.name, row_class(record["rows"])] = by_name.get(fastest or "")
        if layer is layers[0] or args.tune:
            print(f"{'layer':10} {'M':>3} {'ours':>8} {'torch':>8} {'floor':>8} {'over':>7} l2, us")
        measured += measure_layer(layer, weights, rows, args.bandwidth)
        del weights
    if not args.no_chain and not args.layers:
        for model in args.models:
            chains += measure_chain(model, rows, args.bandwidth, best)
    return {"tuned": tuned, "layers": measured, "chains": chains}


if __name__ == "__main__":
    main()
