"""The attention of attention.py through PyTorch's fused attention: on a CPU, several times faster.

Queries go in chunks, each with the keys that it can see and an additive mask. Nothing of the size
[T, T] is kept but the masks: two bytes a query and key below the diagonal in bf16.

Legend: B rows, T queries, K keys, HQ query and H KV heads, G = HQ // H, D dimensions.
"""

import torch
import torch.nn.functional as F
from attention import Rule, widen
from torch import Tensor

CHUNK = 512
"""Queries at a time, where a query sees anything before it."""

WINDOW_CHUNK = 128
"""Queries at a time in a window: all of them read the windows of all."""


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by a rule: q [B, T, HQ, D], k and v [B, K, H, D] -> o like q, lse [B, HQ, T].

    lse, fp32 and without gradient, is that of "cmp" alone, since nothing else uses one; for the
    other branches it is empty, [B, HQ, 0]. Not for CUDA: PyTorch 2.11's fused attention gave 0 for
    the last query there where T % 64 was 1, with a mask that heads share (train.py refuses it).
    """
    num_tokens = q.shape[1]
    size = WINDOW_CHUNK if rule.branch == "swa" else CHUNK
    outputs, lses = [], []
    for start in range(0, num_tokens, size):
        part = slice(start, min(num_tokens, start + size))
        keys = rule.key_range(part, k.shape[1])
        mask = rule.visible(part, keys.stop, q.device)[..., keys]
        outputs.append(_chunk(q[:, part], k[:, keys], v[:, keys], mask, scale))
        if rule.branch == "cmp":
            lses.append(_lse(q[:, part].detach(), k[:, keys].detach(), mask, scale))
    o = torch.cat(outputs, dim=1)
    if not lses:
        return o, widen(q).new_empty(q.shape[0], q.shape[2], 0)
    return o, torch.cat(lses, dim=-1)


def _chunk(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    if not k.shape[1]:
        # Of q, so that the backward pass finds a way through.
        return q * 0.0
    num_rows, dim = q.shape[0], q.shape[3]
    num_kv_heads = k.shape[2]
    # KV heads join the rows, so that a mask serves its group without a copy.
    heads = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    shape = (num_rows * num_kv_heads, heads.shape[1], k.shape[1], dim)
    keys, values = (x.transpose(1, 2).flatten(0, 1)[:, None].expand(shape) for x in (k, v))
    # Not -inf: a row of nothing else would be NaN, and its gradient too.
    least = torch.finfo(q.dtype).min
    mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device)
    mask.masked_fill_(~visible, least)
    mask = mask.expand(num_rows, num_kv_heads, -1, -1).flatten(0, 1)[:, None]
    o = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, scale=scale)
    o = o.unflatten(0, (num_rows, num_kv_heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    sees_any = visible.any(dim=-1)[:, :1].transpose(1, 2)[..., None]  # [B or 1, Tq, 1, 1]
    masked: Tensor = o * sees_any
    return masked


@torch.no_grad()
def _lse(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    heads = q.unflatten(2, (k.shape[2], -1))
    logits = widen(torch.einsum("bthgd,bshd->bhgts", heads, k)) * scale
    logits = logits.masked_fill_(~visible[:, :, None], -torch.inf)
    return logits.logsumexp(dim=-1).flatten(1, 2)
