"""What a GPU's memory leaves for pages: arithmetic, refusals whose remedies work, a real GPU."""

import importlib
import re
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_serve.config import EngineConfig, make_config
from nsa_serve.cuda_graph import GraphReport
from nsa_serve.engine import Engine
from nsa_serve.engine_setup import make_plan, resolve_device
from nsa_serve.errors import CapacityError, ConfigError
from nsa_serve.gpu_memory import (
    MAX_PAGES,
    GpuUsage,
    estimate_graph_bytes,
    plan_gpu_pages,
)
from nsa_serve.kv_cache import KVCache, bytes_per_page
from nsa_serve.messages import EngineInfo, LoadProgress
from nsa_serve.page_cost import PageCost
from nsa_serve.request import EngineRequest
from nsa_serve.structured.masks import GrammarMasks
from nsa_serve.warm_up import gpu_batches
from tests.engine.engine_runs import greedy, make_prompt, run

GIB = 2**30
# An H200 and the 8B model of the benchmarks: 32 layers, 4 KV heads of 128 + 128, bf16, 64 tokens.
USAGE = GpuUsage(
    total_bytes=139 * GIB,
    other_bytes=GIB // 2,
    weight_bytes=17 * GIB,
    activation_bytes=2 * GIB,
    graph_bytes=GIB // 2,
)
PAGE_BYTES = 32 * 4 * 256 * 2 * (64 + 4)
COST = PageCost(
    page_bytes=PAGE_BYTES, fp8_page_bytes=PAGE_BYTES // 2, page_size=64, max_model_len=131072
)
REMEDY = re.compile(r"--([a-z0-9-]+)(?: ([0-9.]+|fp8))?")


def config(**options: Any) -> EngineConfig:
    return make_config(EngineConfig, {"model": "m", **options})


def with_remedy(text: str, chosen: EngineConfig, usage: GpuUsage, cost: PageCost) -> int:
    """Do what an error message says to set, and plan again."""
    values = chosen.model_dump()
    for name, value in REMEDY.findall(text):
        if name == "kv-cache-dtype":
            cost = replace(cost, page_bytes=cost.fp8_page_bytes)
        if name == "enforce-eager":
            usage = replace(usage, graph_bytes=0)
        if name == "max-model-len":
            cost = replace(cost, max_model_len=int(value))
        values[name.replace("-", "_")] = value or True
    return plan_gpu_pages(make_config(EngineConfig, values), usage, cost)


def test_pages_get_what_the_share_leaves() -> None:
    num_pages = plan_gpu_pages(config(), USAGE, COST)
    room = int(139 * GIB * 0.9) - 20 * GIB
    assert num_pages == room // PAGE_BYTES
    half = plan_gpu_pages(config(gpu_memory_utilization=0.5), USAGE, COST)
    assert half == (int(139 * GIB * 0.5) - 20 * GIB) // PAGE_BYTES
    others = replace(USAGE, other_bytes=USAGE.other_bytes + 10 * PAGE_BYTES)
    assert plan_gpu_pages(config(), others, COST) == num_pages - 10


def test_page_memory_goes_before_the_share() -> None:
    settings = config(page_memory=100 * PAGE_BYTES, gpu_memory_utilization=0.01)
    assert plan_gpu_pages(settings, USAGE, COST) == 100
    with pytest.raises(CapacityError, match=r"set --page-memory (\d+)") as caught:
        plan_gpu_pages(config(page_memory=120 * GIB), USAGE, COST)
    remedy = re.findall(r"--page-memory (\d+)", str(caught.value))[0]
    assert plan_gpu_pages(config(page_memory=remedy), USAGE, COST) == 119 * GIB // PAGE_BYTES


def test_a_tiny_model_does_not_get_more_pages_than_the_host_can_track() -> None:
    cost = replace(COST, page_bytes=1000, fp8_page_bytes=500)
    assert plan_gpu_pages(config(), USAGE, cost) == MAX_PAGES


