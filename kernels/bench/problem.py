"""The operator's inputs for the benches: geometries, shuffled paged caches, counts of bytes."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nsa_kernels import ops
from nsa_kernels.gpu import plan as gpu_plan
from nsa_kernels.metadata import BranchKV, LayerCache, build_metadata
from nsa_kernels.reference import CompressionMLP
from nsa_kernels.spec import NSASpec

GEOMETRIES = {
    "paper": NSASpec(),
    "fla": NSASpec(cmp_len=64, cmp_stride=64),
}
CACHE_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Numbers and widths of the heads, and the dtype of everything, or all but the cache.

    kv_per_branch: keys and values of its own for every branch. mlp_hidden_size: of the learned
    compression, 0 = the mean.
    """

    num_q_heads: int = 64
    num_kv_heads: int = 4
    head_dim: int = 128
    v_head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    kv_per_branch: bool = False
    mlp_hidden_size: int = 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, all KV heads."""
        itemsize = int((self.cache_dtype or self.dtype).itemsize)
        return self.num_kv_heads * (self.head_dim + self.v_head_dim) * itemsize

    @property
    def query_bytes_per_token(self) -> int:
        """Bytes of one token's queries, output and gates."""
        return self.num_q_heads * (self.head_dim + self.v_head_dim + 3) * int(self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class InputSet:
    """One layer's inputs: q [T, HQ, D], k [T, H, D], v [T, H, Dv], gates [T, HQ, 3], its cache."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    cache: LayerCache
    branch_kv: BranchKV | None = None
    compression: tuple[CompressionMLP, CompressionMLP] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One step over several layers of random data.

    plans: of the step, and for decode of the steps before it, until the cadence of compression (one
    window closes every cmp_stride tokens) has passed once; calls take turns.
    """

    spec: NSASpec
    heads: Heads
    plans: list[ops.AttnPlan]
    pages: list[list[int]]
    sets: list[InputSet] = field(default_factory=list)

    @property
    def plan(self) -> ops.AttnPlan:
        """Plan of the step itself."""
        return self.plans[0]

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(D)."""
        return float(self.heads.head_dim**-0.5)

    def run(self, inputs: InputSet, plan: "ops.AttnPlan | None" = None) -> Tensor:
        """Run the whole operator, from appending to the gated sum: [T, HQ, Dv]."""
        return ops.nsa_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.gates,
            inputs.cache,
            plan or self.plan,
            self.spec,
            softmax_scale=self.softmax_scale,
            compression=inputs.compression,
            branch_kv=inputs.branch_kv,
        )

    def calls(self) -> list[Callable[[], Tensor]]:
        """Callables that go through input sets and plans. A repeated step rewrites its slots."""
        num_calls = max(len(self.sets), len(self.plans))
        turns = [
            (self.sets[i % len(self.sets)], self.plans[i % len(self.plans)])
            for i in range(num_calls)
        ]
        return [lambda turn=turn: self.run(*turn) for turn in turns]  # type: ignore[misc]


def make_problem(
    spec: NSASpec,
    heads: Heads,
    *,
    starts: Sequence[int],
    query_lens: Sequence[int],
    num_sets: int = 1,
    device: str = "cuda",
    seed: int = 0,
) -> Problem:
    """Random layers in which row b holds starts[b] tokens and query_lens[b] more are added.

    If every row adds one token the step is a decode step, else all rows are prefill chunks. The
    rows' pages are a random permutation of the whole pool.
    """
    is_decode = all(length == 1 for length in query_lens)
    size, rng = spec.block_size, random.Random(seed)
    counts = [math.ceil((a + n) / size) for a, n in zip(starts, query_lens, strict=True)]
    pages = _shuffled_pages(counts, [0] * len(counts), rng)
    # Shorter than a stride, rows would run out of tokens.
    num_plans = min(spec.cmp_stride, min(starts) + 1) if is_decode else 1
    swa_pages = None
    if heads.kv_per_branch:
        # From the oldest token that the earliest of the steps can see.
        seen = spec.window_size + num_plans
        swa_pages = _shuffled_pages(counts, [max(0, a - seen) // size for a in starts], rng)
    metas = [
        build_metadata(
            pages,
            [start - i for start in starts],
            query_lens,
            spec,
            num_decode_rows=len(pages) if is_decode else 0,
            swa_pages=swa_pages,
        )
        for i in range(num_plans)
    ]
    # Kernels, where ops would choose by the device: to compile or interpret them without a GPU.
    plan_attention = ops.plan_attention if device == "cuda" else gpu_plan.plan_attention
    plans = [
        plan_attention(
            meta,
            spec,
            num_q_heads=heads.num_q_heads,
            num_kv_heads=heads.num_kv_heads,
            dtype=heads.dtype,
            device=torch.device(device),
        )
        for meta in metas
    ]
    make = _InputMaker(spec, heads, sum(query_lens), device, seed)
    num_pages = (_num_pages(pages), _num_pages(swa_pages or []))
    sets = [make.input_set(*num_pages) for _ in range(num_sets)]
    return Problem(spec=spec, heads=heads, plans=plans, pages=pages, sets=sets)


def _shuffled_pages(
    counts: Sequence[int], firsts: Sequence[int], rng: random.Random
) -> list[list[int]]:
    """Rows of so many pages in random order, the null page before the first."""
    free = list(range(1, sum(counts) - sum(firsts) + 1))
    rng.shuffle(free)
    return [
        [0] * first + [free.pop() for _ in range(count - first)]
        for count, first in zip(counts, firsts, strict=True)
    ]


def _num_pages(pages: Sequence[Sequence[int]]) -> int:
    """Pages of a pool that holds these rows and the null page."""
    return 1 + sum(page > 0 for row in pages for page in row)


class _InputMaker:
    """Makes random input sets."""

    def __init__(
        self, spec: NSASpec, heads: Heads, num_tokens: int, device: str, seed: int
    ) -> None:
        self.spec, self.heads, self.num_tokens, self.device = spec, heads, num_tokens, device
        self.generator = None
        if device != "meta":
            self.generator = torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(
            *shape, dtype=self.heads.dtype, device=self.device, generator=self.generator
        )

    def mlp(self, width: int) -> CompressionMLP:
        hidden, inner = self.heads.mlp_hidden_size, self.spec.cmp_len * width
        return CompressionMLP(
            self.randn(self.spec.cmp_len, width),
            self.randn(hidden, inner) * inner**-0.5,
            self.randn(hidden),
            self.randn(width, hidden) * hidden**-0.5,
            self.randn(width),
        )

    def pages(self, num_pages: int, tokens: int) -> tuple[Tensor, Tensor]:
        heads = self.heads
        k, v = (
            self.randn(num_pages, heads.num_kv_heads, tokens, width).to(
                heads.cache_dtype or heads.dtype
            )
            for width in (heads.head_dim, heads.v_head_dim)
        )
        return k, v

    def kv(self) -> tuple[Tensor, Tensor]:
        heads = self.heads
        return (
            self.randn(self.num_tokens, heads.num_kv_heads, heads.head_dim),
            self.randn(self.num_tokens, heads.num_kv_heads, heads.v_head_dim),
        )

    def input_set(self, num_pages: int, num_swa_pages: int) -> InputSet:
        spec, heads = self.spec, self.heads
        scale = None
        if heads.cache_dtype is not None:
            scale = torch.ones(heads.num_kv_heads, dtype=torch.float32, device=self.device)
        q = self.randn(self.num_tokens, heads.num_q_heads, heads.head_dim)
        k, v = self.kv()
        gates = torch.sigmoid(self.randn(self.num_tokens, heads.num_q_heads, 3))
        cache = LayerCache(
            *self.pages(num_pages, spec.block_size),
            *self.pages(num_pages, spec.cmp_entries_per_page),
            k_scale=scale,
            v_scale=scale,
        )
        branch_kv = None
        if heads.kv_per_branch:
            k_swa, v_swa = self.pages(num_swa_pages, spec.block_size)
            k_tail, v_tail = self.pages(num_swa_pages, spec.cmp_len)
            cache = replace(cache, k_swa=k_swa, v_swa=v_swa, k_tail=k_tail, v_tail=v_tail)
            branch_kv = BranchKV(*self.kv(), *self.kv())
        mlps = None
        if heads.mlp_hidden_size:
            mlps = self.mlp(heads.head_dim), self.mlp(heads.v_head_dim)
        return InputSet(q, k, v, gates, cache, branch_kv, mlps)


def decode_tokens(spec: NSASpec, context: int) -> tuple[float, int]:
    """Raw tokens and compressed entries that one decode row has to read, at least.

    Branches share keys and values. Raw: the union of selected blocks and window. A free choice lies
    inside the window as often as one made at random.
    """
    size = spec.block_size
    num_blocks = math.ceil(context / size)
    window_blocks = spec.window_size / size
    forced = spec.num_init_blocks + spec.num_local_blocks
    if num_blocks <= spec.num_selected_blocks:
        return float(context), spec.num_windows(context)
    new_in_window = max(0.0, window_blocks - spec.num_local_blocks)
    free = spec.num_selected_blocks - forced
    both = free * new_in_window / (num_blocks - forced)
    blocks = spec.num_selected_blocks + new_in_window - both
    return min(float(context), blocks * size), spec.num_windows(context)


def decode_bytes(spec: NSASpec, heads: Heads, batch: int, context: int) -> float:
    """Bytes that one decode step has to move, at least: keys and values, queries, output."""
    raw, entries = decode_tokens(spec, context)
    if heads.kv_per_branch:
        selected = min(context, spec.num_selected_blocks * spec.block_size)
        raw = float(selected + min(context, spec.window_size))
    return batch * ((raw + entries) * heads.kv_bytes_per_token + heads.query_bytes_per_token)


def dense_decode_bytes(heads: Heads, batch: int, context: int) -> float:
    """Bytes that dense attention has to move in a decode step."""
    return batch * float(context * heads.kv_bytes_per_token + heads.query_bytes_per_token)


def prefill_flops(spec: NSASpec, heads: Heads, length: int, start: int = 0) -> float:
    """Operations that the three branches need for the queries at start .. length - 1.

    A visible (query, key) pair costs 2 (D + Dv) a head; scores are counted once, pooling and
    selection not at all.
    """
    positions = torch.arange(start, length, dtype=torch.int64)
    seen = positions + 1
    windows = ((seen - spec.cmp_len).div(spec.cmp_stride, rounding_mode="floor") + 1).clamp(min=0)
    whole_blocks = (spec.num_selected_blocks - 1) * spec.block_size
    selected = torch.minimum(seen, whole_blocks + positions % spec.block_size + 1)
    pairs = windows + selected + seen.clamp(max=spec.window_size)
    per_pair = 2 * (heads.head_dim + heads.v_head_dim) * heads.num_q_heads
    return float(pairs.sum()) * per_pair


def dense_prefill_flops(heads: Heads, length: int) -> float:
    """Operations of causal dense attention over `length` tokens."""
    pairs = length * (length + 1) / 2
    return pairs * 2 * (heads.head_dim + heads.v_head_dim) * heads.num_q_heads
