"""NSA's three branches over whole sequences, with gradients: what the student trains through.

The rules are those of `nsa_kernels/reference.py`, which the tests compare with. Selection has no
gradient (as in the paper); scores reach the compression branch's softmax only through its output.

Three ways to attend: "plain" is PyTorch over chunks of queries, recomputed in the backward pass, on
any device and in any dtype; "sdpa" is `attention_sdpa.py`, the fast one on a CPU; "triton" is
`attention_triton.py`, for CUDA. Scores are never [T, T]: the largest array is a chunk's, or the
compression scores [T, T / cmp_stride].

Legend: B rows, T tokens, HQ query and H KV heads, G = HQ // H, D dimensions, N windows, NB blocks,
K keys (tokens or windows).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa_kernels.spec import NSASpec

Backend = Literal["plain", "sdpa", "triton"]
Branch = Literal["cmp", "slc", "swa"]

CHUNK_ELEMENTS = 1 << 26
"""Most scores that the plain way holds at once (256 MiB in fp32)."""

_FORCED = 1 << 60


@dataclass(frozen=True, slots=True)
class Rule:
    """Which keys a query sees.

    branch: "cmp", "slc" or "swa". selected: of "slc", bool [B, H, NB, T]; queries last, so that a
    tile of queries reads it in one piece.
    """

    branch: Branch
    spec: NSASpec
    selected: Tensor | None = None

    def visible(self, queries: slice, num_keys: int, device: torch.device) -> Tensor:
        """Return the mask of some queries: bool [B or 1, H or 1, Tq, num_keys]."""
        spec = self.spec
        t = torch.arange(queries.start, queries.stop, device=device)[:, None]
        key = torch.arange(num_keys, device=device)
        if self.branch == "cmp":
            return (key * spec.cmp_stride + spec.cmp_len - 1 <= t)[None, None]
        if self.branch == "swa":
            return ((key <= t) & (key > t - spec.window_size))[None, None]
        assert self.selected is not None, "slc comes with a selection"
        chosen = self.selected[..., queries].transpose(2, 3)  # [B, H, Tq, NB]
        tokens = chosen.repeat_interleave(spec.block_size, dim=-1)[..., :num_keys]
        return tokens & (key <= t)

    def key_range(self, queries: slice, num_keys: int) -> slice:
        """Return the keys that any of these queries can see."""
        if self.branch == "cmp":
            return slice(0, min(num_keys, self.spec.num_windows(queries.stop)))
        first = queries.start - self.spec.window_size + 1 if self.branch == "swa" else 0
        return slice(max(0, first), min(num_keys, queries.stop))


def nsa_branches(
    q: Tensor, k: Tensor, v: Tensor, spec: NSASpec, *, scale: float, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the branches: q [B, T, HQ, D], k and v [B, T, H, D] -> three of [B, T, HQ, D].

    In the order cmp, slc, swa, before gates. A query that sees no window yet has a cmp of 0.
    Raises ValueError for a dialect that is not trained here.
    """
    _check(q, k, v, spec)
    k_cmp, v_cmp = compress_mean(k, spec), compress_mean(v, spec)
    o_cmp, lse = attend(q, k_cmp, v_cmp, Rule("cmp", spec), scale=scale, backend=backend)
    with torch.no_grad():
        selected = select(q, k_cmp, lse, spec, scale=scale, backend=backend)
    o_slc, _ = attend(q, k, v, Rule("slc", spec, selected), scale=scale, backend=backend)
    o_swa, _ = attend(q, k, v, Rule("swa", spec), scale=scale, backend=backend)
    return o_cmp, o_slc, o_swa


