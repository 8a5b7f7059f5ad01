"""Masked attention of long sequences in Triton, forward and backward.

One kernel serves the three branches: a list says which tiles of keys a tile of queries meets, and
inside a tile the branch's own rule is applied. FlashAttention-2 (arXiv 2307.08691) on those lists;
the backward pass has one kernel for keys and values, which goes over the query heads of a group,
and one for queries: no atomics, the same result every time.

Legend as in `attention.py`; tiles are TILE queries by TILE keys.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from attention import Rule
from torch import Tensor

from nsa_kernels.spec import NSASpec

TILE = 64
"""Queries and keys of a tile; also the block_size that "slc" needs."""

_LOG2_E = 1.4426950408889634
_BRANCHES = {"cmp": 0, "slc": 1, "swa": 2}


@dataclass(frozen=True, slots=True)
class _Lists:
    """Tiles of keys that each tile of queries meets, and the other way round.

    keys [B|1, H|1, query tiles, key tiles] int32, num_keys [B|1, H|1, query tiles] int32; queries,
    num_queries: the transpose.
    """

    keys: Tensor
    num_keys: Tensor
    queries: Tensor
    num_queries: Tensor


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.attend`. Raises ValueError for a shape that the kernels do not have."""
    dim, block_size = q.shape[3], rule.spec.block_size
    if dim < 16 or dim & (dim - 1) or block_size != TILE:
        raise ValueError(
            f"the Triton kernels need a head_dim that is a power of two from 16 on and block_size "
            f"{TILE}, got {dim} and {block_size}; use --attention plain"
        )
    lists = _make_lists(rule, q.shape[1], k.shape[1], q.device)
    o, lse = _Attention.apply(q, k, v, rule, lists, scale)
    return o, lse


def triton_group_p(
    q: Tensor, k_cmp: Tensor, lse: Tensor, part: slice, spec: NSASpec, scale: float
) -> Tensor:
    """See `attention._group_p`."""
    num_rows, _, num_q_heads, dim = q.shape
    num_windows, num_kv_heads = k_cmp.shape[1:3]
    num_queries = part.stop - part.start
    out = torch.empty(
        (num_rows, num_kv_heads, num_queries, num_windows), dtype=torch.float32, device=q.device
    )
    grid = (triton.cdiv(num_queries, TILE), triton.cdiv(num_windows, TILE), num_rows * num_kv_heads)
    k_cmp = k_cmp.contiguous()
    _group_p_kernel[grid](
        q.contiguous(), k_cmp, lse, out,
        part.start, part.stop, q.shape[1], num_windows, scale * _LOG2_E,
        num_kv_heads, num_q_heads // num_kv_heads,
        spec.cmp_stride, spec.cmp_len, dim, TILE,
        num_warps=4,
    )  # fmt: skip
    return out


def _make_lists(rule: Rule, num_tokens: int, num_keys: int, device: torch.device) -> _Lists:
    """List the pairs of tiles in which some query sees some key."""
    spec = rule.spec
    num_query_tiles = triton.cdiv(num_tokens, TILE)
    first = torch.arange(num_query_tiles, device=device)[:, None] * TILE
    key = torch.arange(triton.cdiv(num_keys, TILE), device=device) * TILE
    last = first + TILE - 1
    if rule.branch == "cmp":
        meets = (key * spec.cmp_stride + spec.cmp_len - 1 <= last)[None, None]
    elif rule.branch == "swa":
        meets = ((key <= last) & (key + TILE - 1 > first - spec.window_size))[None, None]
    else:
        assert rule.selected is not None, "slc comes with a selection"
        padding = num_query_tiles * TILE - num_tokens
        padded = torch.nn.functional.pad(rule.selected, (0, padding))
        meets = padded.unflatten(-1, (num_query_tiles, TILE)).any(dim=-1).transpose(2, 3)
    meets = meets.to(torch.int8)
    keys = meets.argsort(dim=-1, descending=True, stable=True).int()
    queries = meets.transpose(2, 3).argsort(dim=-1, descending=True, stable=True).int()
    return _Lists(
        keys.contiguous(),
        meets.sum(dim=-1, dtype=torch.int32).contiguous(),
        queries.contiguous(),
        meets.sum(dim=-2, dtype=torch.int32).contiguous(),
    )


