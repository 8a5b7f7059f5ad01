"""Block selection from a score workspace, against the specification."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu.common import score_tile_entries
from nsa_kernels.gpu.decode_select import decode_select
from nsa_kernels.gpu.prefill_cmp import CmpScores
from nsa_kernels.gpu.select import select_blocks, select_constants
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.problem import FLA, LEGACY, MAX_POOL, PAPER

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LONG_WINDOWS = NSASpec(cmp_len=48, cmp_stride=16, block_size=64, num_selected_blocks=7)
SMALL_STRIDE = NSASpec(cmp_len=8, cmp_stride=4, block_size=128, num_selected_blocks=3)
SPECS = {
    "paper": PAPER,
    "fla": FLA,
    "legacy": LEGACY,
    "max_pool": MAX_POOL,
    "long_windows": LONG_WINDOWS,
    "small_stride": SMALL_STRIDE,
}


def make_scores(
    logits: Tensor, positions: Tensor, spec: NSASpec, dtype: torch.dtype = torch.float32
) -> tuple[CmpScores, Tensor]:
    """Workspace for log2 probabilities [R, HQ, N] of the windows, void where nothing is visible.

    Also the scores of the specification, [R, HQ, blocks], not summed over groups.
    """
    num_tokens, num_heads, num_windows = logits.shape
    entries, first = spec.cmp_entries_per_page, spec.strides_per_window - 1
    tile_entries = score_tile_entries(entries)
    num_tiles = -(-(num_windows + first) // tile_entries)
    visible = (positions + 1) // spec.cmp_stride
    s2 = torch.full((num_tokens, num_heads, num_tiles * tile_entries), -torch.inf)
    s2[..., first : first + num_windows] = logits
    is_visible = torch.arange(s2.shape[-1]) < visible[:, None]
    s2 = s2.masked_fill(~is_visible[:, None], -torch.inf)
    lse2 = torch.logsumexp(s2 * 0.6931471805599453, dim=-1) / 0.6931471805599453
    tiled = s2.unflatten(-1, (num_tiles, tile_entries))
    tile_max = tiled.amax(-1)
    p = torch.exp2(tiled - tile_max[..., None])
    spill = None
    units = p
    if spec.score_map == "overlap":
        # Windows of the tile, shifted by the entries that do not exist, against its blocks and the
        # block before.
        blocks = tile_entries // entries
        shifted = torch.zeros(tile_entries, blocks + 1)
        for e in range(tile_entries):
            for j in range(blocks + 1):
                start = e + entries - first
                shifted[e, j] = max(
                    0,
                    min(start + first + 1, (j + 1) * entries) - max(start, j * entries),
                )
        mapped = p.nan_to_num() @ shifted
        units, spill = mapped[..., 1:], mapped[..., 0] if first else None
    written = torch.arange(num_tiles) * tile_entries < visible[:, None]
    written &= (visible > first)[:, None]
    void = ~written[:, None]
    units = units.masked_fill(void[..., None], torch.nan).to(DEVICE, dtype)
    if spill is not None:
        spill = spill.masked_fill(void, torch.nan).to(DEVICE, dtype).contiguous()
    tile_max = tile_max.masked_fill(void, torch.nan)
    scores = CmpScores(
        None, lse2.to(DEVICE), units.contiguous(), spill, tile_max.to(DEVICE).contiguous()
    )
    probabilities = torch.exp2(s2 - lse2[..., None]).nan_to_num()[..., first:]
    num_blocks = num_tiles * tile_entries // entries
    if spec.score_map == "max_pool":
        return scores, probabilities
    return scores, probabilities @ reference.overlap_weights(
        probabilities.shape[-1], num_blocks, spec
    )


def expected_blocks(
    scores: Tensor,
    positions: Tensor,
    spec: NSASpec,
    num_kv_heads: int,
    *,
    is_grouped: bool = False,
) -> Tensor:
    """Select by the specification: [R, H, S], ascending, -1 at the end.

    scores: [R, HQ, ..] of windows for max pooling, else of blocks; or is_grouped, [R, H, blocks].
    """
    grouped = scores if is_grouped else scores.unflatten(1, (num_kv_heads, -1)).sum(2)
    num_blocks = int(positions.max()) // spec.block_size + 1
    if spec.score_map == "max_pool" and not is_grouped:
        grouped = reference._max_pool(grouped, num_blocks, spec)
    return reference.select_blocks(grouped[..., :num_blocks], positions.clamp(min=0), spec)


def in_order(indices: Tensor) -> Tensor:
    """Rows ascending, -1 at the end."""
    indices = indices.cpu()
    return (
        indices.where(indices >= 0, 2**30)
        .sort(-1)
        .values.where((indices >= 0).sort(-1, descending=True).values, -1)
    )


def make_case(
    spec: NSASpec, num_blocks: int, *, heads: int = 2, group: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Positions at and around block boundaries, and log2 probabilities with a local trend."""
    generator = torch.Generator().manual_seed(seed)
    last = num_blocks * spec.block_size - 1
    size = spec.block_size
    positions = torch.tensor([0, spec.cmp_len - 1, size * 2, last // 2, last - size, last])
    logits = torch.randn(6, heads * group, spec.num_windows(last + 1), generator=generator) * 3
    logits += 4 * torch.sin(torch.arange(logits.shape[-1]) / 9)
    return positions, logits


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("num_blocks", "chunk_blocks"), [(70, 1024), (300, 128)])
def test_prefill_selects_as_the_specification(
    name: str, num_blocks: int, chunk_blocks: int
) -> None:
    spec = SPECS[name]
    positions, logits = make_case(spec, num_blocks)
    scores, expected = make_scores(logits, positions, spec)
    indices = select_blocks(
        scores,
        positions.int().to(DEVICE),
        spec,
        num_kv_heads=2,
        chunk_blocks=chunk_blocks,
        heads_per_step=2,
    )
    torch.testing.assert_close(
        in_order(indices), expected_blocks(expected, positions, spec, 2), rtol=0, atol=0
    )


@pytest.mark.parametrize("rows", [24, pytest.param(3000, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["paper", "max_pool"])
def test_many_rows(name: str, rows: int) -> None:
    """Enough of them to see a selection that goes wrong once in a hundred."""
    spec, num_blocks = SPECS[name], 70
    generator = torch.Generator().manual_seed(7)
    last = num_blocks * spec.block_size - 1
    positions = torch.randint(spec.block_size, last, (rows,), generator=generator)
    positions[-1] = last
    logits = torch.randn(rows, 6, spec.num_windows(last + 1), generator=generator) * 3
    scores, expected = make_scores(logits, positions, spec)
    indices = select_blocks(scores, positions.int().to(DEVICE), spec, num_kv_heads=2)
    chosen, best = in_order(indices), expected_blocks(expected, positions, spec, 2)
    # Sums in another order may exchange two blocks of nearly equal score, in very few rows.
    assert (chosen != best).any(-1).float().mean() < 1e-3


@pytest.mark.parametrize("group", [1, 16])
def test_group_sizes(group: int) -> None:
    positions, logits = make_case(PAPER, 30, group=group, heads=1)
    scores, expected = make_scores(logits, positions, PAPER)
    indices = select_blocks(scores, positions.int().to(DEVICE), PAPER, num_kv_heads=1)
    assert in_order(indices).equal(expected_blocks(expected, positions, PAPER, 1))


@pytest.mark.parametrize("name", ["paper", "fla", "legacy", "max_pool"])
@pytest.mark.parametrize(("num_blocks", "chunk_blocks"), [(64, 1024), (300, 128)])
def test_equal_scores_choose_the_lower_block(name: str, num_blocks: int, chunk_blocks: int) -> None:
    """All probabilities equal, or one of two values: exact ties at the threshold and above it."""
    spec = SPECS[name]
    positions, logits = make_case(spec, num_blocks, heads=1, group=2)
    logits.zero_()
    # Blocks 5, 15, 25, .. are far better than the others, and equal to each other.
    window_block = torch.arange(logits.shape[-1]) * spec.cmp_stride // spec.block_size
    logits[3:, :, window_block % 10 == 5] = 6.0
    scores, expected = make_scores(logits, positions, spec)
    # The log-sum-exp is a common factor; 0 keeps all products exact.
    scores = replace(scores, lse2=torch.zeros_like(scores.lse2))
    expected = torch.round(expected / expected[expected > 0].min() * 64) / 64
    indices = select_blocks(
        scores, positions.int().to(DEVICE), spec, num_kv_heads=1, chunk_blocks=chunk_blocks
    )
    assert in_order(indices).equal(expected_blocks(expected, positions, spec, 1))


def test_scores_that_are_not_numbers_select_something_valid() -> None:
    positions, logits = make_case(PAPER, 40)
    scores, _ = make_scores(logits, positions, PAPER)
    scores = replace(scores, lse2=torch.full_like(scores.lse2, torch.nan))
    indices = in_order(select_blocks(scores, positions.int().to(DEVICE), PAPER, num_kv_heads=2))
    current = positions // PAPER.block_size
    assert (indices <= current[:, None, None]).all()
    for row in indices[-1]:
        assert len(set(row.tolist())) == PAPER.num_selected_blocks
        assert (row >= 0).all()


def run_decode(
    scores: CmpScores,
    positions: Tensor,
    spec: NSASpec,
    num_pages_per_row: int,
    *,
    num_kv_heads: int = 2,
    chunk_blocks: int = 1024,
    heads_per_step: int = 4,
    early_bytes: int = 0,
) -> Tensor:
    """Blocks that decode selects, and check that their pages are right: [R, H, S]."""
    assert scores.units is not None and scores.tile_max is not None
    num_rows, num_heads, num_tiles = scores.tile_max.shape
    constants = select_constants(
        spec,
        num_heads // num_kv_heads,
        num_tiles,
        tile_entries=score_tile_entries(spec.cmp_entries_per_page),
        chunk_blocks=chunk_blocks,
        heads_per_step=heads_per_step,
    )
    # Three splits: two halves of the sum, and one that is empty.
    lse2 = scores.lse2[..., None]
    lse2_part = torch.cat((lse2 - 1, torch.full_like(lse2, -torch.inf), lse2 - 1), dim=-1)
    num_pages = 1000
    page_table = torch.randperm(num_rows * num_pages_per_row).reshape(num_rows, -1) % num_pages
    page_table = page_table.int().to(DEVICE)
    shape = (num_rows, num_kv_heads, spec.num_selected_blocks)
    indices = torch.full(shape, 77, dtype=torch.int32, device=DEVICE)
    pages = indices.clone()
    counters = torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=DEVICE)
    decode_select(
        scores.units,
        scores.spill,
        scores.tile_max,
        lse2_part.contiguous(),
        (positions + 1).int().to(DEVICE),
        page_table,
        indices,
        pages,
        counters,
        constants,
        num_pages=num_pages,
        check=True,
        early_bytes=early_bytes,
    )
    looked_up = page_table[:, None].expand(-1, num_kv_heads, -1)
    looked_up = looked_up.gather(2, indices.long().clamp(min=0))
    assert pages.equal(looked_up.where(indices >= 0, 0))
    assert not counters.any()
    return in_order(indices)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("num_blocks", "chunk_blocks"),
    [(70, 1024), (200, 1024), (300, 128), (1000, 1024)],
)
def test_decode_selects_as_the_specification(name: str, num_blocks: int, chunk_blocks: int) -> None:
    spec = SPECS[name]
    positions, logits = make_case(spec, num_blocks, heads=1)
    positions[0] = -1  # a padding row
    scores, expected = make_scores(logits, positions, spec)
    wanted = expected_blocks(expected, positions, spec, 1)
    wanted[0] = -1
    for early_bytes in (0, 1 << 30):
        indices = run_decode(
            scores,
            positions,
            spec,
            num_blocks,
            num_kv_heads=1,
            chunk_blocks=chunk_blocks,
            early_bytes=early_bytes,
        )
        assert indices.equal(wanted)
        if chunk_blocks < num_blocks:
            break


@pytest.mark.parametrize("num_selected", [3, 4, 40, 64, 130, 140])
@pytest.mark.parametrize(("num_blocks", "chunk_blocks"), [(700, 1024), (700, 256)])
def test_decode_selects_few_or_many(num_selected: int, num_blocks: int, chunk_blocks: int) -> None:
    spec = NSASpec(num_selected_blocks=num_selected)
    positions, logits = make_case(spec, num_blocks, heads=1, group=2)
    scores, expected = make_scores(logits, positions, spec)
    indices = run_decode(
        scores, positions, spec, num_blocks, num_kv_heads=1, chunk_blocks=chunk_blocks
    )
    assert indices.equal(expected_blocks(expected, positions, spec, 1))


@pytest.mark.parametrize("name", ["paper", "fla", "legacy", "max_pool"])
@pytest.mark.parametrize(("num_blocks", "chunk_blocks"), [(64, 1024), (300, 1024), (300, 128)])
def test_decode_of_equal_scores(name: str, num_blocks: int, chunk_blocks: int) -> None:
    """Ties at the last place and above it, inside groups and between them."""
    spec = SPECS[name]
    positions, logits = make_case(spec, num_blocks, heads=1, group=2)
    logits.zero_()
    window_block = torch.arange(logits.shape[-1]) * spec.cmp_stride // spec.block_size
    logits[3:, :, window_block % 10 == 5] = 6.0
    scores, expected = make_scores(logits, positions, spec)
    scores = replace(scores, lse2=torch.zeros_like(scores.lse2))
    expected = torch.round(expected / expected[expected > 0].min() * 64) / 64
    indices = run_decode(
        scores, positions, spec, num_blocks, num_kv_heads=1, chunk_blocks=chunk_blocks
    )
    assert indices.equal(expected_blocks(expected, positions, spec, 1))


@pytest.mark.parametrize("chunk_blocks", [1024, 128])
def test_decode_of_scores_that_are_not_numbers(chunk_blocks: int) -> None:
    positions, logits = make_case(PAPER, 200)
    scores, _ = make_scores(logits, positions, PAPER)
    scores = replace(scores, lse2=torch.full_like(scores.lse2, torch.nan))
    indices = run_decode(scores, positions, PAPER, 200, chunk_blocks=chunk_blocks)
    current = positions // PAPER.block_size
    assert (indices <= current[:, None, None]).all()
    for row in indices[-1]:
        assert len(set(row.tolist())) == PAPER.num_selected_blocks
        assert (row >= 0).all()


def test_missing_scores_are_an_error() -> None:
    positions, logits = make_case(PAPER, 10)
    scores, _ = make_scores(logits, positions, PAPER)
    with pytest.raises(ValueError, match="with_scores=True"):
        select_blocks(
            replace(scores, units=None), positions.int().to(DEVICE), PAPER, num_kv_heads=2
        )


def test_only_forced_blocks() -> None:
    spec = NSASpec(num_selected_blocks=3)
    positions, logits = make_case(spec, 20)
    scores, expected = make_scores(logits, positions, spec)
    indices = select_blocks(scores, positions.int().to(DEVICE), spec, num_kv_heads=2)
    assert in_order(indices).equal(expected_blocks(expected, positions, spec, 2))


def test_runs_of_high_scores() -> None:
    """Blocks in one corner score best, where the first threshold is far too low."""
    spec = NSASpec(num_selected_blocks=20)
    positions, logits = make_case(spec, 200)
    logits[..., 60:150] += 30
    scores, expected = make_scores(logits, positions, spec)
    indices = select_blocks(scores, positions.int().to(DEVICE), spec, num_kv_heads=2)
    assert in_order(indices).equal(expected_blocks(expected, positions, spec, 2))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("num_blocks", [1000, 5000])
@pytest.mark.parametrize("num_selected", [16, 64])
def test_full_size(num_blocks: int, num_selected: int) -> None:
    spec = NSASpec(num_selected_blocks=num_selected)
    positions, logits = make_case(spec, num_blocks, heads=1, group=16)
    scores, expected = make_scores(logits, positions, spec, torch.float16)
    indices = in_order(select_blocks(scores, positions.int().to(DEVICE), spec, num_kv_heads=1))
    wanted = expected_blocks(expected, positions, spec, 1)
    # Half-precision units may swap near ties: compare the scores of what was chosen.
    grouped = expected.sum(1, keepdim=True)
    for chosen in (indices, wanted):
        assert (chosen[3:] >= 0).all()
    mine = grouped.gather(2, indices.long().clamp(min=0))[3:].sum(-1)
    best = grouped.gather(2, wanted.long().clamp(min=0))[3:].sum(-1)
    torch.testing.assert_close(mine, best, rtol=1e-3, atol=0)
