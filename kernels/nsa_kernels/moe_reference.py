"""Specification of a mixture of experts (DeepSeekMoE, arXiv 2401.06066), in plain fp32 PyTorch.

T tokens, E experts, k experts a token, I width of an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def route(x: Tensor, router: Tensor, num_experts_per_token: int) -> tuple[Tensor, Tensor]:
    """Return the ids, [T, k] int32, and weights, [T, k] fp32, of each token's experts.

    x: [T, hidden]; router: [E, hidden]. The k largest probabilities of a softmax over all experts,
    not renormalised, in descending order; of equal ones the lower id.
    """
    probabilities = F.linear(x.float(), router.float()).softmax(dim=-1)
    # torch.topk does not say which of equal values it takes; a stable sort does.
    weights, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    first = slice(0, num_experts_per_token)
    return ids[:, first].int(), weights[:, first]


def routed_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Return sum_r weights[t, r] * expert(expert_ids[t, r])(x[t]), [T, hidden] fp32.

    x: [T, hidden]. expert_ids: [T, k], -1 for none. gate_up: [E, 2I, hidden], gate rows first;
    down: [E, hidden, I]. expert(e)(x) = down[e] (silu(gate[e] x) * (up[e] x)).
    """
    x = x.float()
    out = torch.zeros_like(x)
    for token, ids in enumerate(expert_ids.tolist()):
        for rank, expert in enumerate(ids):
            if expert >= 0:
                gate, up = (gate_up[expert].float() @ x[token]).chunk(2)
                part = down[expert].float() @ (F.silu(gate) * up)
                out[token] += weights[token, rank].float() * part
    return out
