"""OutputProcessor: no token and no text is lost, and a stop string ends the request."""

import random
from collections.abc import Sequence

import pytest

from nsa_serve.output import OutputProcessor
from nsa_serve.request import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from nsa_serve.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import TEXTS, tokenizer_of

PROMPT = [5, 6, 7]
EOS = 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of("byte_level")


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte, so that a test knows where each falls."""
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [single[bytes([byte])] for byte in text.encode()]


def _run(
    tokenizer: Tokenizer,
    pieces: Sequence[TokenOutput],
    params: SamplingParams,
) -> tuple[list[RequestOutput], list[bool]]:
    processor = OutputProcessor(tokenizer)
    processor.add("r", index=0, prompt_token_ids=PROMPT, params=params)
    results = [processor.process(piece) for piece in pieces]
    assert processor.num_requests == int(
        not any(r.output and r.output.finish_reason for r in results)
    )
    return [r.output for r in results if r.output is not None], [r.needs_abort for r in results]


def _tokens(ids: list[int], finish: FinishReason | None = FinishReason.LENGTH) -> list[TokenOutput]:
    """One output a token, the last of them with the finish reason."""
    return [
        TokenOutput("r", [token_id], finish_reason=finish if i == len(ids) - 1 else None)
        for i, token_id in enumerate(ids)
    ]


def _text(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


@pytest.mark.parametrize("skip", [True, False])
def test_deltas_add_up_to_the_whole(tokenizer: Tokenizer, skip: bool) -> None:
    rng = random.Random(5)
    for text in TEXTS:
        ids = [*tokenizer.encode(text, add_special_tokens=False), 1, 0]
        logprobs = [TokenLogprobs(i, -0.5, 1, []) for i in ids]
        params = SamplingParams(max_tokens=None, skip_special_tokens=skip, logprobs=0)
        pieces, i = [], 0
        while i < len(ids):
            j = i + rng.randint(1, 3)
            finish = FinishReason.LENGTH if j >= len(ids) else None
            pieces.append(TokenOutput("r", ids[i:j], logprobs[i:j], finish_reason=finish))
            i = j
        outputs, _ = _run(tokenizer, pieces, params)
        assert _text(outputs) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert [i for output in outputs for i in output.token_ids] == ids
        assert [p for output in outputs for p in output.logprobs or ()] == logprobs
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_tokens_without_text_come_with_the_next_output(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "a🦊b")
    outputs, _ = _run(tokenizer, _tokens(ids), SamplingParams())
    assert [(output.text, output.token_ids) for output in outputs] == [
        ("a", ids[:1]),
        ("🦊", ids[1:5]),
        ("b", ids[5:]),
    ]
    assert [output.num_output_tokens for output in outputs] == [1, 5, 6]


def test_the_first_output_carries_the_prompt(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "éx")
    prompt_logprobs = [TokenLogprobs(6, -1.0, 2, []), TokenLogprobs(7, -2.0, 3, [])]
    pieces = [
        TokenOutput("r", ids[:1], prompt_logprobs=prompt_logprobs, num_prefix_hit_tokens=2),
        TokenOutput("r", ids[1:2]),
        TokenOutput("r", ids[2:], finish_reason=FinishReason.LENGTH),
    ]
    outputs, _ = _run(tokenizer, pieces, SamplingParams(prompt_logprobs=0))
    assert outputs[0].prompt_token_ids == PROMPT
    assert outputs[0].prompt_logprobs == prompt_logprobs
    assert (outputs[1].prompt_token_ids, outputs[1].prompt_logprobs) == (None, None)
    assert {output.num_prompt_tokens for output in outputs} == {3}
    assert {output.num_prefix_hit_tokens for output in outputs} == {2}


@pytest.mark.parametrize("num_at_once", [1, 2, 20])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_and_asks_for_an_abort(
    tokenizer: Tokenizer, num_at_once: int, include: bool
) -> None:
    ids = _ids(tokenizer, "one, END two")
    pieces = [TokenOutput("r", ids[i : i + num_at_once]) for i in range(0, len(ids), num_at_once)]
    params = SamplingParams(stop=("END", "two"), include_stop_str_in_output=include)
    outputs, aborts = _run(tokenizer, pieces, params)
    assert _text(outputs) == ("one, END" if include else "one, ")
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, "END")
    # Tokens stay as they were generated; what comes after the end is dropped.
    num_seen = -(-8 // num_at_once) * num_at_once
    assert [i for output in outputs for i in output.token_ids] == ids[:num_seen]
    assert aborts.count(True) == 1


def test_a_stop_string_in_the_last_tokens_needs_no_abort(tokenizer: Tokenizer) -> None:
    outputs, aborts = _run(
        tokenizer, _tokens(_ids(tokenizer, "xEND")), SamplingParams(stop=("END",))
    )
    assert _text(outputs) == "x"
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, "END")
    assert aborts == [False] * 4


def test_a_held_prefix_of_a_stop_string_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    outputs, _ = _run(tokenizer, _tokens(_ids(tokenizer, "xEN")), SamplingParams(stop=("END",)))
    assert [output.text for output in outputs] == ["x", "EN"]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    outputs, _ = _run(tokenizer, _tokens(_ids(tokenizer, "🦊")[:3]), SamplingParams())
    assert [output.text for output in outputs] == ["\ufffd"]


@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, ""), (2, "--A"), (3, "--A"), (4, "--A-"), (5, "--A--")]
)
@pytest.mark.parametrize("num_at_once", [1, 3, 20])
def test_no_stop_string_matches_within_min_tokens(
    tokenizer: Tokenizer, min_tokens: int, expected: str, num_at_once: int
) -> None:
    ids = _ids(tokenizer, "--A----")
    pieces = [TokenOutput("r", ids[i : i + num_at_once]) for i in range(0, len(ids), num_at_once)]
    params = SamplingParams(min_tokens=min_tokens, stop=("--",))
    outputs, _ = _run(tokenizer, pieces, params)
    assert _text(outputs) == expected
    assert outputs[-1].stop_reason == "--"


@pytest.mark.parametrize(
    ("include", "skip", "expected"),
    [(False, True, "ab"), (False, False, "ab"), (True, True, "ab"), (True, False, "ab</s>")],
)
def test_the_text_of_eos(tokenizer: Tokenizer, include: bool, skip: bool, expected: str) -> None:
    params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=skip)
    ids = [*_ids(tokenizer, "ab"), EOS]
    outputs, _ = _run(tokenizer, _tokens(ids, FinishReason.STOP), params)
    assert _text(outputs) == expected
    assert [i for output in outputs for i in output.token_ids] == ids
    assert outputs[-1].num_output_tokens == 3


@pytest.mark.parametrize(("include", "expected"), [(False, "a"), (True, "ab")])
def test_the_text_of_a_stop_token(tokenizer: Tokenizer, include: bool, expected: str) -> None:
    ids = _ids(tokenizer, "ab")
    params = SamplingParams(stop_token_ids=(ids[1],), include_stop_str_in_output=include)
    pieces = [
        TokenOutput("r", ids, finish_reason=FinishReason.STOP, stop_reason=ids[1]),
    ]
    outputs, aborts = _run(tokenizer, pieces, params)
    assert [(o.text, o.token_ids, o.stop_reason) for o in outputs] == [(expected, ids, ids[1])]
    assert aborts == [False]


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR, FinishReason.LENGTH])
def test_an_end_without_tokens_is_reported(tokenizer: Tokenizer, reason: FinishReason) -> None:
    ids = _ids(tokenizer, "aE")
    pieces = [TokenOutput("r", ids), TokenOutput("r", [], finish_reason=reason, error="why")]
    outputs, _ = _run(tokenizer, pieces, SamplingParams(stop=("END",)))
    assert [(o.text, o.finish_reason) for o in outputs] == [("a", None), ("E", reason)]


def test_requests_do_not_mix(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    fox = _ids(tokenizer, "🦊")
    for i in range(2):
        processor.add(
            f"r-{i}",
            index=i,
            prompt_token_ids=PROMPT,
            params=SamplingParams(),
            output_request_id="r",
        )
    for token_id in fox[:3]:
        assert processor.process(TokenOutput("r-0", [token_id])) == (None, False)
    output = processor.process(TokenOutput("r-1", _ids(tokenizer, "a"))).output
    assert output is not None and (output.request_id, output.index, output.text) == ("r", 1, "a")
    output = processor.process(TokenOutput("r-0", fox[3:])).output
    assert output is not None and (output.request_id, output.index, output.text) == ("r", 0, "🦊")
    assert processor.num_requests == 2


def test_an_aborted_request_is_forgotten(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    processor.add("r", index=0, prompt_token_ids=PROMPT, params=SamplingParams())
    with pytest.raises(ValueError, match="'r' is in use"):
        processor.add("r", index=0, prompt_token_ids=PROMPT, params=SamplingParams())
    processor.abort("r")
    assert processor.num_requests == 0
    assert processor.process(TokenOutput("r", PROMPT)) == (None, False)
    processor.abort("r")
    processor.add("r", index=0, prompt_token_ids=PROMPT, params=SamplingParams())
    assert processor.num_requests == 1
