"""Prefill compression attention and its score units against the fp32 specification."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu.common import prefill_block_q, score_tile_entries
from nsa_kernels.gpu.prefill_cmp import CmpScores, prefill_cmp
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE

# fp32 differs in summation order alone; bf16 and fp16 round probabilities and outputs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}

PAPER = NSASpec(num_selected_blocks=4)
SPECS = {
    "paper": PAPER,
    "fla": NSASpec(cmp_len=16, cmp_stride=16, block_size=16, num_selected_blocks=4),
    "small": NSASpec(cmp_len=8, cmp_stride=4, block_size=8, num_selected_blocks=4),
    "no_overlap": NSASpec(cmp_len=16, cmp_stride=16, block_size=128, num_selected_blocks=4),
    "wide": NSASpec(cmp_len=32, cmp_stride=8, block_size=32, num_selected_blocks=4),
    "max_pool": NSASpec(num_selected_blocks=4, score_map="max_pool"),
}


@dataclass
class Problem:
    """A step of rows whose compressed keys lie in scattered pages of a cache of NaN."""

    spec: NSASpec
    cache: LayerCache
    q: Tensor  # [T, HQ, D]
    windows: list[tuple[Tensor, Tensor]]  # of each row: k_cmp [N, H, D], v_cmp [N, H, Dv]
    starts: list[int]
    query_lens: list[int]
    page_table: Tensor
    softmax_scale: float

    @property
    def seq_lens(self) -> list[int]:
        """Tokens of every row after the step."""
        return [start + n for start, n in zip(self.starts, self.query_lens, strict=True)]

    @property
    def num_score_tiles(self) -> int:
        """Score tiles of the longest row."""
        entries = self.spec.cmp_entries_per_page
        return -(
            -max(self.seq_lens) // (self.spec.block_size * score_tile_entries(entries) // entries)
        )

    def run(self, first: int = 0, end: int | None = None, **options: Any) -> CmpScores:
        """Run the kernel on the prefill tiles that start in [first, end)."""
        cu_seqlens = [0]
        for n in self.query_lens:
            cu_seqlens.append(cu_seqlens[-1] + n)
        end = cu_seqlens[-1] if end is None else end
        block_q = prefill_block_q(self.q.shape[1] // self.cache.k.shape[1])
        tiles = [
            (row, start)
            for row, n in enumerate(self.query_lens)
            for start in range(cu_seqlens[row], cu_seqlens[row] + n, block_q)
            if first <= start < end
        ]
        int32 = {"dtype": torch.int32, "device": DEVICE}
        return prefill_cmp(
            self.q,
            self.cache,
            torch.tensor([row for row, _ in tiles], **int32),
            torch.tensor([start for _, start in tiles], **int32),
            torch.tensor(cu_seqlens, **int32),
            torch.tensor(self.seq_lens, **int32),
            self.page_table,
            self.spec,
            softmax_scale=self.softmax_scale,
            first_token=first,
            num_tokens=end - first,
            num_score_tiles=options.pop("num_score_tiles", self.num_score_tiles),
            check=options.pop("check", True),
            **options,
        )


def make_problem(
    spec: NSASpec,
    starts: list[int],
    query_lens: list[int],
    *,
    heads: int = 2,
    group: int = 3,
    dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """Random queries and compressed entries; a query is a view of one fused projection."""
    generator = torch.Generator().manual_seed(sum(query_lens) + group)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_entries, strides = spec.cmp_entries_per_page, spec.strides_per_window
    counts = [-(-(a + n) // spec.block_size) for a, n in zip(starts, query_lens, strict=True)]
    num_pages = sum(counts) + 3
    free = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    page_table = torch.zeros(len(starts), max(counts), dtype=torch.int32)
    k_cmp = torch.full((num_pages, heads, num_entries, dim), torch.nan, dtype=dtype)
    v_cmp = torch.full((num_pages, heads, num_entries, v_dim), torch.nan, dtype=dtype)
    windows = []
    for row, count in enumerate(counts):
        page_table[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        num_windows = spec.num_windows(starts[row] + query_lens[row])
        k, v = randn(num_windows, heads, dim), randn(num_windows, heads, v_dim)
        entry = torch.arange(num_windows) + strides - 1
        page = page_table[row, entry // num_entries].long()
        k_cmp[page, :, entry % num_entries] = k
        v_cmp[page, :, entry % num_entries] = v
        windows.append((k, v))
    fused = randn(sum(query_lens), heads * group + 2, dim + 8) * 2
    kv = torch.zeros(num_pages, heads, spec.block_size, 1, device=DEVICE)
    return Problem(
        spec=spec,
        cache=LayerCache(kv, kv, k_cmp.to(DEVICE), v_cmp.to(DEVICE)),
        q=fused.to(DEVICE)[:, 1:-1, :dim],
        windows=windows,
        starts=starts,
        query_lens=query_lens,
        page_table=page_table.to(DEVICE),
        softmax_scale=dim**-0.5,
    )


@pytest.fixture(autouse=True)
def _repaired_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter take loop bounds from memory (numpy >= 2.4) and multiply bf16.

    It multiplies bf16 matrices as the integers that it stores them in.
    """
    if DEVICE.type == "cuda":
        return
    from triton.runtime import interpreter

    patch_tensor, create_dot = (
        interpreter._patch_lang_tensor,
        interpreter.InterpreterBuilder.create_dot,
    )

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patched_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        a, b = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return create_dot(self, a, b, *args)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", patched_dot)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what kernels allocate with NaN."""
    new_empty = Tensor.new_empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        tensor = new_empty(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def block_scores(scores: CmpScores, problem: Problem, positions: Tensor, num_blocks: int) -> Tensor:
    """Read the workspace as selection does: [R, HQ, NT, units] -> [R, H, num_blocks]."""
    spec = problem.spec
    assert scores.units is not None and scores.tile_max is not None
    tile_entries = score_tile_entries(spec.cmp_entries_per_page)
    visible = ((positions + 1) // spec.cmp_stride)[:, None, None].to(DEVICE)
    written = torch.arange(scores.tile_max.shape[2], device=DEVICE) * tile_entries < visible
    weight = torch.exp2(scores.tile_max - scores.lse2[..., None])
    weight = weight.where(written & (scores.tile_max > -torch.inf), 0.0)
    units = scores.units.float().where(weight[..., None] > 0, 0.0) * weight[..., None]
    if scores.spill is not None:
        spill = scores.spill.float().where(weight > 0, 0.0) * weight
        units[..., :-1, -1] += spill[..., 1:]
    units = units.flatten(2).unflatten(1, (problem.cache.k.shape[1], -1)).sum(2)
    if spec.score_map == "max_pool":
        units = units[..., spec.strides_per_window - 1 :]  # entries to windows
        return reference._max_pool(units.cpu(), num_blocks, spec)
    return units[..., :num_blocks].cpu()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of the expected; NaN stays NaN."""
    return float((actual.float().cpu() - expected).norm() / expected.norm().clamp(min=1e-6))


def check(problem: Problem, scores: CmpScores, first: int = 0) -> None:
    """Compare output, log-sum-exp and block scores of every row with the specification."""
    tolerance, spec = TOLERANCE[problem.q.dtype], problem.spec
    offset, num_tokens = 0, scores.lse2.shape[0]
    for row, (start, n) in enumerate(zip(problem.starts, problem.query_lens, strict=True)):
        a, b = max(first, offset), min(first + num_tokens, offset + n)
        if a < b:
            positions = torch.arange(start + a - offset, start + b - offset)
            mine = slice(a - first, b - first)
            q, (k, v) = problem.q[a:b].float().cpu(), problem.windows[row]
            scale = problem.softmax_scale
            o, lse = reference.cmp_attention(q, k, v, positions, spec, softmax_scale=scale)
            empty = lse == -torch.inf
            lse2 = scores.lse2[mine].cpu()
            assert torch.equal(lse2 == -torch.inf, empty)
            assert relative_error(lse2[~empty] / 1.4426950408889634, lse[~empty]) <= tolerance
            if scores.o_cmp is not None:
                assert relative_error(scores.o_cmp[mine], o) <= tolerance
                assert (scores.o_cmp[mine].cpu()[empty] == 0).all()
            if scores.units is not None:
                num_blocks = -(-problem.seq_lens[row] // spec.block_size)
                expected = reference.block_scores(
                    q, k, lse, positions, spec, softmax_scale=scale, num_blocks=num_blocks
                )
                part = replace(
                    scores,
                    lse2=scores.lse2[mine],
                    units=scores.units[mine],
                    tile_max=None if scores.tile_max is None else scores.tile_max[mine],
                    spill=None if scores.spill is None else scores.spill[mine],
                )
                actual = block_scores(part, problem, positions, num_blocks)
                assert relative_error(actual, expected) <= tolerance
        offset += n


@pytest.mark.parametrize("name", SPECS)
def test_ragged_rows(name: str) -> None:
    """Rows that see nothing, part of one tile, and several tiles; starts that no tile divides."""
    spec = SPECS[name]
    long = 2 * score_tile_entries(spec.cmp_entries_per_page) * spec.cmp_stride + 37
    problem = make_problem(spec, [0, 3, long, 0], [1, 36, 50, spec.cmp_len - 1])
    check(problem, problem.run())


@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (60, 60), (192, 128)])
def test_group_sizes_and_head_dims(group: int, dim: int, v_dim: int) -> None:
    problem = make_problem(PAPER, [1010], [41], heads=1, group=group, dim=dim, v_dim=v_dim)
    check(problem, problem.run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    problem = make_problem(PAPER, [2100], [20], heads=1, group=8, dim=32, dtype=dtype)
    check(problem, problem.run())


def test_sub_chunks_equal_the_whole() -> None:
    problem = make_problem(PAPER, [700, 30], [80, 50], heads=1, group=8)  # tiles of 16 tokens
    for first, end in [(0, 48), (48, 112), (112, 130)]:
        check(problem, problem.run(first, end), first)


def test_output_goes_where_it_is_wanted() -> None:
    problem = make_problem(PAPER, [700], [80], heads=1, group=8)
    out = torch.full((80, 8, 16), torch.nan, device=DEVICE)
    scores = problem.run(16, 48, out=out)
    check(problem, scores, 16)
    assert scores.o_cmp is not None and torch.equal(out[16:48], scores.o_cmp)
    assert out[:16].isnan().all() and out[48:].isnan().all()
    with pytest.raises(ValueError, match="out must have shape"):
        problem.run(16, 48, out=out[1:])


def test_output_and_scores_alone() -> None:
    problem = make_problem(PAPER, [1100], [40])
    only_output = problem.run(with_scores=False)
    assert only_output.units is None and only_output.tile_max is None
    check(problem, only_output)
    only_scores = problem.run(with_output=False)
    assert only_scores.o_cmp is None
    check(problem, only_scores)
    check(problem, problem.run(with_output=False, with_scores=False))


@pytest.mark.parametrize("block_n", [16, 128])
def test_tiles_of_other_sizes_without_scores(block_n: int) -> None:
    for starts, lens in ([[1100, 0], [40, 31]], [[2047], [9]]):
        problem = make_problem(PAPER, starts, lens)
        check(problem, problem.run(with_scores=False, block_n=block_n))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beside_an_attention_sink_keep_their_digits(dtype: torch.dtype) -> None:
    """One key 2^40 times as likely as the rest: what the rest score must not vanish in fp16."""
    problem = make_problem(PAPER, [3000], [8], heads=1, group=8, dim=32, dtype=dtype)
    k, _ = problem.windows[0]
    problem.q[:] = problem.q.abs()
    k[0] = 28 * problem.softmax_scale / problem.q.float().mean().item()
    page = int(problem.page_table[0, 0])
    problem.cache.k_cmp[page, :, 1] = k[0].to(DEVICE)
    scores = problem.run()
    positions = torch.arange(3000, 3008)
    _, lse = reference.cmp_attention(
        problem.q.float().cpu(), *problem.windows[0], positions, PAPER, softmax_scale=32**-0.5
    )
    expected = reference.block_scores(
        problem.q.float().cpu(), k, lse, positions, PAPER, softmax_scale=32**-0.5, num_blocks=47
    )
    late = slice(17, 45)  # blocks of the tiles after the sink's
    assert expected[..., late].sum() < 1e-6 * expected.sum()
    actual = block_scores(scores, problem, positions, 47)
    assert relative_error(actual[..., late], expected[..., late]) <= 2e-2


def test_row_split_gives_the_same() -> None:
    problem = make_problem(PAPER, [1100], [40])
    for split in (1, 2, 8):
        check(problem, problem.run(row_split=split))


@pytest.mark.parametrize("num_score_tiles", [1, 5])
def test_more_score_tiles_than_needed(num_score_tiles: int) -> None:
    problem = make_problem(PAPER, [1000], [24])
    check(problem, problem.run(num_score_tiles=num_score_tiles))


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_kernels.gpu.prefill_cmp.NARROW_LIMIT", 0)
    problem = make_problem(PAPER, [1100], [40])
    check(problem, problem.run())


def test_the_log_sum_exp_alone() -> None:
    problem = make_problem(PAPER, [700], [41])
    alone = problem.run(with_output=False, with_scores=False)
    assert alone.o_cmp is None and alone.units is None
    assert torch.equal(alone.lse2, problem.run().lse2)


def test_bad_arguments_say_what_was_expected() -> None:
    problem = make_problem(PAPER, [0], [40])
    with pytest.raises(ValueError, match=r"multiple of a page's 4 entries.* got 30"):
        problem.run(with_scores=False, block_n=30)
    with pytest.raises(ValueError, match="None with scores; got 64"):
        problem.run(block_n=64)
    problem.softmax_scale = 0.0
    with pytest.raises(ValueError, match=r"softmax_scale must be positive, got 0\.0"):
        problem.run()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "group", "dim", "v_dim"),
    [
        (torch.bfloat16, 16, 128, 128),
        (torch.bfloat16, 16, 192, 128),
        (torch.bfloat16, 16, 256, 256),
        (torch.bfloat16, 128, 64, 64),
        (torch.bfloat16, 1, 128, 128),
        (torch.bfloat16, 3, 96, 96),
        (torch.bfloat16, 64, 128, 128),
        (torch.float16, 6, 64, 64),
        (torch.float16, 8, 128, 128),
        (torch.float32, 16, 128, 128),
        (torch.float32, 64, 60, 60),
    ],
)
def test_full_size(dtype: torch.dtype, group: int, dim: int, v_dim: int) -> None:
    problem = make_problem(
        NSASpec(), [8000, 0], [300, 700], group=group, dim=dim, v_dim=v_dim, dtype=dtype
    )
    check(problem, problem.run(check=False))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"row_split": 1, "num_warps": 8, "num_stages": 3}])
@pytest.mark.parametrize("name", ["paper", "fla", "max_pool", "wide"])
def test_full_size_tuning(name: str, options: dict[str, int]) -> None:
    problem = make_problem(
        SPECS[name], [5000, 0], [500, 90], group=16, dim=128, v_dim=128, dtype=torch.bfloat16
    )
    check(problem, problem.run(check=False, **options))
