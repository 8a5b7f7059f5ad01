"""Block traces: what tokens report to have selected is what the specification selects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nsa_kernels import ops, reference
from nsa_kernels.block_trace import BlockTrace
from nsa_kernels.metadata import build_metadata
from nsa_kernels.spec import NSASpec
from nsa_serve import model_runner
from nsa_serve.engine import Engine
from nsa_serve.errors import RequestError
from nsa_serve.fold import fold
from nsa_serve.llm import LLM
from nsa_serve.messages import EngineInfo
from nsa_serve.model_source import load_tokenizer
from nsa_serve.output import OutputProcessor
from nsa_serve.request import EngineRequest, TraceParams
from nsa_serve.trace import check_trace, traced_layers
from tests.engine.engine_runs import greedy, make_engine, make_prompt, run

Blocks = list[list[list[list[int]]]]
CHECKPOINTS = ("nsa", "llama-nsa", "llama", "llama-mlp")
# Below, at and above the tokens that are all selected (64), and well above.
LENGTHS = (1, 40, 63, 65, 111, 200)
MAX_TOKENS = 12
EVERYTHING = TraceParams()


@pytest.fixture(params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, checkpoints: Mapping[str, Path]) -> Path:
    return checkpoints[request.param]


def ask(
    name: str, prompt: list[int], trace: TraceParams | None = EVERYTHING, **options: Any
) -> EngineRequest:
    params = greedy(options.pop("max_tokens", MAX_TOKENS))
    return EngineRequest(
        request_id=name, prompt_token_ids=prompt, params=params, trace=trace, **options
    )


def run_traced(
    engine: Engine, requests: Sequence[EngineRequest]
) -> tuple[dict[str, list[int]], dict[str, Blocks]]:
    """Run all requests; return the tokens and the traces of each."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    blocks: dict[str, Blocks] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.token_ids
            blocks[output.request_id] += output.blocks or []
    return tokens, blocks


