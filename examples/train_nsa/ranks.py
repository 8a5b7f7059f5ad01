"""The processes that train together, one a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Ranks:
    """The processes that train together, one a GPU."""

    rank: int
    size: int
    device: torch.device

    def agree(self, value: float) -> float:
        """Return rank 0's value."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average all gradients over the ranks, in one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))


def start_ranks(device: str) -> Ranks:
    """Join the processes that torchrun started, if it did."""
    if not dist.is_torchelastic_launched():
        return Ranks(0, 1, torch.device(device))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    where = torch.device(device, dist.get_node_local_rank()) if device == "cuda" else device
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(where))
