"""Sequences in a poisoned paged cache, and what the specification says about them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu.plan import plan_attention as plan_gpu_attention
from nsa_kernels.metadata import BranchKV, LayerCache, build_metadata
from nsa_kernels.ops import Branches, CompressionMLP, nsa_attention, plan_attention
from nsa_kernels.spec import NSASpec

# A window page that a row has passed: whoever reads the entry, reads outside of the cache.
PASSED = 1 << 30

# Both sides compute in fp32; they differ in summation order over at most a few thousand terms.
FP32_TOLERANCE = 2e-5

PAPER = NSASpec(num_selected_blocks=4, window_size=96)
FLA = NSASpec(cmp_len=16, cmp_stride=16, block_size=16, num_selected_blocks=4, window_size=24)
LEGACY = NSASpec(
    cmp_len=8,
    cmp_stride=8,
    block_size=8,
    num_selected_blocks=8,
    num_init_blocks=0,
    num_local_blocks=1,
    window_size=13,
    selection="fla_legacy",
)
ODD = NSASpec(
    cmp_len=12,
    cmp_stride=4,
    block_size=12,
    num_selected_blocks=3,
    num_init_blocks=0,
    num_local_blocks=2,
    window_size=1,
)
NO_WINDOW = NSASpec(cmp_len=16, cmp_stride=8, block_size=32, num_selected_blocks=5, window_size=0)
MAX_POOL = NSASpec(num_selected_blocks=4, window_size=0, score_map="max_pool")
INFLLM = NSASpec(
    num_selected_blocks=4,
    window_size=0,
    score_map="max_pool",
    dense_len=300,
    lse_len=128,
    lse_stride=64,
)
SPECS = {
    "paper": PAPER,
    "fla": FLA,
    "legacy": LEGACY,
    "odd": ODD,
    "no_window": NO_WINDOW,
    "max_pool": MAX_POOL,
    "infllm": INFLLM,
}


@dataclass
class Problem:
    """Sequences with their keys in scattered pages of a cache that starts out as NaN.

    k_cmp .. v_swa are k and v themselves where the branches share keys and values.
    path: "torch", or "gpu" for the Triton kernels (in the interpreter where there is no GPU).
    dtype: of queries and new tokens, and of the cache unless that is FP8.
    """

    spec: NSASpec
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    k_cmp: list[Tensor]
    v_cmp: list[Tensor]
    k_swa: list[Tensor]
    v_swa: list[Tensor]
    gates: list[Tensor]
    cache: LayerCache
    pages: list[list[int]]
    swa_pages: list[list[int]]  # window pages, other ones than pages
    mlps: tuple[CompressionMLP, CompressionMLP] | None
    softmax_scale: float
    path: str
    dtype: torch.dtype

    @property
    def separate(self) -> bool:
        """Whether every branch has keys and values of its own."""
        return self.cache.k_swa is not None

    def run(
        self,
        starts: list[int],
        query_lens: list[int],
        *,
        rows: list[int] | None = None,
        num_decode_rows: int = 0,
        branches: Branches | None = None,
        gates: tuple[float, float, float] | None = None,
        gate_logits: bool = False,
    ) -> list[Tensor]:
        """Run one step that adds tokens [start, start + query_len) of the rows."""
        rows = list(range(len(self.q))) if rows is None else rows
        meta = build_metadata(
            [self.pages[row] for row in rows],
            starts,
            query_lens,
            self.spec,
            num_decode_rows=num_decode_rows,
            swa_pages=(
                [self.held_swa_pages(row, a) for row, a in zip(rows, starts, strict=True)]
                if self.separate
                else None
            ),
        )
        device = self.cache.k.device
        plan_path = plan_attention if self.path == "torch" else plan_gpu_attention
        plan = plan_path(
            meta,
            self.spec,
            num_q_heads=self.q[0].shape[1],
            num_kv_heads=self.k[0].shape[1],
            dtype=self.dtype,
            device=device,
            branches=branches,
            check_bounds=self.path == "gpu",
        )
        parts = list(zip(rows, starts, query_lens, strict=True))

        def step(tensors: list[Tensor]) -> Tensor:
            joined = torch.cat([tensors[row][a : a + n] for row, a, n in parts])
            return joined.to(device, self.dtype)

        output = nsa_attention(
            step(self.q),
            step(self.k),
            step(self.v),
            gates or step([torch.logit(g) for g in self.gates] if gate_logits else self.gates),
            self.cache,
            plan,
            self.spec,
            softmax_scale=self.softmax_scale,
            compression=self.mlps,
            branch_kv=(
                BranchKV(step(self.k_cmp), step(self.v_cmp), step(self.k_swa), step(self.v_swa))
                if self.separate
                else None
            ),
            sigmoid_gates=gate_logits,
        )
        return list(output.cpu().split(query_lens))

    def held_swa_pages(self, row: int, start: int) -> list[int]:
        """A sequence's window pages, without those that no query from `start` on reads."""
        first = max(0, start - max(self.spec.window_size, self.spec.cmp_len) + 1)
        num_passed = first // self.spec.block_size
        return [PASSED] * num_passed + self.swa_pages[row][num_passed:]

    def expected(self, row: int, start: int, stop: int, gates: Tensor | None = None) -> Tensor:
        """The specification's rows [start, stop) of one sequence."""
        spec, scale = self.spec, self.softmax_scale
        raw_k, raw_v = self.k_cmp[row][:stop], self.v_cmp[row][:stop]
        if self.mlps is None:
            k_cmp = reference.compress_mean(raw_k, spec)
            v_cmp = reference.compress_mean(raw_v, spec)
        else:
            mlps = [
                CompressionMLP(m.pos.cpu(), m.w1.cpu(), m.b1.cpu(), m.w2.cpu(), m.b2.cpu())
                for m in self.mlps
            ]
            k_cmp = reference.compress_mlp(raw_k, spec, mlps[0])
            v_cmp = reference.compress_mlp(raw_v, spec, mlps[1])
        q, positions = self.q[row][start:stop], torch.arange(start, stop)
        o_cmp, lse = reference.cmp_attention(q, k_cmp, v_cmp, positions, spec, softmax_scale=scale)
        if spec.lse_len:
            k_lse = reference.compress_mean(self.k[row][:stop], spec.coarse)
            lse = reference.selection_lse(q, k_lse, positions, spec, softmax_scale=scale)
        scores = reference.block_scores(
            q,
            k_cmp,
            lse,
            positions,
            spec,
            softmax_scale=scale,
            num_blocks=-(-stop // spec.block_size),
        )
        blocks = reference.select_blocks(scores, positions, spec)
        k, v = self.k[row][:stop], self.v[row][:stop]
        o_slc, _ = reference.slc_attention(q, k, v, blocks, positions, spec, softmax_scale=scale)
        k, v = self.k_swa[row][:stop], self.v_swa[row][:stop]
        o_swa, _ = reference.swa_attention(q, k, v, positions, spec, softmax_scale=scale)
        gates = self.gates[row][start:stop] if gates is None else gates
        return reference.combine(o_cmp, o_slc, o_swa, gates)


def make_problem(
    spec: NSASpec,
    lengths: list[int],
    *,
    heads: int = 2,
    group: int = 3,
    dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    mlp: bool = False,
    separate: bool = False,
    path: str = "torch",
    device: torch.device | None = None,
    seed: int = 0,
    scales: tuple[list[float], list[float]] | None = None,
) -> Problem:
    """Random sequences; the pages of all of them are shuffled together.

    scales: of keys and of values of each KV head, for an FP8 cache.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).float()

    size, entries = spec.block_size, spec.cmp_entries_per_page
    counts = [-(-length // size) for length in lengths]
    num_pages = sum(counts) + 3
    shuffled = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    pages = [[shuffled.pop() for _ in range(count)] for count in counts]
    swa_pages = [[num_pages - page for page in owned] for owned in pages]

    def poisoned(tokens: int, width: int, count: int = num_pages) -> Tensor:
        cache_dtype = dtype if scales is None else torch.float8_e4m3fn
        cache = torch.full((count, heads, tokens, width), torch.nan).to(cache_dtype)
        if path == "torch":
            cache[0] = 0  # the null page is readable
        return cache.to(device)

    cache = LayerCache(
        poisoned(size, dim),
        poisoned(size, v_dim),
        poisoned(entries, dim),
        poisoned(entries, v_dim),
        poisoned(size, dim) if separate else None,
        poisoned(size, v_dim) if separate else None,
        poisoned(spec.cmp_len, dim) if separate else None,
        poisoned(spec.cmp_len, v_dim) if separate else None,
        *(torch.tensor(scale, device=device) for scale in scales or ()),
        **({"k_lse": poisoned(size // spec.lse_stride, dim)} if spec.lse_len else {}),
    )

    def mlp_weights(width: int) -> CompressionMLP:
        shapes = (
            randn(spec.cmp_len, width),
            randn(24, spec.cmp_len * width) * 0.2,
            randn(24),
            randn(width, 24) * 0.2,
            randn(width),
        )
        return CompressionMLP(*(w.to(device, dtype) for w in shapes))

    k = [randn(n, heads, dim) for n in lengths]
    v = [randn(n, heads, v_dim) for n in lengths]

    def another(shared: list[Tensor]) -> list[Tensor]:
        return [randn(*x.shape) for x in shared] if separate else shared

    return Problem(
        spec=spec,
        q=[randn(n, heads * group, dim) * 2 for n in lengths],
        k=k,
        v=v,
        k_cmp=another(k),
        v_cmp=another(v),
        k_swa=another(k),
        v_swa=another(v),
        gates=[torch.sigmoid(randn(n, heads * group, 3)) for n in lengths],
        cache=cache,
        pages=pages,
        swa_pages=swa_pages,
        mlps=(mlp_weights(dim), mlp_weights(v_dim)) if mlp else None,
        softmax_scale=dim**-0.5,
        path=path,
        dtype=dtype,
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = FP32_TOLERANCE) -> None:
    """Relative error of the whole tensor, which also fails on NaN."""
    assert actual.shape == expected.shape
    error = (actual.float() - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance}"
