"""The mixture-of-experts feed-forward by PyTorch's operators (DeepSeekMoE, arXiv 2401.06066).

T tokens, E experts, k experts a token, I width of an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_serve.models.layers import GatedMLP


def route(x: Tensor, router: Tensor, num_experts_per_token: int) -> tuple[Tensor, Tensor]:
    """Return the weights, [T, k] fp32, and ids, [T, k] int64, of each token's experts.

    x: [T, hidden]; router: [E, hidden]. The k largest probabilities of a softmax over all experts,
    in fp32 and not renormalised; of equal ones the lower id.
    """
    probabilities = F.linear(x.float(), router.float()).softmax(dim=-1)
    # torch.topk does not say which of equal values it takes; a stable sort does.
    weights, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    return weights[:, :num_experts_per_token], ids[:, :num_experts_per_token]


class MoE(nn.Module):
    """shared(x) + sum over a token's experts of weight * expert(x) + residual.

    router: [E, hidden]. experts: E gated MLPs; shared: one, which every token takes, or None.
    """

    def __init__(
        self,
        router: Tensor,
        experts: list[GatedMLP],
        shared: GatedMLP | None,
        num_experts_per_token: int,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(experts)
        self.shared = shared
        self.num_experts_per_token = num_experts_per_token

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[T, hidden], [T, hidden] -> [T, hidden]."""
        weights, ids = route(x, self.router, self.num_experts_per_token)
        result = residual.clone() if self.shared is None else self.shared(x, residual)
        # By token, then rank: what an expert adds does not depend on who else is in the step, and
        # a token's experts are summed in the order of their rank.
        parts = x.new_empty(*ids.shape, x.shape[1])
        for expert in ids.unique().tolist():
            tokens, ranks = (ids == expert).nonzero(as_tuple=True)
            rows = x[tokens]
            output = self.experts[expert](rows, torch.zeros_like(rows))
            parts[tokens, ranks] = output * weights[tokens, ranks].unsqueeze(1).to(output.dtype)
        for rank in range(ids.shape[1]):
            result = result + parts[:, rank]
        return result
