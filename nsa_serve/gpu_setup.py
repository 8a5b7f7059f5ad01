"""A model on a GPU: weights, a measured worst case, pages from what is left, kernels and graphs.

How much a step needs is not computed but measured, with the largest step that may come and a cache
of one page. Imports Triton: only where there is a GPU.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from nsa_serve.config import StepLimits
from nsa_serve.cuda_graph import GraphReport, page_buckets, row_buckets
from nsa_serve.engine_setup import LoadedRunner, OnProgress, SetupPlan, byte_progress, timed
from nsa_serve.errors import CapacityError
from nsa_serve.gpu_memory import (
    MAX_PAGES,
    GpuUsage,
    estimate_graph_bytes,
    plan_gpu_pages,
    utilization_of,
)
from nsa_serve.gpu_runner import GpuModelRunner
from nsa_serve.kv_cache import KVCache, page_cost
from nsa_serve.kv_scales import LayerScales, calibrate_scales
from nsa_serve.messages import DeviceMemory, LoadProgress
from nsa_serve.models.nsa_transformer import NSATransformer
from nsa_serve.models.weights import load_device_weights, weight_bytes
from nsa_serve.page_cost import PageCost
from nsa_serve.structured.masks import GrammarMasks

logger = logging.getLogger(__name__)

# Copies of the logits of a step's rows that sampling with every option makes: edited ones,
# log-probabilities, and what they are made with. Prompt log-probabilities take 64 rows at once.
_NUM_LOGIT_COPIES = 4
_LEAST_LOGIT_ROWS = 64


class GpuMeter:
    """Memory of a CUDA device, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.init()

    @property
    def name(self) -> str:
        """What the device is called."""
        return torch.cuda.get_device_name(self.device)

    def free_and_total(self) -> tuple[int, int]:
        """Return what nobody uses, and what there is."""
        free, total = torch.cuda.mem_get_info(self.device)
        return free, total

    def reserved(self) -> int:
        """Return what torch holds, after giving back what it can."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)

    def start_peak(self) -> None:
        """Begin to look for the peaks."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Return the most that torch held since `start_peak`."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device)

    def allocated(self) -> int:
        """Return the bytes of live tensors."""
        return torch.cuda.memory_allocated(self.device)

    def allocated_peak(self) -> int:
        """Return the most that live tensors took since `start_peak`."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def load_gpu_runner(
    plan: SetupPlan,
    grammars: GrammarMasks,
    phases: dict[str, float],
    *,
    on_progress: OnProgress | None = None,
) -> LoadedRunner:
    """Load a model to a GPU, and give its cache what memory is left.

    Raises ModelError (the checkpoint), CapacityError (memory) or ConfigError (settings).
    """
    with timed(phases, "device"):
        meter = GpuMeter(plan.device)
        # Another engine of this process is like another process.
        reserved_before = meter.reserved()
        num_weight_bytes = weight_bytes(plan.model, plan.dtype, plan.config.quantization)
        _check_weights(plan, meter, num_weight_bytes)
    with timed(phases, "weights"), _out_of_memory("the weights", "serve a smaller model"):
        model = _load_model(plan, on_progress)
    scales: list[LayerScales] | None = None
    if plan.config.kv_cache_dtype == "fp8":
        with timed(phases, "scales"), _out_of_memory("the calibration prompt", "free some memory"):
            scales = calibrate_scales(model, plan.max_model_len)
    with timed(phases, "profile"):
        remedy = "lower --max-num-batched-tokens or --max-num-seqs"
        with _out_of_memory("the largest step", remedy):
            usage = measure(plan, meter, model, grammars, reserved_before=reserved_before)
        cost = page_cost(plan.model, plan.cache_dtype, plan.limits, plan.max_model_len)
        num_pages, max_model_len = _plan_pages(plan, usage, cost)
        num_swa_pages = cost.num_swa_pages(num_pages)
    remedy = "lower --gpu-memory-utilization or --page-memory"
    with timed(phases, "cache"), _out_of_memory("the KV cache", remedy):
        cache = KVCache(
            plan.model,
            num_pages,
            dtype=plan.cache_dtype,
            device=plan.device,
            num_swa_pages=num_swa_pages,
            scales=scales,
        )
        runner = _make_runner(plan, model, cache, grammars, max_model_len=max_model_len)
    with timed(phases, "graphs"), _out_of_memory("a CUDA graph", f"{remedy}, or --enforce-eager"):
        runner.warm_up()
        report = runner.capture(_graph_progress(on_progress))
    _check_graphs(report, usage)
    return LoadedRunner(
        runner=runner,
        num_pages=num_pages,
        num_swa_pages=num_swa_pages,
        weight_bytes=num_weight_bytes,
        memory=DeviceMemory(
            name=meter.name,
            total_bytes=usage.total_bytes,
            other_bytes=usage.other_bytes,
            weight_bytes=usage.weight_bytes,
            activation_bytes=usage.activation_bytes,
            graph_bytes=report.bytes,
            num_graphs=report.num_graphs,
            capture_s=report.capture_s,
        ),
    )


def measure(
    plan: SetupPlan,
    meter: GpuMeter,
    model: NSATransformer,
    grammars: GrammarMasks,
    *,
    reserved_before: int,
) -> GpuUsage:
    """Run the largest steps on a throw-away cache, and return what pages cannot have.

    reserved_before: what torch held when the weights were not loaded yet.
    """
    loaded = meter.reserved()
    meter.start_peak()
    cache = KVCache(
        plan.model,
        2,
        dtype=plan.cache_dtype,
        device=plan.device,
        num_swa_pages=2 if plan.model.kv_per_branch else 0,
    )
    runner = _make_runner(
        plan, model, cache, grammars, max_model_len=plan.max_model_len, is_eager=True
    )
    runner.warm_up()
    activations = meter.peak() - loaded
    # Every decode step, without graphs: their pool will hold what the largest one takes.
    meter.start_peak()
    before = meter.allocated()
    runner.capture(None)
    pool = max(0, meter.allocated_peak() - before)
    activations = max(activations, meter.peak() - loaded)
    del runner, cache
    own = meter.reserved() - reserved_before
    free, total = meter.free_and_total()
    return GpuUsage(
        total_bytes=total,
        # By now the kernels are loaded.
        other_bytes=total - free - own,
        weight_bytes=loaded - reserved_before,
        activation_bytes=activations + sampling_bytes(plan.limits, plan.model.vocab_size),
        graph_bytes=estimate_graph_bytes(num_graphs(plan), plan.model.num_layers, pool),
    )


def _plan_pages(plan: SetupPlan, usage: GpuUsage, cost: PageCost) -> tuple[int, int]:
    """Return the number of pages and the longest request that they hold; say what was lowered."""
    num_pages = plan_gpu_pages(plan.config, usage, cost)
    if num_pages == MAX_PAGES:
        logger.info("the KV cache has %d pages, the most that it may have", MAX_PAGES)
    max_model_len = min(plan.max_model_len, (num_pages - 1) * cost.page_size)
    if max_model_len < plan.max_model_len:
        logger.info(
            "max_model_len is %d, which is what fits the cache; the model was made for %d",
            max_model_len,
            plan.max_model_len,
        )
    return num_pages, max_model_len


def sampling_bytes(limits: StepLimits, vocab_size: int) -> int:
    """Return what sampling with every option takes at once, in fp32 logits."""
    num_rows = max(limits.max_num_seqs, _LEAST_LOGIT_ROWS)
    return _NUM_LOGIT_COPIES * num_rows * vocab_size * torch.float32.itemsize


def num_graphs(plan: SetupPlan) -> int:
    """Return how many graphs will be captured: decode steps by rows and context, two samplers."""
    if plan.config.enforce_eager:
        return 0
    rows = row_buckets(plan.limits.max_num_seqs)
    return len(rows) * (2 + len(page_buckets(plan.max_model_len, plan.model.nsa.block_size)))


def _load_model(plan: SetupPlan, on_progress: OnProgress | None) -> NSATransformer:
    weights = load_device_weights(
        plan.source,
        plan.model,
        plan.dtype,
        device=plan.device,
        quantization=plan.config.quantization,
        is_dummy=plan.config.load_format == "dummy",
        on_progress=byte_progress(on_progress),
    )
    return NSATransformer(
        plan.model, weights, max_positions=plan.max_model_len, backend="triton"
    ).eval()


def _make_runner(
    plan: SetupPlan,
    model: NSATransformer,
    cache: KVCache,
    grammars: GrammarMasks,
    *,
    max_model_len: int,
    is_eager: bool = False,
) -> GpuModelRunner:
    limits, config = plan.limits, plan.config
    return GpuModelRunner(
        model,
        cache,
        grammars,
        config=config.model_copy(update={"enforce_eager": True}) if is_eager else config,
        max_model_len=max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        eos_token_ids=plan.model.eos_token_ids,
    )


def _check_weights(plan: SetupPlan, meter: GpuMeter, num_bytes: int) -> None:
    """Raise CapacityError when the weights alone are too many, before they are read."""
    free, total = meter.free_and_total()
    share = 1.0 if plan.config.page_memory is not None else utilization_of(plan.config)
    room = int(total * share) - (total - free)
    if num_bytes >= room:
        raise CapacityError(
            f"the weights need {num_bytes} bytes, but {max(0, room)} of the {total} bytes of "
            f"{meter.name} may be used: {free} are free and gpu_memory_utilization is {share:g}; "
            "free some or raise --gpu-memory-utilization, or serve a smaller model"
        )


def _check_graphs(report: GraphReport, usage: GpuUsage) -> None:
    if report.bytes > usage.graph_bytes:
        logger.info(
            "CUDA graphs take %d bytes, %d were expected: as much more of the GPU is in use than "
            "was planned",
            report.bytes,
            usage.graph_bytes,
        )


def _graph_progress(on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(LoadProgress("graphs", done, total))


@contextmanager
def _out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn torch's error into one that says what did not fit, and what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise CapacityError(f"{what} does not fit the GPU: {reason}; {remedy}") from None
