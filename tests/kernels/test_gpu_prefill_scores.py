"""Block scores of prefill chunks, summed over groups, against the fp32 specification."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu.common import prefill_block_q
from nsa_kernels.gpu.prefill_scores import GroupScores, ScoreTuning, prefill_scores
from nsa_kernels.gpu.select_groups import select_group_blocks
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.test_gpu_prefill_cmp import SPECS, Problem, make_problem, relative_error
from tests.kernels.test_gpu_select import expected_blocks, in_order

# fp32 differs in summation order alone; of bf16 and fp16 the products are exact, too.
TOLERANCE = 1e-5

PAPER = SPECS["paper"]
LEGACY = NSASpec(
    cmp_len=16,
    cmp_stride=16,
    block_size=16,
    num_selected_blocks=4,
    num_init_blocks=0,
    num_local_blocks=1,
    selection="fla_legacy",
)
WIDE_PAGES = NSASpec(cmp_len=2, cmp_stride=1, block_size=128, num_selected_blocks=3)
ALL_SPECS = {**SPECS, "legacy": LEGACY, "wide_pages": WIDE_PAGES}


def exact_lse(problem: Problem) -> Tensor:
    """Natural log-sum-exp of every row of the step over its visible windows: [T, HQ]."""
    parts = []
    offset = 0
    for row, (start, n) in enumerate(zip(problem.starts, problem.query_lens, strict=True)):
        q, (k, v) = problem.q[offset : offset + n].float().cpu(), problem.windows[row]
        positions = torch.arange(start, start + n)
        _, lse = reference.cmp_attention(
            q, k, v, positions, problem.spec, softmax_scale=problem.softmax_scale
        )
        parts.append(lse)
        offset += n
    return torch.cat(parts)


def run(problem: Problem, first: int = 0, end: int | None = None, **options: Any) -> GroupScores:
    """Run the kernel on the prefill tiles that start in [first, end)."""
    cu_seqlens = [0]
    for n in problem.query_lens:
        cu_seqlens.append(cu_seqlens[-1] + n)
    end = cu_seqlens[-1] if end is None else end
    block_q = prefill_block_q(problem.q.shape[1] // problem.cache.k.shape[1])
    tiles = [
        (row, start)
        for row, n in enumerate(problem.query_lens)
        for start in range(cu_seqlens[row], cu_seqlens[row] + n, block_q)
        if first <= start < end
    ]
    int32 = {"dtype": torch.int32, "device": DEVICE}
    lse2 = (exact_lse(problem)[first:end] * 1.4426950408889634).to(DEVICE)
    return prefill_scores(
        problem.q,
        problem.cache,
        options.pop("lse2", lse2),
        torch.tensor([row for row, _ in tiles], **int32),
        torch.tensor([start for _, start in tiles], **int32),
        torch.tensor(cu_seqlens, **int32),
        torch.tensor(problem.seq_lens, **int32),
        problem.page_table,
        problem.spec,
        softmax_scale=problem.softmax_scale,
        first_token=first,
        num_tokens=end - first,
        num_score_tiles=options.pop("num_score_tiles", problem.num_score_tiles),
        check=options.pop("check", True),
        **options,
    )


def as_selection_reads(
    scores: GroupScores, spec: NSASpec, positions: Tensor, num_blocks: int
) -> Tensor:
    """Scores [R, H, num_blocks], with 0 for what is not visible."""
    visible = ((positions + 1) // spec.cmp_stride)[:, None, None]
    units = scores.units.cpu()
    index = torch.arange(units.shape[2])
    if spec.score_map == "max_pool":
        units = units.where(index < visible, 0.0)[..., spec.strides_per_window - 1 :]
        return reference._max_pool(units, num_blocks, spec)
    entries = spec.cmp_entries_per_page
    units = units.where(index * entries < visible, 0.0)
    if scores.spill is not None:
        spill = scores.spill.cpu().where(index * entries < visible, 0.0)
        units[..., :-1] += spill[..., 1:]
    return units[..., :num_blocks]


def check(problem: Problem, scores: GroupScores, first: int = 0) -> None:
    """Compare the scores, and the blocks chosen by them, with the specification, row by row."""
    spec, lse = problem.spec, exact_lse(problem)
    num_kv_heads = problem.cache.k.shape[1]
    offset, num_tokens = 0, scores.units.shape[0]
    for row, (start, n) in enumerate(zip(problem.starts, problem.query_lens, strict=True)):
        a, b = max(first, offset), min(first + num_tokens, offset + n)
        if a < b:
            positions = torch.arange(start + a - offset, start + b - offset)
            mine = slice(a - first, b - first)
            num_blocks = -(-problem.seq_lens[row] // spec.block_size)
            expected = reference.block_scores(
                problem.q[a:b].float().cpu(),
                problem.windows[row][0],
                lse[a:b],
                positions,
                spec,
                softmax_scale=problem.softmax_scale,
                num_blocks=num_blocks,
            )
            part = GroupScores(
                scores.units[mine].contiguous(),
                None if scores.spill is None else scores.spill[mine].contiguous(),
            )
            scored = positions >= spec.num_selected_blocks * spec.block_size
            actual = as_selection_reads(part, spec, positions, num_blocks)
            if scored.any():
                assert relative_error(actual[scored], expected[scored]) <= TOLERANCE
            chosen = select_group_blocks(part, positions.int().to(DEVICE), spec)
            best = expected_blocks(expected, positions, spec, num_kv_heads, is_grouped=True)
            # Sums in another order may exchange two blocks of nearly equal score, in few rows.
            assert (in_order(chosen) != best).any(-1).float().mean() <= 0.01
        offset += n


@pytest.mark.parametrize("name", ALL_SPECS)
def test_ragged_rows(name: str) -> None:
    """Rows without scores, some with one, and long ones; starts that no tile divides."""
    spec = ALL_SPECS[name]
    selected = spec.num_selected_blocks * spec.block_size
    problem = make_problem(spec, [0, selected - 11, 2 * selected + 37, 0], [1, 36, 50, 20])
    check(problem, run(problem))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16, 48, 128])
def test_group_sizes(group: int) -> None:
    """Whatever the places of a group's heads in a tile, each is added once."""
    problem = make_problem(PAPER, [1010], [21], heads=2 if group < 16 else 1, group=group)
    check(problem, run(problem))


