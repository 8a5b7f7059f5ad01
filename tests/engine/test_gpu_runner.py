"""The GPU runner, its buffers and its sampler in Triton's interpreter, in an engine on the CPU.

All but the device: kernels run as Python, a graph is a recorded call on the same static tensors,
and nothing is asynchronous. What the host does between the kernels is what runs on a GPU: rows and
their order, pending tokens, padding, pages, samplers, steps in flight. Few tokens, since a step
takes the interpreter a second; `test_gpu_engine.py` has the many.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_serve.cuda_graph import GraphReport
from nsa_serve.engine import Engine
from nsa_serve.engine_setup import LoadedRunner, SetupPlan
from nsa_serve.kv_cache import KVCache
from nsa_serve.model_runner import ModelRunner
from nsa_serve.models.nsa_transformer import NSATransformer
from nsa_serve.models.weights import load_device_weights
from nsa_serve.request import EngineRequest, SamplingParams
from nsa_serve.structured import grammar
from nsa_serve.structured.masks import GrammarMasks
from tests.engine.engine_runs import Result, greedy, make_engine, make_prompt, run
from tests.engine.test_invariants import assert_near
from tests.kernels.conftest import _repaired_interpreter  # noqa: F401 (a fixture for all tests)
from tests.util import write_checkpoint

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="is for Triton's interpreter; a GPU runs the real engine"
    ),
    # Kernels may compute on memory that nobody wrote, and drop the result; numpy sees it.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

# 1 layer, 2 KV heads, 16 + 16 dims, fp32, 16 tokens and 4 compressed entries.
PAGE_BYTES = 20 * 256
# As of test_gpu_engine.py: fp32 sums in another order.
TOLERANCE = 1e-4


@dataclass
class RecordedCalls:
    """Stands for `GraphPool`: a replay calls what a graph would run, on the same tensors."""

    device: torch.device
    calls: dict[tuple[object, ...], Callable[[], None]] = field(default_factory=dict)
    replayed: list[tuple[object, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.calls)

    def capture(self, key: tuple[object, ...], run: Callable[[], None]) -> None:
        self.calls[key] = run

    def has(self, key: tuple[object, ...]) -> bool:
        return key in self.calls

    def replay(self, key: tuple[object, ...]) -> None:
        self.replayed.append(key)
        self.calls[key]()


def load_interpreted(
    plan: SetupPlan, grammars: GrammarMasks, phases: dict[str, float], **_: Any
) -> LoadedRunner:
    """As `gpu_setup.load_gpu_runner`, on the CPU, with as many pages as page_memory holds."""
    from nsa_serve.gpu_runner import GpuModelRunner

    assert plan.config.page_memory is not None
    num_pages = plan.config.page_memory // PAGE_BYTES
    weights = load_device_weights(plan.source, plan.model, plan.dtype, device=plan.device)
    model = NSATransformer(
        plan.model, weights, max_positions=plan.max_model_len, backend="triton"
    ).eval()
    cache = KVCache(plan.model, num_pages, dtype=plan.dtype, device=plan.device)
    for layer in cache.layers:
        for tensor in (layer.k, layer.v, layer.k_cmp, layer.v_cmp):
            tensor[1:].fill_(torch.nan)  # what was never written must not be read
    runner = GpuModelRunner(
        model,
        cache,
        grammars,
        config=plan.config,
        max_model_len=min(plan.max_model_len, (num_pages - 1) * plan.model.nsa.block_size),
        max_num_seqs=plan.limits.max_num_seqs,
        max_num_batched_tokens=plan.limits.max_num_batched_tokens,
        eos_token_ids=plan.model.eos_token_ids,
    )
    runner.capture()
    return LoadedRunner(runner=runner, num_pages=num_pages, weight_bytes=0)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, Engine]]:
    """The CPU engine, and the GPU's in the interpreter, with few pages and rows."""
    folder = write_checkpoint(tmp_path / "llama", seed=3, num_layers=1)
    reference = make_engine(folder, page_memory="4MiB")

    def measure(device: torch.device, capture_all: Callable[[], int]) -> GraphReport:
        return GraphReport(capture_all(), 0.0, 0)

    monkeypatch.setattr("nsa_serve.engine.load_runner", load_interpreted)
    monkeypatch.setattr("nsa_serve.engine.gpu_batches", lambda **_: [])
    monkeypatch.setattr(Engine, "_warm_up_grammars", lambda self: None)
    monkeypatch.setattr("nsa_serve.gpu_runner.GraphPool", RecordedCalls)
    monkeypatch.setattr("nsa_serve.gpu_runner.measure", measure)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    options = {"page_memory": 6 * PAGE_BYTES, "max_num_seqs": 5, "max_num_batched_tokens": 40}
    engine = make_engine(folder, async_scheduling=True, **options)
    yield reference, engine
    engine.close()
    reference.close()


