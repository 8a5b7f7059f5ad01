"""Attention of few decode rows between the linear layers around it: one kernel against three.

    python kernels/bench/decode_latency.py [--geometry a b] [--steps 2048x1 ...] [--max-seconds 24]
                                           [--tune] [--out FILE.json]

A CUDA graph holds 16 layers, of each: the projection in front, the attention, the projection after
it, every one of which depends on the one before. "none" has the projections alone; all figures are
microseconds a layer more than that. "three" and "three, waits" are the three kernels, with and
without the next layer's early start under the last; "cmp" and "cmp, select" are the first of them.
"short" is `decode_short`, where the rule allows it, and "short, waits" waits before it reads.
"error": of one layer's output against "three, waits". Steps that find no time are left out, and
said so. A cache is read again by a later layer where all would take more than 4 GB.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from timing import finish, make_parser, time_graph
from torch import Tensor

from nsa_kernels.gpu import attention
from nsa_kernels.gpu.decode_cmp import decode_cmp
from nsa_kernels.gpu.decode_short import ShortLimits, can_decode_short, decode_short
from nsa_kernels.gpu.linear import linear
from nsa_kernels.gpu.plan import GpuPlan, plan_decode
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec
from nsa_kernels.torch_plan import Branches

NUM_LAYERS = 16
CACHE_BYTES = 4 << 30
BUDGET_S = 0.06


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model's attention: spec, width of the stream, query heads, KV heads, width of a head."""

    spec: NSASpec
    hidden: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


GEOMETRIES = {
    "a": Geometry(
        NSASpec(
            cmp_len=16,
            cmp_stride=16,
            block_size=16,
            num_init_blocks=0,
            num_local_blocks=1,
            window_size=128,
            selection="fla_legacy",
        ),
        2048,
        32,
        2,
        64,
    ),
    "b": Geometry(NSASpec(), 2560, 64, 4, 128),
}
# Contexts and rows, the most wanted first.
STEPS = ["2048x1", "2048x8", "65536x1", "32768x8", "65536x8", "8192x32", "65536x32"]


