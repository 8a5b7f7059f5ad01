"""The specification of NSA: plain fp32 PyTorch over one sequence of contiguous tensors.

Every operator that serves has a function of the same meaning here and is tested against it.
Nothing in this file is fast; everything in it is meant to be read beside docs/nsa.md.
"Eq." is an equation of the paper, arXiv 2502.11089.

Legend: T tokens of the sequence, Tq query tokens (any of the T), HQ query heads, H KV heads,
G = HQ // H query heads per KV head (heads h*G .. h*G+G-1 share KV head h), D dimension of
queries and keys, Dv of values, N compression windows, S = num_selected_blocks, P pages.

`positions` [Tq] int64 are absolute: position t is the token k[t], and a query sees no later one.
Tensors are on the CPU; any floating dtype is computed in fp32 and the results are fp32. A tensor of
the wrong shape, or a position that the sequence does not have, raises ValueError.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.spec import NSASpec


@dataclass(frozen=True, slots=True)
class CompressionMLP:
    """Weights of the learnable compression phi (Eq. 7), one set for all KV heads.

    pos: [l, D] intra-block position encoding, added to the tokens of a window.
    w1, b1: [hidden, l * D], [hidden]; a column of w1 is `token_in_window * D + channel`.
    w2, b2: [Dout, hidden], [Dout].
    """

    pos: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def compress_mean(x: Tensor, spec: NSASpec) -> Tensor:
    """Average every complete window: [T, H, D] -> [N, H, D], window j is tokens [j*d, j*d + l)."""
    return _windows(x, spec).mean(dim=2)


def compress_mlp(x: Tensor, spec: NSASpec, weights: CompressionMLP) -> Tensor:
    """Map every complete window through phi (Eq. 7): [T, H, D] -> [N, H, Dout].

    phi(window) = w2 @ silu(w1 @ flatten(window + pos) + b1) + b2.
    """
    windows = _windows(x, spec)  # [N, H, l, D]
    num_windows, num_kv_heads, cmp_len, dim = windows.shape
    hidden_size, out_dim = weights.w1.shape[0], weights.w2.shape[0]
    _check_shape("pos", weights.pos, (cmp_len, dim))
    _check_shape("w1", weights.w1, (hidden_size, cmp_len * dim))
    _check_shape("b1", weights.b1, (hidden_size,))
    _check_shape("w2", weights.w2, (out_dim, hidden_size))
    _check_shape("b2", weights.b2, (out_dim,))
    flat = (windows + weights.pos.float()).reshape(num_windows, num_kv_heads, cmp_len * dim)
    hidden = F.silu(flat @ weights.w1.float().T + weights.b1.float())
    return hidden @ weights.w2.float().T + weights.b2.float()


def cmp_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    positions: Tensor,
    spec: NSASpec,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the windows that end at or before the query (Eq. 7).

    q [Tq, HQ, D], k_cmp [N, H, D], v_cmp [N, H, Dv] -> o [Tq, HQ, Dv], lse [Tq, HQ].
    A query that sees no window yet has o = 0 and lse = -inf.
    """
    visible = _visible_windows(positions, k_cmp.shape[0], spec)  # [Tq, N]
    visible = visible[:, None].expand(-1, k_cmp.shape[1], -1)
    return _masked_attention(q, k_cmp, v_cmp, visible, softmax_scale)


def selection_lse(
    q: Tensor, k_lse: Tensor, positions: Tensor, spec: NSASpec, *, softmax_scale: float
) -> Tensor:
    """Return InfLLM-v2's log-sum-exp of the scores of the coarse windows: [Tq, HQ].

    k_lse [N', H, D]: means of the keys of windows of `lse_len` tokens, every `lse_stride`
    (`compress_mean(k, spec.coarse)`), of which a query sees those that end at or before it.
    """
    _, lse = cmp_attention(q, k_lse, k_lse, positions, spec.coarse, softmax_scale=softmax_scale)
    return lse


def block_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    positions: Tensor,
    spec: NSASpec,
    *,
    softmax_scale: float,
    num_blocks: int,
) -> Tensor:
    """Score every block for every GQA group (Eq. 8 to 10).

    q [Tq, HQ, D], k_cmp [N, H, D], lse [Tq, HQ] -> [Tq, H, num_blocks].
    p = exp(q k_cmp * softmax_scale - lse) on the visible windows and 0 elsewhere, summed over the
    heads of the group, then mapped to blocks as `spec.score_map` says. Usually `lse` is that of
    `cmp_attention`; InfLLM-v2 takes `selection_lse`, and p may then exceed 1. Where it is -inf,
    scores are 0.
    """
    num_queries, num_q_heads, _ = q.shape
    num_windows, num_kv_heads, _ = k_cmp.shape
    _check_heads(q, k_cmp)
    _check_shape("lse", lse, (num_queries, num_q_heads))
    _check_positions(positions, num_queries, num_blocks * spec.block_size)
    group_size = num_q_heads // num_kv_heads
    visible = _visible_windows(positions, num_windows, spec)  # [Tq, N]
    group_p = torch.zeros(num_queries, num_kv_heads, num_windows)
    for head in range(num_q_heads):
        kv_head = head // group_size
        logits = q[:, head].float() @ k_cmp[:, kv_head].float().T * softmax_scale
        head_lse = lse[:, head, None].float()
        p = torch.exp(logits - head_lse)
        group_p[:, kv_head] += p.where(visible & (head_lse > -torch.inf), 0.0)
    if spec.score_map == "max_pool":
        return _max_pool(group_p, num_blocks, spec)
    return group_p @ overlap_weights(num_windows, num_blocks, spec)


