"""A mixture of experts on a GPU (DeepSeekMoE): routing, and routed experts of any number of rows.

Nothing waits for the device and all shapes follow from the number of rows, so a layer can be
captured in a CUDA graph. Up to MAX_FEW_ROWS rows (`moe_decode.py`) each expert that is used has its
weights read once; above (`moe_prefill.py`) rows are sorted by expert and multiplied in tiles.

T rows, E experts of width I, k experts a row.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nsa_kernels.checks import check_shape
from nsa_kernels.gpu.moe_decode import MAX_FEW_ROWS, experts_of_few, sum_experts
from nsa_kernels.gpu.moe_prefill import experts_by_torch, experts_of_many
from nsa_kernels.gpu.moe_route import route_few, route_many, sort_pairs

Method = Literal["triton", "torch"]


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the rows of a layer go.

    hidden: [T, hidden], the rows after the norm. expert_ids: [T, k] int32, by descending weight; -1
    for rows that are not used. weights: [T, k] fp32, not renormalised.
    """

    hidden: Tensor
    expert_ids: Tensor
    weights: Tensor


def make_counters(device: torch.device) -> Tensor:
    """Return what `route` counts its programs with: zeros, and zeros again after every call."""
    return torch.zeros(MAX_FEW_ROWS, dtype=torch.int32, device=device)


def route(
    x: Tensor,
    norm: tuple[Tensor, float],
    router: Tensor,
    num_experts_per_token: int,
    *,
    counters: Tensor,
    row_lens: Tensor | None = None,
    launch_pdl: bool = False,
) -> Routing:
    """Normalise rows and choose the experts of each; see `moe_reference.route`.

    x: [T, hidden]. norm: (weight [hidden], eps), an RMSNorm. router: [E, hidden]. counters: of
    `make_counters`, not used by two calls at once. row_lens: [T] int32, 0 for a padding row: it
    takes no expert, where there are at most MAX_FEW_ROWS rows.
    launch_pdl: of few rows: start before the kernel in front has ended, on devices that can.

    Raises ValueError when shapes or dtypes do not fit.
    """
    num_rows, hidden = x.shape
    num_experts = router.shape[0]
    check_shape("router", router, (num_experts, hidden))
    check_shape("norm weight", norm[0], (hidden,))
    if not 1 <= num_experts_per_token <= num_experts:
        raise ValueError(
            f"num_experts_per_token must be from 1 to {num_experts}, the number of experts, got "
            f"{num_experts_per_token}"
        )
    if router.dtype != x.dtype:
        raise ValueError(f"x and router must have one dtype, got {x.dtype} and {router.dtype}")
    x, router = x.contiguous(), router.contiguous()
    if num_rows > MAX_FEW_ROWS or num_rows == 0:
        return Routing(*route_many(x, norm, router, num_experts_per_token))
    if row_lens is not None:
        check_shape("row_lens", row_lens, (num_rows,))
    check_shape("counters", counters, (MAX_FEW_ROWS,))
    found = route_few(
        x,
        norm,
        router,
        num_experts_per_token,
        counters=counters,
        row_lens=row_lens,
        launch_pdl=launch_pdl,
    )
    return Routing(*found)


def routed_experts(
    routing: Routing,
    gate_up: Tensor,
    down: Tensor,
    *,
    residual: Tensor,
    out: Tensor | None = None,
    method: Method | None = None,
    launch_pdl: bool = False,
) -> Tensor:
    """Return residual + the weighted sum of each row's experts, [T, hidden].

    gate_up: [E, 2I, hidden], gate rows first; down: [E, hidden, I]; contiguous, in the dtype of the
    rows. residual: [T, hidden]. out: where to write it; it may be the residual.
    method, of many rows, and launch_pdl, of few: for measuring; None is Triton.
    Sums over a row's experts are in fp32, in their order, and without atomics.

    Raises ValueError when shapes or dtypes do not fit.
    """
    x, ids = routing.hidden, routing.expert_ids
    num_rows, hidden = x.shape
    num_experts, _, width = down.shape
    check_shape("down", down, (num_experts, hidden, width))
    check_shape("gate_up", gate_up, (num_experts, 2 * width, hidden))
    check_shape("residual", residual, (num_rows, hidden))
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous and {x.dtype}, got {tensor.dtype}")
    if out is None:
        out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    if not out.is_contiguous() or tuple(out.shape) != (num_rows, hidden):
        raise ValueError(f"out must be contiguous and {(num_rows, hidden)}, got {out.shape}")
    if num_rows == 0:
        return out
    is_few = num_rows <= MAX_FEW_ROWS
    if is_few:
        parts = experts_of_few(x, ids, gate_up, down, launch_pdl=launch_pdl)
    else:
        pairs, ends = sort_pairs(ids, num_experts)
        compute = experts_by_torch if method == "torch" else experts_of_many
        parts = compute(x, pairs, ends, gate_up, down)
    return sum_experts(
        parts,
        ids,
        routing.weights,
        residual=residual.contiguous(),
        out=out,
        launch_pdl=launch_pdl and is_few,
    )
