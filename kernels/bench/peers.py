"""The peers, timed like the operator: dense attention by torch and FlashInfer, and fla's NSA.

Every peer is a function that prepares input sets and returns one callable for each. A peer that is
not installed, or refuses the shape, is recorded with its error, not hidden.
"""

import functools
import importlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from problem import Heads, Problem, dense_decode_bytes
from timing import Call, num_sets, time_graph
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_SDPA = {**BACKENDS, "efficient": SDPBackend.EFFICIENT_ATTENTION}
Builder = Callable[[], Sequence[Call]]


def measure(build: Builder, *, budget_s: float = 0.25) -> dict[str, Any]:
    """Time a peer: {"ms", "spread", "how"}, or {"error"} where it is not available."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls = build()
            result: dict[str, Any] = asdict(time_graph(calls, budget_s=budget_s))
    except Exception as error:  # whatever a peer raises is its result
        message = (str(error).splitlines() or [""])[0]
        result = {"error": f"{type(error).__name__}: {message}"[:300]}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return result


def fastest(results: dict[str, dict[str, Any]]) -> tuple[str, float] | None:
    """The fastest peer's name and milliseconds."""
    times = [(r["ms"], name) for name, r in results.items() if "ms" in r]
    return (min(times)[1], min(times)[0]) if times else None


def sdpa_decode(
    backend: str, heads: Heads, batch: int, context: int, *, packed: bool, padded: bool = False
) -> list[Call]:
    """Torch's dense decode over contiguous K/V [B, H, s, D].

    packed: the heads of a group are the query rows of their KV head, which needs no mask because
    all of them see everything; else one query row a head with enable_gqa.
    padded: values are stored as wide as keys, for kernels that know one width.
    """
    count = num_sets(dense_decode_bytes(heads, batch, context))
    group = heads.num_q_heads // heads.num_kv_heads
    q_shape = (
        (batch, heads.num_kv_heads, group, heads.head_dim)
        if packed
        else (batch, heads.num_q_heads, 1, heads.head_dim)
    )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(_SDPA[backend]):
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=not packed)
        return out[..., : heads.v_head_dim]

    calls: list[Call] = []
    for _ in range(count):
        q = torch.randn(*q_shape, dtype=heads.dtype, device=_device())
        k, v = _dense_cache(heads, batch, context)
        if padded:
            v = F.pad(v, (0, heads.head_dim - heads.v_head_dim))
        calls.append(functools.partial(call, q, k, v))
    return calls


def flashinfer_decode(problem: Problem, context: int) -> list[Call]:
    """FlashInfer's paged decode with tensor cores, over the pages of the operator's own caches."""
    flashinfer = importlib.import_module("flashinfer")
    heads, batch = problem.heads, len(problem.pages)
    if heads.head_dim != heads.v_head_dim:
        raise ValueError("FlashInfer's decode has keys and values of one width")
    page_size = problem.spec.block_size
    indices = torch.tensor(list(itertools.chain(*problem.pages)), dtype=torch.int32, device="cuda")
    pages_per_row = len(problem.pages[0])
    indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages_per_row
    last_page_len = torch.full(
        (batch,), (context - 1) % page_size + 1, dtype=torch.int32, device="cuda"
    )
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 * 1024**2, dtype=torch.uint8, device="cuda"),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last_page_len.clone(),
    )
    wrapper.plan(
        indptr,
        indices,
        last_page_len,
        heads.num_q_heads,
        heads.num_kv_heads,
        heads.head_dim,
        page_size,
        q_data_type=heads.dtype,
        kv_data_type=heads.dtype,
    )
    # As many of the operator's sets as dense attention needs to leave L2 behind.
    count = num_sets(dense_decode_bytes(heads, batch, context))
    return [
        functools.partial(wrapper.run, inputs.q, (inputs.cache.k, inputs.cache.v))
        for inputs in problem.sets[:count]
    ]


