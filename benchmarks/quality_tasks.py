"""What `quality.py` asks of every model: token ids and right answers, from held-out books.

Phrasings, key formats and depths are the evaluation's own: examples/train_nsa/retrieval.py says how
its training rows are kept apart, and a test holds it to that. All of it is made by seeds, so every
model gets the same ids.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nsa_serve.tokenizer import Tokenizer

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
PASSKEY_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
PASSKEY_NEEDLE = " The pass key is {code}. Remember it. {code} is the pass key. "
PASSKEY_QUESTION = "\n\nWhat is the pass key? The pass key is"
PAIRS_INTRO = "Some lines of the text below store a value under two words.\n\n"
PAIRS_NEEDLE = "\nThe value stored under {key} is {code}.\n"
PAIRS_QUESTION = "\n\nWhich value is stored under {key}? The value stored under {key} is"
FIRST_WORDS = ("amber", "silent", "golden", "narrow", "frozen", "purple", "ancient", "hollow")
SECOND_WORDS = ("falcon", "cedar", "comet", "marble", "tiger", "violin", "glacier", "thistle")
NUM_PAIRS = 4

CHAT_PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write a haiku about autumn.",
    "What is the difference between a frog and a toad?",
    "Name three uses of a paper clip.",
    "Tell me a joke about a cat.",
    "What should I pack for a weekend in the mountains?",
    "Translate into plain words: 'The meeting is postponed until further notice.'",
    "Who wrote Romeo and Juliet, and what is it about?",
    "How many legs does a spider have?",
    "Give me a recipe for pancakes.",
    "What does a carpenter do?",
    "Describe a thunderstorm in three sentences.",
    "How can I remember people's names better?",
    "What is the largest planet in the solar system?",
    "Write a thank-you note to a teacher.",
    "Explain what a library is for.",
    "What are the four seasons and what happens in each?",
    "Suggest a name for a small bakery, and say why it fits.",
)


@dataclass(frozen=True)
class Retrieval:
    """One question: its prompt, the code to find, and where it lies."""

    prompt: list[int]
    code: str
    depth: float


@dataclass(frozen=True)
class Cloze:
    """A passage without its last word, and four words as ids; the first is the right one."""

    prompt: list[int]
    choices: list[list[int]]


def make_spans(
    books: Sequence[Sequence[int]], *, num_spans: int, num_targets: int, longest: int, seed: int
) -> list[list[int]]:
    """Return spans of `longest` tokens, as evenly over the books as they allow.

    The last num_targets tokens of a span are scored. A context of C tokens is the span's last C,
    so that every model and every context predicts the same tokens. Raises SystemExit when no book
    is long enough.
    """
    long_books = [book for book in books if len(book) >= longest]
    if not long_books:
        raise SystemExit(f"no held-out book has {longest} tokens; use shorter contexts")
    rng = np.random.default_rng(seed)
    spans = []
    for index in range(num_spans):
        book = long_books[index % len(long_books)]
        end = int(rng.integers(longest, len(book) + 1))
        spans.append(list(book[end - longest : end]))
    return spans


def make_retrievals(
    kind: str,
    tokenizer: Tokenizer,
    books: Sequence[Sequence[int]],
    *,
    length: int,
    num_samples: int,
    seed: int,
) -> list[Retrieval]:
    """Return num_samples questions a depth; a prompt has `length` tokens.

    kind: "passkey" or "pairs". Every other haystack is a held-out book, the others are filler.
    """
    found = []
    for depth in DEPTHS:
        for sample in range(num_samples):
            rng = np.random.default_rng((seed, length, round(100 * depth), sample))
            book = books[int(rng.integers(len(books)))] if sample % 2 == 0 else None
            found.append(_make_retrieval(kind, tokenizer, book, length, depth, rng))
    return found


def _make_retrieval(
    kind: str,
    tokenizer: Tokenizer,
    book: Sequence[int] | None,
    length: int,
    depth: float,
    rng: np.random.Generator,
) -> Retrieval:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    codes = [str(code) for code in rng.choice(90000, NUM_PAIRS, replace=False) + 10000]
    others: list[tuple[float, list[int]]] = []
    if kind == "passkey":
        intro, question = encode(PASSKEY_INTRO), encode(PASSKEY_QUESTION)
        needle = encode(PASSKEY_NEEDLE.format(code=codes[0]))
    else:
        keys = [
            f"{FIRST_WORDS[a]} {SECOND_WORDS[b]}"
            for a, b in zip(
                rng.permutation(len(FIRST_WORDS)), rng.permutation(len(SECOND_WORDS)), strict=True
            )
        ]
        lines = [
            encode(PAIRS_NEEDLE.format(key=key, code=code))
            for key, code in zip(keys, codes, strict=False)
        ]
        intro, question = encode(PAIRS_INTRO), encode(PAIRS_QUESTION.format(key=keys[0]))
        needle = lines[0]
        others = [(float(rng.random()), line) for line in lines[1:]]
    needles = sorted([(depth, needle), *others], key=lambda item: item[0])
    room = length - len(intro) - len(question) - sum(len(ids) for _, ids in needles)
    if room < 0:
        raise SystemExit(f"a {kind} prompt needs more than {length} tokens")
    if book is None:
        filler = encode(FILLER)
        hay = (filler * (room // len(filler) + 1))[:room]
    else:
        start = int(rng.integers(max(1, len(book) - room + 1)))
        hay = list(book[start : start + room])
    body = list(intro)
    last = 0
    for place, ids in needles:
        # So that the needle's first token is at `depth` of the prompt.
        want = min(max(round(place * length) - len(body) + last, last), len(hay))
        body += hay[last:want] + ids
        last = want
    return Retrieval([*body, *hay[last:], *question], codes[0], depth)


def is_right(answer: str, code: str) -> bool:
    """True when the first number of the answer is the code."""
    number = re.search(r"\d+", answer)
    return number is not None and number.group() == code


def make_cloze(
    tokenizer: Tokenizer, texts: Sequence[str], *, count: int, context_words: int, seed: int
) -> list[Cloze]:
    """Return passages whose last word, the end of a sentence, is to be chosen among four.

    The wrong words end other sentences of the same book and are about as long.
    """
    rng = np.random.default_rng(seed)
    items: list[Cloze] = []
    per_book = -(-count // len(texts))
    for text in texts:
        words = re.findall(r"\S+", text)
        ends = [
            index
            for index, word in enumerate(words)
            if index >= context_words and re.fullmatch(r"[a-z]{4,}[.!?]", word)
        ]
        for index in rng.permutation(ends)[:per_book].tolist():
            right = words[index][:-1]
            pool = sorted({words[other][:-1] for other in ends} - {right})
            pool.sort(key=lambda word: abs(len(word) - len(right)))
            wrong = rng.choice(pool[:40], 3, replace=False).tolist() if len(pool) >= 3 else []
            if len(wrong) < 3 or len(items) == count:
                continue
            passage = " ".join(words[index - context_words : index])
            prompt = tokenizer.encode(passage, add_special_tokens=False)
            choices = [
                tokenizer.encode(f" {word}", add_special_tokens=False) for word in (right, *wrong)
            ]
            items.append(Cloze(prompt, choices))
    return items
