"""The gated sum that ends prefill, with the merge of selected attention's partial results in it.

Legend: T tokens of the step, R tokens of the sub-chunk, HQ / H query / KV heads, G = HQ // H,
Dv width of values, N partial results a query has at most.
"""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape
from nsa_kernels.torch_ops import Gates

# (token, head) pairs of one program.
MERGE_ROWS = 16


def combine(
    o_cmp: Tensor | None,
    o_swa: Tensor | None,
    gates: Gates,
    *,
    num_kv_heads: int,
    first_token: int,
    num_tokens: int,
    out: Tensor,
    sigmoid_gates: bool = False,
) -> None:
    """Write out[t] = g_cmp * o_cmp[t] + g_swa * o_swa[t] for num_tokens tokens from first_token.

    o_cmp, o_swa: [T, HQ, Dv] or None = 0; out: [T, HQ, Dv]. gates: [T, HQ, 3] in the order
    (cmp, slc, swa), or three constants. sigmoid_gates: they are logits yet.
    """
    merge_and_combine(
        None,
        None,
        None,
        o_cmp,
        o_swa,
        gates,
        num_kv_heads=num_kv_heads,
        first_token=first_token,
        num_tokens=num_tokens,
        out=out,
        sigmoid_gates=sigmoid_gates,
    )


def merge_and_combine(
    partial: Tensor | None,
    partial_lse2: Tensor | None,
    num_free: Tensor | None,
    o_cmp: Tensor | None,
    o_swa: Tensor | None,
    gates: Gates,
    *,
    num_kv_heads: int,
    first_token: int,
    num_tokens: int,
    out: Tensor,
    sigmoid_gates: bool,
    num_warps: int = 4,
    unroll: int = 4,
) -> None:
    """Add the selected branch to `combine`: o_slc = sum_n exp2(partial_lse2[n] - lse2) partial[n].

    partial: [R, H, N, G, Dv] in the dtype of q, partial_lse2: [R, H, N, G] fp32, base 2, of the
    tokens from first_token on. num_free: [R, H] int32 or None = 0; of a query's partial results
    only the first 1 + num_free are read.
    """
    num_q_heads, v_head_dim = out.shape[1:]
    for name, branch in (("o_cmp", o_cmp), ("o_swa", o_swa)):
        if branch is not None:
            check_shape(name, branch, tuple(out.shape))
    g_cmp, g_slc, g_swa = (0.0, 0.0, 0.0) if isinstance(gates, Tensor) else gates
    gate_strides = gates.stride() if isinstance(gates, Tensor) else (0, 0, 0)
    num_rows = num_tokens * num_q_heads
    max_partials = partial.shape[2] if partial is not None else 1
    _merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
        partial,
        partial_lse2,
        num_free,
        o_cmp,
        o_swa,
        gates if isinstance(gates, Tensor) else None,
        out,
        g_cmp,
        g_slc,
        g_swa,
        first_token,
        num_rows,
        *(o_cmp.stride()[:2] if o_cmp is not None else (0, 0)),
        *(o_swa.stride()[:2] if o_swa is not None else (0, 0)),
        *gate_strides,
        *out.stride()[:2],
        NUM_Q_HEADS=num_q_heads,
        GROUP_SIZE=num_q_heads // num_kv_heads,
        V_DIM=v_head_dim,
        MAX_PARTIALS=max_partials,
        SIGMOID_GATES=sigmoid_gates,
        BLOCK_R=MERGE_ROWS,
        BLOCK_DV=triton.next_power_of_2(v_head_dim),
        BLOCK_N=triton.next_power_of_2(max_partials),
        UNROLL=min(unroll, max_partials),
        num_warps=num_warps,
    )