class Stack:
    """The layers of one step on random data; contexts end where a window does not close."""

    def __init__(self, geometry: Geometry, context: int, rows: int) -> None:
        spec, device = geometry.spec, torch.device("cuda")
        self.geometry, self.rows = geometry, rows
        q_width = geometry.num_q_heads * geometry.head_dim
        kv_width = geometry.num_kv_heads * geometry.head_dim
        self.edges = [q_width, kv_width, kv_width, geometry.num_q_heads * 3]
        make = functools.partial(torch.randn, dtype=torch.bfloat16, device=device)
        scale = geometry.hidden**-0.5
        self.norm = (torch.ones(geometry.hidden, dtype=torch.bfloat16, device=device), 1e-6)
        self.weights = [
            (
                make(sum(self.edges), geometry.hidden).mul_(scale),
                make(geometry.hidden, q_width).mul_(0.1 * q_width**-0.5),
            )
            for _ in range(NUM_LAYERS)
        ]
        self.x = make(rows, geometry.hidden)
        num_pages = context // spec.block_size
        pool = rows * num_pages + 1
        entries, size = spec.cmp_entries_per_page, spec.block_size
        token_bytes = 4 * kv_width
        cache_bytes = pool * (size + entries) * token_bytes
        self.caches = [
            LayerCache(
                *(
                    make(pool, geometry.num_kv_heads, tokens, geometry.head_dim)
                    for tokens in (size, size, entries, entries)
                )
            )
            for _ in range(max(1, min(NUM_LAYERS, CACHE_BYTES // cache_bytes)))
        ]
        table = torch.randperm(pool - 1, device=device).add_(1).to(torch.int32)
        seq_lens = torch.full((rows,), context - 3, dtype=torch.int32, device=device)
        self.plan = plan_decode(
            seq_lens,
            seq_lens - 1,
            table.view(rows, num_pages),
            torch.zeros(2, rows * geometry.num_q_heads, dtype=torch.int32, device=device),
            spec,
            num_q_heads=geometry.num_q_heads,
            branches=Branches(),
            is_settled=True,
        )
        self.fixed = make(rows, q_width)

    def split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split a projection: q, k, v [rows, heads, D] and the gates' logits [rows, HQ, 3]."""
        q, k, v, gates = fused.split(self.edges, dim=1)
        width = self.geometry.head_dim
        q, k, v = (part.unflatten(1, (-1, width)) for part in (q, k, v))
        return q, k, v, gates.unflatten(1, (-1, 3))

    def run(self, attend: "Attend") -> Tensor:
        """All layers."""
        x = self.x
        for layer, (first, last) in enumerate(self.weights):
            fused = linear(x, first, norm=self.norm)
            o = attend(fused, self.caches[layer % len(self.caches)])
            x = linear(o, last, residual=x)
        return x

    def one(self, attend: "Attend") -> Tensor:
        """The attention of the first layer."""
        out = attend(linear(self.x, self.weights[0][0], norm=self.norm), self.caches[0]).float()
        torch.cuda.synchronize()
        return out

    def operator(self, plan: GpuPlan, **tuning: Any) -> "Attend":
        """Return how a layer attends under `plan`; tuning: of `decode_short`."""
        scale = self.geometry.head_dim**-0.5

        def attend(fused: Tensor, cache: LayerCache) -> Tensor:
            attention.decode_short = functools.partial(decode_short, **tuning)
            q, k, v, gates = self.split(fused)
            spec = self.geometry.spec
            out = attention.nsa_attention(
                q, k, v, gates, cache, plan, spec, softmax_scale=scale, sigmoid_gates=True
            )
            attention.decode_short = decode_short
            return out.flatten(1)

        return attend

    def first_kernels(self, *, with_selection: bool) -> "Attend":
        """Return the stage that appends and compresses, and selection after it if wanted.

        The projection after it reads what nobody writes, and still waits for the stage.
        """
        plan, heads = self.plan, self.geometry.num_kv_heads
        early = plan.use_pdl and self.rows * heads <= attention.MAX_PDL_GROUPS

        def attend(fused: Tensor, cache: LayerCache) -> Tensor:
            q, k, v, _ = self.split(fused)
            decode_cmp(
                q,
                k,
                v,
                cache,
                plan.seq_lens,
                plan.page_table,
                self.geometry.spec,
                softmax_scale=self.geometry.head_dim**-0.5,
                counters=plan.counters[0],
                num_sms=plan.num_sms,
                shape=plan.decode_shape,
                with_selection=with_selection,
                launch_pdl=early,
                start_next=with_selection and plan.use_pdl,
            )
            return self.fixed

        return attend

    def modes(self, *, tune: bool) -> dict[str, "Attend"]:
        """What is measured, by name; "none" first."""
        plan, width = self.plan, self.edges[0]
        three = replace(plan, short_limits=ShortLimits(pages=0))
        modes: dict[str, Attend] = {
            "none": lambda fused, cache: fused[:, :width],
            "three, waits": self.operator(replace(three, start_after=False)),
            "three": self.operator(three),
        }
        is_short = can_decode_short(
            self.geometry.spec,
            self.caches[0],
            plan.branches,
            dtype=torch.bfloat16,
            num_q_heads=self.geometry.num_q_heads,
            shape=plan.decode_shape,
            limits=plan.short_limits,
        )
        if is_short:
            modes["short"] = self.operator(plan)
            modes["short, waits"] = self.operator(replace(plan, is_settled=False))
        if is_short and tune:
            for warps, registers in ((8, 192), (8, 160), (8, 128), (16, None), (16, 96)):
                name = f"short, {warps} warps, {registers} registers"
                modes[name] = self.operator(plan, num_warps=warps, max_registers=registers)
        modes["cmp"] = self.first_kernels(with_selection=False)
        modes["cmp, select"] = self.first_kernels(with_selection=True)
        return modes


Attend = Callable[[Tensor, LayerCache], Tensor]


def measure(
    geometry: Geometry, context: int, rows: int, *, tune: bool, deadline: float
) -> dict[str, Any]:
    """Time every mode of one step, until the deadline: microseconds a layer."""
    stack = Stack(geometry, context, rows)
    modes = stack.modes(tune=tune)
    expected = stack.one(modes["three, waits"])
    row: dict[str, Any] = {"us": {}, "how": {}, "error": {}, "spread": {}}
    base = 0.0
    for name, attend in modes.items():
        if name != "none" and time.perf_counter() > deadline:
            break
        if name.startswith(("three", "short")):
            error = (stack.one(attend) - expected).norm() / expected.norm()
            row["error"][name] = float(error)
        timing = time_graph([functools.partial(stack.run, attend)], min_calls=1, budget_s=BUDGET_S)
        layer_us = timing.ms * 1e3 / NUM_LAYERS
        if name == "none":
            base = row["base_us"] = layer_us
        else:
            row["us"][name] = layer_us - base
        row["how"][name], row["spread"][name] = timing.how, timing.spread
    return row


def main() -> None:
    """Measure the steps, print the table and the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--geometry", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--steps", nargs="+", default=STEPS, help="contexts x rows")
    parser.add_argument("--max-seconds", type=float, default=24.0)
    parser.add_argument("--tune", action="store_true", help="warps and registers of decode_short")
    args = parser.parse_args()
    started = time.perf_counter()
    deadline = started + args.max_seconds - 2.0
    torch.manual_seed(0)
    rows, left_out = [], []
    for geometry in args.geometry:
        for step in args.steps:
            if time.perf_counter() > deadline:
                left_out.append(f"{geometry} {step}")
                continue
            context, num_rows = map(int, step.split("x"))
            row = measure(
                GEOMETRIES[geometry], context, num_rows, tune=args.tune, deadline=deadline
            )
            rows.append({"geometry": geometry, "context": context, "rows": num_rows, **row})
            print(f"{geometry} {context} x {num_rows}: projections alone {row['base_us']:.1f} us")
            for name, us in row["us"].items():
                error = f"  error {row['error'][name]:.1e}" if name in row["error"] else ""
                how = row["how"][name]
                print(f"    {name:34} {us:8.2f}{error}{'' if how == 'graph' else '  ' + how}")
            torch.cuda.empty_cache()
    print("left out:", ", ".join(left_out) or "nothing")
    results = {"num_layers": NUM_LAYERS, "rows": rows, "left_out": left_out}
    finish("decode_latency", results, out=args.out, started=started)


if __name__ == "__main__":
    main()
