"""Structured output in the engine: what is sampled matches, in every way that a request can run."""

import json
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsa_serve.engine import Engine
from nsa_serve.engine_setup import load_vocabulary
from nsa_serve.errors import RequestError
from nsa_serve.exclusions import apply_bitmask, excluded_tokens
from nsa_serve.model_source import load_tokenizer
from nsa_serve.request import EngineRequest, FinishReason, SamplingParams, StructuredOutput
from nsa_serve.structured import grammar
from nsa_serve.structured.masks import GrammarMasks, TokenMatcher
from nsa_serve.tokenizer import Tokenizer
from tests.engine.engine_runs import Result, greedy, make_engine, make_prompt, run
from tests.engine.test_engine import PAGE_BYTES

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["ä", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    # Random weights write white space for ever.
    "x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None},
}
PERSON = grammar.json_schema(SCHEMA, param="schema")
CHOICES = ["yes", "no", "a (b) [c]\n*", "日本"]
EOS = 2


@pytest.fixture(scope="module")
def folder(checkpoints: Mapping[str, Path]) -> Path:
    return checkpoints["llama"]


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = make_engine(folder, page_memory=80 * PAGE_BYTES)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer(engine: Engine) -> Tokenizer:
    return load_tokenizer(engine.config)


def ask(name: str, structured: StructuredOutput | None, **params: Any) -> EngineRequest:
    values = {"max_tokens": 200, "seed": len(name), **params}
    return EngineRequest(
        request_id=name,
        prompt_token_ids=make_prompt(9, seed=len(name)),
        params=SamplingParams(structured=structured, **values),
    )


