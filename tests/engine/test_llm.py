"""LLM over a fake engine: order, folding, failures that leave nothing behind; and `fold`."""

import pytest

from nsa_serve.errors import ConfigError, NSAServeError, RequestError
from nsa_serve.fold import fold, fold_by_index
from nsa_serve.llm import LLM
from nsa_serve.request import (
    EngineRequest,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from nsa_serve.request_check import sample_params

from .byte_tokenizer import make_byte_tokenizer
from .fake_engine import REFUSED_TOKEN, VOCAB_SIZE, FakeEngine

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def make_llm(engine: FakeEngine | None = None) -> LLM:
    return LLM.from_engine(engine or FakeEngine({}), make_byte_tokenizer(TEMPLATE))


def text_of(num_tokens: int) -> str:
    return "".join(chr(ord("a") + i % 26) for i in range(num_tokens))


def test_outputs_are_whole_and_in_the_order_of_the_prompts() -> None:
    llm = make_llm()
    lengths = [9, 2, 30, 1]
    outputs = llm.generate(
        ["one", "two", "three", "four"],
        [SamplingParams(max_tokens=length) for length in lengths],
        use_tqdm=False,
    )
    assert [output.text for output in outputs] == [text_of(length) for length in lengths]
    assert [output.num_output_tokens for output in outputs] == lengths
    prompts = [bytes(output.prompt_token_ids or []) for output in outputs]
    assert prompts == [b"one", b"two", b"three", b"four"]
    assert {output.finish_reason for output in outputs} == {FinishReason.LENGTH}


def test_every_kind_of_prompt() -> None:
    llm = make_llm()
    (one,) = llm.generate("text", use_tqdm=False)
    assert one.text == text_of(16) and one.num_prompt_tokens == 4
    ids = llm.generate([[1, 2], [3]], use_tqdm=False)
    assert [output.prompt_token_ids for output in ids] == [[1, 2], [3]]
    assert llm.generate([], use_tqdm=False) == []


def test_samples_follow_their_prompt() -> None:
    outputs = make_llm().generate(["a", "b"], SamplingParams(max_tokens=3), n=3, use_tqdm=False)
    assert [output.index for output in outputs] == [0, 1, 2, 0, 1, 2]
    assert [output.prompt_token_ids for output in outputs] == [[97]] * 3 + [[98]] * 3


def test_a_stop_string_ends_the_request_in_the_engine() -> None:
    engine = FakeEngine({})
    params = SamplingParams(max_tokens=400, stop=("fgh",))
    (output,) = make_llm(engine).generate("x", params, use_tqdm=False)
    assert (output.text, output.stop_reason) == ("abcde", "fgh")
    assert not engine.has_unfinished


def test_chat_applies_the_template() -> None:
    llm = make_llm()
    (output,) = llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
    assert bytes(output.prompt_token_ids or []) == b"<user>hi<assistant>"
    two = llm.chat([[{"role": "user", "content": c}] for c in "ab"], use_tqdm=False)
    assert [bytes(item.prompt_token_ids or [])[6:7] for item in two] == [b"a", b"b"]
    with pytest.raises(RequestError, match="mixture"):
        llm.chat([{"role": "user", "content": "a"}, [{"role": "user", "content": "b"}]])  # type: ignore[list-item]


def test_a_bad_prompt_is_named_and_nothing_runs() -> None:
    engine = FakeEngine({})
    llm = make_llm(engine)
    with pytest.raises(RequestError, match=f"prompt 1: .* token id {VOCAB_SIZE}"):
        llm.generate([[1], [VOCAB_SIZE]])
    with pytest.raises(RequestError, match="mixture"):
        llm.generate(["a", [1]])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="put it in a list"):
        llm.generate([1, 2])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="got 1 for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(RequestError, match="refuses"):
        llm.generate([[1], [REFUSED_TOKEN]])
    assert not engine.has_unfinished


class _FailingEngine(FakeEngine):
    """Fails the request whose prompt is [7] in its third step."""

    def step(self) -> list[TokenOutput]:
        outputs = super().step()
        if self.stats.num_steps_total == 3:
            doomed = next(
                item for item, _ in self._requests.values() if item.prompt_token_ids == [7]
            )
            return [
                TokenOutput(doomed.request_id, [], error="NaN", finish_reason=FinishReason.ERROR)
            ]
        return outputs


def test_a_request_that_fails_later_leaves_nothing_running() -> None:
    engine = _FailingEngine({})
    with pytest.raises(NSAServeError, match="prompt 1 failed: NaN"):
        make_llm(engine).generate([[6], [7], [8]], use_tqdm=False)
    engine.abort([item for item in engine._requests if item.startswith("1-")])
    assert not engine.has_unfinished


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_length"):
        LLM("a-model", max_model_length=4)


def test_samples_of_a_seeded_request_have_seeds_of_their_own() -> None:
    params = SamplingParams(seed=2**63 - 2, top_k=3)
    seeds = [sample_params(params, index).seed for index in range(4)]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63), -(2**63) + 1]
    assert sample_params(params, 3).top_k == 3
    assert sample_params(SamplingParams(), 3).seed is None
    request = EngineRequest(request_id="r", prompt_token_ids=[1], params=sample_params(params, 2))
    assert request.params.seed == -(2**63)


def make_output(index: int, text: str, **values: object) -> RequestOutput:
    defaults: dict[str, object] = {"token_ids": list(text.encode()), "num_output_tokens": 1}
    return RequestOutput(request_id="r", index=index, text=text, **(defaults | values))  # type: ignore[arg-type]


def test_fold_joins_what_is_new_and_keeps_what_is_last() -> None:
    logprob = TokenLogprobs(97, -1.0, 1, [])
    whole = fold(
        [
            make_output(1, "a", prompt_token_ids=[5], logprobs=[logprob], num_prompt_tokens=1),
            make_output(1, "", num_output_tokens=2),
            make_output(1, "bc", logprobs=[logprob], num_output_tokens=3,
                        num_prompt_tokens=1, finish_reason=FinishReason.STOP, stop_reason="x"),
        ]
    )  # fmt: skip
    assert whole == make_output(
        1,
        "abc",
        prompt_token_ids=[5],
        logprobs=[logprob, logprob],
        num_prompt_tokens=1,
        num_output_tokens=3,
        finish_reason=FinishReason.STOP,
        stop_reason="x",
    )


def test_fold_is_associative_and_fold_by_index_separates_samples() -> None:
    outputs = [make_output(i % 2, text, num_output_tokens=i) for i, text in enumerate("abcdefg")]
    evens, odds = outputs[::2], outputs[1::2]
    assert fold([fold(evens[:2]), *evens[2:]]) == fold(evens)
    assert fold_by_index(outputs) == [fold(evens), fold(odds)]
    assert fold(evens).logprobs is None
    with pytest.raises(ValueError, match="several"):
        fold(outputs)
    with pytest.raises(ValueError, match="none"):
        fold([])