def test_a_refusal_has_the_numbers() -> None:
    usage = replace(USAGE, weight_bytes=121 * GIB)
    with pytest.raises(CapacityError) as caught:
        plan_gpu_pages(config(max_model_len=131072), usage, COST)
    message = str(caught.value)
    for number in (
        *(usage.total_bytes, usage.other_bytes, usage.weight_bytes, usage.activation_bytes),
        *(usage.graph_bytes, PAGE_BYTES, 2049 * PAGE_BYTES, 2049),
    ):
        assert str(number) in message
    assert "set --max-model-len" in message or "--gpu-memory-utilization" in message


@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_each_remedy_of_a_refusal_works(data: st.DataObject) -> None:
    page_bytes = data.draw(st.integers(64, 10**6))
    total = data.draw(st.integers(10**7, 10**9))
    parts = [data.draw(st.integers(0, total // 3)) for _ in range(4)]
    usage = GpuUsage(
        total_bytes=total,
        other_bytes=parts[0],
        weight_bytes=parts[1],
        activation_bytes=parts[2],
        graph_bytes=parts[3] // 8,
    )
    max_model_len = data.draw(st.one_of(st.none(), st.integers(1, 10**5)))
    options: dict[str, Any] = {"max_model_len": max_model_len}
    if data.draw(st.booleans()):
        options["page_memory"] = data.draw(st.integers(1, total))
    else:
        options["gpu_memory_utilization"] = data.draw(st.floats(0.01, 1))
    num_step_swa_pages = data.draw(st.sampled_from((0, 0, 2, 33)))
    cost = PageCost(
        page_bytes=page_bytes,
        fp8_page_bytes=page_bytes // (1 if num_step_swa_pages else data.draw(st.integers(1, 2))),
        page_size=16,
        max_model_len=max_model_len or 10**5,
        swa_page_bytes=data.draw(st.integers(1, 10**6)) if num_step_swa_pages else 0,
        num_step_swa_pages=num_step_swa_pages,
    )
    chosen = config(**options)
    try:
        num_pages = plan_gpu_pages(chosen, usage, cost)
    except CapacityError as error:
        message = str(error)
        advice = message.rpartition("; ")[2]
        if advice.startswith("set "):
            for text in advice.split(", or "):
                assert with_remedy(text, chosen, usage, cost) >= 2, message
        else:
            assert advice.startswith(("lower --max-num-batched-tokens", "free ")), message
            (number,) = map(int, re.findall(r"(?:until they take|free) (\d+) bytes", advice))
            freed = replace(usage, other_bytes=usage.other_bytes - number)
            text = advice.partition(" set ")[2]
            assert with_remedy(text, chosen, freed, cost) >= 2, message
        return
    assert 2 <= num_pages <= MAX_PAGES
    if max_model_len is not None:
        assert num_pages - 1 >= cost.pages_per_request
    in_use = usage.fixed_bytes + cost.bytes_of(num_pages)
    assert in_use <= total
    if "page_memory" not in options:
        assert in_use <= total * options["gpu_memory_utilization"]


def test_graphs_take_nothing_when_there_are_none() -> None:
    assert estimate_graph_bytes(0, 32, GIB) == 0
    assert estimate_graph_bytes(70, 32, GIB) > GIB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu", "quantization": "fp8"}, "quantization is fp8 but the device is a cpu"),
        ({"device": "cpu", "kv_cache_dtype": "fp8"}, "--kv-cache-dtype out or serve on a GPU"),
        ({"device": "cpu", "gpu_memory_utilization": 0.5}, "gpu_memory_utilization is 0.5 but"),
        ({"gpu_memory_utilization": 0}, "greater than 0"),
        ({"gpu_memory_utilization": 1.01}, "less than or equal to 1"),
        ({"max_model_len": "all"}, "max_model_len"),
    ],
)
def test_settings_that_a_device_cannot_have_are_refused(
    options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


@pytest.mark.parametrize(("name", "is_refused"), [("llama-mlp", True), ("llama", False)])
def test_heads_too_narrow_for_an_fp8_cache_are_refused(
    checkpoints: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, is_refused: bool
) -> None:
    cuda = torch.device("cuda:0")
    monkeypatch.setattr("nsa_serve.engine_setup.resolve_device", lambda config: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("nsa_serve.engine_setup.run_dtype", lambda config, device: torch.bfloat16)
    wanted = config(model=str(checkpoints[name]), device="cuda", kv_cache_dtype="fp8")
    if is_refused:
        with pytest.raises(ConfigError, match=r"head_dim 20 with v_head_dim 12.*--kv-cache-dtype"):
            make_plan(wanted)
    else:
        assert make_plan(wanted).cache_dtype == torch.float8_e4m3fn


def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"torch sees no CUDA device: .*--device cpu"):
        resolve_device(config(device="cuda"))
    assert resolve_device(config()) == torch.device("cpu")
    for options in ({"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}):
        with pytest.raises(ConfigError, match=r"leave --.* out or serve on a GPU"):
            resolve_device(config(**options))


def test_defaults_depend_on_the_device() -> None:
    cpu, cuda = (config().limits(device, 1000) for device in ("cpu", "cuda"))
    assert (cpu.max_num_seqs, cpu.max_num_batched_tokens, cpu.is_async) == (32, 1024, False)
    assert (cuda.max_num_seqs, cuda.max_num_batched_tokens, cuda.is_async) == (64, 8192, True)
    asked = config(max_num_seqs=3, max_num_batched_tokens=5, async_scheduling=False)
    limits = asked.limits("cuda", 1000)
    assert (limits.max_num_seqs, limits.max_num_batched_tokens, limits.is_async) == (3, 5, False)
    # Prompts that are not cut must fit a step.
    whole = config(enable_chunked_prefill=False)
    assert whole.limits("cuda", 131072).max_num_batched_tokens == 131072
    assert whole.limits("cuda", 100).max_num_batched_tokens == 8192
    with pytest.raises(ConfigError, match="lower --max-model-len to 99,"):
        config(enable_chunked_prefill=False, max_num_batched_tokens=99).limits("cuda", 100)
    assert config(max_model_len="auto").max_model_len is None


@pytest.mark.parametrize("max_request_tokens", [2, 9, 11, 64, 4096])
def test_warm_up_requests_can_be_served(
    checkpoints: Mapping[str, Path], max_request_tokens: int
) -> None:
    values = {"model": str(checkpoints["llama"]), "device": "cpu", "num_threads": 1}
    values |= {"max_num_batched_tokens": 48}
    if max_request_tokens <= 64:
        values |= {"max_model_len": max_request_tokens}
    engine = Engine(make_config(EngineConfig, values))
    for batch in gpu_batches(
        max_request_tokens=engine.scheduler.max_request_tokens,
        max_num_batched_tokens=48,
        vocab_size=engine.info.vocab_size,
    ):
        results = run(engine, batch)
        assert all(result.token_ids for result in results.values())
    engine.close()


class FakeMeter:
    """A GPU of 1 MB, of which others use 50 kB, the weights 200 kB, and a step 90 kB at most.

    Of the others' memory, 20 kB are another engine's in this process.
    """

    TOTAL, OTHER, WEIGHTS, STEP, DECODE = 1_000_000, 50_000, 200_000, 90_000, 20_000
    EARLIER = 20_000
    name = "a fake"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_calls = 0

    def free_and_total(self) -> tuple[int, int]:
        weights = self.WEIGHTS if self.num_calls > 1 else 0
        return self.TOTAL - self.OTHER - weights, self.TOTAL

    def reserved(self) -> int:
        self.num_calls += 1
        return self.EARLIER + (self.WEIGHTS if self.num_calls > 1 else 0)

    def start_peak(self) -> None:
        pass

    def peak(self) -> int:
        return self.EARLIER + self.WEIGHTS + self.STEP

    def allocated(self) -> int:
        return self.WEIGHTS

    def allocated_peak(self) -> int:
        return self.WEIGHTS + self.DECODE


class FakeRunner:
    """Notes what it was made with, and what was asked of it."""

    made: "list[FakeRunner]"

    def __init__(
        self,
        model: object,
        cache: KVCache,
        grammars: object,
        *,
        config: EngineConfig,
        **limits: Any,
    ) -> None:
        self.num_pages, self.is_eager, self.limits = cache.num_pages, config.enforce_eager, limits
        self.calls: list[str] = []
        self.made.append(self)

    def warm_up(self) -> None:
        self.calls.append("warm_up")

    def capture(self, on_progress: Any = None) -> GraphReport:
        self.calls.append("capture")
        if on_progress is not None:
            on_progress(1, 2)
        return GraphReport(num_graphs=0 if self.is_eager else 2, capture_s=1.0, bytes=77)


@pytest.fixture
def gpu_setup(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module, with a fake runner and a fake GPU: it must not need a real one to be tested."""
    FakeRunner.made = []
    module = importlib.import_module("nsa_serve.gpu_setup")
    monkeypatch.setattr(module, "GpuModelRunner", FakeRunner)
    monkeypatch.setattr(module, "GpuMeter", FakeMeter)
    monkeypatch.setattr(module, "sampling_bytes", lambda *_: 10_000)
    monkeypatch.setattr(module, "estimate_graph_bytes", lambda _count, _layers, pool: pool + 5_000)
    return module


def test_pages_get_what_a_measured_step_leaves(
    gpu_setup: types.ModuleType, checkpoints: Mapping[str, Path]
) -> None:
    settings = config(model=str(checkpoints["llama"]), dtype="float32", num_threads=1)
    plan = make_plan(settings.model_copy(update={"device": "cpu"}))
    phases: dict[str, float] = {}
    seen: list[LoadProgress] = []
    loaded = gpu_setup.load_gpu_runner(plan, grammars(), phases, on_progress=seen.append)
    fixed = 50_000 + 200_000 + 90_000 + 10_000 + 20_000 + 5_000
    assert loaded.num_pages == (900_000 - fixed) // bytes_per_page(plan.model, torch.float32)
    measured, real = FakeRunner.made
    assert (measured.num_pages, measured.is_eager) == (2, True)
    assert (real.num_pages, real.is_eager) == (loaded.num_pages, False)
    assert measured.limits["max_model_len"] == plan.max_model_len
    # What does not fit the cache needs neither graphs nor buffers.
    fits = (loaded.num_pages - 1) * plan.model.nsa.block_size
    assert real.limits["max_model_len"] == min(fits, plan.max_model_len)
    assert measured.calls == real.calls == ["warm_up", "capture"]
    assert list(phases) == ["device", "weights", "profile", "cache", "graphs"]
    assert {item.phase for item in seen} == {"weights", "graphs"}
    assert loaded.memory is not None
    assert loaded.memory.graph_bytes == 77 and loaded.memory.other_bytes == 50_000
    assert loaded.memory.weight_bytes == 200_000 and loaded.memory.activation_bytes == 100_000


def test_weights_that_do_not_fit_are_not_read(
    gpu_setup: types.ModuleType, checkpoints: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(config(model=str(checkpoints["llama"]), device="cpu", dtype="float32"))
    monkeypatch.setattr(FakeMeter, "TOTAL", 60_000)
    with pytest.raises(CapacityError, match=r"the weights need \d+ bytes, but 4000 of the 60000"):
        gpu_setup.load_gpu_runner(plan, grammars(), {})
    assert not FakeRunner.made


@pytest.mark.parametrize("what", ["warm_up", "capture"])
def test_out_of_memory_is_a_refusal_with_a_remedy(
    gpu_setup: types.ModuleType,
    checkpoints: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    def fail(runner: FakeRunner, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. More words.")

    plan = make_plan(config(model=str(checkpoints["llama"]), device="cpu", dtype="float32"))
    monkeypatch.setattr(FakeRunner, what, fail)
    with pytest.raises(CapacityError, match=r"does not fit the GPU: CUDA out of memory; lower --"):
        gpu_setup.load_gpu_runner(plan, grammars(), {})


def grammars() -> GrammarMasks:
    def load() -> Any:
        raise AssertionError("no grammar is used here")

    return GrammarMasks(load)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "nsa"])
def test_an_engine_on_a_gpu_says_where_its_memory_goes(
    checkpoints: Mapping[str, Path], name: str
) -> None:
    # Other tests use the GPU at the same time.
    free, total = torch.cuda.mem_get_info()
    share = min(1.0, (total - free + 8 * GIB) / total)
    engine = gpu_engine(checkpoints[name], gpu_memory_utilization=share)
    info: EngineInfo = engine.info
    memory = info.memory
    assert memory is not None and info.device == "cuda:0" and info.trace is None
    assert memory.num_graphs > 0 and memory.total_bytes > memory.other_bytes > 0
    pages = sum(part.total_bytes for part in info.cache)
    planned = pages + memory.weight_bytes + memory.activation_bytes + memory.graph_bytes
    assert planned + memory.other_bytes <= share * total + GIB
    assert torch.cuda.memory_allocated() >= pages
    assert list(info.phase_s)[-2:] == ["graphs", "warm-up"]
    results = run(
        engine, [EngineRequest(request_id="a", prompt_token_ids=make_prompt(40), params=greedy(5))]
    )
    assert len(results["a"].token_ids) == 5
    assert engine.stats.num_graph_replays_total
    assert engine.stats.num_preemptions_total == 0
    engine.close()


@pytest.mark.gpu
def test_a_gpu_that_is_too_small_is_refused_and_the_remedy_works(
    checkpoints: Mapping[str, Path],
) -> None:
    page_bytes = 2 * 2 * (16 + 16) * 4 * (16 + 4)
    with pytest.raises(CapacityError, match=r"set --max-model-len (\d+) or less") as caught:
        gpu_engine(checkpoints["llama"], page_memory=4 * page_bytes, max_model_len=160)
    fits = int(re.findall(r"--max-model-len (\d+)", str(caught.value))[0])
    engine = gpu_engine(checkpoints["llama"], page_memory=4 * page_bytes, max_model_len=fits)
    assert engine.info.max_model_len == fits
    engine.close()


@pytest.mark.gpu
def test_a_cache_of_8_bits_takes_half_of_one_of_16(checkpoints: Mapping[str, Path]) -> None:
    wide, narrow = (
        gpu_engine(checkpoints["llama"], page_memory="8MiB", dtype="bfloat16", kv_cache_dtype=dtype)
        for dtype in ("auto", "fp8")
    )
    assert narrow.info.num_pages + 1 == 2 * (wide.info.num_pages + 1)
    assert narrow.info.cache_dtype == "float8_e4m3fn" and "scales" in narrow.info.phase_s
    results = run(
        narrow, [EngineRequest(request_id="a", prompt_token_ids=make_prompt(40), params=greedy(5))]
    )
    assert len(results["a"].token_ids) == 5
    wide.close()
    narrow.close()


@pytest.mark.gpu
def test_eager_steps_have_no_graphs(checkpoints: Mapping[str, Path]) -> None:
    engine = gpu_engine(checkpoints["llama"], page_memory="16MiB", enforce_eager=True)
    assert engine.info.memory is not None and engine.info.memory.num_graphs == 0
    run(engine, [EngineRequest(request_id="a", prompt_token_ids=make_prompt(40), params=greedy(5))])
    assert engine.stats.num_graph_replays_total is None
    engine.close()


def gpu_engine(folder: Path, **options: Any) -> Engine:
    values = {"model": str(folder), "device": "cuda", "dtype": "float32", "max_num_seqs": 8}
    return Engine(make_config(EngineConfig, values | options))