def selection_loss(q: Tensor, k: Tensor, spec: NSASpec, queries: Tensor, *, scale: float) -> Tensor:
    """Compare what selection goes by with full attention, for some queries: a scalar.

    q [B, T, HQ, D], k [B, T, H, D], queries int64 [P]. The target is the probability that full
    attention gives to each block, as the mean over a group's heads; the prediction is the block
    scores from the compressed keys. Both are taken over the blocks that are not chosen anyway,
    normalized, and compared by KL(target || prediction), each query and group weighted by the
    target's share there. Only the prediction has a gradient.
    """
    num_heads = k.shape[2]
    num_blocks = -(-k.shape[1] // spec.block_size)
    t, block = queries[:, None], torch.arange(num_blocks, device=q.device)
    current = t // spec.block_size
    is_open = (block >= spec.num_init_blocks) & (block <= current - spec.num_local_blocks)
    heads = widen(q[:, queries]).unflatten(2, (num_heads, -1))  # [B, P, H, G, D]
    with torch.no_grad():
        logits = torch.einsum("bphgd,bshd->bhgps", heads, widen(k)) * scale
        key = torch.arange(k.shape[1], device=q.device)
        p = logits.masked_fill_(key > t, -torch.inf).softmax(dim=-1).mean(dim=2)  # [B, H, P, T]
        blocks = F.pad(p, (0, num_blocks * spec.block_size - k.shape[1]))
        target = blocks.unflatten(-1, (num_blocks, -1)).sum(dim=-1) * is_open
        weight = target.sum(dim=-1)
    k_cmp = compress_mean(k, spec)
    logits = torch.einsum("bphgd,bnhd->bhgpn", heads, widen(k_cmp)) * scale
    last = torch.arange(k_cmp.shape[1], device=q.device) * spec.cmp_stride + spec.cmp_len - 1
    # Not -inf: a query that sees no window would be NaN. It has no open block either.
    logits = logits.masked_fill(last > t, torch.finfo(logits.dtype).min)
    scores = block_scores(logits.softmax(dim=-1).sum(dim=2), num_blocks, spec) * is_open
    tiny = torch.finfo(scores.dtype).tiny
    predicted = (scores / scores.sum(dim=-1, keepdim=True).clamp_min(tiny)).clamp_min(1e-12)
    target = target / weight.clamp_min(tiny)[..., None]
    kl = torch.special.xlogy(target, target) - torch.special.xlogy(target, predicted)
    loss: Tensor = (kl.sum(dim=-1) * weight).mean()
    return loss


def compress_mean(x: Tensor, spec: NSASpec) -> Tensor:
    """Average every complete window: [B, T, H, D] -> [B, N, H, D] in the dtype of x.

    Summed in fp32 (or fp64), then rounded, as the cache holds it.
    """
    num_strides, per_window = x.shape[1] // spec.cmp_stride, spec.strides_per_window
    num_windows = spec.num_windows(x.shape[1])
    strides = x[:, : num_strides * spec.cmp_stride].unflatten(1, (num_strides, spec.cmp_stride))
    sums = widen(strides).sum(dim=2)  # [B, strides, H, D]
    parts = [sums[:, i : i + num_windows] for i in range(per_window)]
    total: Tensor = sum(parts[1:], start=parts[0])
    return (total / spec.cmp_len).to(x.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, *, scale: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Attend by a rule: q [B, T, HQ, D], k and v [B, K, H, D] -> o like q, lse [B, HQ, T].

    lse is fp32 or fp64, has no gradient, and is -inf where a query sees no key; o is 0 there.
    """
    if k.shape[1] == 0:
        # Of q, so that the backward pass finds a way through.
        return q * 0.0, widen(q).new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    if backend == "triton":
        # Imported here: there is no Triton on machines without a GPU.
        from attention_triton import triton_attention

        return triton_attention(q, k, v, rule, scale)
    if backend == "sdpa":
        from attention_sdpa import sdpa_attention

        return sdpa_attention(q, k, v, rule, scale)
    return _plain_attention(q, k, v, rule, scale)


def select(
    q: Tensor, k_cmp: Tensor, lse: Tensor, spec: NSASpec, *, scale: float, backend: Backend
) -> Tensor:
    """Choose the blocks of every query: bool [B, H, NB, T], queries last (Eq. 8 to 11).

    q [B, T, HQ, D], k_cmp [B, N, H, D], lse [B, HQ, T] of the compression branch.
    """
    num_rows, num_tokens = q.shape[:2]
    num_blocks = -(-num_tokens // spec.block_size)
    t = torch.arange(num_tokens, device=q.device)
    block = torch.arange(num_blocks, device=q.device)
    if num_blocks <= spec.num_selected_blocks:
        candidates = block[:, None] <= t // spec.block_size  # [NB, T]
        return candidates.expand(num_rows, k_cmp.shape[2], -1, -1).contiguous()
    parts = []
    size = max(1, CHUNK_ELEMENTS // (num_rows * q.shape[2] * max(1, k_cmp.shape[1])))
    for start in range(0, num_tokens, size):
        part = slice(start, min(num_tokens, start + size))
        group_p = _group_p(q, k_cmp, lse, part, spec, scale=scale, backend=backend)
        parts.append(_top_blocks(block_scores(group_p, num_blocks, spec), t[part], spec))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def block_scores(group_p: Tensor, num_blocks: int, spec: NSASpec) -> Tensor:
    """Map probabilities of windows to blocks (Eq. 9): [B, H, Tq, N] -> [B, H, Tq, NB].

    A block's score counts a window once for each stride that they share.
    """
    per_window, per_block = spec.strides_per_window, spec.cmp_entries_per_page
    num_strides = num_blocks * per_block
    # Window c covers the strides c .. c + per_window - 1.
    padded = F.pad(group_p, (per_window - 1, num_strides - group_p.shape[-1]))
    strides = padded[..., per_window - 1 :].clone()
    for back in range(1, per_window):
        first = per_window - 1 - back
        strides += padded[..., first : first + num_strides]
    scores: Tensor = strides.unflatten(-1, (num_blocks, per_block)).sum(dim=-1)
    return scores


def _top_blocks(scores: Tensor, t: Tensor, spec: NSASpec) -> Tensor:
    """Choose blocks by score [B, H, Tq, NB], of queries at t [Tq]: bool [B, H, NB, Tq]."""
    num_blocks = scores.shape[-1]
    block = torch.arange(num_blocks, device=scores.device)
    current = (t // spec.block_size)[:, None]
    is_candidate = block <= current
    is_forced = (block < spec.num_init_blocks) | (block > current - spec.num_local_blocks)
    # One integer orders a block: forced ones first, then by score (its bits, as a number that is
    # not negative), then the lower index. No two are equal, so that topk has no ties to break.
    bits = scores.float().view(torch.int32).long()
    key = (bits << 16) + (num_blocks - 1 - block)
    key = torch.where(is_forced, key + _FORCED, key).masked_fill(~is_candidate, -1)
    top = key.topk(spec.num_selected_blocks, dim=-1, sorted=False)
    chosen = torch.zeros(key.shape, dtype=torch.bool, device=key.device)
    chosen.scatter_(-1, top.indices, top.values >= 0)
    return chosen.transpose(2, 3).contiguous()


def _group_p(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    part: slice,
    spec: NSASpec,
    *,
    scale: float,
    backend: Backend,
) -> Tensor:
    """Sum the probabilities of the windows over a group's heads: fp32 [B, H, Tq, N]."""
    if backend == "triton":
        from attention_triton import triton_group_p

        return triton_group_p(q, k_cmp, lse, part, spec, scale)
    heads = widen(q[:, part]).unflatten(2, (k_cmp.shape[2], -1))  # [B, Tq, H, G, D]
    logits = torch.einsum("bthgd,bnhd->bhgtn", heads, widen(k_cmp)) * scale
    visible = Rule("cmp", spec).visible(part, k_cmp.shape[1], q.device)[:, :, None]
    shift = lse[..., part].unflatten(1, (k_cmp.shape[2], -1))[..., None]
    # Masked after the exponential: where no window is visible the shift is -inf.
    return torch.exp(logits - shift).masked_fill(~visible, 0.0).sum(dim=2)


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, scale: float
) -> tuple[Tensor, Tensor]:
    num_tokens, num_keys = q.shape[1], k.shape[1]
    size = max(1, CHUNK_ELEMENTS // (q.shape[0] * q.shape[2] * num_keys))
    outputs, lses = [], []
    for start in range(0, num_tokens, size):
        part = slice(start, min(num_tokens, start + size))
        keys = rule.key_range(part, num_keys)
        if keys.stop == 0:
            o, lse = attend(q[:, part], k[:, :0], v[:, :0], rule, scale=scale, backend="plain")
        elif torch.is_grad_enabled() and size < num_tokens:
            o, lse = checkpoint(
                _plain_chunk, q[:, part], k[:, keys], v[:, keys], rule, part, keys, scale,
                use_reentrant=False,
            )  # fmt: skip
        else:
            o, lse = _plain_chunk(q[:, part], k[:, keys], v[:, keys], rule, part, keys, scale)
        outputs.append(o)
        lses.append(lse)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=-1)


def _plain_chunk(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, part: slice, keys: slice, scale: float
) -> tuple[Tensor, Tensor]:
    # [B or 1, H or 1, 1, Tq, K]
    visible = rule.visible(part, keys.stop, q.device)[..., keys][:, :, None]
    heads = widen(q).unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bthgd,bshd->bhgts", heads, widen(k)) * scale
    # Not -inf: a row of nothing else would be NaN, and its gradient too.
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    sees_any = visible.any(dim=-1)
    p = logits.softmax(dim=-1) * sees_any[..., None]
    o = torch.einsum("bhgts,bshd->bthgd", p, widen(v)).flatten(2, 3).to(q.dtype)
    with torch.no_grad():
        lse = logits.logsumexp(dim=-1).masked_fill(~sees_any, -torch.inf).flatten(1, 2)
    return o, lse


def widen(x: Tensor) -> Tensor:
    """Return x in the dtype that sums are taken in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(q: Tensor, k: Tensor, v: Tensor, spec: NSASpec) -> None:
    is_plain = spec.score_map == "overlap" and spec.selection == "exact"
    if not is_plain or spec.dense_len or spec.lse_len or not spec.window_size:
        raise ValueError(
            "training computes score_map 'overlap' with selection 'exact', a window and neither "
            f"dense_len nor lse_len, got {spec}"
        )
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "expected q [B, T, HQ, D] and k, v [B, T, H, D], got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"KV heads must divide query heads, got {k.shape[2]} and {q.shape[2]}")
