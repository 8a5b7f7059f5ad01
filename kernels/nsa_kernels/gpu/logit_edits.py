"""What requests change in their logits before a token is chosen, for all rows in one launch.

Logit bias, penalties for tokens seen, and -inf for tokens that are excluded, by id or by a mask,
which has bit i % 32 of word i // 32 set where token i is allowed.

Programs of a row share the vocabulary for its masks; the first also goes through the lists. It
leaves alone what a mask excludes, so that no two programs write different values to one place.

Legend: R rows, E edited rows, V vocabulary, W = ceil(V / 32) words of a mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape

# Fields of an edit. Lists are [first, end) in the buffer of the edits, which follow one another in
# it for every list: bias has ids, values; seen has places, ids, counts. ABSENT where there is none.
(
    ROW,
    BIAS_FIRST,
    BIAS_END,
    NEWS_FIRST,
    NEWS_END,
    SEEN_SLOT,
    NUM_SEEN,
    EXCLUDED_FIRST,
    EXCLUDED_END,
    MASK_FIRST,
    ALLOWED_SLOT,
    REPETITION,
    PRESENCE,
    FREQUENCY,
) = range(14)
NUM_FIELDS = 16
ABSENT = -1

_BLOCK = 1024
_MASK_PROGRAMS = 16


def edit_logits(
    logits: Tensor,
    edits: Tensor,
    num_edits: int,
    *,
    seen: Tensor,
    allowed: Tensor,
    has_masks: bool,
) -> None:
    """Edit rows of logits, float32 [R, V], in place.

    edits: int32, E = `num_edits` times NUM_FIELDS fields, and behind them the lists and masks that
    these point to; floats are there by their bits. No row is edited twice. seen: int32 [slots, 2,
    capacity], the tokens that a slot penalises and how often each was generated; what is new in it
    is written first. allowed: int32 [slots, W], masks. has_masks: some edit has a mask.

    The order is: bias; repetition, frequency and presence penalty; exclusion.
    """
    num_words = triton.cdiv(logits.shape[1], 32)
    check_shape("allowed", allowed, (allowed.shape[0], num_words))
    check_shape("seen", seen, (seen.shape[0], 2, seen.shape[2]))
    if num_edits == 0:
        return
    _edit_kernel[(num_edits, _MASK_PROGRAMS if has_masks else 1)](
        logits,
        logits.stride(0),
        logits.shape[1],
        edits,
        seen,
        seen.shape[2],
        allowed,
        num_words,
        BLOCK=_BLOCK,
        NUM_FIELDS=NUM_FIELDS,
        num_warps=8,
        # A penalty is rounded where PyTorch rounds it.
        enable_fp_fusion=False,
    )


def new_tables(
    num_slots: int, capacity: int, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `seen` and `allowed` for `edit_logits`."""
    return (
        torch.zeros(num_slots, 2, capacity, dtype=torch.int32, device=device),
        torch.zeros(num_slots, triton.cdiv(vocab_size, 32), dtype=torch.int32, device=device),
    )


@triton.jit
def _is_allowed(ids, mask_ptr, has_mask, allowed_ptr, has_allowed, mask):
    """Whether neither mask of a row excludes tokens `ids`; a mask it lacks allows all."""
    words = tl.load(mask_ptr + ids // 32, mask=mask & has_mask, other=-1)
    words = words & tl.load(allowed_ptr + ids // 32, mask=mask & has_allowed, other=-1)
    return ((words >> (ids % 32)) & 1) != 0


@triton.jit(do_not_specialize=["capacity"])
def _edit_kernel(
    logits_ptr,
    stride_r,
    vocab_size,
    edits_ptr,
    seen_ptr,
    capacity,
    allowed_ptr,
    num_words,
    BLOCK: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
):
    edit_ptr = edits_ptr + tl.program_id(0) * NUM_FIELDS
    logits_row = logits_ptr + tl.load(edit_ptr).to(tl.int64) * stride_r
    offs = tl.arange(0, BLOCK)
    mask_first, allowed_slot = tl.load(edit_ptr + 9), tl.load(edit_ptr + 10)
    has_mask, has_allowed = mask_first >= 0, allowed_slot >= 0
    mask_ptr = edits_ptr + tl.maximum(mask_first, 0)
    allowed_row = allowed_ptr + tl.maximum(allowed_slot, 0) * num_words
    if tl.program_id(1) == 0:
        first, end = tl.load(edit_ptr + 1), tl.load(edit_ptr + 2)
        for start in range(first, end, BLOCK):
            is_biased = start + offs < end
            biased = tl.load(edits_ptr + start + offs, mask=is_biased, other=0)
            bias = tl.load(edits_ptr + (end - first) + start + offs, mask=is_biased, other=0)
            x = tl.load(logits_row + biased, mask=is_biased, other=0.0)
            free = _is_allowed(biased, mask_ptr, has_mask, allowed_row, has_allowed, is_biased)
            x += bias.to(tl.float32, bitcast=True)
            tl.store(logits_row + biased, x, mask=is_biased & free)
        slot = tl.load(edit_ptr + 5)
        if slot >= 0:
            seen_ids = seen_ptr + slot.to(tl.int64) * 2 * capacity
            seen_counts = seen_ids + capacity
            first, end = tl.load(edit_ptr + 3), tl.load(edit_ptr + 4)
            for start in range(first, end, BLOCK):
                is_new = start + offs < end
                news = edits_ptr + start + offs
                place = tl.load(news, mask=is_new, other=0)
                new_id = tl.load(news + (end - first), mask=is_new, other=0)
                new_count = tl.load(news + 2 * (end - first), mask=is_new, other=0)
                tl.store(seen_ids + place, new_id, mask=is_new)
                tl.store(seen_counts + place, new_count, mask=is_new)
            # What was written above, by other threads, is read below.
            tl.debug_barrier()
            repetition = tl.load(edit_ptr + 11).to(tl.float32, bitcast=True)
            presence = tl.load(edit_ptr + 12).to(tl.float32, bitcast=True)
            frequency = tl.load(edit_ptr + 13).to(tl.float32, bitcast=True)
            num_seen = tl.load(edit_ptr + 6)
            for start in range(0, num_seen, BLOCK):
                is_seen = start + offs < num_seen
                seen_id = tl.load(seen_ids + start + offs, mask=is_seen, other=0)
                count = tl.load(seen_counts + start + offs, mask=is_seen, other=0)
                x = tl.load(logits_row + seen_id, mask=is_seen, other=0.0)
                free = _is_allowed(seen_id, mask_ptr, has_mask, allowed_row, has_allowed, is_seen)
                if repetition != 1.0:
                    x = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
                x -= frequency * count.to(tl.float32) + tl.where(count > 0, presence, 0.0)
                tl.store(logits_row + seen_id, x, mask=is_seen & free)
        tl.debug_barrier()
        first, end = tl.load(edit_ptr + 7), tl.load(edit_ptr + 8)
        for start in range(first, end, BLOCK):
            is_listed = start + offs < end
            excluded = tl.load(edits_ptr + start + offs, mask=is_listed, other=0)
            tl.store(logits_row + excluded, float("-inf"), mask=is_listed)
    if has_mask | has_allowed:
        part, num_parts = tl.program_id(1), tl.num_programs(1)
        for start in range(part * BLOCK, vocab_size, num_parts * BLOCK):
            ids = start + offs
            is_token = ids < vocab_size
            free = _is_allowed(ids, mask_ptr, has_mask, allowed_row, has_allowed, is_token)
            tl.store(logits_row + ids, float("-inf"), mask=is_token & (free == 0))