class _Attention(torch.autograd.Function):
    """The kernels as one differentiable function of q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: Rule, lists: _Lists, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        num_rows, num_tokens, num_q_heads, _ = q.shape
        o = torch.empty_like(q)
        lse = torch.empty((num_rows, num_q_heads, num_tokens), dtype=torch.float32, device=q.device)
        grid = (triton.cdiv(num_tokens, TILE), num_rows * num_q_heads)
        _forward_kernel[grid](
            q, k, v, o, lse, *_list_arguments(rule, lists.keys, lists.num_keys),
            num_tokens, k.shape[1], scale * _LOG2_E, **_constants(q, k, rule),
            num_warps=4, num_stages=3,
        )  # fmt: skip
        ctx.save_for_backward(
            q, k, v, o, lse, lists.keys, lists.num_keys, lists.queries, lists.num_queries
        )
        ctx.rule, ctx.scale = rule, scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, *tensors = ctx.saved_tensors
        lists, rule = _Lists(*tensors), ctx.rule
        grad = grad.contiguous()
        num_rows, num_tokens, num_q_heads, _ = q.shape
        num_keys, num_kv_heads = k.shape[1:3]
        delta = (grad.float() * o.float()).sum(dim=-1).transpose(1, 2).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        sizes = (num_tokens, num_keys, ctx.scale, ctx.scale * _LOG2_E)
        constants = _constants(q, k, rule)
        _backward_keys_kernel[(triton.cdiv(num_keys, TILE), num_rows * num_kv_heads)](
            q, k, v, grad, lse, delta, dk, dv,
            *_list_arguments(rule, lists.queries, lists.num_queries), *sizes, **constants,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        _backward_queries_kernel[(triton.cdiv(num_tokens, TILE), num_rows * num_q_heads)](
            q, k, v, grad, lse, delta, dq,
            *_list_arguments(rule, lists.keys, lists.num_keys), *sizes, **constants,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def _list_arguments(rule: Rule, tiles: Tensor, counts: Tensor) -> tuple[Any, ...]:
    """Arguments of the kernels: selection and lists, and how to step from head to head."""
    stride_b = 0 if tiles.shape[0] == 1 else tiles.shape[1]
    stride_h = 0 if tiles.shape[1] == 1 else 1
    # A tensor where there is no selection too, so that there is one signature.
    selected = counts if rule.selected is None else rule.selected.view(torch.int8)
    num_blocks = 0 if rule.selected is None else rule.selected.shape[2]
    return selected, num_blocks, tiles, counts, stride_b, stride_h, tiles.shape[2], tiles.shape[3]


def _constants(q: Tensor, k: Tensor, rule: Rule) -> dict[str, int]:
    spec = rule.spec
    return {
        "KV_HEADS": k.shape[2],
        "GROUP_SIZE": q.shape[2] // k.shape[2],
        "BRANCH": _BRANCHES[rule.branch],
        "CMP_STRIDE": spec.cmp_stride,
        "CMP_LEN": spec.cmp_len,
        "WINDOW": spec.window_size,
        "DIM": q.shape[3],
        "BLOCK": TILE,
    }


@triton.jit
def _visible(
    selected_ptr, head, num_blocks, t, key, key_tile, num_tokens, num_keys,
    BRANCH: tl.constexpr, CMP_STRIDE: tl.constexpr, CMP_LEN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The branch's rule inside a tile: [BLOCK queries, BLOCK keys]. head: of the selection."""
    inside = (t < num_tokens)[:, None] & (key < num_keys)[None, :]
    if BRANCH == 0:
        return inside & ((key * CMP_STRIDE + (CMP_LEN - 1))[None, :] <= t[:, None])
    causal = inside & (key[None, :] <= t[:, None])
    if BRANCH == 2:
        return causal & (key[None, :] > t[:, None] - WINDOW)
    row = (head.to(tl.int64) * num_blocks + key_tile) * num_tokens
    chosen = tl.load(selected_ptr + row + t, mask=t < num_tokens, other=0)
    return causal & (chosen != 0)[:, None]


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    selected_ptr, num_blocks, tiles_ptr, counts_ptr, stride_lb, stride_lh, num_lists, list_len,
    num_tokens, num_keys, scale_log2,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, BRANCH: tl.constexpr,
    CMP_STRIDE: tl.constexpr, CMP_LEN: tl.constexpr, WINDOW: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    Q_HEADS: tl.constexpr = KV_HEADS * GROUP_SIZE
    # The last tiles of queries have most keys: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, q_head = tl.program_id(1) // Q_HEADS, tl.program_id(1) % Q_HEADS
    kv_head = q_head // GROUP_SIZE
    t = tile * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    q_rows = ((row.to(tl.int64) * num_tokens + t) * Q_HEADS + q_head) * DIM
    q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=(t < num_tokens)[:, None], other=0.0)
    index = (row * stride_lb + kv_head * stride_lh) * num_lists + tile
    list_ptr = tiles_ptr + index.to(tl.int64) * list_len
    m_i = tl.full([BLOCK], -1e30, dtype=tl.float32)
    l_i = tl.zeros([BLOCK], dtype=tl.float32)
    acc = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    for i in range(tl.load(counts_ptr + index)):
        key_tile = tl.load(list_ptr + i)
        key = key_tile * BLOCK + tl.arange(0, BLOCK)
        k_rows = ((row.to(tl.int64) * num_keys + key) * KV_HEADS + kv_head) * DIM
        in_keys = key < num_keys
        k = tl.load(k_ptr + k_rows[None, :] + d[:, None], mask=in_keys[None, :], other=0.0)
        v = tl.load(v_ptr + k_rows[:, None] + d[None, :], mask=in_keys[:, None], other=0.0)
        visible = _visible(
            selected_ptr, row * KV_HEADS + kv_head, num_blocks, t, key, key_tile,
            num_tokens, num_keys, BRANCH, CMP_STRIDE, CMP_LEN, WINDOW,
        )  # fmt: skip
        s = tl.dot(q, k, input_precision="ieee") * scale_log2
        s = tl.where(visible, s, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new
    sees_any = l_i > 0.0
    o = tl.where(sees_any[:, None], acc / tl.where(sees_any, l_i, 1.0)[:, None], 0.0)
    lse = (m_i + tl.log2(tl.where(sees_any, l_i, 1.0))) / 1.4426950408889634
    lse = tl.where(sees_any, lse, -float("inf"))
    out = o_ptr + q_rows[:, None] + d[None, :]
    tl.store(out, o.to(o_ptr.dtype.element_ty), mask=(t < num_tokens)[:, None])
    lse_rows = (row.to(tl.int64) * Q_HEADS + q_head) * num_tokens + t
    tl.store(lse_ptr + lse_rows, lse, mask=t < num_tokens)


@triton.jit
def _load_lse(lse_ptr, rows, in_rows):
    """The log-sum-exp in base 2; of a query without keys, 0, so that nothing becomes NaN."""
    lse = tl.load(lse_ptr + rows, mask=in_rows, other=0.0)
    return tl.where(lse == -float("inf"), 0.0, lse) * 1.4426950408889634


@triton.jit
def _backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    selected_ptr, num_blocks, tiles_ptr, counts_ptr, stride_lb, stride_lh, num_lists, list_len,
    num_tokens, num_keys, scale, scale_log2,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, BRANCH: tl.constexpr,
    CMP_STRIDE: tl.constexpr, CMP_LEN: tl.constexpr, WINDOW: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    Q_HEADS: tl.constexpr = KV_HEADS * GROUP_SIZE
    key_tile = tl.program_id(0)
    row, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    key = key_tile * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    k_rows = ((row.to(tl.int64) * num_keys + key) * KV_HEADS + kv_head) * DIM
    in_keys = (key < num_keys)[:, None]
    k = tl.load(k_ptr + k_rows[:, None] + d[None, :], mask=in_keys, other=0.0)
    v = tl.load(v_ptr + k_rows[:, None] + d[None, :], mask=in_keys, other=0.0)
    index = (row * stride_lb + kv_head * stride_lh) * num_lists + key_tile
    list_ptr = tiles_ptr + index.to(tl.int64) * list_len
    count = tl.load(counts_ptr + index)
    dk = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    dv = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    for i in range(count * GROUP_SIZE):
        # The heads of a group one after the other for each tile: they share its selection.
        t = tl.load(list_ptr + i // GROUP_SIZE) * BLOCK + tl.arange(0, BLOCK)
        q_head = kv_head * GROUP_SIZE + i % GROUP_SIZE
        in_rows = t < num_tokens
        q_rows = ((row.to(tl.int64) * num_tokens + t) * Q_HEADS + q_head) * DIM
        q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=in_rows[:, None], other=0.0)
        do = tl.load(do_ptr + q_rows[:, None] + d[None, :], mask=in_rows[:, None], other=0.0)
        stat_rows = (row.to(tl.int64) * Q_HEADS + q_head) * num_tokens + t
        lse = _load_lse(lse_ptr, stat_rows, in_rows)
        delta = tl.load(delta_ptr + stat_rows, mask=in_rows, other=0.0)
        visible = _visible(
            selected_ptr, row * KV_HEADS + kv_head, num_blocks, t, key, key_tile,
            num_tokens, num_keys, BRANCH, CMP_STRIDE, CMP_LEN, WINDOW,
        )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        p = tl.where(visible, tl.exp2(s - lse[:, None]), 0.0)
        dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
    out = k_rows[:, None] + d[None, :]
    tl.store(dk_ptr + out, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_keys)
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=in_keys)


