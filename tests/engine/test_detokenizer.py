"""Streams equal the whole: text in pieces, and stop strings however the text is cut."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_serve.detokenizer import IncrementalDetokenizer, StopStrings
from nsa_serve.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import TEXTS, tokenizer_of

KINDS = ["byte_level", "llama", "metaspace"]


def _stream(
    tokenizer: Tokenizer, ids: list[int], rng: random.Random, *, skip: bool, max_push: int = 3
) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    text, i = "", 0
    while i < len(ids):
        num_tokens = rng.randint(0, max_push)
        text += detokenizer.push(ids[i : i + num_tokens])
        i += num_tokens
    return text + detokenizer.finish()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_a_stream_of_text_is_its_decoding(kind: str, skip: bool) -> None:
    tokenizer, rng = tokenizer_of(kind), random.Random(1)
    for text in [*TEXTS, "</s>".join(TEXTS), "<s>the fox</s>"]:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert _stream(tokenizer, ids, rng, skip=skip) == tokenizer.decode(
            ids, skip_special_tokens=skip
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_a_stream_of_random_ids_is_their_decoding(kind: str, skip: bool) -> None:
    tokenizer, rng = tokenizer_of(kind), random.Random(2)
    # Two ids beyond the tokenizer's: a model's vocabulary may be padded.
    for length in (0, 1, 2, 3, 64, 111, 400):
        ids = [rng.randrange(tokenizer.vocab_size + 2) for _ in range(length)]
        assert _stream(tokenizer, ids, rng, skip=skip) == tokenizer.decode(
            ids, skip_special_tokens=skip
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_is_held_until_it_is_whole(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = [_byte_id(tokenizer, byte) for byte in "🦊é".encode()]
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "🦊", "", "é"]
    assert detokenizer.finish() == ""


def test_an_unfinished_character_is_flushed_at_the_end() -> None:
    tokenizer = tokenizer_of("byte_level")
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
    assert detokenizer.push([_byte_id(tokenizer, 0xF0), _byte_id(tokenizer, 0x9F)]) == ""
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_lone_lead_bytes_do_not_pile_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(kind)
    lead = _byte_id(tokenizer, 0xF0)
    table, num_looked_up = tokenizer.byte_table, 0
    get = table.get

    def counting_get(token_id: int) -> bytes:
        nonlocal num_looked_up
        num_looked_up += 1
        return get(token_id)

    monkeypatch.setattr(table, "get", counting_get)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
    # Every push emits the one before it: nothing is kept to be decoded again.
    pieces = [detokenizer.push([lead]) for _ in range(8000)]
    assert pieces == ["", *["\ufffd"] * 7999]
    assert num_looked_up == 8000
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_the_first_space_stays_when_text_stands_before_it(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("fox", add_special_tokens=False)
    for prompt, skip, expected in [
        ([], True, "fox"),
        ([1], True, "fox"),
        ([1, *ids], True, " fox"),
        ([1], False, " fox"),
    ]:
        detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip, prompt_token_ids=prompt
        )
        assert detokenizer.push([]) + detokenizer.push(ids) + detokenizer.finish() == expected


def _byte_id(tokenizer: Tokenizer, byte: int) -> int:
    ids = range(tokenizer.vocab_size)
    return next(i for i in ids if tokenizer.token_bytes(i) == bytes([byte]))


def _find(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Return the start and text of the match that ends first, the longest of those."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


def _run(stops: list[str], pieces: list[str], *, include: bool) -> tuple[list[str], str | None]:
    search = StopStrings(stops, include)
    shown = []
    for piece in pieces:
        text, matched = search.push(piece)
        shown.append(text)
        if matched is not None:
            return shown, matched
    return [*shown, search.finish()], None


_letters = st.text(alphabet="ab<é", max_size=40)
_stops = st.lists(st.text(alphabet="ab<é", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=_letters, stops=_stops, cuts=st.lists(st.integers(0, 40)), include=st.booleans())
def test_stop_strings_equal_a_search_of_the_whole_text(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[i:j] for i, j in pairwise(bounds)]
    shown, matched = _run(stops, pieces, include=include)
    expected = _find(text, stops)
    if expected is None:
        assert (matched, "".join(shown)) == (None, text)
        return
    start, stop = expected
    assert (matched, "".join(shown)) == (stop, text[:start] + (stop if include else ""))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=_letters, stops=_stops)
def test_text_is_held_only_while_it_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    search, num_shown = StopStrings(stops, False), 0
    for i, char in enumerate(text):
        piece, matched = search.push(char)
        if matched is not None:
            return
        num_shown += len(piece)
        tails = (text[start : i + 1] for start in range(i + 1))
        may_begin = (tail for tail in tails if any(stop.startswith(tail) for stop in stops))
        assert i + 1 - num_shown == len(next(may_begin, ""))


def test_a_prefix_that_comes_to_nothing_is_shown_at_once() -> None:
    shown, matched = _run(["</think>"], ["a</th", "e ", "<", "/think"], include=False)
    assert (shown, matched) == (["a", "</the ", "", "", "</think"], None)


def test_without_stop_strings_text_passes_through() -> None:
    assert _run([], ["a", "", "b"], include=False) == (["a", "", "b", ""], None)