CASES: dict[str, SamplingParams] = {
    "greedy": greedy(4, logprobs=2, prompt_logprobs=1),
    "seeded": SamplingParams(max_tokens=4, seed=3, top_k=40, top_p=0.9, ignore_eos=True),
    "penalties": greedy(4, frequency_penalty=1.0, repetition_penalty=1.3, logprobs=1),
    "bad words": greedy(4, bad_words=((7,), (90,)), logit_bias={7: 3.0}, min_tokens=2),
    "none": greedy(0, prompt_logprobs=1),
    "grammar": SamplingParams(
        structured=grammar.regex(r"[a-z]{2,3}!", param="r"), max_tokens=5, seed=2
    ),
}
LENGTHS = (1, 16, 30, 5, 33, 2)


def ask(name: str, length: int, params: SamplingParams) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=make_prompt(length), params=params)


def assert_equal(got: Mapping[str, Result], want: Mapping[str, Result]) -> None:
    assert {name: r.token_ids for name, r in got.items()} == {
        name: r.token_ids for name, r in want.items()
    }
    for name, result in got.items():
        assert result.finish_reason is want[name].finish_reason
        assert_near(result.logprobs, want[name].logprobs, TOLERANCE)
        assert (result.prompt_logprobs is None) == (want[name].prompt_logprobs is None)
        assert_near(result.prompt_logprobs or [], want[name].prompt_logprobs or [], TOLERANCE)


def test_a_mixed_load_gives_the_tokens_of_the_cpu_engine(pair: tuple[Engine, Engine]) -> None:
    """Preempted, in batches of all sizes, chunks beside decode rows, steps in flight."""
    reference, engine = pair
    assert not isinstance(engine.runner, ModelRunner)
    requests = [
        ask(name, length, params)
        for length, (name, params) in zip(LENGTHS, CASES.items(), strict=True)
    ]
    assert_equal(run(engine, requests), run(reference, requests))
    assert engine.scheduler.num_preemptions_total > 0
    assert engine.runner.num_graph_replays > 0 and engine.runner.num_eager_steps > 0


# By name: arguments of `write_checkpoint`, and options of `tests.engine.variants`.
SERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Six query heads, 202 fused outputs: nothing that is counted by rows starts on 16 bytes.
    "mlp": (
        {
            "nsa": {"compression": "mlp", "cmp_hidden_size": 20, "window_size": 17},
            "config": {"v_head_dim": 12},
            "num_q_heads": 6,
            "head_dim": 20,
        },
        {
            "dtype": "float32",
            "page_memory": 60 * PAGE_BYTES,
            "max_num_seqs": 19,
            "longest": 400,
            "num_requests": 100,
        },
    ),
    # Steps that end between two sizes that linear layers are compiled for.
    "small steps": (
        {},
        {
            "dtype": "bfloat16",
            "page_memory": 60 * PAGE_BYTES,
            "max_num_seqs": 7,
            "max_num_batched_tokens": 30,
            "longest": 400,
            "num_requests": 40,
        },
    ),
    # So many KV heads that one row is cut otherwise than two; contexts of three buckets.
    "long": (
        {
            "nsa": {"cmp_len": 32, "cmp_stride": 16, "block_size": 64, "window_size": 128},
            "num_q_heads": 15,
            "num_kv_heads": 15,
            "max_position_embeddings": 20_000,
        },
        {
            "dtype": "float32",
            "page_memory": 400 * PAGE_BYTES,
            "max_num_seqs": 3,
            "longest": 18_000,
            "num_requests": 12,
        },
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_a_load_compiles_nothing_after_the_warm_up(tmp_path: Path, name: str) -> None:
    """In a process of its own, which knows what a GPU would compile; the interpreter does not."""
    arguments, options = SERVED[name]
    folder = write_checkpoint(tmp_path / name, seed=3, num_layers=1, **arguments)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.engine.variants", str(folder), json.dumps(options)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {"_decode_slc_kernel", "_prefill_cmp_kernel", "_draw_kernel"} <= set(report["kernels"])
    assert report["num_graph_replays"] > 100 and report["num_eager_steps"] > 20
    assert report["late"] == []
