"""The paged operators against the fp32 specification, over ugly sizes and every dialect."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.metadata import LayerCache, build_metadata
from nsa_kernels.ops import Branches, CompressionMLP, nsa_attention, plan_attention
from nsa_kernels.spec import NSASpec

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
SPECS = {
    "paper": PAPER,
    "fla": FLA,
    "legacy": LEGACY,
    "odd": ODD,
    "no_window": NO_WINDOW,
    "max_pool": MAX_POOL,
}


@dataclass
class Problem:
    """Sequences with their keys in scattered pages of a cache that starts out as NaN."""

    spec: NSASpec
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    gates: list[Tensor]
    cache: LayerCache
    pages: list[list[int]]
    mlps: tuple[CompressionMLP, CompressionMLP] | None
    softmax_scale: float

    def run(
        self,
        starts: list[int],
        query_lens: list[int],
        *,
        rows: list[int] | None = None,
        num_decode_rows: int = 0,
        branches: Branches | None = None,
        gates: tuple[float, float, float] | None = None,
    ) -> list[Tensor]:
        """Run one step that adds tokens [start, start + query_len) of the rows."""
        rows = list(range(len(self.q))) if rows is None else rows
        meta = build_metadata(
            [self.pages[row] for row in rows],
            starts,
            query_lens,
            self.spec,
            num_decode_rows=num_decode_rows,
        )
        heads = self.k[0].shape[1]
        plan = plan_attention(
            meta, self.spec, num_kv_heads=heads, dtype=self.cache.k.dtype, branches=branches
        )
        parts = list(zip(rows, starts, query_lens, strict=True))

        def step(tensors: list[Tensor]) -> Tensor:
            joined = torch.cat([tensors[row][a : a + n] for row, a, n in parts])
            return joined.to(self.cache.k.dtype)

        output = nsa_attention(
            step(self.q),
            step(self.k),
            step(self.v),
            gates or step(self.gates),
            self.cache,
            plan,
            self.spec,
            softmax_scale=self.softmax_scale,
            compression=self.mlps,
        )
        return list(output.split(query_lens))

    def expected(self, row: int, start: int, stop: int, gates: Tensor | None = None) -> Tensor:
        """The specification's rows [start, stop) of one sequence."""
        k, v = self.k[row][:stop], self.v[row][:stop]
        if self.mlps is None:
            k_cmp = reference.compress_mean(k, self.spec)
            v_cmp = reference.compress_mean(v, self.spec)
        else:
            k_cmp = reference.compress_mlp(k, self.spec, self.mlps[0])
            v_cmp = reference.compress_mlp(v, self.spec, self.mlps[1])
        return reference.nsa_attention(
            self.q[row][start:stop],
            k,
            v,
            k_cmp,
            v_cmp,
            self.gates[row][start:stop] if gates is None else gates,
            torch.arange(start, stop),
            self.spec,
            softmax_scale=self.softmax_scale,
        )


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
    seed: int = 0,
) -> Problem:
    """Random sequences; the pages of all of them are shuffled together."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).float()

    size, entries = spec.block_size, spec.cmp_entries_per_page
    counts = [-(-length // size) for length in lengths]
    num_pages = sum(counts) + 3
    shuffled = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    pages = [[shuffled.pop() for _ in range(count)] for count in counts]

    def poisoned(tokens: int, width: int) -> Tensor:
        cache = torch.full((num_pages, heads, tokens, width), torch.nan, dtype=dtype)
        cache[0] = 0  # the null page is readable
        return cache

    cache = LayerCache(
        poisoned(size, dim), poisoned(size, v_dim), poisoned(entries, dim), poisoned(entries, v_dim)
    )
    mlps = None
    if mlp:
        mlps = tuple(
            CompressionMLP(
                randn(spec.cmp_len, width),
                randn(24, spec.cmp_len * width) * 0.2,
                randn(24),
                randn(width, 24) * 0.2,
                randn(width),
            )
            for width in (dim, v_dim)
        )
    return Problem(
        spec=spec,
        q=[randn(n, heads * group, dim) * 2 for n in lengths],
        k=[randn(n, heads, dim) for n in lengths],
        v=[randn(n, heads, v_dim) for n in lengths],
        gates=[torch.sigmoid(randn(n, heads * group, 3)) for n in lengths],
        cache=cache,
        pages=pages,
        mlps=mlps,
        softmax_scale=dim**-0.5,
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = FP32_TOLERANCE) -> None:
    """Relative error of the whole tensor, which also fails on NaN."""
    assert actual.shape == expected.shape
    error = (actual.float() - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance}"


@pytest.mark.parametrize("name", SPECS)
def test_whole_prefill_of_ragged_rows(name: str) -> None:
    spec = SPECS[name]
    lengths = [1, spec.cmp_len - 1, spec.cmp_len, spec.block_size + 1, 63, 111, 333]
    problem = make_problem(spec, lengths)
    outputs = problem.run([0] * len(lengths), lengths)
    for row, length in enumerate(lengths):
        assert_close(outputs[row], problem.expected(row, 0, length))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_chunks_equal_the_whole(name: str, chunk: int) -> None:
    problem = make_problem(SPECS[name], [259])
    parts = []
    for start in range(0, 259, chunk):
        parts += problem.run([start], [min(chunk, 259 - start)])
    assert_close(torch.cat(parts), problem.expected(0, 0, 259))


@pytest.mark.parametrize("name", SPECS)
def test_decode_continues_a_prefill_across_every_boundary(name: str) -> None:
    spec = SPECS[name]
    prompt, steps = 3 * spec.block_size - 2, 2 * spec.block_size + 5
    problem = make_problem(spec, [prompt + steps])
    problem.run([0], [prompt])
    outputs = [problem.run([prompt + i], [1], num_decode_rows=1)[0] for i in range(steps)]
    assert_close(torch.cat(outputs), problem.expected(0, prompt, prompt + steps))


@pytest.mark.parametrize("name", SPECS)
def test_decode_rows_and_chunks_share_a_step(name: str) -> None:
    spec = SPECS[name]
    lengths = [5, 40, 300, 301, 150]
    starts = [4, 39, 299, 0, 130]
    problem = make_problem(spec, lengths)
    for row, start in enumerate(starts):
        if start:
            problem.run([0], [start], rows=[row])
    query_lens = [length - start for length, start in zip(lengths, starts, strict=True)]
    outputs = problem.run(starts, query_lens, num_decode_rows=3)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert_close(outputs[row], problem.expected(row, start, length))


@pytest.mark.parametrize("group", [1, 3, 8, 16])
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (60, 60), (192, 128)])
def test_group_sizes_and_head_dims(group: int, dim: int, v_dim: int) -> None:
    problem = make_problem(PAPER, [401], group=group, dim=dim, v_dim=v_dim, seed=group)
    problem.run([0], [400])
    assert_close(problem.run([400], [1], num_decode_rows=1)[0], problem.expected(0, 400, 401))
    problem = make_problem(PAPER, [401], group=group, dim=dim, v_dim=v_dim, seed=group)
    assert_close(problem.run([0], [401])[0], problem.expected(0, 0, 401))


@pytest.mark.parametrize("name", ["paper", "fla", "odd"])
def test_learned_compression(name: str) -> None:
    problem = make_problem(SPECS[name], [230], mlp=True)
    problem.run([0], [129])
    outputs = problem.run([129], [100])
    assert_close(outputs[0], problem.expected(0, 129, 229))
    assert_close(problem.run([229], [1], num_decode_rows=1)[0], problem.expected(0, 229, 230))


CONSTANT_GATES = [g for g in itertools.product((0.0, 1.0, 0.5), repeat=3) if any(g)][::4]


@pytest.mark.parametrize("gates", CONSTANT_GATES)
def test_constant_gates_skip_unused_branches(gates: tuple[float, float, float]) -> None:
    problem = make_problem(PAPER, [330, 41])
    branches = Branches(*(gate != 0.0 for gate in gates))
    full = torch.tensor(gates).expand(330, 6, 3)
    outputs = problem.run([0, 0], [329, 41], branches=branches, gates=gates)
    assert_close(outputs[0], problem.expected(0, 0, 329, full[:329]))
    assert_close(outputs[1], problem.expected(1, 0, 41, full[:41]))
    last = problem.run([329], [1], rows=[0], num_decode_rows=1, branches=branches, gates=gates)
    assert_close(last[0], problem.expected(0, 329, 330, full[:1]))


@pytest.mark.parametrize("name", SPECS)
def test_equal_scores_choose_the_lower_block(name: str) -> None:
    """Zero keys and 2^k windows: all probabilities are the same power of two, so ties are exact.

    The values differ, so a query that chose other blocks among the tied has another output.
    """
    spec = SPECS[name]
    length = 63 * spec.cmp_stride + spec.cmp_len
    assert spec.num_windows(length) == 64
    problem = make_problem(spec, [length])
    problem.k[0].zero_()
    expected = problem.expected(0, length - 1, length)
    problem.run([0], [length - 1])
    assert_close(problem.run([length - 1], [1], num_decode_rows=1)[0], expected)
    problem.run([0], [length // 2])
    assert_close(problem.run([length // 2], [length - length // 2])[0][-1:], expected)


def test_bfloat16_stays_near_the_specification() -> None:
    # bf16 rounds scores and probabilities to 8 bits: 1e-2 on the whole is what that costs. The
    # selection is kept out of it by making all blocks selected.
    spec = NSASpec(num_selected_blocks=16, window_size=96)
    problem = make_problem(spec, [500], dim=64, v_dim=64, dtype=torch.bfloat16)
    problem.run([0], [499])
    last = problem.run([499], [1], num_decode_rows=1)[0]
    assert_close(last, problem.expected(0, 499, 500), tolerance=1e-2)


def test_nothing_but_own_pages_is_read_or_written() -> None:
    problem = make_problem(PAPER, [300, 300])
    problem.run([0], [300], rows=[0])
    owned = set(problem.pages[0])
    for tensor in (problem.cache.k, problem.cache.v, problem.cache.k_cmp, problem.cache.v_cmp):
        for page in range(1, tensor.shape[0]):
            if page not in owned:
                assert tensor[page].isnan().all(), f"page {page} was written"


def test_wrong_shapes_name_the_tensor() -> None:
    problem = make_problem(FLA, [20])
    problem.v[0] = problem.v[0][..., :8]
    with pytest.raises(ValueError, match=r"v must have shape \(20, 2, 16\), got \(20, 2, 8\)"):
        problem.run([0], [20])
    with pytest.raises(ValueError, match="row 0 has 40 tokens but 2 pages of 16"):
        build_metadata([[1, 2]], [0], [40], FLA)