@triton.jit
def _gate(gates_ptr, constant, offset, mask, SIGMOID_GATES: tl.constexpr):
    """One gate of every row, from the tensor if there is one."""
    if gates_ptr is None:
        gate = tl.zeros(offset.shape, tl.float32) + constant
    else:
        gate = tl.load(gates_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if SIGMOID_GATES:
            gate = tl.sigmoid(gate)
    return gate


@triton.jit(do_not_specialize=["first_token", "num_rows"])
def _merge_kernel(
    partial_ptr,
    partial_lse2_ptr,
    num_free_ptr,
    o_cmp_ptr,
    o_swa_ptr,
    gates_ptr,
    out_ptr,
    g_cmp,
    g_slc,
    g_swa,
    first_token,
    num_rows,
    stride_cmp_t,
    stride_cmp_h,
    stride_swa_t,
    stride_swa_h,
    stride_gate_t,
    stride_gate_h,
    stride_gate_branch,
    stride_out_t,
    stride_out_h,
    NUM_Q_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    V_DIM: tl.constexpr,
    MAX_PARTIALS: tl.constexpr,
    SIGMOID_GATES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """BLOCK_R query heads of one or of several tokens."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_DV)
    mask_r = offs_r < num_rows
    mask = mask_r[:, None] & (offs_d < V_DIM)[None, :]
    token = (first_token + offs_r // NUM_Q_HEADS).to(tl.int64)
    head = offs_r % NUM_Q_HEADS
    gate_offset = token * stride_gate_t + head * stride_gate_h

    acc = tl.zeros((BLOCK_R, BLOCK_DV), tl.float32)
    if partial_ptr is not None:
        # Partial result n of head g of pair (token, KV head) is row (pair * N + n) * G + g.
        pair = offs_r // GROUP_SIZE
        first_row = pair.to(tl.int64) * (MAX_PARTIALS * GROUP_SIZE) + offs_r % GROUP_SIZE
        num_partials = mask_r.to(tl.int32)
        if num_free_ptr is not None:
            num_partials += tl.load(num_free_ptr + pair, mask=mask_r, other=0)
        offs_n = tl.arange(0, BLOCK_N)
        lse2 = tl.load(
            partial_lse2_ptr + first_row[:, None] + offs_n[None, :] * GROUP_SIZE,
            mask=offs_n[None, :] < num_partials[:, None],
            other=-float("inf"),
        )
        top = tl.max(lse2, axis=1)
        # A row that sees nothing has -inf here, and must not become NaN.
        top = tl.where(top > -float("inf"), top, 0.0)
        total = tl.sum(tl.exp2(lse2 - top[:, None]), axis=1)
        g_slc_row = _gate(gates_ptr, g_slc, gate_offset + stride_gate_branch, mask_r, SIGMOID_GATES)
        scale = g_slc_row / tl.where(total > 0.0, total, 1.0)
        for first_n in range(0, tl.max(num_partials), UNROLL):
            # Independent loads: UNROLL of them are in flight at once.
            for i in tl.static_range(UNROLL):
                row = first_row + (first_n + i) * GROUP_SIZE
                mask_n = first_n + i < num_partials
                lse2_n = tl.load(partial_lse2_ptr + row, mask=mask_n, other=-float("inf"))
                part = tl.load(
                    partial_ptr + row[:, None] * V_DIM + offs_d[None, :],
                    mask=mask & mask_n[:, None],
                    other=0.0,
                )
                acc += tl.exp2(lse2_n - top)[:, None] * part.to(tl.float32)
        acc *= scale[:, None]
    if o_cmp_ptr is not None:
        gate = _gate(gates_ptr, g_cmp, gate_offset, mask_r, SIGMOID_GATES)
        offset = (token * stride_cmp_t + head * stride_cmp_h)[:, None] + offs_d[None, :]
        branch = tl.load(o_cmp_ptr + offset, mask=mask, other=0.0)
        acc += gate[:, None] * branch.to(tl.float32)
    if o_swa_ptr is not None:
        gate = _gate(gates_ptr, g_swa, gate_offset + 2 * stride_gate_branch, mask_r, SIGMOID_GATES)
        offset = (token * stride_swa_t + head * stride_swa_h)[:, None] + offs_d[None, :]
        branch = tl.load(o_swa_ptr + offset, mask=mask, other=0.0)
        acc += gate[:, None] * branch.to(tl.float32)
    offset = (token * stride_out_t + head * stride_out_h)[:, None] + offs_d[None, :]
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)
