"""The operators that a model calls, dispatched by the device of their tensors.

`plan_attention` runs once a step on host metadata, `nsa_attention` once a layer.
"""

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from nsa_kernels import torch_ops, torch_plan
from nsa_kernels.block_trace import BlockTrace
from nsa_kernels.checks import check_branch_kv, check_coarse, check_scales, check_shape
from nsa_kernels.metadata import AttnMetadata, BranchKV, LayerCache
from nsa_kernels.reference import CompressionMLP
from nsa_kernels.spec import NSASpec
from nsa_kernels.torch_ops import Gates
from nsa_kernels.torch_plan import Branches, TorchPlan

if TYPE_CHECKING:
    from nsa_kernels.gpu.plan import GpuPlan

# One name for what the device's path planned.
AttnPlan: TypeAlias = "TorchPlan | GpuPlan"

__all__ = [
    "AttnMetadata",
    "AttnPlan",
    "BlockTrace",
    "BranchKV",
    "Branches",
    "CompressionMLP",
    "Gates",
    "LayerCache",
    "nsa_attention",
    "plan_attention",
]


def plan_attention(
    meta: AttnMetadata,
    spec: NSASpec,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    branches: Branches | None = None,
    check_bounds: bool = False,
    trace: BlockTrace | None = None,
) -> AttnPlan:
    """Plan one step for every layer of a model.

    meta: of `build_metadata`, on the host. dtype: of queries, keys and values. device: where the
    layers run, None = cpu. branches: outputs that the gates let through, None = all.
    check_bounds: let GPU kernels assert that every page id lies in the cache; slow, for debugging.
    The CPU path checks indices always. trace: records what its rows select; only on the CPU.

    Raises ValueError for a device without kernels, a geometry that they cannot tile, or a trace
    where there is none.
    """
    if num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    device = device or torch.device("cpu")
    if device.type == "cpu":
        return torch_plan.plan_attention(
            meta, spec, num_kv_heads=num_kv_heads, dtype=dtype, branches=branches, trace=trace
        )
    if trace is not None:
        raise ValueError(f"device {device} has no block trace yet; use device cpu")
    if device.type == "cuda":
        # Imported here, so that a machine without a GPU never needs Triton.
        from nsa_kernels.gpu import plan as gpu_plan

        return gpu_plan.plan_attention(
            meta,
            spec,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            dtype=dtype,
            device=device,
            branches=branches,
            check_bounds=check_bounds,
        )
    raise ValueError(f"NSA has no kernels for device {device}; use device cpu or cuda")


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
    branch_kv: BranchKV | None = None,
    sigmoid_gates: bool = False,
) -> Tensor:
    """Append one step's tokens to a layer's cache and attend from them; return [T, HQ, Dv].

    q: [T, HQ, D], k: [T, H, D], v: [T, H, Dv], rotary embedding applied, one floating dtype.
    gates: [T, HQ, 3] in the order (cmp, slc, swa), or three constants. sigmoid_gates: the tensor
    holds logits, and the operator applies the sigmoid.
    cache: the layer's pages; this step's keys, values and closing windows are written to it.
    plan: of `plan_attention`, for this step. compression: MLPs of keys and values, None = mean.
    branch_kv: keys and values of compression and window where they are not k and v.
    The formula is that of `reference.nsa_attention` (paper, Eq. 5 to 12).

    Raises ValueError when a shape does not fit, keys and values of a branch are missing, or the
    device cannot have the cache's dtype.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, v_head_dim = cache.k.shape[1], cache.v.shape[3]
    check_shape("k", k, (num_tokens, num_kv_heads, head_dim))
    check_shape("v", v, (num_tokens, num_kv_heads, v_head_dim))
    check_branch_kv(branch_kv, cache, k, v)
    check_scales(cache, num_kv_heads)
    check_coarse(cache, spec)
    if num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if isinstance(gates, Tensor):
        check_shape("gates", gates, (num_tokens, num_q_heads, 3))
    if isinstance(plan, TorchPlan):
        if cache.k_scale is not None:
            raise ValueError("the CPU has no FP8 cache: use the dtype of the keys, or a GPU")
        if isinstance(gates, Tensor) and sigmoid_gates:
            gates = torch.sigmoid(gates)
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
            branch_kv=branch_kv,
        )
    from nsa_kernels.gpu import attention as gpu_attention

    return gpu_attention.nsa_attention(
        q,
        k,
        v,
        gates,
        cache,
        plan,
        spec,
        softmax_scale=softmax_scale,
        compression=compression,
        branch_kv=branch_kv,
        sigmoid_gates=sigmoid_gates,
    )
