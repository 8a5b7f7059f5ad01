"""Checks of what callers pass to the public operators."""

from torch import Tensor

from nsa_kernels.metadata import BranchKV, LayerCache


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError, naming the tensor and both shapes, unless it has the expected shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def check_branch_kv(branch_kv: BranchKV | None, cache: LayerCache, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless a branch has keys and values exactly where the cache has room."""
    rooms = (cache.k_swa, cache.v_swa, cache.k_tail, cache.v_tail)
    if (branch_kv is not None) != (rooms[0] is not None) or len({r is None for r in rooms}) > 1:
        raise ValueError(
            "branch_kv goes with a cache that has k_swa, v_swa, k_tail and v_tail: "
            f"got branch_kv {'given' if branch_kv is not None else 'missing'} and a cache with "
            f"{sum(r is not None for r in rooms)} of the four"
        )
    if branch_kv is not None:
        for name, tensor in (("k_cmp", branch_kv.k_cmp), ("k_swa", branch_kv.k_swa)):
            check_shape(f"branch_kv.{name}", tensor, tuple(k.shape))
        for name, tensor in (("v_cmp", branch_kv.v_cmp), ("v_swa", branch_kv.v_swa)):
            check_shape(f"branch_kv.{name}", tensor, tuple(v.shape))
