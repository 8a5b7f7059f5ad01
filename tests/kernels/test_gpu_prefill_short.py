"""Prefill's selected attention over short contexts, all keys with a mask, against the spec."""

import pytest
import torch
from torch import Tensor

from nsa_kernels.gpu import plan as gpu_plan
from nsa_kernels.gpu.common import prefill_block_q
from nsa_kernels.gpu.prefill_short import prefill_short
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.test_gpu_prefill_slc import (
    PAPER,
    Step,
    assert_close,
    block_spec,
    make_step,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(step: Step, *, first_row: int = 0, with_others: bool = True, **options: object) -> Tensor:
    """Run rows from `first_row` on; the rest of the output stays NaN."""
    lens = [stop - start for start, stop in zip(step.starts, step.lengths, strict=True)]
    cu_seqlens = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0).to(torch.int32)
    first = int(cu_seqlens[first_row])
    group = step.q.shape[1] // step.cache.k.shape[1]
    tiles = gpu_plan._tiles(cu_seqlens.numpy(), first_row, prefill_block_q(group))
    tile_rows, tile_starts = (torch.from_numpy(t).to(DEVICE, torch.int32) for t in tiles)
    shape = (*step.q.shape[:2], step.cache.v.shape[3])
    out = torch.full(shape, torch.nan, dtype=step.q.dtype, device=DEVICE)
    options.setdefault("gates", step.gates)
    prefill_short(
        step.q,
        step.block_indices[first:].contiguous(),
        step.o_cmp if with_others else None,
        step.o_swa if with_others else None,
        cache=step.cache,
        spec=step.spec,
        tile_rows=tile_rows,
        tile_starts=tile_starts,
        cu_seqlens_q=cu_seqlens.to(DEVICE),
        seq_lens=step.seq_lens,
        page_table=step.page_table,
        softmax_scale=step.softmax_scale,
        first_token=first,
        out=out,
        check=True,
        **options,  # type: ignore[arg-type]
    )
    return out


@pytest.mark.parametrize(
    ("spec", "group", "dims"),
    [
        (block_spec(8, 6), 3, (16, 16)),
        (block_spec(16, 4, num_init=0, num_local=1), 16, (16, 16)),
        (block_spec(32, 5, num_init=2, num_local=1), 1, (60, 60)),
        (PAPER, 3, (192, 128)),
        (block_spec(128, 4), 1, (16, 16)),
    ],
    ids=["8", "16", "32", "64", "128"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ragged_rows(spec: NSASpec, group: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    size = spec.block_size
    # A whole short prompt, a chunk in the middle of a block, one that is far along.
    starts, lengths = [0, 2 * size - 3, 9 * size], [size + 1, 2 * size + 4, 9 * size + 7]
    step = make_step(spec, starts, lengths, group=group, dim=dims[0], v_dim=dims[1], dtype=dtype)
    assert_close(run(step), step.expected(), dtype)


def test_only_the_rows_of_the_tiles_are_written() -> None:
    step = make_step(block_spec(16, 6), [0, 40], [50, 101])
    out = run(step, first_row=1)
    assert out[:50].isnan().all()
    assert_close(out[50:], step.expected()[50:], torch.float32)


def test_branches_that_are_not_used_and_constant_gates() -> None:
    step = make_step(block_spec(16, 6), [0, 40], [50, 101])
    constant = torch.tensor([0.0, 0.5, 0.0]).expand(step.gates.shape)
    out = run(step, with_others=False, gates=(0.0, 0.5, 0.0))
    assert_close(out, step.expected(constant, with_others=False), torch.float32)


def test_gate_logits() -> None:
    step = make_step(block_spec(16, 6), [0], [70])
    logits = torch.randn(step.gates.shape).to(DEVICE)
    out = run(step, gates=logits, sigmoid_gates=True)
    assert_close(out, step.expected(torch.sigmoid(logits.cpu())), torch.float32)


def test_more_blocks_than_a_word_has_bits() -> None:
    step = make_step(block_spec(8, 16), [590], [603], heads=1)
    assert int(step.block_indices.max()) > 64
    assert_close(run(step), step.expected(), torch.float32)