@pytest.mark.parametrize("dim", [60, 192])
def test_head_dims(dim: int) -> None:
    problem = make_problem(PAPER, [1010], [21], heads=1, group=3, dim=dim)
    check(problem, run(problem))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    problem = make_problem(PAPER, [2100], [20], heads=1, group=8, dim=32, dtype=dtype)
    check(problem, run(problem))


def test_sub_chunks_equal_the_whole_to_the_last_bit() -> None:
    problem = make_problem(PAPER, [700, 300], [80, 50], heads=1, group=8)  # tiles of 16 tokens
    whole = run(problem)
    visible = torch.tensor([*range(701, 781), *range(301, 351)], device=DEVICE) // 16
    seen = torch.arange(whole.units.shape[2], device=DEVICE) * 4 < visible[:, None, None]
    for first, end in [(0, 48), (48, 112), (112, 130)]:
        part = run(problem, first, end)
        check(problem, part, first)
        for mine, of_whole in ((part.units, whole.units), (part.spill, whole.spill)):
            assert mine is not None and of_whole is not None
            assert (
                mine[seen[first:end]]
                .nan_to_num(-1)
                .equal(of_whole[first:end][seen[first:end]].nan_to_num(-1))
            )


def test_scores_beside_an_attention_sink_keep_their_digits() -> None:
    """One key 2^40 times as likely as the rest: the rest still has an order."""
    problem = make_problem(PAPER, [3000], [8], heads=1, group=8, dim=32, dtype=torch.bfloat16)
    k, _ = problem.windows[0]
    problem.q[:] = problem.q.abs()
    k[0] = 28 * problem.softmax_scale / problem.q.float().mean().item()
    k[0] = k[0].bfloat16()
    page = int(problem.page_table[0, 0])
    problem.cache.k_cmp[page, :, 1] = k[0].to(DEVICE)
    positions = torch.arange(3000, 3008)
    expected = reference.block_scores(
        problem.q.float().cpu(), k, exact_lse(problem), positions, PAPER,
        softmax_scale=problem.softmax_scale, num_blocks=47,
    )  # fmt: skip
    actual = as_selection_reads(run(problem), PAPER, positions, 47)
    assert expected[..., 17:45].sum() < 1e-6 * expected.sum()
    assert relative_error(actual[..., 17:45], expected[..., 17:45]) <= 1e-4


