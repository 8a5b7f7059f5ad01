"""Synthetic retrieval at any length: codes hidden in a long text, and questions about them.

Each row hides one or more (name, code) pairs in a haystack and then asks for some of them, as a
chat or as plain text. The haystack is a cut of a book or filler sentences.

Kept apart from the evaluation (`benchmarks/quality_tasks.py`), which has phrasings, keys and
depths of its own; tests/train/test_data_retrieval.py holds it to this:

- codes here have 3, 4, 6, 7 or 8 digits, or two letters and 2 to 4 digits; the evaluation's have
  five digits (of lengths on one side only, or of few, a student learns the length);
- names here are a word and a two-digit number ("harbor-27"); the evaluation's are two words, and
  no word is in both lists;
- no sentence of the evaluation's needles, questions or fillers occurs here;
- nothing hides within MIN_DEPTH_DISTANCE of a depth in EVAL_DEPTHS, the evaluation's grid, where
  depth is (index of the first token of the needle) / (tokens of the row).

Books must be other books than the evaluation's: `data.py --skip` leaves those out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsa_serve.tokenizer import Tokenizer

EVAL_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Depths that the evaluation asks at, and training does not."""

MIN_DEPTH_DISTANCE = 0.01
FORM_WEIGHT = 0.1
"""Loss weight of an answer's other words: which of several forms it takes is chance."""

MAX_PAIRS = 8

KEY_WORDS = (
    "harbor", "meadow", "lantern", "copper", "willow", "anchor", "saddle", "kettle", "orchard",
    "pepper", "ribbon", "timber", "velvet", "walnut", "canyon", "bishop", "candle", "dagger",
    "engine", "fabric", "garden", "hammer", "island", "jacket", "ladder", "mirror", "needle",
    "oyster", "pillow", "quarry", "rocket", "spider", "temple", "valley", "window", "barrel",
)  # fmt: skip

NEEDLES = (
    "Note: the code for {name} is {code}.",
    "Please remember that {name} has the code {code}.",
    "({name} was given the number {code}.)",
    "For {name}, use {code}.",
    "In the ledger it says: {name} = {code}.",
    "The secret of {name} is {code}, nothing else.",
    "By the way, {code} is the code that belongs to {name}.",
    "Someone had written on the wall: {name}: {code}.",
    "Keep this in mind: whoever asks for {name} must say {code}.",
    "Entry {name} holds the value {code}.",
    "{name} is {code}; once more, {code}.",
    "Code {code} opens {name}, and only {code} does.",
)

PLAIN_QUESTIONS = (
    ("\n\nQuestion: What is the code for {name}?\nAnswer:", " {code}"),
    ("\n\nThe code for {name}, as stated above, is", " {code}"),
    ("\n\nQ: Which value does {name} have?\nA: It is", " {code}"),
    ("\n\n{name} =", " {code}"),
    ("\n\nAs the text said, {name} has the code", " {code}"),
)

CHAT_OPENINGS = (
    "Read the following text carefully. I will ask about it.\n\n",
    "Here is a long document:\n\n",
    "",
    "Below is a text with some codes in it.\n\n",
)

CHAT_QUESTIONS = (
    "What is the code for {name}?",
    "Which code belongs to {name}?",
    "Find the value of {name} in the text.",
    "Tell me the code that the text gives for {name}.",
    "According to the text, what is {name}?",
)

CHAT_ANSWERS = ("{code}", "The code for {name} is {code}.", "It is {code}.", "{name}: {code}")

FILLERS = (
    "The river was low that summer and the boats stayed at the pier. ",
    "He put the letters back into the drawer and locked it. ",
    "Rain had been falling since the early morning. ",
    "A cart went by, and then the street was quiet. ",
    "They spoke for a while about the price of corn. ",
    "Nobody had seen the dog since Tuesday. ",
    "The clock in the hall was always a little slow. ",
    "She walked as far as the mill and turned back. ",
    "There were apples on the table and a jug of water. ",
    "The road bends twice before it reaches the village. ",
)