@triton.jit
def _backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    selected_ptr, num_blocks, tiles_ptr, counts_ptr, stride_lb, stride_lh, num_lists, list_len,
    num_tokens, num_keys, scale, scale_log2,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, BRANCH: tl.constexpr,
    CMP_STRIDE: tl.constexpr, CMP_LEN: tl.constexpr, WINDOW: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    Q_HEADS: tl.constexpr = KV_HEADS * GROUP_SIZE
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, q_head = tl.program_id(1) // Q_HEADS, tl.program_id(1) % Q_HEADS
    kv_head = q_head // GROUP_SIZE
    t = tile * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    in_rows = t < num_tokens
    q_rows = ((row.to(tl.int64) * num_tokens + t) * Q_HEADS + q_head) * DIM
    q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=in_rows[:, None], other=0.0)
    do = tl.load(do_ptr + q_rows[:, None] + d[None, :], mask=in_rows[:, None], other=0.0)
    stat_rows = (row.to(tl.int64) * Q_HEADS + q_head) * num_tokens + t
    lse = _load_lse(lse_ptr, stat_rows, in_rows)
    delta = tl.load(delta_ptr + stat_rows, mask=in_rows, other=0.0)
    index = (row * stride_lb + kv_head * stride_lh) * num_lists + tile
    list_ptr = tiles_ptr + index.to(tl.int64) * list_len
    dq = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    for i in range(tl.load(counts_ptr + index)):
        key_tile = tl.load(list_ptr + i)
        key = key_tile * BLOCK + tl.arange(0, BLOCK)
        k_rows = ((row.to(tl.int64) * num_keys + key) * KV_HEADS + kv_head) * DIM
        in_keys = (key < num_keys)[:, None]
        k = tl.load(k_ptr + k_rows[:, None] + d[None, :], mask=in_keys, other=0.0)
        v = tl.load(v_ptr + k_rows[:, None] + d[None, :], mask=in_keys, other=0.0)
        visible = _visible(
            selected_ptr, row * KV_HEADS + kv_head, num_blocks, t, key, key_tile,
            num_tokens, num_keys, BRANCH, CMP_STRIDE, CMP_LEN, WINDOW,
        )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        p = tl.where(visible, tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    out = dq_ptr + q_rows[:, None] + d[None, :]
    tl.store(out, (dq * scale).to(dq_ptr.dtype.element_ty), mask=in_rows[:, None])


# The first query differs from chunk to chunk and must not compile the kernel anew.
@triton.jit(do_not_specialize=["start", "stop"])
def _group_p_kernel(
    q_ptr, k_ptr, lse_ptr, out_ptr,
    start, stop, num_tokens, num_windows, scale_log2,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    CMP_STRIDE: tl.constexpr, CMP_LEN: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    Q_HEADS: tl.constexpr = KV_HEADS * GROUP_SIZE
    row, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = start + offset
    window = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    in_rows = t < stop
    k_rows = ((row.to(tl.int64) * num_windows + window) * KV_HEADS + kv_head) * DIM
    in_windows = window < num_windows
    k = tl.load(k_ptr + k_rows[None, :] + d[:, None], mask=in_windows[None, :], other=0.0)
    visible = in_rows[:, None] & ((window * CMP_STRIDE + (CMP_LEN - 1))[None, :] <= t[:, None])
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for group in tl.static_range(GROUP_SIZE):
        q_head = kv_head * GROUP_SIZE + group
        q_rows = ((row.to(tl.int64) * num_tokens + t) * Q_HEADS + q_head) * DIM
        q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=in_rows[:, None], other=0.0)
        rows = (row.to(tl.int64) * Q_HEADS + q_head) * num_tokens + t
        lse = _load_lse(lse_ptr, rows, in_rows)
        s = tl.dot(q, k, input_precision="ieee") * scale_log2
        total += tl.where(visible, tl.exp2(s - lse[:, None]), 0.0)
    out_row = (tl.program_id(2).to(tl.int64) * (stop - start) + offset) * num_windows
    out = out_ptr + out_row[:, None] + window[None, :]
    tl.store(out, total, mask=in_rows[:, None] & in_windows[None, :])
