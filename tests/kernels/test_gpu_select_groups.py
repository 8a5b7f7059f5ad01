"""Block selection from scores that are summed over groups, against the specification."""

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu.prefill_scores import GroupScores
from nsa_kernels.gpu.select_groups import select_group_blocks
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.test_gpu_select import LONG_WINDOWS, SMALL_STRIDE, in_order
from tests.kernels.test_gpu_select import SPECS as SELECT_SPECS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# As many blocks as entries, and half of them from the last 16.
SMALL_LEGACY = NSASpec(
    cmp_len=16,
    cmp_stride=16,
    block_size=16,
    num_selected_blocks=16,
    num_init_blocks=0,
    num_local_blocks=1,
    selection="fla_legacy",
)
ALL_LOCAL = NSASpec(num_selected_blocks=3)
SPECS = {**SELECT_SPECS, "small_legacy": SMALL_LEGACY, "all_local": ALL_LOCAL}


def make_case(
    spec: NSASpec, num_blocks: int, *, num_rows: int = 12, values: int = 0
) -> tuple[GroupScores, Tensor, Tensor]:
    """Scores of 2 KV heads, positions [R] and the specification's block scores [R, 2, blocks].

    What a row does not see is NaN. values: that many different scores at most, 0 = all differ.
    """
    generator = torch.Generator().manual_seed(num_blocks + num_rows)
    last = num_blocks * spec.block_size - 1
    positions = torch.randint(spec.block_size, last, (num_rows,), generator=generator)
    few = [0, spec.cmp_len - 1, last // 2, last - spec.block_size, last]
    positions[: len(few)] = torch.tensor(few)
    entries = spec.cmp_entries_per_page
    is_max_pool = spec.score_map == "max_pool"
    has_spill = spec.strides_per_window > 1 and not is_max_pool
    shape = (num_rows, 2, (num_blocks + 7) * (entries if is_max_pool else 1))

    def draw() -> Tensor:
        drawn = torch.rand(shape, generator=generator) ** 4
        return drawn if not values else (drawn * values).floor() / values

    units, spill = draw(), draw() if has_spill else None
    visible = ((positions + 1) // spec.cmp_stride)[:, None, None]
    first_entry = torch.arange(shape[2]) * (1 if is_max_pool else entries)
    seen = (first_entry < visible).expand(shape)
    expected = units.where(seen, 0.0)
    if is_max_pool:
        first = spec.strides_per_window - 1
        expected[..., :first] = 0.0
        expected = reference._max_pool(expected[..., first:], num_blocks, spec)
        units[..., :first] = 0.0
    if spill is not None:
        expected[..., :-1] += spill.where(seen, 0.0)[..., 1:]
        spill = spill.where(seen, torch.nan).to(DEVICE)
    scores = GroupScores(units.where(seen, torch.nan).to(DEVICE), spill)
    return scores, positions, expected[..., :num_blocks]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("num_blocks", "chunk_blocks"), [(20, 1024), (70, 1024), (300, 128), (1100, 256)]
)
@pytest.mark.parametrize("values", [0, 3])
def test_selects_as_the_specification(
    name: str, num_blocks: int, chunk_blocks: int, values: int
) -> None:
    """In one chunk and in several, also where most scores are equal."""
    spec = SPECS[name]
    scores, positions, expected = make_case(spec, num_blocks, values=values)
    indices = select_group_blocks(
        scores, positions.int().to(DEVICE), spec, chunk_blocks=chunk_blocks
    )
    assert in_order(indices).equal(reference.select_blocks(expected, positions, spec))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_best_may_be_in_any_chunk(order: str) -> None:
    spec = NSASpec(cmp_len=16, cmp_stride=16, block_size=16)
    scores, positions, _ = make_case(spec, 600)
    units = torch.arange(1.0, 608.0) if order == "rising" else torch.arange(607.0, 0.0, -1.0)
    seen = torch.arange(607) < ((positions + 1) // 16)[:, None, None]
    units = units.expand(len(positions), 2, -1).where(seen, 0.0).contiguous()
    scores = GroupScores(units.to(DEVICE), None)
    indices = select_group_blocks(scores, positions.int().to(DEVICE), spec, chunk_blocks=128)
    expected = reference.select_blocks(units[..., :600], positions, spec)
    assert in_order(indices).equal(expected)


@pytest.mark.parametrize("spec", [LONG_WINDOWS, SMALL_STRIDE, SMALL_LEGACY])
def test_scores_that_are_not_numbers_select_something_valid(spec: NSASpec) -> None:
    scores, positions, _ = make_case(spec, 300)
    scores.units.fill_(torch.nan)
    indices = in_order(
        select_group_blocks(scores, positions.int().to(DEVICE), spec, chunk_blocks=128)
    )
    current = positions // spec.block_size
    assert (indices <= current[:, None, None]).all()
    for row in indices[4]:
        assert len(set(row.tolist())) == spec.num_selected_blocks
        assert (row >= 0).all()


def test_writes_where_it_is_wanted() -> None:
    spec = SMALL_LEGACY
    scores, positions, _ = make_case(spec, 70)
    out = torch.full((12, 2, 16), 77, dtype=torch.int32, device=DEVICE)
    assert select_group_blocks(scores, positions.int().to(DEVICE), spec, out=out) is out
    assert not (out == 77).any()
    empty = GroupScores(scores.units[:0], None)
    nothing = select_group_blocks(empty, positions[:0].int().to(DEVICE), spec)
    assert nothing.shape == (0, 2, 16)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("num_blocks", [1000, 5000])
@pytest.mark.parametrize("num_warps", [1, 4])
def test_full_size(name: str, num_blocks: int, num_warps: int) -> None:
    """Enough rows to see a selection that goes wrong once in a hundred."""
    spec = SPECS[name]
    scores, positions, expected = make_case(spec, num_blocks, num_rows=300)
    indices = select_group_blocks(scores, positions.int().to(DEVICE), spec, num_warps=num_warps)
    assert in_order(indices).equal(reference.select_blocks(expected, positions, spec))
