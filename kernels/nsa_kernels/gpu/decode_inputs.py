"""The first kernel of a decode step: the step's few integers, spread out to where others read them.

R rows of the step, P pages of the page table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fields of `packed`, a row of it each.
SEQ_LEN, TOKEN, SOURCE, PAGE_INDEX, PAGE, SWA_PAGE = range(6)
NUM_FIELDS = 6


@triton.jit(do_not_specialize=["num_rows"])
def _decode_inputs_kernel(
    packed_ptr,
    last_tokens_ptr,
    input_ids_ptr,
    seq_lens_ptr,
    positions_ptr,
    page_table_ptr,
    swa_page_table_ptr,
    stride_packed,
    stride_table,
    stride_swa_table,
    num_rows,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = rows < num_rows
    seq_len = tl.load(packed_ptr + rows, mask=mask, other=0)
    token = tl.load(packed_ptr + stride_packed + rows, mask=mask, other=0)
    source = tl.load(packed_ptr + 2 * stride_packed + rows, mask=mask, other=0)
    page_index = tl.load(packed_ptr + 3 * stride_packed + rows, mask=mask, other=-1)
    page = tl.load(packed_ptr + 4 * stride_packed + rows, mask=mask, other=0)
    sampled = tl.load(last_tokens_ptr + source, mask=mask & (token < 0), other=0)
    tl.store(input_ids_ptr + rows, tl.where(token < 0, sampled, token.to(tl.int64)), mask=mask)
    tl.store(seq_lens_ptr + rows, seq_len, mask=mask)
    # A padding row has no last token; 0 is a position that every table has.
    tl.store(positions_ptr + rows, tl.maximum(seq_len - 1, 0), mask=mask)
    entry = page_table_ptr + rows.to(tl.int64) * stride_table + page_index
    tl.store(entry, page, mask=mask & (page_index >= 0))
    if swa_page_table_ptr is not None:
        swa_page = tl.load(packed_ptr + 5 * stride_packed + rows, mask=mask, other=0)
        entry = swa_page_table_ptr + rows.to(tl.int64) * stride_swa_table + page_index
        tl.store(entry, swa_page, mask=mask & (page_index >= 0))


def decode_inputs(
    packed: Tensor,
    last_tokens: Tensor,
    *,
    num_rows: int,
    input_ids: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    page_table: Tensor,
    swa_page_table: Tensor | None = None,
) -> None:
    """Write a decode step's inputs; nothing but this one launch, so a CUDA graph can hold it.

    packed: [6, R or more] int32, a row a field: seq_len (0 for a padding row), token (-1 when the
    step before sampled it), source (which of last_tokens it is then), page_index (-1 for none),
    page (what that entry of the row's page table is now) and swa_page (the same of its window
    pages, where there are any). last_tokens: int64.
    Written: input_ids int64, seq_lens, positions int32, R entries each; page_table and
    swa_page_table [R, P] int32.
    """
    if packed.dtype != torch.int32 or packed.shape[0] != NUM_FIELDS:
        raise ValueError(f"packed must be int32 [{NUM_FIELDS}, R], got {tuple(packed.shape)}")
    block = 128
    _decode_inputs_kernel[(triton.cdiv(num_rows, block),)](
        packed,
        last_tokens,
        input_ids,
        seq_lens,
        positions,
        page_table,
        swa_page_table,
        packed.stride(0),
        page_table.stride(0),
        0 if swa_page_table is None else swa_page_table.stride(0),
        num_rows,
        BLOCK_R=block,
        num_warps=4,
    )