def overlap_weights(num_windows: int, num_blocks: int, spec: NSASpec) -> Tensor:
    """Count the strides that window c shares with block j (Eq. 9): [num_windows, num_blocks].

    Window c covers strides [c, c + l/d), block j strides [j * l'/d, (j + 1) * l'/d). The double
    sum of Eq. 9 visits window c once for each shared stride when its indices are taken 1-based;
    read 0-based, the printed formula selects one block beside the right one.
    """
    per_window, per_block = spec.strides_per_window, spec.cmp_entries_per_page
    window_start = torch.arange(num_windows)[:, None]
    block_start = torch.arange(num_blocks)[None, :] * per_block
    first = torch.maximum(window_start, block_start)
    end = torch.minimum(window_start + per_window, block_start + per_block)
    return (end - first).clamp(min=0).float()


def select_blocks(scores: Tensor, positions: Tensor, spec: NSASpec) -> Tensor:
    """Choose the blocks of every query: [Tq, H, num_blocks] -> [Tq, H, width] int32 (Eq. 11).

    With IC = position // block_size the candidates are the blocks 0..IC. The first
    `num_init_blocks` and the `num_local_blocks` that end at IC are always chosen, the best others
    fill up: higher score first, then lower index. A query at a position below `dense_len` - 1
    chooses every candidate. A row lists its blocks in ascending order and ends in -1 where fewer
    than width = `block_table_width` (S without `dense_len`) were chosen.
    """
    num_queries, num_kv_heads, num_blocks = scores.shape
    _check_positions(positions, num_queries, num_blocks * spec.block_size)
    size = spec.num_selected_blocks
    num_forced = spec.num_init_blocks + spec.num_local_blocks
    if spec.selection == "fla_legacy" and (size % 2 or num_forced > size // 2):
        raise ValueError(
            "selection 'fla_legacy' needs an even num_selected_blocks whose half holds all forced "
            f"blocks, got num_selected_blocks {size} and {num_forced} forced blocks"
        )
    rows = scores.float().tolist()
    chosen = [
        [_select_row(rows[i][h], position, spec) for h in range(num_kv_heads)]
        for i, position in enumerate(positions.tolist())
    ]
    width = spec.block_table_width
    padded = [[blocks + [-1] * (width - len(blocks)) for blocks in heads] for heads in chosen]
    return torch.tensor(padded, dtype=torch.int32).reshape(num_queries, num_kv_heads, width)


def slc_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    positions: Tensor,
    spec: NSASpec,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the tokens of the selected blocks, up to the query's own (Eq. 12).

    q [Tq, HQ, D], k [T, H, D], v [T, H, Dv], block_indices [Tq, H, S] with -1 for "none", in any
    order -> o [Tq, HQ, Dv], lse [Tq, HQ]. With no visible token o = 0 and lse = -inf.
    """
    num_tokens, num_kv_heads, _ = k.shape
    num_queries = q.shape[0]
    _check_positions(positions, num_queries, num_tokens)
    _check_shape("block_indices", block_indices, (num_queries, num_kv_heads, None))
    tokens = torch.arange(num_tokens)
    token_block = tokens // spec.block_size
    selected = (block_indices[..., None, :] == token_block[:, None]).any(dim=-1)  # [Tq, H, T]
    visible = selected & (tokens <= positions[:, None])[:, None]
    return _masked_attention(q, k, v, visible, softmax_scale)


def swa_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, spec: NSASpec, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the last `window_size` tokens, the query's own included: (t - w, t].

    q [Tq, HQ, D], k [T, H, D], v [T, H, Dv] -> o [Tq, HQ, Dv], lse [Tq, HQ].
    With window_size 0 there is no such branch: o = 0 and lse = -inf.
    """
    _check_positions(positions, q.shape[0], k.shape[0])
    distance = positions[:, None] - torch.arange(k.shape[0])  # [Tq, T]
    visible = (distance >= 0) & (distance < spec.window_size)
    return _masked_attention(q, k, v, visible[:, None].expand(-1, k.shape[1], -1), softmax_scale)


def combine(o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, gates: Tensor) -> Tensor:
    """Sum the branches [Tq, HQ, Dv], each weighed by its gate (Eq. 5).

    gates: [Tq, HQ, 3], already through the sigmoid, in the order (cmp, slc, swa).
    """
    _check_shape("o_slc", o_slc, tuple(o_cmp.shape))
    _check_shape("o_swa", o_swa, tuple(o_cmp.shape))
    _check_shape("gates", gates, (o_cmp.shape[0], o_cmp.shape[1], 3))
    branches = torch.stack((o_cmp, o_slc, o_swa), dim=-1).float()  # [Tq, HQ, Dv, 3]
    return (branches * gates.float()[:, :, None]).sum(dim=-1)


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    positions: Tensor,
    spec: NSASpec,
    *,
    softmax_scale: float,
    block_indices: Tensor | None = None,
    k_lse: Tensor | None = None,
) -> Tensor:
    """Run the whole of NSA for the queries q [Tq, HQ, D] over one sequence: -> [Tq, HQ, Dv].

    k [T, H, D], v [T, H, Dv]; k_cmp, v_cmp: their compression, [N, H, ...]; gates [Tq, HQ, 3].
    block_indices [Tq, H, width]: attend to these instead of selecting, so that two implementations
    can be compared although near ties make their selections differ.
    k_lse: keys of the coarse windows, for a spec with `lse_len`; see `selection_lse`.
    InfLLM-v2 is the gates (0, 1, 0): one attention, over the selected blocks.
    """
    o_cmp, lse = cmp_attention(q, k_cmp, v_cmp, positions, spec, softmax_scale=softmax_scale)
    if (k_lse is None) != (spec.lse_len == 0):
        raise ValueError(
            f"k_lse goes with lse_len, got lse_len {spec.lse_len} "
            f"and {'no k_lse' if k_lse is None else 'k_lse'}"
        )
    if k_lse is not None:
        lse = selection_lse(q, k_lse, positions, spec, softmax_scale=softmax_scale)
    if block_indices is None:
        num_blocks = -(-k.shape[0] // spec.block_size)
        scores = block_scores(
            q, k_cmp, lse, positions, spec, softmax_scale=softmax_scale, num_blocks=num_blocks
        )
        block_indices = select_blocks(scores, positions, spec)
    o_slc, _ = slc_attention(q, k, v, block_indices, positions, spec, softmax_scale=softmax_scale)
    o_swa, _ = swa_attention(q, k, v, positions, spec, softmax_scale=softmax_scale)
    return combine(o_cmp, o_slc, o_swa, gates)


def gather_pages(cache: Tensor, page_table_row: Tensor, num_tokens: int) -> Tensor:
    """Read a sequence's tokens from the paged cache [num_pages, H, page_size, D]: -> [T, H, D].

    Token i lies at cache[page_table_row[i // page_size], :, i % page_size].
    """
    return _gather_entries(cache, page_table_row, torch.arange(num_tokens))


def gather_cmp(cmp_cache: Tensor, page_table_row: Tensor, num_tokens: int, spec: NSASpec) -> Tensor:
    """Read a sequence's windows from the cache [num_pages, H, l'/d, D]: -> [N, H, D].

    Window j is filed under the page in which it ends: as entry e = j + l/d - 1 of the sequence,
    at cmp_cache[page_table_row[e // (l'/d)], :, e % (l'/d)].
    """
    _check_shape("cmp_cache", cmp_cache, (None, None, spec.cmp_entries_per_page, None))
    windows = torch.arange(spec.num_windows(num_tokens))
    return _gather_entries(cmp_cache, page_table_row, windows + spec.strides_per_window - 1)


def _windows(x: Tensor, spec: NSASpec) -> Tensor:
    """View [T, H, D] as its complete windows [N, H, l, D], in fp32."""
    _check_shape("x", x, (None, None, None))
    if spec.num_windows(x.shape[0]) == 0:
        return x.new_zeros((0, x.shape[1], spec.cmp_len, x.shape[2]), dtype=torch.float32)
    return x.float().unfold(0, spec.cmp_len, spec.cmp_stride).transpose(2, 3)


def _visible_windows(positions: Tensor, num_windows: int, spec: NSASpec) -> Tensor:
    """Tell which windows end at or before each position: [Tq, N] bool."""
    last_tokens = torch.arange(num_windows) * spec.cmp_stride + spec.cmp_len - 1
    return last_tokens <= positions[:, None]


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q over the keys that `visible` [Tq, H, T] admits: (o, lse)."""
    _check_heads(q, k)
    _check_shape("v", v, (k.shape[0], k.shape[1], None))
    _check_shape("visible", visible, (q.shape[0], k.shape[1], k.shape[0]))
    group_size = q.shape[1] // k.shape[1]
    o = torch.zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf)
    for head in range(q.shape[1]):
        kv_head = head // group_size
        mask = visible[:, kv_head]
        logits = q[:, head].float() @ k[:, kv_head].float().T * softmax_scale
        logits = logits.masked_fill(~mask, -torch.inf)
        lse[:, head] = torch.logsumexp(logits, dim=-1)
        # An all-masked row has -inf - (-inf) here, hence the where instead of a plain exp.
        p = torch.exp(logits - lse[:, head, None]).where(mask, 0.0)
        o[:, head] = p @ v[:, kv_head].float()
    return o, lse


def _max_pool(group_p: Tensor, num_blocks: int, spec: NSASpec) -> Tensor:
    """Take a block's best window among those that overlap it: [Tq, H, N] -> [Tq, H, num_blocks].

    InfLLM-v2's max pooling with kernel l'/d + l/d - 1, stride l'/d and padding l/d - 1.
    """
    per_window, per_block = spec.strides_per_window, spec.cmp_entries_per_page
    pooled = torch.zeros(*group_p.shape[:2], num_blocks)
    for block in range(num_blocks):
        first = max(0, block * per_block - (per_window - 1))
        overlapping = group_p[..., first : (block + 1) * per_block]
        if overlapping.shape[-1]:
            pooled[..., block] = overlapping.amax(dim=-1)
    return pooled


def _select_row(scores: Sequence[float], position: int, spec: NSASpec) -> list[int]:
    """Choose the blocks of the query at `position`, in ascending order."""
    current = position // spec.block_size
    if position + 1 < spec.dense_len:
        return list(range(current + 1))
    # fla gives a forced block the score 1.0 a head, which no sum of probabilities exceeds, and
    # scores the others on windows complete before block `current`. Windows that end inside it
    # touch only forced blocks there (l = d = l'), so ranking forced blocks first is the same rule.
    forced = {
        *range(spec.num_init_blocks),
        *range(current + 1 - spec.num_local_blocks, current + 1),
    }
    ranked = sorted(range(current + 1), key=lambda j: (j not in forced, -scores[j], j))
    size = spec.num_selected_blocks
    if spec.selection == "fla_legacy" and current >= size:
        # Its kernel reads the blocks in chunks of `size` and on every chunk but the first keeps
        # half of what it had and half of what it reads, whatever the scores.
        last_chunk = current // size * size
        past = [j for j in ranked if j < last_chunk][: size // 2]
        return sorted(past + [j for j in ranked if j >= last_chunk][: size // 2])
    return sorted(ranked[:size])


def _gather_entries(cache: Tensor, page_table_row: Tensor, entries: Tensor) -> Tensor:
    """Read entries of a sequence from [num_pages, H, entries_per_page, D]: -> [E, H, D]."""
    _check_shape("cache", cache, (None, None, None, None))
    _check_shape("page_table_row", page_table_row, (None,))
    entries_per_page = cache.shape[2]
    num_pages_used = int(entries[-1]) // entries_per_page + 1 if len(entries) else 0
    if num_pages_used > len(page_table_row):
        raise ValueError(
            f"page_table_row must name {num_pages_used} pages, got {len(page_table_row)}"
        )
    pages = page_table_row[entries // entries_per_page].long()
    if ((pages < 0) | (pages >= cache.shape[0])).any():
        raise ValueError(
            f"page ids in use must be in [0, {cache.shape[0]}), got {sorted(set(pages.tolist()))}"
        )
    return cache[pages, :, entries % entries_per_page]


def _check_shape(name: str, tensor: Tensor, expected: Sequence[int | None]) -> None:
    """Raise ValueError unless `tensor` has the expected shape, where None is any size."""
    sizes = tuple(tensor.shape)
    if len(sizes) != len(expected) or any(
        want not in (None, got) for want, got in zip(expected, sizes, strict=True)
    ):
        shown = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} must have shape [{shown}], got {list(sizes)}")


def _check_heads(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless q [Tq, HQ, D] and k [T, H, D] make whole groups."""
    _check_shape("q", q, (None, None, None))
    _check_shape("k", k, (None, None, q.shape[2]))
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"KV heads must divide query heads, got {q.shape[1]} query and {k.shape[1]} KV heads"
        )


def _check_positions(positions: Tensor, num_queries: int, num_tokens: int) -> None:
    """Raise ValueError unless there is a position in [0, num_tokens) for every query."""
    _check_shape("positions", positions, (num_queries,))
    if ((positions < 0) | (positions >= num_tokens)).any():
        raise ValueError(
            f"positions must be in [0, {num_tokens}), "
            f"got {int(positions.min())} to {int(positions.max())}"
        )
