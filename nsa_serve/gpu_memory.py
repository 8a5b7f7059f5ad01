"""What of a GPU's memory is left for pages, and what to do when that is too little.

Plain arithmetic on what was measured; `gpu_setup.py` measures.
"""

import math
from dataclasses import dataclass

from nsa_serve.config import DEFAULT_GPU_MEMORY_UTILIZATION, EngineConfig
from nsa_serve.errors import CapacityError
from nsa_serve.page_cost import PageCost

# A page costs the host some 200 bytes of bookkeeping once it holds a prefix.
MAX_PAGES = 2**22

# What the driver keeps of each layer in a CUDA graph: some ten kernels with their arguments.
_GRAPH_LAYER_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUsage:
    """Bytes of a GPU that pages cannot have.

    total_bytes: what the GPU has. other_bytes: other processes, the driver and loaded kernels.
    activation_bytes: the most that a step takes for itself, and the buffers that steps share.
    graph_bytes: what CUDA graphs will take, estimated.
    """

    total_bytes: int
    other_bytes: int
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """All of it but the total."""
        return self.other_bytes + self.weight_bytes + self.activation_bytes + self.graph_bytes

    def describe(self) -> str:
        """Return the parts for an error message."""
        return (
            f"the GPU has {self.total_bytes} bytes, other processes and the driver use "
            f"{self.other_bytes}, the weights {self.weight_bytes}, a step's activations "
            f"{self.activation_bytes}, CUDA graphs {self.graph_bytes}"
        )


def utilization_of(config: EngineConfig) -> float:
    """Return the share of the GPU's memory that may be in use."""
    share = config.gpu_memory_utilization
    return DEFAULT_GPU_MEMORY_UTILIZATION if share is None else share


def estimate_graph_bytes(num_graphs: int, num_layers: int, pool_bytes: int) -> int:
    """Return what CUDA graphs take: a pool for one decode step's tensors, and themselves."""
    return pool_bytes + num_graphs * num_layers * _GRAPH_LAYER_BYTES if num_graphs else 0


def plan_gpu_pages(config: EngineConfig, usage: GpuUsage, cost: PageCost) -> int:
    """Return the number of pages, the null page included.

    They are what --page-memory holds, else all that --gpu-memory-utilization leaves; at most
    MAX_PAGES. Where no --max-model-len is asked for, one page for tokens is enough.

    Raises CapacityError with the numbers, and remedies that each would do.
    """
    num_needed = 1 + (1 if config.max_model_len is None else cost.pages_per_request)
    room = usage.total_bytes - usage.fixed_bytes
    if config.page_memory is None:
        room = int(usage.total_bytes * utilization_of(config)) - usage.fixed_bytes
        num_pages = cost.num_pages_in(room)
    else:
        num_pages = cost.num_pages_in(config.page_memory)
        if config.page_memory > room:
            raise CapacityError(
                f"page_memory is {config.page_memory} bytes, but {max(0, room)} are left: "
                f"{usage.describe()}; {_page_memory_remedy(config, cost, num_needed, room)}"
            )
    if num_pages < num_needed:
        raise CapacityError(_explain(config, usage, cost, num_pages=num_pages, needed=num_needed))
    return min(num_pages, MAX_PAGES)


def _page_memory_remedy(config: EngineConfig, cost: PageCost, num_needed: int, room: int) -> str:
    """Say what helps where more pages were asked for than fit."""
    needed_bytes = cost.bytes_of(num_needed)
    if room >= needed_bytes:
        return f"set --page-memory {room}"
    num_pages = cost.num_pages_in(room)
    if config.max_model_len is not None and num_pages >= 2:
        return f"set --page-memory {room} and --max-model-len {(num_pages - 1) * cost.page_size}"
    return f"free {needed_bytes - room} bytes of the GPU and set --page-memory {needed_bytes}"


def _explain(
    config: EngineConfig, usage: GpuUsage, cost: PageCost, *, num_pages: int, needed: int
) -> str:
    """Say that `num_pages` are too few, and what would help: only what surely does."""
    needed_bytes = cost.bytes_of(needed)
    subject = "the KV cache"
    if config.max_model_len is not None:
        subject = f"one request of max_model_len {config.max_model_len}"
    if config.page_memory is None:
        room = int(usage.total_bytes * utilization_of(config)) - usage.fixed_bytes
        source = f"gpu_memory_utilization {utilization_of(config):g} leaves {room} bytes"
    else:
        room = config.page_memory
        source = f"page_memory is {room} bytes"
    remedies = _remedies(config, usage, cost, num_pages=num_pages, needed=needed)
    return (
        f"{subject} needs {cost.describe(needed)}: {needed_bytes} bytes, but {source} "
        f"({num_pages} pages): {usage.describe()}; " + ", or ".join(remedies)
    )


def _remedies(
    config: EngineConfig, usage: GpuUsage, cost: PageCost, *, num_pages: int, needed: int
) -> list[str]:
    needed_bytes = cost.bytes_of(needed)
    remedies = []
    if config.max_model_len is not None and num_pages >= 2:
        remedies.append(f"set --max-model-len {(num_pages - 1) * cost.page_size} or less")
    budget = usage.total_bytes - usage.fixed_bytes
    if config.page_memory is not None:
        room = config.page_memory
        if needed_bytes <= budget:
            remedies.append(f"set --page-memory {needed_bytes} or more")
    else:
        room = int(usage.total_bytes * utilization_of(config)) - usage.fixed_bytes
        # Upwards: what is shown must be enough.
        share = math.ceil(1000 * (usage.fixed_bytes + needed_bytes + 1) / usage.total_bytes) / 1000
        if share <= 1:
            remedies.append(f"set --gpu-memory-utilization {share:g} or more")
        if 0 < needed_bytes - room <= usage.graph_bytes:
            remedies.append("set --enforce-eager")
    if needed * cost.fp8_page_bytes <= room and cost.fp8_page_bytes < cost.page_bytes:
        remedies.append("set --kv-cache-dtype fp8")
    if remedies:
        return remedies
    if config.page_memory is not None:
        missing = needed_bytes - budget
        return [f"free {missing} bytes of the GPU and set --page-memory {needed_bytes}"]
    missing = needed_bytes - room
    if usage.activation_bytes + cost.step_swa_bytes >= missing:
        growing = "the activations and the window pages" if cost.step_swa_bytes else "activations"
        return [
            f"lower --max-num-batched-tokens or --max-num-seqs, with which {growing} grow, "
            f"until they take {missing} bytes less"
        ]
    return [f"free {missing} bytes of the GPU, or serve a smaller model"]
