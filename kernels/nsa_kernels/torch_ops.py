"""The whole NSA operator in vectorised PyTorch over the paged cache: the CPU path.

T tokens of the step, HQ query heads, H KV heads, D and Dv dimensions of keys and of values,
W compression windows that close in the step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.metadata import BranchKV, LayerCache
from nsa_kernels.reference import CompressionMLP
from nsa_kernels.torch_decode import Outputs, decode_branches
from nsa_kernels.torch_plan import BranchPlan, DecodePlan, TorchPlan
from nsa_kernels.torch_prefill import prefill_chunk

Gates = Tensor | tuple[float, float, float]


def store_kv(
    k: Tensor, v: Tensor, branch_kv: BranchKV | None, cache: LayerCache, plan: TorchPlan
) -> None:
    """Zero the pages that the step opens, then write keys [T, H, D] and values [T, H, Dv]."""
    _zero_pages((cache.k, cache.v, cache.k_cmp, cache.v_cmp), plan.fresh_rows)
    if cache.k_lse is not None:
        _zero_pages((cache.k_lse,), plan.fresh_rows)
    _write(k, cache.k, plan.kv_rows)
    _write(v, cache.v, plan.kv_rows)
    if branch_kv is not None and plan.separate is not None:
        keys, values = cache.window_kv
        _zero_pages((keys, values), plan.separate.fresh_rows)
        _write(branch_kv.k_swa, keys, plan.separate.kv_rows)
        _write(branch_kv.v_swa, values, plan.separate.kv_rows)


def _zero_pages(caches: tuple[Tensor, ...], page_rows: Tensor) -> None:
    if len(page_rows):
        for tensor in caches:
            tensor.view(-1, tensor.shape[2] * tensor.shape[3]).index_fill_(0, page_rows, 0)


def _write(x: Tensor, cache: Tensor, token_rows: Tensor) -> None:
    cache.view(-1, x.shape[-1]).index_copy_(0, token_rows, x.reshape(-1, x.shape[-1]))


def compress_kv(
    branch_kv: BranchKV | None,
    cache: LayerCache,
    plan: TorchPlan,
    cmp_len: int,
    compression: tuple[CompressionMLP, CompressionMLP] | None,
) -> None:
    """Compress the windows that closed in this step, and file them.

    compression: the MLPs of keys and of values, or None for the mean. branch_kv: raw tokens of the
    compression branch where it does not share those of the cache; they also go to the tails.
    """
    raws: tuple[Tensor, Tensor] = (cache.k, cache.v)
    separate = plan.separate
    if branch_kv is not None:
        raws = (branch_kv.k_cmp, branch_kv.v_cmp)
    tails = (cache.k_tail, cache.v_tail)
    for index, compressed in enumerate((cache.k_cmp, cache.v_cmp)):
        raw, tail = raws[index], tails[index]
        dim = raw.shape[-1]
        if len(plan.cmp_rows):
            if separate is None or tail is None:
                windows = raw.view(-1, dim).index_select(0, plan.window_rows)
            else:
                windows = _separate_windows(raw, tail, separate, cmp_len)
            windows = windows.view(-1, cmp_len, dim)
            if compression is None:
                entries = windows.mean(1, dtype=torch.float32).to(raw.dtype)
            else:
                entries = _mlp(windows, compression[index])
            compressed.view(-1, dim).index_copy_(0, plan.cmp_rows, entries)
        if separate is not None and tail is not None:
            _write(raw[separate.tail_tokens], tail, separate.tail_rows)


def compress_coarse(cache: LayerCache, plan: TorchPlan) -> None:
    """Average the keys of the coarse windows that closed in this step, and file them."""
    if cache.k_lse is None or not len(plan.lse_rows):
        return
    dim = cache.k.shape[-1]
    windows = cache.k.view(-1, dim).index_select(0, plan.lse_window_rows)
    entries = windows.view(len(plan.lse_rows), -1, dim).mean(1, dtype=torch.float32)
    cache.k_lse.view(-1, dim).index_copy_(0, plan.lse_rows, entries.to(cache.k_lse.dtype))


def _separate_windows(raw: Tensor, tail: Tensor, plan: BranchPlan, cmp_len: int) -> Tensor:
    """Windows whose tokens lie in the step's own [T, H, dim] or in tails: [W, H, l, dim]."""
    heads, dim = raw.shape[1:]
    tokens = raw.index_select(0, plan.window_tokens)
    if len(plan.old_tokens):
        old = tail.view(-1, dim).index_select(0, plan.old_rows)
        tokens.index_copy_(0, plan.old_tokens, old.view(-1, heads, dim))
    return tokens.view(-1, cmp_len, heads, dim).transpose(1, 2).contiguous()


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
    branch_kv: BranchKV | None = None,
) -> Tensor:
    """Append this step's tokens to the cache and attend: [T, HQ, Dv]. See `ops.nsa_attention`."""
    store_kv(k, v, branch_kv, cache, plan)
    branches = plan.branches
    if branches.cmp or branches.slc:
        compress_kv(branch_kv, cache, plan, cmp_len, compression)
        compress_coarse(cache, plan)
    q = q * softmax_scale
    if plan.trace is not None:
        plan.trace.begin_layer()
    if plan.decode is not None and not plan.chunks:
        outputs = _decode(q, cache, plan, plan.decode)
        return combine(outputs, gates)
    shape = (q.shape[0], q.shape[1], v.shape[2])
    o_cmp, o_slc, o_swa = (
        q.new_zeros(shape) if used else None for used in (branches.cmp, branches.slc, branches.swa)
    )
    if plan.decode is not None:
        rows = slice(0, plan.decode.num_rows)
        decoded = _decode(q[rows], cache, plan, plan.decode)
        for output, part in zip((o_cmp, o_slc, o_swa), decoded, strict=True):
            if output is not None and part is not None:
                output[rows] = part
    for chunk in plan.chunks:
        prefill_chunk(q, cache, chunk, branches, (o_cmp, o_slc, o_swa), trace=plan.trace)
    return combine((o_cmp, o_slc, o_swa), gates)


def _decode(q: Tensor, cache: LayerCache, plan: TorchPlan, decode: DecodePlan) -> Outputs:
    outputs, block_indices = decode_branches(q, cache, decode, plan.branches)
    if plan.trace is not None:
        plan.trace.record_decode(block_indices)
    return outputs


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
