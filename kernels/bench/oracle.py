"""NSA in vectorised fp32 for one long sequence, on any device: the accuracy bench's other side.

The formulas and symbols are those of `nsa_kernels.reference`, which is exact but loops.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels.reference import overlap_weights
from nsa_kernels.spec import NSASpec

# Attention logits held at once.
MAX_LOGITS = 2**26


@dataclass(frozen=True, slots=True)
class Expected:
    """out: [Tq, HQ, Dv] fp32. scores: [Tq, H, blocks] fp32. indices: [Tq, H, S], as used."""

    out: Tensor
    scores: Tensor
    indices: Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    positions: Tensor,
    spec: NSASpec,
    *,
    softmax_scale: float,
    block_indices: Tensor | None = None,
) -> Expected:
    """Attend from q [Tq, HQ, D] at `positions` to k [T, H, D], v [T, H, Dv] with gates [Tq, HQ, 3].

    block_indices: [Tq, H, S], -1 for none; the selection to use, None = the best blocks.
    """
    if torch.backends.cuda.matmul.allow_tf32:
        raise ValueError("the oracle needs fp32 matrix products: switch TF32 off")
    k, v = k.float(), v.float()
    k_cmp, v_cmp = _pool(k, spec), _pool(v, spec)
    num_blocks = -(-k.shape[0] // spec.block_size)
    weights = overlap_weights(k_cmp.shape[0], num_blocks, spec).to(q.device)
    group = q.shape[1] // k.shape[1]
    chunk = max(1, MAX_LOGITS // (group * k.shape[0]))
    parts = []
    for first in range(0, q.shape[0], chunk):
        part = slice(first, first + chunk)
        heads = []
        for head in range(k.shape[1]):
            own = slice(head * group, (head + 1) * group)
            heads.append(
                _attend_group(
                    q[part, own].float() * softmax_scale,
                    (k[:, head], v[:, head]),
                    (k_cmp[:, head], v_cmp[:, head]),
                    gates[part, own].float(),
                    positions[part],
                    weights,
                    spec,
                    None if block_indices is None else block_indices[part, head].long(),
                )
            )
        out, scores, indices = zip(*heads, strict=True)
        parts.append((torch.cat(out, dim=1), torch.stack(scores, 1), torch.stack(indices, 1)))
    return Expected(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def forced_blocks(positions: Tensor, num_blocks: int, spec: NSASpec) -> Tensor:
    """Tell which blocks every query has to choose: [Tq, blocks] bool."""
    current = (positions // spec.block_size)[:, None]
    blocks = torch.arange(num_blocks, device=positions.device)
    is_local = (blocks > current - spec.num_local_blocks) & (blocks <= current)
    return is_local | ((blocks < spec.num_init_blocks) & (blocks <= current))


def best_blocks(scores: Tensor, positions: Tensor, spec: NSASpec) -> Tensor:
    """Choose the best blocks by scores [Tq, blocks], forced ones first: [Tq, S], -1 for none."""
    num_blocks = scores.shape[1]
    blocks = torch.arange(num_blocks, device=scores.device)
    ranks = scores.masked_fill(forced_blocks(positions, num_blocks, spec), torch.inf)
    ranks = ranks.masked_fill(blocks > (positions // spec.block_size)[:, None], -torch.inf)
    best = ranks.topk(min(spec.num_selected_blocks, num_blocks), dim=1)
    indices = best.indices.masked_fill(best.values == -torch.inf, -1)
    missing = spec.num_selected_blocks - indices.shape[1]
    return torch.nn.functional.pad(indices, (0, missing), value=-1)


def _attend_group(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    kv_cmp: tuple[Tensor, Tensor],
    gates: Tensor,
    positions: Tensor,
    weights: Tensor,
    spec: NSASpec,
    indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One KV head: q [c, G, D], already scaled -> out [c, G, Dv], scores [c, blocks], indices."""
    windows = torch.arange(kv_cmp[0].shape[0], device=q.device)
    ends = windows * spec.cmp_stride + spec.cmp_len - 1
    p_cmp = _softmax(q @ kv_cmp[0].T, ends <= positions[:, None])
    scores = p_cmp.sum(1) @ weights
    if indices is None:
        indices = best_blocks(scores, positions, spec)
    # One column more takes the absent choices.
    selected = torch.zeros(len(q), scores.shape[1] + 1, dtype=torch.bool, device=q.device)
    selected.scatter_(1, indices.where(indices >= 0, scores.shape[1]), True)
    tokens = torch.arange(kv[0].shape[0], device=q.device)
    distance = positions[:, None] - tokens
    visible = selected[:, :-1].repeat_interleave(spec.block_size, dim=1)[:, : len(tokens)]
    logits = q @ kv[0].T
    out = gates[..., 0, None] * (p_cmp @ kv_cmp[1])
    out += gates[..., 1, None] * (_softmax(logits, visible & (distance >= 0)) @ kv[1])
    in_window = (distance >= 0) & (distance < spec.window_size)
    out += gates[..., 2, None] * (_softmax(logits, in_window) @ kv[1])
    return out, scores, indices


def _softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Probabilities of logits [c, G, N] over visible [c, N]; zeros where nothing is visible."""
    masked = logits.masked_fill(~visible[:, None], -torch.inf)
    return torch.softmax(masked, dim=-1).nan_to_num(0.0)


def _pool(x: Tensor, spec: NSASpec) -> Tensor:
    return x.unfold(0, spec.cmp_len, spec.cmp_stride).mean(dim=-1)