def test_nothing_is_read_of_heads_that_see_nothing() -> None:
    """A log-sum-exp of -inf makes no NaN."""
    problem = make_problem(PAPER, [1010], [20])
    lse2 = torch.full((20, 6), -torch.inf, device=DEVICE)
    scores = run(problem, lse2=lse2)
    positions = torch.arange(1010, 1030)
    assert not as_selection_reads(scores, PAPER, positions, 17).any()


def test_fp8_keys() -> None:
    """The scale of each KV head belongs to the product; e4m3 numbers are exact in bf16."""
    problem = make_problem(PAPER, [1010], [20], heads=2, group=8, dim=32, dtype=torch.bfloat16)
    scales = torch.tensor([0.25, 0.5])
    cache = problem.cache
    k_cmp = cache.k_cmp.to(torch.float8_e4m3fn)
    problem.cache = replace(
        cache, k_cmp=k_cmp, k_scale=scales.to(DEVICE), v_scale=scales.to(DEVICE)
    )
    k, v = problem.windows[0]
    k = k.to(torch.float8_e4m3fn).float() * scales[:, None]
    problem.windows[0] = (k, v)
    check(problem, run(problem))


@pytest.mark.parametrize("split", [2, 8])
def test_row_split_gives_the_same(split: int) -> None:
    problem = make_problem(PAPER, [1100], [40])
    check(problem, run(problem, tuning=ScoreTuning(row_split=split)))


def test_more_score_tiles_than_needed() -> None:
    problem = make_problem(PAPER, [1000], [24])
    check(problem, run(problem, num_score_tiles=5))


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_kernels.gpu.prefill_scores.NARROW_LIMIT", 0)
    problem = make_problem(PAPER, [1100], [40])
    check(problem, run(problem))


def test_bad_arguments_say_what_was_expected() -> None:
    problem = make_problem(PAPER, [0], [40])
    with pytest.raises(ValueError, match="lse2 must have shape"):
        run(problem, lse2=torch.zeros(3, 6, device=DEVICE))
    problem.softmax_scale = 0.0
    with pytest.raises(ValueError, match=r"softmax_scale must be positive, got 0\.0"):
        run(problem, lse2=torch.zeros(40, 6, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("name", ALL_SPECS)
@pytest.mark.parametrize(
    ("dtype", "group", "dim"),
    [
        (torch.bfloat16, 16, 128),
        (torch.bfloat16, 16, 64),
        (torch.bfloat16, 3, 192),
        (torch.bfloat16, 64, 128),
        (torch.float16, 8, 64),
        (torch.float32, 16, 128),
    ],
)
def test_full_size(name: str, dtype: torch.dtype, group: int, dim: int) -> None:
    problem = make_problem(
        ALL_SPECS[name], [4000, 0], [300, 700], group=group, dim=dim, v_dim=16, dtype=dtype
    )
    check(problem, run(problem, check=False))