def dense_decode(
    heads: Heads, problem: Problem | None, batch: int, context: int
) -> dict[str, Builder]:
    """All dense decode peers; `problem` lends its pages to FlashInfer."""
    peers: dict[str, Builder] = {}
    paddings = (False, True) if heads.v_head_dim < heads.head_dim else (False,)
    for backend, packed, padded in itertools.product(BACKENDS, (False, True), paddings):
        name = f"{backend}{'-packed' if packed else ''}{'-padded' if padded else ''}"
        peers[name] = functools.partial(
            sdpa_decode, backend, heads, batch, context, packed=packed, padded=padded
        )
    if heads.v_head_dim != heads.head_dim:
        # The one kernel of torch with two widths; it knows no groups.
        peers["efficient-packed"] = functools.partial(
            sdpa_decode, "efficient", heads, batch, context, packed=True
        )
    if problem is not None:
        peers["flashinfer"] = functools.partial(flashinfer_decode, problem, context)
    return peers


def fla_decode(heads: Heads, batch: int, context: int) -> list[Call]:
    """fla's NSA for one new token, as its layer does it: the whole cache is pooled in each step.

    Window 0, because its window needs flash-attn: it does less work here than the operator.
    """
    return _fla_calls(heads, batch, 1, context)


def fla_prefill(heads: Heads, length: int) -> list[Call]:
    """fla's NSA over a whole sequence, window 0."""
    return _fla_calls(heads, 1, length, length)


def sdpa_prefill(backend: str, heads: Heads, length: int) -> list[Call]:
    """Torch's dense causal attention over one sequence, GQA without repeating K/V."""
    q = torch.randn(1, heads.num_q_heads, length, heads.head_dim, dtype=heads.dtype, device="cuda")
    k, v = _dense_cache(heads, 1, length)

    def call() -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return [call]


def check_decode_peers(heads: Heads, *, batch: int = 2, context: int = 1024) -> dict[str, Any]:
    """Relative error of torch's decode peers against fp32 arithmetic on the same inputs."""
    errors: dict[str, Any] = {}
    for name, build in dense_decode(heads, None, batch, context).items():
        try:
            call = build()[0]
            q, k, v = (t.float() for t in call.args)  # type: ignore[attr-defined]
            group = heads.num_q_heads // heads.num_kv_heads
            q = q.reshape(batch, heads.num_kv_heads, group, heads.head_dim)
            weights = torch.softmax(q @ k.transpose(2, 3) * heads.head_dim**-0.5, dim=-1)
            expected = (weights @ v).reshape(batch, heads.num_q_heads, -1)
            actual = call()
            assert isinstance(actual, Tensor)
            actual = actual.float().reshape(batch, heads.num_q_heads, -1)
            expected = expected[..., : heads.v_head_dim]
            errors[name] = float((actual - expected).norm() / expected.norm())
        except Exception as error:  # the same peers fail later, with their message in the table
            errors[name] = f"{type(error).__name__}: {error}"[:160]
    return errors


def _device() -> str:
    """Where peers run: on the CPU in a trial without a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dense_cache(heads: Heads, batch: int, context: int) -> tuple[Tensor, Tensor]:
    shape = (batch, heads.num_kv_heads, context)
    k = torch.randn(*shape, heads.head_dim, dtype=heads.dtype, device=_device())
    return k, torch.randn(*shape, heads.v_head_dim, dtype=heads.dtype, device=_device())


def _fla_calls(heads: Heads, batch: int, num_queries: int, context: int) -> list[Call]:
    parallel_nsa = importlib.import_module("fla.ops.nsa").parallel_nsa

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=heads.dtype, device="cuda")

    count = num_sets(dense_decode_bytes(heads, batch, context)) if num_queries == 1 else 1
    calls: list[Call] = []
    for _ in range(count):
        gates = torch.sigmoid(randn(3, batch, num_queries, heads.num_q_heads))
        calls.append(
            functools.partial(
                parallel_nsa,
                q=randn(batch, num_queries, heads.num_q_heads, heads.head_dim),
                k=randn(batch, context, heads.num_kv_heads, heads.head_dim),
                v=randn(batch, context, heads.num_kv_heads, heads.v_head_dim),
                g_cmp=gates[0],
                g_slc=gates[1],
                g_swa=gates[2],
                block_counts=16,
                block_size=64,
                window_size=0,
            )
        )
    return calls
