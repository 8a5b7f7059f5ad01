"""What the API process and the engine process say to each other: msgpack structs, never pickle.

To the engine: `AddRequest`, `AbortRequests`, `Shutdown`.
From the engine: `LoadProgress`..., then `EngineReady` or `EngineFailed`, then a `StepOutputs` for
each step.
"""

import msgspec

from nsa_serve.cache_reads import CacheReads, ReadCosts
from nsa_serve.request import EngineRequest, TokenOutput


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """Stop these requests and free what they hold; unknown ids are ignored (they just ended)."""

    request_ids: list[str]


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """Queue one request."""

    request: EngineRequest


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave the loop and exit."""


class CacheComponent(msgspec.Struct, frozen=True):
    """One line of the cache table: a kind of entry and what it costs.

    max_tokens: of one sequence, those that have such an entry at a time, at most; None is all.
    """

    name: str  # "raw", "compressed", "coarse", "window", "tail"
    bytes_per_token: float
    total_bytes: int
    max_tokens: int | None = None


class TraceGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """What one must know of a model to read the trace of its blocks; the rest is in costs.spec."""

    num_layers: int
    num_kv_heads: int
    costs: ReadCosts


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory of a GPU goes, in bytes. num_graphs, capture_s: of its CUDA graphs.

    other_bytes: other processes, and what the driver keeps. activation_bytes: the most that a step
    takes for itself, and the buffers that steps share.
    """

    name: str
    total_bytes: int
    other_bytes: int
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    num_graphs: int
    capture_s: float

    def parts(self) -> list[tuple[str, int]]:
        """Return name and bytes of each part that pages cannot have, and of the whole."""
        return [
            ("total", self.total_bytes),
            ("other", self.other_bytes),
            ("weights", self.weight_bytes),
            ("activations", self.activation_bytes),
            ("graphs", self.graph_bytes),
        ]


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded and what fits, known once the engine is ready."""

    family: str
    dtype: str
    device: str
    num_parameters: int
    weight_bytes: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    page_size: int
    num_pages: int  # without the null page
    cache: list[CacheComponent]
    phase_s: dict[str, float]  # start-up phase -> seconds
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    trace: TraceGeometry | None = None  # None where blocks cannot be traced
    memory: DeviceMemory | None = None  # None on a CPU
    cache_dtype: str = ""  # empty: that of the model
    quantization: str | None = None
    num_swa_pages: int = 0  # window pages without their null page; 0 where the model has none


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """The engine is loaded and warmed up."""

    info: EngineInfo


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, or stopped; `message` is one line for the user."""

    message: str
    kind: str  # class name of the error: "ModelError", "CapacityError", ...


class LoadProgress(msgspec.Struct, frozen=True, tag=True):
    """Bytes of weights loaded so far, for the progress bar."""

    phase: str
    done: int
    total: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The engine's counters and gauges after a step. `*_total` only grow.

    num_step_tokens and the reads are those of the last step alone: what attention needed of the
    cache (bytes over a server's life would outgrow 64 bits). num_graph_replays_total: None where
    no step is replayed from a graph. num_swa_pages: window pages, 0 where the model has none.
    """

    num_steps_total: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_pages: int = 0
    num_pages: int = 0
    num_preemptions_total: int = 0
    prefix_cache_queries_total: int = 0  # tokens looked up
    prefix_cache_hits_total: int = 0  # tokens found
    num_step_tokens: int = 0  # tokens of this step: prompt chunks and decode rows
    decode_reads: CacheReads = CacheReads()
    prefill_reads: CacheReads = CacheReads()
    num_graph_replays_total: int | None = None
    num_free_swa_pages: int = 0
    num_swa_pages: int = 0


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """What one step produced; without outputs it is a heartbeat."""

    outputs: list[TokenOutput]
    stats: EngineStats


ToEngine = AddRequest | AbortRequests | Shutdown
FromEngine = LoadProgress | EngineReady | EngineFailed | StepOutputs
