"""Prefill chunks on the vectorised PyTorch path: tiles of queries against a gathered sequence.

H KV heads, G query heads a KV head, Q queries of a tile, L keys, P blocks, E compressed entries a
block, U blocks in the union of what a tile's queries selected.
"""

import torch
from torch import Tensor

from nsa_kernels.block_trace import BlockTrace
from nsa_kernels.metadata import LayerCache
from nsa_kernels.torch_plan import MASKED, Branches, ChunkPlan, TilePlan
from nsa_kernels.torch_select import group_block_scores, relative_probs, select_block_mask


class _Sequence:
    """One sequence's keys and values, gathered from its pages once a layer: [H, tokens, dim]."""

    def __init__(self, cache: LayerCache, plan: ChunkPlan, *, want_cmp_output: bool) -> None:
        self.page_size = cache.page_size
        self.k = _gather(cache.k, plan.page_rows)
        self.v = _gather(cache.v, plan.page_rows)
        self.k_cmp = _gather(cache.k_cmp, plan.page_rows) if plan.needs_cmp else None
        self.v_cmp = _gather(cache.v_cmp, plan.page_rows) if want_cmp_output else None
        has_coarse = any(tile.lse_bias is not None for tile in plan.tiles)
        self.k_lse = None
        if has_coarse and cache.k_lse is not None:
            self.k_lse = _gather(cache.k_lse, plan.page_rows).float()
        # The window's keys, and the position of the first of them.
        self.k_swa, self.v_swa, self.swa_start = self.k, self.v, 0
        if plan.swa_page_rows is not None:
            keys, values = cache.window_kv
            self.k_swa = _gather(keys, plan.swa_page_rows)
            self.v_swa = _gather(values, plan.swa_page_rows)
            self.swa_start = plan.swa_first_page * cache.page_size


def _gather(cache: Tensor, page_rows: Tensor) -> Tensor:
    num_pages, num_kv_heads, tokens, dim = cache.shape
    flat = cache.view(num_pages * num_kv_heads, tokens * dim)
    return flat.index_select(0, page_rows).view(num_kv_heads, -1, dim)


def prefill_chunk(
    q: Tensor,
    cache: LayerCache,
    plan: ChunkPlan,
    branches: Branches,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    trace: BlockTrace | None = None,
) -> None:
    """Attend from one sequence's chunk; write its rows of (o_cmp, o_slc, o_swa).

    q: [T, HQ, D] of the whole step, already multiplied by the softmax scale; outputs: [T, HQ, Dv],
    None for an unused branch. trace: where to record selections.
    """
    sequence = _Sequence(cache, plan, want_cmp_output=branches.cmp)
    o_cmp, o_slc, o_swa = outputs
    for tile in plan.tiles:
        rows = slice(tile.start, tile.stop)
        grouped = _group_heads(q[rows], sequence.k.shape[0])
        mask = None
        if tile.cmp_bias is not None:
            cmp_output, mask = _cmp(grouped, sequence, tile, want_output=o_cmp is not None)
            if o_cmp is not None and cmp_output is not None:
                o_cmp[rows] = _ungroup_heads(cmp_output)
        if trace is not None:
            trace.record_tile(tile.start, tile.stop, mask)
        if o_slc is not None:
            if mask is None:
                slc_output = _causal(grouped, sequence, tile)
            else:
                slc_output = _selected(grouped, sequence, tile, mask)
            o_slc[rows] = _ungroup_heads(slc_output)
        if o_swa is not None and tile.window_bias is not None:
            o_swa[rows] = _ungroup_heads(_window(grouped, sequence, tile))