class _Recorder:
    """Stands in for the operator of every layer: keeps queries and keys of one sequence."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, ...]] = []
        self.compressions: list[Any] = []
        self._attend = ops.nsa_attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        self.calls.append((q.clone(), k.clone()))
        self.compressions.append(options["compression"])
        self.softmax_scale = options["softmax_scale"]
        return self._attend(q, k, v, *args, **options)


def specified_blocks(folder: Path, prompt: list[int], output: list[int]) -> Blocks:
    """Return the specification's selection of the query before each output token.

    Queries and keys come from the model, run over the whole sequence in one piece.
    """
    engine = make_engine(folder, enable_prefix_caching=False)
    recorder = _Recorder()
    with mock.patch("nsa_serve.models.nsa_attention.nsa_attention", recorder):
        run(engine, [ask("whole", [*prompt, *output[:-1]], None, max_tokens=1)])
    spec = engine.runner.model.config.nsa
    first = len(prompt) - 1
    layers = []
    for (q, k), compression in zip(recorder.calls, recorder.compressions, strict=True):
        if compression is None:
            k_cmp = reference.compress_mean(k, spec)
        else:
            k_cmp = reference.compress_mlp(k, spec, compression[0])
        positions = torch.arange(first, len(q))
        scale = recorder.softmax_scale
        _, lse = reference.cmp_attention(
            q[first:], k_cmp, k_cmp, positions, spec, softmax_scale=scale
        )
        scores = reference.block_scores(
            q[first:], k_cmp, lse, positions, spec,
            softmax_scale=scale, num_blocks=-(-len(q) // spec.block_size),
        )  # fmt: skip
        layers.append(reference.select_blocks(scores, positions, spec).tolist())
    return [
        [[[b for b in blocks if b >= 0] for blocks in layer[token]] for layer in layers]
        for token in range(len(output))
    ]


def test_traces_alone_are_the_specification(folder: Path) -> None:
    engine = make_engine(folder, enable_prefix_caching=False)
    for length in LENGTHS:
        prompt = make_prompt(length)
        tokens, blocks = run_traced(engine, [ask("a", prompt)])
        assert blocks["a"] == specified_blocks(folder, prompt, tokens["a"]), length


def test_the_cases_are_not_trivial(folder: Path) -> None:
    """Some selections must leave blocks out, and differ from layer to layer or head to head."""
    engine = make_engine(folder, enable_prefix_caching=False)
    _, blocks = run_traced(engine, [ask("a", make_prompt(200))])
    info = engine.info
    for token in blocks["a"]:
        heads = [tuple(head) for layer in token for head in layer]
        assert all(len(head) < 200 // info.page_size for head in heads)
    assert len({tuple(head) for token in blocks["a"] for layer in token for head in layer}) > 1


@pytest.mark.parametrize("max_num_batched_tokens", [37, 2048])
def test_traces_in_a_batch_are_those_alone(folder: Path, max_num_batched_tokens: int) -> None:
    """Traced and untraced requests of many lengths; chunked, and with decode rows beside."""
    alone = make_engine(folder, enable_prefix_caching=False)
    engine = make_engine(
        folder, enable_prefix_caching=False, max_num_batched_tokens=max_num_batched_tokens
    )
    requests = [
        ask(str(length), make_prompt(length), TraceParams() if i % 2 else None)
        for i, length in enumerate((*LENGTHS, 17, 129))
    ]
    tokens, blocks = run_traced(engine, requests)
    for request in requests:
        name = request.request_id
        traced = EngineRequest(
            request_id=name,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
            trace=TraceParams(),
        )
        want_tokens, want_blocks = run_traced(alone, [traced])
        assert tokens[name] == want_tokens[name]
        assert blocks[name] == ([] if request.trace is None else want_blocks[name])


def test_after_a_prefix_hit(folder: Path) -> None:
    engine = make_engine(folder)
    prompt = make_prompt(180)
    _, first = run_traced(engine, [ask("a", prompt)])
    tokens, second = run_traced(engine, [ask("b", prompt)])
    assert engine.scheduler.prefix_cache_hits_total >= 160
    assert second["b"] == first["a"] == specified_blocks(folder, prompt, tokens["b"])


def test_after_a_preemption(folder: Path) -> None:
    roomy = make_engine(folder)
    part_bytes = sum(part.total_bytes for part in roomy.info.cache) // roomy.info.num_pages
    num_pages = 1 + -(-300 // roomy.info.page_size)
    engine = make_engine(folder, page_memory=num_pages * part_bytes, enable_prefix_caching=False)
    requests = [ask(name, make_prompt(120, seed=i), max_tokens=60) for i, name in enumerate("ab")]
    tokens, blocks = run_traced(engine, requests)
    assert engine.scheduler.num_preemptions_total > 0
    for request in requests:
        name = request.request_id
        want = specified_blocks(folder, request.prompt_token_ids, tokens[name])
        assert blocks[name] == want


def test_layers_and_tokens_are_those_asked_for(checkpoints: Mapping[str, Path]) -> None:
    engine = make_engine(checkpoints["llama"], enable_prefix_caching=False)
    prompt = make_prompt(100)
    _, whole = run_traced(engine, [ask("a", prompt)])
    tokens, some = run_traced(engine, [ask("b", prompt, TraceParams(layers=(1,), max_tokens=5))])
    assert len(tokens["b"]) == MAX_TOKENS
    assert some["b"] == [[token[1]] for token in whole["a"][:5]]
    _, turned = run_traced(engine, [ask("c", prompt, TraceParams(layers=(1, 0)))])
    assert turned["c"] == [[token[1], token[0]] for token in whole["a"]]


def test_nothing_is_recorded_unless_asked_for(
    checkpoints: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sequence[int]] = []

    class CountedTrace(BlockTrace):
        def __init__(self, rows: Sequence[int]) -> None:
            made.append(rows)
            super().__init__(rows)

    monkeypatch.setattr(model_runner, "BlockTrace", CountedTrace)
    engine = make_engine(checkpoints["llama"])
    plain = run(engine, [ask(str(n), make_prompt(n), None) for n in (30, 70)])
    assert made == []
    tokens, blocks = run_traced(
        engine, [ask("t", make_prompt(30), TraceParams(max_tokens=3), max_tokens=8)]
    )
    # Once a step, and no longer than the bound says.
    assert len(made) == len(blocks["t"]) == 3
    assert tokens["t"] == plain["30"].token_ids[:8]


def test_logits_do_not_depend_on_traces(checkpoints: Mapping[str, Path]) -> None:
    """Bit for bit: of the traced row, and of the one beside it."""
    engine = make_engine(checkpoints["llama"], enable_prefix_caching=False)
    runs = []
    for trace in (None, TraceParams()):
        requests = [
            EngineRequest(
                request_id=name,
                prompt_token_ids=make_prompt(length),
                params=greedy(10, logprobs=5),
                trace=trace if name == "traced" else None,
            )
            for name, length in (("traced", 90), ("beside", 120))
        ]
        runs.append(run(engine, requests))
    assert runs[0] == runs[1]


def test_a_model_without_selection_has_no_blocks() -> None:
    """The recorder itself, where the selection branch is off."""
    spec = NSASpec(
        cmp_len=8, cmp_stride=4, block_size=16, num_selected_blocks=4, num_local_blocks=2
    )
    meta = build_metadata([[1, 2]], [19], [1], spec, num_decode_rows=1)
    for uses_slc, want in ((True, [0, 1]), (False, [])):
        trace = BlockTrace([0])
        trace.prepare(meta, spec, num_kv_heads=2, uses_slc=uses_slc)
        trace.begin_layer()
        trace.record_decode(None)
        assert trace.blocks_of(0, [0]) == [[want, want]]


def test_another_device_is_refused() -> None:
    spec = NSASpec(cmp_len=8, cmp_stride=4, block_size=16)
    meta = build_metadata([[1]], [0], [1], spec, num_decode_rows=1)
    with pytest.raises(ValueError, match="no block trace yet"):
        ops.plan_attention(
            meta,
            spec,
            num_q_heads=2,
            num_kv_heads=2,
            dtype=torch.float32,
            device=torch.device("cuda"),
            trace=BlockTrace([0]),
        )


def test_what_cannot_be_traced_is_refused(checkpoints: Mapping[str, Path]) -> None:
    engine = make_engine(checkpoints["llama"])
    info: EngineInfo = engine.info
    geometry = check_trace(TraceParams(), info)
    assert traced_layers(TraceParams(), geometry) == (0, 1)
    assert traced_layers(TraceParams(layers=(1,)), geometry) == (1,)
    refused = {
        "layers 0 to 1": TraceParams(layers=(0, 2)),
        "names a layer twice": TraceParams(layers=(1, 1)),
        "1 to 64 layers, got 0": TraceParams(layers=()),
        "from 1 to 512, got 0": TraceParams(max_tokens=0),
        "from 1 to 512, got 513": TraceParams(max_tokens=513),
    }
    for message, params in refused.items():
        with pytest.raises(RequestError, match=message):
            check_trace(params, info)
        with pytest.raises(RequestError, match=message):
            engine.add(ask("a", make_prompt(4), params))
    assert not engine.has_unfinished


def test_deltas_join_to_the_whole_trace(checkpoints: Mapping[str, Path]) -> None:
    """Tokens that wait for text keep their blocks; folding outputs joins them."""
    folder = checkpoints["llama"]
    engine = make_engine(folder, enable_prefix_caching=False)
    tokenizer = load_tokenizer(engine.config)
    request = ask("a", make_prompt(70))
    _, blocks = run_traced(engine, [request])
    processor = OutputProcessor(tokenizer)
    processor.add("a", index=0, prompt_token_ids=request.prompt_token_ids, params=request.params)
    engine.add(request)
    parts = []
    while engine.has_unfinished:
        for output in engine.step():
            result, _ = processor.process(output)
            if result is not None:
                assert len(result.blocks or []) == len(result.token_ids)
                parts.append(result)
    assert fold(parts).blocks == blocks["a"]
    plain = LLM.from_engine(engine, tokenizer).generate(
        [request.prompt_token_ids], request.params, use_tqdm=False
    )
    assert plain[0].blocks is None
