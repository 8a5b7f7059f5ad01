"""From settings to a model that can run steps: what is loaded, where, in which dtype, how large."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from nsa_kernels.checks import check_fp8_dims
from nsa_serve.cache_reads import ReadCosts
from nsa_serve.config import EngineConfig, ModelConfig, StepLimits
from nsa_serve.errors import CapacityError, ConfigError, ModelError
from nsa_serve.kv_cache import KVCache, components, num_pages_for, page_cost
from nsa_serve.memory import available_bytes
from nsa_serve.messages import DeviceMemory, EngineInfo, LoadProgress, TraceGeometry
from nsa_serve.model_runner import ModelRunner
from nsa_serve.model_source import ModelSource, load_tokenizer, resolve_model
from nsa_serve.models.families import load_model_config
from nsa_serve.models.fp8 import check_fp8
from nsa_serve.models.layers import cpu_has_bfloat16
from nsa_serve.models.nsa_transformer import NSATransformer, used_branches
from nsa_serve.models.weight_shapes import num_parameters
from nsa_serve.models.weights import load_weights
from nsa_serve.sampler import Sampler
from nsa_serve.structured.masks import GrammarMasks
from nsa_serve.structured.matcher import GrammarError, Vocabulary, make_table

if TYPE_CHECKING:
    from nsa_serve.gpu_runner import GpuModelRunner

logger = logging.getLogger(__name__)

OnProgress = Callable[[LoadProgress], None]
# Of the free memory, when --page-memory does not say.
_DEFAULT_MEMORY_SHARE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupPlan:
    """What is decided before the weights are read.

    cache_dtype: of the pages. max_model_len: what settings and model allow; memory may lower it.
    """

    config: EngineConfig
    source: ModelSource
    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    max_model_len: int
    limits: StepLimits

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has."""
        return num_parameters(self.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRunner:
    """A model that can run steps. memory is None on a CPU.

    num_pages, num_swa_pages: with the null page; 0 window pages where the model has none.
    """

    runner: "ModelRunner | GpuModelRunner"
    num_pages: int
    weight_bytes: int
    memory: DeviceMemory | None = None
    num_swa_pages: int = 0


def make_plan(config: EngineConfig) -> SetupPlan:
    """Decide what can be decided without the weights, so that what cannot work fails at once.

    Raises ConfigError or ModelError.
    """
    device = resolve_device(config)
    source = resolve_model(config)
    model = load_model_config(source)
    dtype = run_dtype(config, device)
    max_model_len = _model_len_limit(config, model)
    is_cuda = device.type == "cuda"
    if config.quantization is not None:
        check_fp8(device, dtype)
    if config.kv_cache_dtype == "fp8":
        _check_fp8_cache(device, model)
    return SetupPlan(
        config=config,
        source=source,
        model=model,
        device=device,
        dtype=dtype,
        cache_dtype=torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype,
        max_model_len=max_model_len,
        limits=config.limits("cuda" if is_cuda else "cpu", max_model_len),
    )


def load_runner(
    plan: SetupPlan,
    grammars: GrammarMasks,
    phases: dict[str, float],
    *,
    on_progress: OnProgress | None = None,
) -> LoadedRunner:
    """Load the model and make its cache; `phases` gets the seconds of each part.

    Raises ModelError (the checkpoint), CapacityError (memory) or ConfigError (settings).
    """
    if plan.device.type == "cuda":
        # Imports Triton.
        from nsa_serve.gpu_setup import load_gpu_runner

        return load_gpu_runner(plan, grammars, phases, on_progress=on_progress)
    num_pages = size_cache(plan.config, plan.model, plan.dtype, plan.max_model_len)
    cost = page_cost(plan.model, plan.dtype, plan.limits, plan.max_model_len)
    num_swa_pages = cost.num_swa_pages(num_pages)
    with timed(phases, "weights"):
        weights = load_weights(
            plan.source,
            plan.model,
            plan.dtype,
            is_dummy=plan.config.load_format == "dummy",
            on_progress=byte_progress(on_progress),
        )
    with timed(phases, "layout"):
        model = NSATransformer(plan.model, weights, max_positions=plan.max_model_len).eval()
    with timed(phases, "cache"):
        cache = KVCache(
            plan.model,
            num_pages,
            dtype=plan.dtype,
            device=plan.device,
            num_swa_pages=num_swa_pages,
        )
    return LoadedRunner(
        runner=ModelRunner(model, cache, Sampler(plan.model.eos_token_ids), grammars),
        num_pages=num_pages,
        num_swa_pages=num_swa_pages,
        weight_bytes=plan.num_parameters * plan.dtype.itemsize,
    )


def describe(
    plan: SetupPlan, loaded: LoadedRunner, max_model_len: int, phases: dict[str, float]
) -> EngineInfo:
    """Return what was loaded, for the start-up table and for those who ask."""
    model, num_pages = plan.model, loaded.num_pages - 1
    num_swa_pages = max(0, loaded.num_swa_pages - 1)
    return EngineInfo(
        family=model.family,
        dtype=_name(plan.dtype),
        device=str(plan.device),
        num_parameters=plan.num_parameters,
        weight_bytes=loaded.weight_bytes,
        max_model_len=max_model_len,
        max_num_seqs=plan.limits.max_num_seqs,
        vocab_size=model.vocab_size,
        page_size=model.nsa.block_size,
        num_pages=num_pages,
        cache=components(model, plan.cache_dtype, num_pages, num_swa_pages),
        phase_s=phases,
        bos_token_id=model.bos_token_id,
        eos_token_ids=model.eos_token_ids,
        trace=_trace_geometry(plan),
        memory=loaded.memory,
        cache_dtype=_name(plan.cache_dtype),
        quantization=plan.config.quantization,
        num_swa_pages=num_swa_pages,
    )


def load_vocabulary(config: EngineConfig, model: ModelConfig) -> Vocabulary:
    """Read the tokenizer; GrammarError when no grammar can be followed with it."""
    try:
        tokenizer = load_tokenizer(config)
    except ModelError as error:
        raise GrammarError(f"the model's tokenizer cannot be read: {error}") from None
    table = make_table(tokenizer, model.vocab_size, model.eos_token_ids)
    return Vocabulary(table, partial(tokenizer.encode, add_special_tokens=False))


@contextmanager
def timed(phases: dict[str, float], name: str) -> Iterator[None]:
    """Put the seconds that the block takes into `phases`."""
    start = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - start


def byte_progress(on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    """Return how the weight loader reports bytes."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(LoadProgress("weights", done, total))


def resolve_device(config: EngineConfig) -> torch.device:
    """Return where to run. Raises ConfigError when there is no such device or it lacks something.

    A second GPU is chosen by CUDA_VISIBLE_DEVICES: the engine takes the first that torch sees.
    """
    has_cuda = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        why = (
            "this torch is built without CUDA: install its CUDA build"
            if torch.version.cuda is None
            else "it needs NVIDIA's driver and a visible GPU (see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES)"
        )
        raise ConfigError(
            f"torch sees no CUDA device: {why}, or serve with --device cpu (torch "
            f"{torch.__version__})"
        )
    config.check_device("cuda" if has_cuda else "cpu")
    return torch.device("cuda", 0) if has_cuda else torch.device("cpu")


def run_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """Return the dtype to run in: "auto" is bfloat16 where the device computes in it."""
    if config.dtype == "auto":
        if device.type == "cuda":
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bfloat16 = cpu_has_bfloat16()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def _check_fp8_cache(device: torch.device, model: ModelConfig) -> None:
    """Raise ConfigError where kernels cannot use an FP8 cache.

    GPUs older than Ada (8.9) have no instructions for e4m3; for head widths see `check_fp8_dims`.
    A cache with window pages has no scales for them, and one with coarse keys none for those.
    """
    for field, is_set in (("kv_per_branch", model.kv_per_branch), ("lse_len", model.nsa.lse_len)):
        if is_set:
            raise ConfigError(
                f"kv_cache_dtype fp8 is not supported for a model with {field}, as "
                f"{model.family} has: leave --kv-cache-dtype out"
            )
    try:
        check_fp8_dims(model.head_dim, model.v_head_dim)
    except ValueError as error:
        raise ConfigError(f"{error}; leave --kv-cache-dtype out") from None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ConfigError(
            f"kv_cache_dtype fp8 needs a GPU of compute capability 8.9 or later; "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: leave "
            "--kv-cache-dtype out"
        )


def read_costs(model: ModelConfig, cache_dtype: torch.dtype) -> ReadCosts:
    """Return what a query of this model costs in cache bytes."""
    branches = used_branches(model)
    num_rows = model.num_layers * model.num_kv_heads
    return ReadCosts(
        spec=model.nsa,
        key_bytes=num_rows * model.head_dim * cache_dtype.itemsize,
        value_bytes=num_rows * model.v_head_dim * cache_dtype.itemsize,
        uses_cmp=branches.cmp,
        uses_slc=branches.slc,
        uses_swa=branches.swa,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _trace_geometry(plan: SetupPlan) -> TraceGeometry | None:
    """Return what traces need, or None where there are none: the GPU path keeps no selection."""
    if plan.device.type != "cpu":
        return None
    model = plan.model
    costs = read_costs(model, plan.cache_dtype)
    return TraceGeometry(num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, costs=costs)


def _model_len_limit(config: EngineConfig, model: ModelConfig) -> int:
    """Return the longest request that settings and model allow, before memory is looked at."""
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {config.max_model_len} but the model was made for "
            f"{model.max_position_embeddings} tokens (max_position_embeddings); "
            f"lower --max-model-len"
        )
    return config.max_model_len


def size_cache(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, max_model_len: int
) -> int:
    """Return the number of pages in the memory of a CPU, the null page included.

    Raises CapacityError, with the numbers and a remedy, when a --max-model-len that was asked for
    does not fit.
    """
    page_size, limits = model.nsa.block_size, config.limits("cpu", max_model_len)
    cost = page_cost(model, dtype, limits, max_model_len)
    pages_per_request = cost.pages_per_request
    if config.page_memory is not None:
        num_pages = num_pages_for(cost, config.page_memory)
    else:
        weight_bytes = dtype.itemsize * num_parameters(model)
        free = available_bytes()
        if free <= weight_bytes:
            raise CapacityError(
                f"the weights need {weight_bytes} bytes in {dtype}, but {free} bytes of memory are "
                f"free: free some, or serve a smaller model"
            )
        memory = (free - weight_bytes) // _DEFAULT_MEMORY_SHARE
        useful = limits.max_num_seqs * pages_per_request + 1
        num_pages = min(num_pages_for(cost, memory), useful)
    if config.max_model_len is not None and num_pages - 1 < pages_per_request:
        fits = (num_pages - 1) * page_size
        raise CapacityError(
            f"one request of max_model_len {max_model_len} needs {pages_per_request} pages of "
            f"{cost.page_bytes} bytes, but the cache holds {num_pages - 1}: set --max-model-len "
            f"{fits} or less, or --page-memory {cost.bytes_of(pages_per_request + 1)} or more"
        )
    return num_pages