def _group_heads(q: Tensor, num_kv_heads: int) -> Tensor:
    """[Q, HQ, D] -> [H, G, Q, D]."""
    num_queries, num_q_heads, dim = q.shape
    grouped = q.view(num_queries, num_kv_heads, num_q_heads // num_kv_heads, dim)
    return grouped.permute(1, 2, 0, 3).contiguous()


def _ungroup_heads(o: Tensor) -> Tensor:
    """[H, G, Q, Dv] -> [Q, HQ, Dv]."""
    return o.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """[H, G, Q, D] x [H, L, D] -> [H, G, Q, L]."""
    heads, group, queries, dim = q.shape
    scores = torch.bmm(q.view(heads, group * queries, dim), keys.transpose(1, 2))
    return scores.view(heads, group, queries, -1)


def _weighted_sum(probs: Tensor, values: Tensor) -> Tensor:
    """[H, G, Q, L] x [H, L, Dv] -> [H, G, Q, Dv]."""
    heads, group, queries, keys = probs.shape
    output = torch.bmm(probs.view(heads, group * queries, keys), values)
    return output.view(heads, group, queries, -1)


def _cmp(
    q: Tensor, sequence: _Sequence, tile: TilePlan, *, want_output: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Attend to the compressed entries; return (output, selected blocks [H, Q, P])."""
    assert tile.cmp_bias is not None and tile.has_windows is not None
    assert sequence.k_cmp is not None
    num_entries = tile.cmp_bias.shape[-1]
    keys = sequence.k_cmp[:, :num_entries]
    output = mask = probs = None
    if want_output or tile.lse_bias is None:
        scores = _scores(q, keys).add_(tile.cmp_bias)
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32)
    if want_output:
        assert sequence.v_cmp is not None and probs is not None
        output = _weighted_sum(probs.to(q.dtype), sequence.v_cmp[:, :num_entries])
        output = output * tile.has_windows
    if tile.lse_bias is not None:
        assert sequence.k_lse is not None
        # In fp32, as in decode: these scores are for the selection alone.
        scores = _scores(q.float(), keys.float()).add_(tile.cmp_bias)
        coarse = _scores(q.float(), sequence.k_lse[:, : tile.lse_bias.shape[-1]])
        probs = relative_probs(scores, coarse.add_(tile.lse_bias))
    if tile.selection is not None:
        assert probs is not None
        block_scores = group_block_scores(probs.transpose(1, 2), tile.selection)
        mask = select_block_mask(block_scores, tile.selection)
    return output, mask


def _causal(q: Tensor, sequence: _Sequence, tile: TilePlan) -> Tensor:
    """Attend to every earlier token: all blocks are selected."""
    scores = _scores(q, sequence.k[:, : tile.num_keys])
    scores[..., tile.first_position :] += tile.causal_bias
    return _weighted_sum(torch.softmax(scores, dim=-1), sequence.v[:, : tile.num_keys])


def _selected(q: Tensor, sequence: _Sequence, tile: TilePlan, mask: Tensor) -> Tensor:
    """Attend to the selected blocks: gather the tile's union of them, mask the rest per query.

    The queries of a tile lie in one block, which is forced: it comes last in the union, cut at the
    last key, so that the causal mask has one place.
    """
    size = sequence.page_size
    own = tile.first_position // size
    heads = mask.shape[0]
    own_keys = tile.num_keys - own * size
    past = mask[..., :own]
    blocks, block_bias = _union(past, q.dtype)
    num_blocks = blocks.shape[1]
    rows = (blocks + torch.arange(heads).unsqueeze(1) * (sequence.k.shape[1] // size)).flatten()
    keys, values = (
        torch.cat(
            (
                x.view(-1, size * x.shape[2]).index_select(0, rows).view(heads, -1, x.shape[2]),
                x[:, own * size : tile.num_keys],
            ),
            dim=1,
        )
        for x in (sequence.k, sequence.v)
    )
    scores = _scores(q, keys)
    past_scores, own_scores = scores.split((num_blocks * size, own_keys), dim=-1)
    past_scores.unflatten(-1, (num_blocks, size)).add_(block_bias.unsqueeze(1).unsqueeze(-1))
    first = tile.first_position - own * size
    own_scores[..., first:] += tile.causal_bias
    return _weighted_sum(torch.softmax(scores, dim=-1), values)


def _union(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Blocks that any query of the tile selected, per head, and the bias of each query on them.

    mask: [H, Q, P] bool. Returns blocks [H, U] int64 and bias [H, Q, U]; a head with fewer than U
    is filled up with blocks that none of its queries selected.
    """
    used = mask.any(1)
    count = int(used.sum(1).max())
    order = torch.sort(used.to(torch.uint8), dim=1, descending=True, stable=True).indices
    blocks = order[:, :count]
    chosen = mask.gather(2, blocks.unsqueeze(1).expand(-1, mask.shape[1], -1))
    bias = torch.zeros(chosen.shape, dtype=dtype).masked_fill_(~chosen, MASKED)
    return blocks, bias


def _window(q: Tensor, sequence: _Sequence, tile: TilePlan) -> Tensor:
    """Attend to the last `window_size` tokens."""
    assert tile.window_bias is not None
    keys = slice(tile.window_start - sequence.swa_start, tile.num_keys - sequence.swa_start)
    scores = _scores(q, sequence.k_swa[:, keys]).add_(tile.window_bias)
    return _weighted_sum(torch.softmax(scores, dim=-1), sequence.v_swa[:, keys])
