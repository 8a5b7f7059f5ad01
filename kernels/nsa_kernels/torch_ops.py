"""The whole NSA operator in vectorised PyTorch over the paged cache: the CPU path.

T tokens of the step, HQ query heads, H KV heads, D and Dv dimensions of keys and of values,
W compression windows that close in the step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.metadata import LayerCache
from nsa_kernels.reference import CompressionMLP
from nsa_kernels.torch_decode import decode_branches
from nsa_kernels.torch_plan import TorchPlan
from nsa_kernels.torch_prefill import prefill_chunk

Gates = Tensor | tuple[float, float, float]


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, plan: TorchPlan) -> None:
    """Zero the pages that the step opens, then write keys [T, H, D] and values [T, H, Dv]."""
    if len(plan.fresh_rows):
        for tensor in (cache.k, cache.v, cache.k_cmp, cache.v_cmp):
            tensor.view(-1, tensor.shape[2] * tensor.shape[3]).index_fill_(0, plan.fresh_rows, 0)
    cache.k.view(-1, k.shape[-1]).index_copy_(0, plan.kv_rows, k.reshape(-1, k.shape[-1]))
    cache.v.view(-1, v.shape[-1]).index_copy_(0, plan.kv_rows, v.reshape(-1, v.shape[-1]))


def compress_kv(
    cache: LayerCache,
    plan: TorchPlan,
    cmp_len: int,
    compression: tuple[CompressionMLP, CompressionMLP] | None,
) -> None:
    """Compress the windows that closed in this step, from the cached tokens, and file them.

    compression: the MLPs of keys and of values, or None for the mean.
    """
    if not len(plan.cmp_rows):
        return
    for index, (raw, compressed) in enumerate(((cache.k, cache.k_cmp), (cache.v, cache.v_cmp))):
        dim = raw.shape[-1]
        windows = raw.view(-1, dim).index_select(0, plan.window_rows).view(-1, cmp_len, dim)
        if compression is None:
            entries = windows.mean(1, dtype=torch.float32).to(raw.dtype)
        else:
            entries = _mlp(windows, compression[index])
        compressed.view(-1, dim).index_copy_(0, plan.cmp_rows, entries)


def _mlp(windows: Tensor, mlp: CompressionMLP) -> Tensor:
    """phi of the specification on [W * H, l, D] windows, in their dtype."""
    flat = (windows + mlp.pos).flatten(1)
    return F.linear(F.silu(F.linear(flat, mlp.w1, mlp.b1)), mlp.w2, mlp.b2)


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    cache: LayerCache,
    plan: TorchPlan,
    *,
    cmp_len: int,
    softmax_scale: float,
    compression: tuple[CompressionMLP, CompressionMLP] | None = None,
) -> Tensor:
    """Append this step's tokens to the cache and attend: [T, HQ, Dv]. See `ops.nsa_attention`."""
    store_kv(k, v, cache, plan)
    branches = plan.branches
    if branches.cmp or branches.slc:
        compress_kv(cache, plan, cmp_len, compression)
    q = q * softmax_scale
    if plan.decode is not None and not plan.chunks:
        outputs, _ = decode_branches(q, cache, plan.decode, branches)
        return combine(outputs, gates)
    shape = (q.shape[0], q.shape[1], v.shape[2])
    o_cmp, o_slc, o_swa = (
        q.new_zeros(shape) if used else None for used in (branches.cmp, branches.slc, branches.swa)
    )
    if plan.decode is not None:
        rows = slice(0, plan.decode.num_rows)
        decoded, _ = decode_branches(q[rows], cache, plan.decode, branches)
        for output, part in zip((o_cmp, o_slc, o_swa), decoded, strict=True):
            if output is not None and part is not None:
                output[rows] = part
    for chunk in plan.chunks:
        prefill_chunk(q, cache, chunk, branches, (o_cmp, o_slc, o_swa))
    return combine((o_cmp, o_slc, o_swa), gates)


def combine(outputs: tuple[Tensor | None, Tensor | None, Tensor | None], gates: Gates) -> Tensor:
    """Gated sum of the branch outputs [T, HQ, Dv]; None counts as zero.

    gates: [T, HQ, 3] in the order (cmp, slc, swa), or three constants.
    """
    total: Tensor | None = None
    for index, output in enumerate(outputs):
        if output is None:
            continue
        if isinstance(gates, Tensor):
            part = output * gates[..., index, None]
        else:
            part = output if gates[index] == 1.0 else output * gates[index]
        total = part if total is None else total + part
    if total is None:
        raise ValueError("no branch is used: every gate is zero")
    return total