@dataclass(frozen=True)
class Pair:
    """What is hidden: a name and its code."""

    name: str
    code: str


class RetrievalMaker:
    """Makes rows of an exact length.

    haystack: uint16 token ids of books, of which cuts are taken.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: NDArray[Any]) -> None:
        self._tokenizer = tokenizer
        self._haystack = haystack
        self._fillers = [np.array(self._encode(text)) for text in FILLERS]
        # Needles go after a token that ends a sentence or a line.
        ends = (".", "!", "?", "\n", '."')
        stops = [ids[0] for text in ends if len(ids := self._encode(text)) == 1]
        self._stops = np.array(stops)

    def make(
        self, length: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return ids int64 [T] and loss weights float32 [T].

        The weight is 1 on the codes of answers, FORM_WEIGHT on their other words, and 0 everywhere
        else.

        Raises ValueError for a length that has no room for a needle and a question (below 160).
        """
        if length < 160:
            raise ValueError(f"retrieval needs rows of at least 160 tokens, got {length}")
        most = int(np.clip(length // 256, 1, MAX_PAIRS))
        pairs = make_pairs(int(rng.integers(1, most + 1)), rng)
        needles = [self._needle(pair, rng) for pair in pairs]
        num_asked = int(rng.integers(1, len(pairs) + 1))
        asked = [pairs[i] for i in rng.permutation(len(pairs))[:num_asked]]
        is_chat = bool(rng.random() < 0.5)
        while True:
            head, tail, weights = self._frame(asked, rng, is_chat=is_chat)
            room = length - len(head) - len(tail) - sum(map(len, needles))
            if room >= length // 4 or len(asked) == 1:
                break
            asked = asked[:-1]
        body = self._hide(needles, room, len(head), length, rng)
        ids = np.concatenate((head, body, tail)).astype(np.int64)
        weight = np.zeros(length, dtype=np.float32)
        weight[length - len(tail) :] = weights
        return ids, weight

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _needle(self, pair: Pair, rng: np.random.Generator) -> NDArray[np.int64]:
        text = str(rng.choice(NEEDLES)).format(name=pair.name, code=pair.code)
        before = str(rng.choice((" ", "\n")))
        return np.array(self._encode(f"{before}{text}"))

    def _frame(
        self, asked: Sequence[Pair], rng: np.random.Generator, *, is_chat: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Return what goes before and after the haystack, and the loss weights of the latter."""
        parts = self._chat(asked, rng) if is_chat else _plain(asked, rng)
        head = np.array(self._encode(parts[0][0]), dtype=np.int64)
        ids: list[int] = []
        weights: list[float] = []
        for text, code in parts[1:]:
            tokens = self._encode(text)
            ids += tokens
            weights += self._weights(tokens, text, code)
        return head, np.array(ids, dtype=np.int64), np.array(weights, dtype=np.float32)

    def _weights(self, tokens: Sequence[int], text: str, code: str | None) -> list[float]:
        """Return 1 for tokens that have a part of the code in them, FORM_WEIGHT for others."""
        if code is None:
            return [0.0] * len(tokens)
        start = text.index(code)
        weights, position = [], 0
        for token in tokens:
            end = position + len(self._tokenizer.token_bytes(token))
            is_code = position < start + len(code) and end > start
            weights.append(1.0 if is_code else FORM_WEIGHT)
            position = end
        return weights

    def _chat(
        self, asked: Sequence[Pair], rng: np.random.Generator
    ) -> list[tuple[str, str | None]]:
        """Return the text before the haystack, and what follows as (text, code of an answer)."""
        mark = "\uf8ffhaystack\uf8ff"
        messages: list[dict[str, str]] = []
        parts: list[tuple[str, str | None]] = []
        shown = ""
        for index, pair in enumerate(asked):
            question = str(rng.choice(CHAT_QUESTIONS)).format(name=pair.name)
            answer = str(rng.choice(CHAT_ANSWERS)).format(name=pair.name, code=pair.code)
            opening = str(rng.choice(CHAT_OPENINGS)) + mark + "\n\n" if index == 0 else ""
            messages.append({"role": "user", "content": opening + question})
            before = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": answer})
            after = self._tokenizer.apply_chat_template(messages, add_generation_prompt=False)
            parts += [
                (before.removeprefix(shown), None),
                (after.removeprefix(before), pair.code),
            ]
            shown = after
        head, tail = parts[0][0].split(mark)
        return [(head, None), (tail, None), *parts[1:]]

    def _hide(
        self,
        needles: Sequence[NDArray[np.int64]],
        room: int,
        before: int,
        length: int,
        rng: np.random.Generator,
    ) -> NDArray[np.int64]:
        """Return `room` tokens of haystack with the needles at allowed depths in it."""
        hay = self._hay(room, rng)
        is_stop = np.isin(hay, self._stops)
        pieces, last, used = [], 0, before
        wanted = np.sort(rng.uniform(0.0, 1.0, len(needles))) * room
        for needle, want in zip(needles, wanted, strict=True):
            # Places of the haystack in front of which this needle may be.
            places = np.arange(last, room + 1)
            depths = (places - last + used) / length
            allowed = np.all(
                np.abs(depths[:, None] - np.array(EVAL_DEPTHS)) > MIN_DEPTH_DISTANCE, axis=1
            )
            after_stop = np.concatenate(([True], is_stop))[last:]
            good = places[allowed & after_stop] if (allowed & after_stop).any() else places[allowed]
            place = int(good[np.argmin(np.abs(good - want))]) if len(good) else None
            if place is None:
                raise ValueError(f"no place is left for a needle in a row of {length} tokens")
            pieces += [hay[last:place], needle]
            used += place - last + len(needle)
            last = place
        return np.concatenate((*pieces, hay[last:]))

    def _hay(self, room: int, rng: np.random.Generator) -> NDArray[np.int64]:
        if rng.random() < 0.75 and len(self._haystack) > room:
            start = int(rng.integers(len(self._haystack) - room + 1))
            return self._haystack[start : start + room].astype(np.int64)
        parts: list[NDArray[np.int64]] = []
        total = 0
        while total < room:
            parts.append(self._fillers[int(rng.integers(len(self._fillers)))])
            total += len(parts[-1])
        return np.concatenate(parts)[:room]


def make_pairs(count: int, rng: np.random.Generator) -> list[Pair]:
    """Return pairs with different names."""
    words = rng.permutation(len(KEY_WORDS))[:count]
    return [
        Pair(f"{KEY_WORDS[i]}-{int(rng.integers(10, 100))}", make_code(rng)) for i in words.tolist()
    ]


def make_code(rng: np.random.Generator) -> str:
    """Return a code of 3, 4, 6, 7 or 8 digits, or of letters and digits; never five digits."""
    kind = int(rng.integers(6))
    if kind == 5:
        letters = "".join(rng.choice(list("ABCDEFGHJKLMNPRSTUVWXYZ"), 2).tolist())
        return f"{letters}{_digits(int(rng.integers(2, 5)), rng)}"
    return _digits((3, 4, 6, 7, 8)[kind], rng)


def _digits(count: int, rng: np.random.Generator) -> str:
    return str(int(rng.integers(10 ** (count - 1), 10**count)))


def _plain(asked: Sequence[Pair], rng: np.random.Generator) -> list[tuple[str, str | None]]:
    parts: list[tuple[str, str | None]] = [("", None)]
    for pair in asked:
        question, answer = PLAIN_QUESTIONS[int(rng.integers(len(PLAIN_QUESTIONS)))]
        parts.append((question.format(name=pair.name), None))
        parts.append((answer.format(code=pair.code), pair.code))
    return parts
