"""Decode rows (one query token a sequence) on the vectorised PyTorch path.

B rows, H KV heads, G query heads a KV head, P pages of the longest row, E compressed entries a
page, n selected blocks.
"""

import torch
from torch import Tensor

from nsa_kernels.metadata import LayerCache
from nsa_kernels.torch_plan import MASKED, Branches, DecodePlan
from nsa_kernels.torch_select import group_block_scores, relative_probs, select_block_indices

Outputs = tuple[Tensor | None, Tensor | None, Tensor | None]


def decode_branches(
    q: Tensor, cache: LayerCache, plan: DecodePlan, branches: Branches
) -> tuple[Outputs, Tensor | None]:
    """Attend from one query a row; return ((o_cmp, o_slc, o_swa), block_indices).

    q: [B, HQ, D], already multiplied by the softmax scale. Each output is [B, HQ, Dv], or None
    when its branch is not used; block_indices is [B, H, n] int64, -1 padded, or None when all
    blocks are selected.
    """
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = cache.k.shape[1]
    grouped = q.reshape(num_rows * num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    o_cmp = o_slc = o_swa = block_indices = None
    if plan.cmp_bias is not None:
        o_cmp, block_indices = _cmp(grouped, cache, plan, want_output=branches.cmp)
    if branches.slc:
        if block_indices is None:
            assert plan.dense_bias is not None
            o_slc = _attend_pages(grouped, cache.k, cache.v, plan.page_rows, plan.dense_bias)
        else:
            o_slc = _slc(grouped, cache, plan, block_indices)
    if branches.swa and plan.window_page_rows is not None and plan.window_bias is not None:
        keys, values = cache.window_kv
        o_swa = _attend_pages(grouped, keys, values, plan.window_page_rows, plan.window_bias)
    shape = (num_rows, num_q_heads, cache.v.shape[3])
    outputs = tuple(None if o is None else o.view(shape) for o in (o_cmp, o_slc, o_swa))
    return (outputs[0], outputs[1], outputs[2]), block_indices


def _cmp(
    q: Tensor, cache: LayerCache, plan: DecodePlan, *, want_output: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Attend to the compressed entries; choose blocks where the plan selects."""
    assert plan.cmp_bias is not None and plan.has_windows is not None
    keys = _pages(cache.k_cmp, plan.page_rows, q.shape[0])
    # In fp32: the scores decide the selection, and for one query that is no slower than bf16.
    scores = torch.baddbmm(plan.cmp_bias, q.float(), keys.float().transpose(1, 2))
    output = block_indices = probs = None
    if want_output or plan.lse_bias is None:
        probs = torch.softmax(scores, dim=-1)
    if want_output:
        assert probs is not None
        values = _pages(cache.v_cmp, plan.page_rows, q.shape[0])
        output = torch.bmm(probs.to(q.dtype), values).view(plan.num_rows, -1, values.shape[-1])
        output = output * plan.has_windows
    if plan.selection is not None:
        if plan.lse_bias is not None:
            assert cache.k_lse is not None
            keys = _pages(cache.k_lse, plan.page_rows, q.shape[0])
            coarse = torch.baddbmm(plan.lse_bias, q.float(), keys.float().transpose(1, 2))
            probs = relative_probs(scores, coarse)
        assert probs is not None
        block_scores = group_block_scores(probs, plan.selection)
        block_scores = block_scores.view(plan.num_rows, -1, plan.num_pages)
        block_indices = select_block_indices(block_scores, plan.selection)
    return output, block_indices


def _slc(q: Tensor, cache: LayerCache, plan: DecodePlan, block_indices: Tensor) -> Tensor:
    """Attend to the tokens of the selected blocks; only those pages are read."""
    assert plan.block_row_base is not None and plan.bias_row_base is not None
    chosen = block_indices.clamp(min=0)
    page_rows = plan.page_rows.index_select(0, (chosen + plan.block_row_base).flatten())
    bias = plan.token_bias.view(-1, plan.token_bias.shape[-1])
    bias = bias.index_select(0, (chosen + plan.bias_row_base).flatten())
    absent = block_indices < 0
    if bool(absent.any()):
        bias = bias.masked_fill(absent.view(-1, 1), MASKED)
    return _attend_pages(q, cache.k, cache.v, page_rows, bias.view(q.shape[0], 1, -1))


def _attend_pages(q: Tensor, k: Tensor, v: Tensor, page_rows: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention of q [B * H, G, D] to the tokens of pages; bias [B * H, 1, tokens]."""
    keys = _pages(k, page_rows, q.shape[0])
    values = _pages(v, page_rows, q.shape[0])
    scores = torch.baddbmm(bias, q, keys.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, dim=-1), values)


def _pages(cache: Tensor, page_rows: Tensor, num_groups: int) -> Tensor:
    """Gather whole pages of a [num_pages, H, tokens, D] cache: [B * H, tokens, D]."""
    num_pages, num_kv_heads, tokens, dim = cache.shape
    rows = cache.view(num_pages * num_kv_heads, tokens * dim).index_select(0, page_rows)
    return rows.view(num_groups, -1, dim)
