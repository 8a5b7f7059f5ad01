"""The operators that a model calls, dispatched by the device of their tensors.

`plan_attention` runs once a step on host metadata, `nsa_attention` once a layer.
"""

import torch
from torch import Tensor

from nsa_kernels import torch_ops
from nsa_kernels.checks import check_shape
from nsa_kernels.metadata import AttnMetadata, LayerCache
from nsa_kernels.reference import CompressionMLP
from nsa_kernels.spec import NSASpec
from nsa_kernels.torch_ops import Gates
from nsa_kernels.torch_plan import Branches, TorchPlan, plan_attention

# One name for what the device's path planned; a second path makes this a union.
AttnPlan = TorchPlan

__all__ = [
    "AttnMetadata",
    "AttnPlan",
    "Branches",
    "CompressionMLP",
    "Gates",
    "LayerCache",
    "nsa_attention",
    "plan_attention",
]


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    cache: LayerCache,
    plan: AttnPlan,
    spec: NSASpec,
    *,
    softmax_scale: float,
    compression: tuple[CompressionMLP, CompressionMLP] | None = None,
) -> Tensor:
    """Append one step's tokens to a layer's cache and attend from them; return [T, HQ, Dv].

    q: [T, HQ, D], k: [T, H, D], v: [T, H, Dv], rotary embedding applied, one floating dtype.
    gates: [T, HQ, 3] in the order (cmp, slc, swa), or three constants.
    cache: the layer's pages; this step's keys, values and closing windows are written to it.
    plan: of `plan_attention`, for this step. compression: MLPs of keys and values, None = mean.
    The formula is that of `reference.nsa_attention` (paper, Eq. 5 to 12).

    Raises ValueError when a shape does not fit.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, v_head_dim = cache.k.shape[1], cache.v.shape[3]
    check_shape("k", k, (num_tokens, num_kv_heads, head_dim))
    check_shape("v", v, (num_tokens, num_kv_heads, v_head_dim))
    if num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if isinstance(gates, Tensor):
        check_shape("gates", gates, (num_tokens, num_q_heads, 3))
    if q.device != torch.device("cpu"):
        raise ValueError(f"NSA has no kernels for device {q.device}; use device cpu")
    return torch_ops.nsa_attention(
        q,
        k,
        v,
        gates,
        cache,
        plan,
        cmp_len=spec.cmp_len,
        softmax_scale=softmax_scale,
        compression=compression,
    )
