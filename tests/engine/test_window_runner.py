"""The GPU runner of a model with window pages, in Triton's interpreter: as test_gpu_runner.py."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_serve.cuda_graph import GraphReport
from nsa_serve.engine import Engine
from nsa_serve.engine_setup import LoadedRunner, SetupPlan
from nsa_serve.kv_cache import KVCache, page_cost
from nsa_serve.model_runner import ModelRunner
from nsa_serve.models.nsa_transformer import NSATransformer
from nsa_serve.models.weights import load_device_weights
from nsa_serve.structured.masks import GrammarMasks
from tests.engine.engine_runs import greedy, make_engine, run
from tests.engine.test_gpu_runner import RecordedCalls, ask
from tests.kernels.conftest import _repaired_interpreter  # noqa: F401 (a fixture for all tests)
from tests.util import write_checkpoint

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="is for Triton's interpreter; a GPU runs the real engine"
    ),
    # Kernels may compute on memory that nobody wrote, and drop the result; numpy sees it.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

# Pages of 16 tokens, without the null page: too few for all requests at once.
NUM_PAGES = 11
LENGTHS = (1, 33, 62, 15)


def load_interpreted(
    plan: SetupPlan, grammars: GrammarMasks, phases: dict[str, float], **_: Any
) -> LoadedRunner:
    """As `gpu_setup.load_gpu_runner`, on the CPU, over caches of NaN."""
    from nsa_serve.gpu_runner import GpuModelRunner

    cost = page_cost(plan.model, plan.dtype, plan.limits, plan.max_model_len)
    num_pages, num_swa_pages = NUM_PAGES + 1, cost.num_swa_pages(NUM_PAGES + 1)
    weights = load_device_weights(plan.source, plan.model, plan.dtype, device=plan.device)
    model = NSATransformer(
        plan.model, weights, max_positions=plan.max_model_len, backend="triton"
    ).eval()
    cache = KVCache(
        plan.model, num_pages, dtype=plan.dtype, device=plan.device, num_swa_pages=num_swa_pages
    )
    for layer in cache.layers:
        for name in ("k", "v", "k_cmp", "v_cmp", "k_swa", "v_swa", "k_tail", "v_tail"):
            # What was never written must not be read; nor is a null page, by a kernel.
            getattr(layer, name).fill_(torch.nan)
    runner = GpuModelRunner(
        model,
        cache,
        grammars,
        config=plan.config,
        max_model_len=NUM_PAGES * plan.model.nsa.block_size,
        max_num_seqs=plan.limits.max_num_seqs,
        max_num_batched_tokens=plan.limits.max_num_batched_tokens,
    )
    runner.capture()
    return LoadedRunner(
        runner=runner, num_pages=num_pages, weight_bytes=0, num_swa_pages=num_swa_pages
    )


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, Engine]]:
    """The CPU engine, and the GPU's in the interpreter, with few pages and rows."""
    folder = write_checkpoint(
        tmp_path / "paper",
        "nsa_moe",
        nsa={"compression": "mlp", "cmp_hidden_size": 12, "window_size": 18},
        num_layers=1,
        num_q_heads=4,
        num_kv_heads=1,
        seed=3,
    )
    reference = make_engine(folder, page_memory="4MiB")

    def measure(device: torch.device, capture_all: Callable[[], int]) -> GraphReport:
        return GraphReport(capture_all(), 0.0, 0)

    monkeypatch.setattr("nsa_serve.engine.load_runner", load_interpreted)
    monkeypatch.setattr("nsa_serve.engine.gpu_batches", lambda **_: [])
    monkeypatch.setattr(Engine, "_warm_up_grammars", lambda self: None)
    monkeypatch.setattr("nsa_serve.gpu_runner.GraphPool", RecordedCalls)
    monkeypatch.setattr("nsa_serve.gpu_runner.measure", measure)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 40, "max_model_len": 128}
    engine = make_engine(folder, async_scheduling=True, page_memory="4MiB", **options)
    yield reference, engine
    engine.close()
    reference.close()


def test_a_mixed_load_gives_the_tokens_of_the_cpu_engine(pair: tuple[Engine, Engine]) -> None:
    """Windows move over pages in graphs, beside chunks, after preemptions and prefix hits."""
    reference, engine = pair
    assert engine.swa_pool is not None and not isinstance(engine.runner, ModelRunner)
    requests = [ask(str(length), length, greedy(20)) for length in LENGTHS]
    wanted = run(reference, requests)
    got = run(engine, requests)
    assert engine.scheduler.num_preemptions_total > 0
    assert engine.runner.num_graph_replays > 10 and engine.runner.num_eager_steps > 0
    hit = run(engine, [ask("33", 33, greedy(20))])
    assert hit["33"].num_prefix_hit_tokens == 32
    for results in (got, hit):
        for name, result in results.items():
            assert result.token_ids == wanted[name].token_ids, f"prompt of {name} tokens"
    engine.scheduler.check()
    assert engine.swa_pool.num_free_pages == engine.swa_pool.num_pages