def text_of(tokenizer: Tokenizer, result: Result) -> str:
    """The text of an output that ended by itself, which is by an EOS token."""
    assert result.finish_reason is FinishReason.STOP
    assert result.token_ids[-1] == EOS and EOS not in result.token_ids[:-1]
    return tokenizer.decode(result.token_ids[:-1], skip_special_tokens=False)


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"]
    assert isinstance(person["name"], str) and len(person["name"]) <= 8
    assert isinstance(person["age"], int) and 0 <= person["age"] <= 120
    assert len(person["tags"]) <= 2 and set(person["tags"]) <= {"ä", "b"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_kind_is_matched(engine: Engine, tokenizer: Tokenizer, temperature: float) -> None:
    requests = [
        ask("schema", PERSON, temperature=temperature),
        ask("regex", grammar.regex(r"\d{3}-[a-fé]{2,5}x", param="r"), temperature=temperature),
        ask("choice", grammar.choice(CHOICES, param="c"), temperature=temperature),
        ask(
            "lark",
            grammar.grammar('start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/', param="g"),
            temperature=temperature,
            logit_bias={tokenizer.encode(">", add_special_tokens=False)[0]: 5.0},
        ),
    ]
    texts = {name: text_of(tokenizer, result) for name, result in run(engine, requests).items()}
    check_person(texts["schema"])
    assert re.fullmatch(r"\d{3}-[a-fé]{2,5}x", texts["regex"])
    assert texts["choice"] in CHOICES
    assert re.fullmatch(r"<[a-z]{1,3}(,[a-z]{1,3})*>", texts["lark"])


def test_json_object_is_an_object_however_far_it_gets(engine: Engine, tokenizer: Tokenizer) -> None:
    """Random weights seldom end a free object; its beginning still is one."""
    result = run(engine, [ask("r", grammar.json_object(), max_tokens=30)])["r"]
    assert tokenizer.decode(result.token_ids, skip_special_tokens=True).startswith("{")


def test_a_limit_ends_an_unfinished_output(engine: Engine, tokenizer: Tokenizer) -> None:
    whole = run(engine, [ask("r", PERSON)])["r"]
    cut = run(engine, [ask("r", PERSON, max_tokens=5)])["r"]
    assert cut.finish_reason is FinishReason.LENGTH
    assert cut.token_ids == whole.token_ids[:5]


def test_a_mixed_batch_equals_each_request_alone(engine: Engine) -> None:
    requests = [
        ask(f"{'x' * i}", PERSON if i % 2 else None, max_tokens=60, temperature=i % 3 / 2)
        for i in range(1, 9)
    ]
    together = run(engine, requests)
    for request in requests:
        alone = run(engine, [request])[request.request_id]
        assert alone.token_ids == together[request.request_id].token_ids


def test_a_preempted_request_goes_on_where_it_was(folder: Path, engine: Engine) -> None:
    requests = [ask(f"{'x' * i}", PERSON, max_tokens=100) for i in range(1, 9)]
    want = {request.request_id: run(engine, [request]) for request in requests}
    small = make_engine(folder, page_memory=16 * PAGE_BYTES, max_num_seqs=8)
    results = run(small, requests)
    assert small.scheduler.num_preemptions_total > 0
    for name, result in results.items():
        assert result == want[name][name]
    small.close()


def test_log_probabilities_are_the_models_own(engine: Engine) -> None:
    """The mask takes tokens away; it does not make the others likelier in what is reported."""
    structured = grammar.choice(["zzz"], param="c")
    first = run(engine, [ask("r", structured, temperature=0.0, logprobs=2)])["r"].logprobs[0]
    free = run(engine, [ask("r", None, temperature=0.0, logprobs=2, max_tokens=1)])["r"].logprobs[0]
    assert first.top == free.top
    assert first.rank > 2 and first.logprob < free.logprob


def test_the_end_of_the_grammar_goes_before_min_tokens_and_ignore_eos(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    structured = grammar.choice(["yes"], param="c")
    params = {"max_tokens": 50, "min_tokens": 40, "ignore_eos": True}
    result = run(engine, [ask("r", structured, **params)])["r"]
    assert text_of(tokenizer, result) == "yes"


def test_min_tokens_holds_back_an_end_that_can_wait(engine: Engine) -> None:
    structured = grammar.regex("[ab]{1,30}", param="r")
    bias = {EOS: 100.0}
    short = run(engine, [ask("r", structured, logit_bias=bias)])["r"]
    long = run(engine, [ask("r", structured, logit_bias=bias, min_tokens=9)])["r"]
    assert (len(short.token_ids), len(long.token_ids)) == (2, 10)


def errors_of(engine: Engine) -> dict[str, tuple[str | None, str | None]]:
    errors = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.error is not None:
                errors[output.request_id] = (output.error, output.error_kind)
        engine.scheduler.check()
    return errors


def test_constraints_that_leave_no_token_fail_one_request(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    (token_id,) = tokenizer.encode("x", add_special_tokens=False)
    engine.add(ask("bad", grammar.choice(["yes"], param="c"), allowed_token_ids=(token_id,)))
    engine.add(ask("good", grammar.choice(["yes"], param="c")))
    errors = errors_of(engine)
    message = "every token was excluded: loosen allowed_token_ids, structured output"
    assert errors == {"bad": (message, "RequestError")}
    assert engine.pool.num_free_pages == engine.pool.num_pages


def test_an_error_of_the_library_fails_one_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicError(BaseException):
        """As llguidance raises when its own code fails: no Exception."""

    fill = GrammarMasks._fill

    def fill_or_panic(self: GrammarMasks, bits: Any, ready: list[tuple[TokenMatcher, int]]) -> None:
        if any(matcher is bad.matcher for matcher, _ in ready):
            raise PanicError
        fill(self, bits, ready)

    monkeypatch.setattr(GrammarMasks, "_fill", fill_or_panic)
    engine.add(ask("bad", PERSON))
    engine.add(ask("good", PERSON))
    bad = next(
        e.request for e in engine.scheduler._entries.values() if e.request.request_id == "bad"
    )
    assert errors_of(engine) == {"bad": ("the grammar failed: internal error: PanicError", None)}


def test_a_grammar_that_gets_too_complex_fails_one_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_serve.structured.matcher._STEP_MAX_ITEMS", 40)
    engine = make_engine(folder, page_memory=80 * PAGE_BYTES)
    ambiguous = grammar.grammar('start: a\na: a a | "x" | "xx" | "xxx"', param="g")
    engine.add(ask("bad", ambiguous, min_tokens=100))
    engine.add(ask("good", grammar.choice(["yes"], param="c")))
    errors = errors_of(engine)
    assert list(errors) == ["bad"]
    message, kind = errors["bad"]
    assert str(message).startswith("the grammar failed: ") and kind == "RequestError"
    engine.close()


@pytest.mark.parametrize(
    ("structured", "words"),
    [
        (
            StructuredOutput("json_schema", '{"not": {}}'),
            'JSON schema.*Unimplemented keys: \\["not',
        ),
        (StructuredOutput("regex", "(?=a)b"), "regular expression.*look-around"),
        (StructuredOutput("grammar", "start: x"), "the grammar cannot be used.*unknown name"),
    ],
)
def test_a_grammar_that_does_not_compile_is_refused(
    engine: Engine, structured: StructuredOutput, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        engine.add(ask("r", structured))
    assert caught.value.param == "structured"
    assert not engine.has_unfinished


def test_without_a_tokenizer_only_constrained_requests_are_refused(
    tmp_path: Path, folder: Path
) -> None:
    for file in folder.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    engine = make_engine(tmp_path, page_memory=20 * PAGE_BYTES)
    with pytest.raises(RequestError, match="tokenizer cannot be read"):
        engine.add(ask("r", PERSON))
    assert len(run(engine, [ask("s", None, max_tokens=3, ignore_eos=True)])["s"].token_ids) == 3
    engine.close()


def test_others_run_while_a_grammar_is_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def load_slowly(*arguments: Any) -> Any:
        gate.wait()
        return load_vocabulary(*arguments)

    monkeypatch.setattr("nsa_serve.engine.load_vocabulary", load_slowly)
    engine = make_engine(folder, page_memory=80 * PAGE_BYTES)
    engine.add(ask("slow", grammar.choice(["yes"], param="c")))
    engine.add(ask("aborted", PERSON))
    with pytest.raises(RequestError, match="in use"):
        engine.add(ask("slow", PERSON))
    other = EngineRequest(request_id="other", prompt_token_ids=[5], params=greedy(4))
    assert len(run_until_idle(engine, other)) == 4
    assert engine.has_unfinished
    engine.abort(["aborted", "unknown"])
    gate.set()
    result = Result()
    while engine.has_unfinished:
        for output in engine.step():
            assert output.request_id == "slow"
            result.add(output)
    assert result.finish_reason is FinishReason.STOP
    engine.close()


def run_until_idle(engine: Engine, request: EngineRequest) -> list[int]:
    engine.add(request)
    tokens: list[int] = []
    while engine.scheduler.has_unfinished:
        tokens += [token for output in engine.step() for token in output.token_ids]
    return tokens


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 9, 31, 32, 33, 111])
@pytest.mark.parametrize("rows", [[0], [0, 1, 2], [2, 0]])
def test_the_bitmask_is_applied_to_its_rows_alone(vocab_size: int, rows: list[int]) -> None:
    rng = np.random.default_rng(vocab_size)
    bits = rng.integers(0, 256, (len(rows), -(-vocab_size // 32) * 4), dtype=np.uint8)
    before = torch.randn(3, vocab_size)
    logits = before.clone()
    apply_bitmask(logits, rows, bits)
    excluded = excluded_tokens(torch.from_numpy(bits), vocab_size)
    assert torch.equal(logits[rows] == -torch.inf, excluded)
    for row in range(3):
        for token_id in range(vocab_size):
            is_kept = row not in rows or bits[rows.index(row), token_id // 8] >> token_id % 8 & 1
            want = before[row, token_id] if is_kept else -torch.inf
            assert logits[row, token_id] == want
