"""Retrieval rows, and that nothing of the evaluation is in them."""

import re

import chat
import numpy as np
import pytest
import quality_tasks
import retrieval
from retrieval import EVAL_DEPTHS, MIN_DEPTH_DISTANCE, RetrievalMaker

from nsa_serve.config import EngineConfig
from nsa_serve.model_source import load_tokenizer
from nsa_serve.tokenizer import Tokenizer

PROSE = "The old man went to the sea. He said nothing! And why should he?\nNobody asked him. " * 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(EngineConfig())


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer) -> RetrievalMaker:
    ids = tokenizer.encode(PROSE, add_special_tokens=False)
    return RetrievalMaker(tokenizer, np.array(ids, dtype=np.uint16))


def _rows(maker: RetrievalMaker, count: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(3)
    lengths = rng.integers(160, 2300, count).tolist()
    return [(length, *maker.make(length, rng)) for length in lengths]


def test_answers_are_in_the_text_before_them(maker: RetrievalMaker, tokenizer: Tokenizer) -> None:
    for length, ids, weight in _rows(maker, 60):
        assert ids.shape == weight.shape == (length,)
        is_code = weight == 1
        starts = np.flatnonzero(is_code & ~np.roll(is_code, 1))
        assert len(starts)
        for start in starts:
            end = start + int(np.argmin(np.append(is_code[start:], False)))
            code = tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False).strip(" .")
            before = tokenizer.decode(ids[:start].tolist(), skip_special_tokens=False)
            assert re.fullmatch(r"[A-Z0-9]{3,8}", code) and code in before


def test_no_code_is_like_the_evaluations() -> None:
    rng = np.random.default_rng(5)
    codes = [retrieval.make_code(rng) for _ in range(3000)]
    assert not any(re.fullmatch(r"\d{5}", code) for code in codes)
    assert len({len(code) for code in codes}) > 2


def test_no_needle_is_at_a_depth_of_the_evaluation(
    maker: RetrievalMaker, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    assert EVAL_DEPTHS == quality_tasks.DEPTHS
    # A token that no text has marks where needles begin.
    mark = 0
    monkeypatch.setattr(
        RetrievalMaker, "_needle", lambda *_: np.array([mark, 260, 261], dtype=np.int64)
    )
    found = []
    for length, ids, _ in _rows(maker, 200):
        found += (np.flatnonzero(ids == mark) / length).tolist()
    distance = np.abs(np.array(found)[:, None] - np.array(EVAL_DEPTHS)).min(axis=1)
    assert len(found) > 300 and distance.min() > MIN_DEPTH_DISTANCE
    assert min(found) < 0.1 and max(found) > 0.85


def test_no_words_are_shared_with_the_evaluation(
    maker: RetrievalMaker, tokenizer: Tokenizer
) -> None:
    evaluation = (quality_tasks.FILLER, quality_tasks.PASSKEY_INTRO, quality_tasks.PASSKEY_NEEDLE,
                  quality_tasks.PASSKEY_QUESTION, quality_tasks.PAIRS_INTRO,
                  quality_tasks.PAIRS_NEEDLE, quality_tasks.PAIRS_QUESTION)  # fmt: skip
    words = {*quality_tasks.FIRST_WORDS, *quality_tasks.SECOND_WORDS}
    assert not words & {*retrieval.KEY_WORDS}
    fragments = {
        part.strip().lower()
        for text in evaluation
        for part in re.split(r"[.?\n]|\{\w+\}", text)
        if len(part.split()) >= 3
    }
    assert len(fragments) >= 10
    for _, ids, _ in _rows(maker, 150):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False).lower()
        assert not [fragment for fragment in fragments if fragment in text]
        assert not [word for word in words if f" {word} " in text]


def test_no_chat_prompt_is_the_evaluations() -> None:
    def plain(text: str) -> str:
        return re.sub(r"\W+", " ", text.lower()).strip()

    training = {plain(text) for text in chat.make_prompts(5000, seed=1)}
    assert len(training) >= 600 and len(set(quality_tasks.CHAT_PROMPTS)) == 20
    assert not training & set(map(plain, quality_tasks.CHAT_PROMPTS))


def test_evaluation_prompts_are_exact(tokenizer: Tokenizer) -> None:
    books = [tokenizer.encode(PROSE, add_special_tokens=False)]
    for kind in ("passkey", "pairs"):
        items = quality_tasks.make_retrievals(
            kind, tokenizer, books, length=400, num_samples=2, seed=2
        )
        assert [item.depth for item in items] == [d for d in quality_tasks.DEPTHS for _ in range(2)]
        for item in items:
            text = tokenizer.decode(item.prompt, skip_special_tokens=False)
            assert len(item.prompt) == 400 and item.code in text
            assert quality_tasks.is_right(f" {item.code}. Remember", item.code)
            place = len(tokenizer.encode(text[: text.index(item.code)], add_special_tokens=False))
            assert abs(place / 400 - item.depth) < 0.08
    assert not quality_tasks.is_right("12345", "1234")


def test_spans_end_in_the_same_targets_at_every_context() -> None:
    books = [list(range(1000 * i, 1000 * i + 700)) for i in range(3)]
    spans = quality_tasks.make_spans(books, num_spans=5, num_targets=9, longest=300, seed=1)
    assert all(len(span) == 300 for span in spans)
    assert len({span[0] // 1000 for span in spans}) == 3
