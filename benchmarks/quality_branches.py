"""What each branch of NSA adds to a layer's output, taken from the engine's own layers on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_kernels.metadata import build_metadata
from nsa_kernels.ops import AttnPlan, LayerCache
from nsa_serve.config import BRANCHES, EngineConfig, make_config
from nsa_serve.engine import Engine
from nsa_serve.models.layers import apply_rotary
from nsa_serve.models.nsa_attention import NSAAttention

_SHUT = -1e4
"""A gate's logit whose sigmoid is 0, in bfloat16 too."""


@torch.inference_mode()
def branch_shares(model: str, ids: Sequence[int], *, dtype: str = "auto") -> Tensor:
    """Return each layer's shares of output norm, [L, 3] in the order cmp, slc, swa, summing to 1.

    The share of branch b is the mean over tokens of |o_proj (gate_b * o_b)|, divided by the sum of
    that over the branches. model: of gate "linear"; an adapter, a folder or a built-in name. ids:
    one prompt, run in one piece. Raises ValueError for another gate.
    """
    options = {"model": model, "device": "cpu", "dtype": dtype, "max_model_len": len(ids) + 1}
    engine = Engine(make_config(EngineConfig, options))
    try:
        runner = engine.runner
        config = runner.model.config
        if config.nsa.gate != "linear":
            raise ValueError(f"{model} has gate {config.nsa.gate!r}; shares are of gate 'linear'")
        size = engine.info.page_size
        pages = list(range(1, 2 + len(ids) // size))
        meta = build_metadata([pages], [0], [len(ids)], config.nsa, num_decode_rows=0)
        found: list[Tensor] = []
        layers = [m for m in runner.model.modules() if isinstance(m, NSAAttention)]
        for layer in layers:
            layer.register_forward_hook(lambda *call: found.append(_norms(call[0], *call[1])))
        runner.model(
            torch.tensor(ids), meta.positions, runner.model.plan(meta), runner.cache.layers
        )
    finally:
        engine.close()
    norms = torch.stack(found)
    return norms / norms.sum(dim=1, keepdim=True)


def _norms(
    layer: NSAAttention,
    x: Tensor,
    _residual: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: LayerCache,
    plan: AttnPlan,
) -> Tensor:
    """Run a layer again, with the gates of one branch open at a time: mean norms [3]."""
    fused = layer.qkvg(x)
    qk = apply_rotary(fused[:, : layer.attend.qk_width].unflatten(-1, (-1, layer.head_dim)), rotary)
    first = layer.attend.qk_width + layer.attend.v_width
    norms: list[Any] = []
    for branch in range(len(BRANCHES)):
        alone = fused.clone()
        for other in range(len(BRANCHES)):
            if other != branch:
                alone[:, first + other :: len(BRANCHES)] = _SHUT
        # What is appended to the cache is there already, and the same.
        output = layer.out(layer.attend(qk, alone, cache, plan))
        norms.append(output.float().norm(dim=-1).mean())
    return torch.stack(norms)
