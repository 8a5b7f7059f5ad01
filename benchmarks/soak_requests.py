"""What the clients of the soak ask for, and what must be true of the answers."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]
CHOICES = ["yes", "no", "perhaps, on a Sunday"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
# Each is refused with a 4xx.
BAD_FIELDS: tuple[Body, ...] = (
    {"temperature": 5.0},
    {"top_p": 0.0},
    {"max_tokens": -1},
    {"logprobs": 99},
    {"prompt": ""},
    {"prompt": {"text": "no"}},
    {"model": "another"},
    {"structured_outputs": {"regex": "("}},
    {"logit_bias": {"-5": 1.0}},
    {"stop_token_ids": [10**9]},
    {"min_tokens": 9, "max_tokens": 3},
)


@dataclass
class Answer:
    """What came back: one text, finish reason and number of log-probabilities a choice.

    num_tokens: generated in all, from the usage.
    """

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    num_logprobs: dict[int, int] = field(default_factory=dict)
    num_tokens: int = 0

    def add(self, message: dict[str, Any]) -> None:
        """Take in a completion, or a chunk of one."""
        if message.get("usage"):
            self.num_tokens = message["usage"]["completion_tokens"]
        for choice in message["choices"]:
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            if choice["finish_reason"]:
                self.reasons[index] = choice["finish_reason"]
            if choice.get("logprobs"):
                count = len(choice["logprobs"]["token_logprobs"])
                self.num_logprobs[index] = self.num_logprobs.get(index, 0) + count


@dataclass(frozen=True)
class Ask:
    """A request. check: what is wrong with a whole answer, None for nothing. n: choices asked for.

    is_bad: must be refused. cancel_after: events after which the client goes away.
    """

    kind: str
    body: Body
    n: int = 1
    is_bad: bool = False
    cancel_after: int | None = None
    check: Callable[[Answer], str | None] = lambda answer: None


class Asks:
    """Draws requests: prompts of a model's own words, some of them with a beginning in common.

    max_prompt_tokens and max_output_tokens bound what one asks for.
    """

    def __init__(
        self, token_ids: list[int], seed: int, *, max_prompt_tokens: int, max_output_tokens: int
    ) -> None:
        self._token_ids = token_ids
        self._random = random.Random(seed)
        self._max_prompt_tokens = max_prompt_tokens
        self._max_output_tokens = max_output_tokens
        self._shared = [self._words(max_prompt_tokens // 2) for _ in range(4)]

    def draw(self) -> Ask:
        """Return the next request."""
        pick = self._random.random()
        if pick < 0.05:
            return self._bad()
        if pick < 0.15:
            return self._structured()
        body = self._body()
        if pick < 0.30:
            return self._cancelled(body)
        if pick < 0.45:
            return self._with_logprobs(body)
        if pick < 0.55:
            n = self._random.randint(2, 4)
            return Ask("n", {**body, "n": n, "temperature": 1.0}, n=n)
        return Ask("plain", body, check=self._length_check(body))

    def _words(self, count: int) -> list[int]:
        start = self._random.randrange(max(1, len(self._token_ids) - count))
        return self._token_ids[start : start + count]

    def _prompt(self) -> list[int]:
        # As many short ones as long ones.
        length = round(self._max_prompt_tokens ** self._random.random())
        if self._random.random() < 0.4:
            shared = self._random.choice(self._shared)
            return [*shared[:length], *self._words(self._random.randint(1, 9))]
        return self._words(length)

    def _body(self) -> Body:
        draw = self._random
        body: Body = {
            "prompt": self._prompt(),
            "max_tokens": draw.randint(1, self._max_output_tokens),
            "temperature": draw.choice((0.0, 0.0, 0.7, 1.0, 1.5)),
            "stream": draw.random() < 0.6,
            "priority": draw.randint(-1, 1),
            "ignore_eos": draw.random() < 0.5,
        }
        for name, values in (
            ("top_p", (0.5, 0.9)),
            ("top_k", (1, 20, 300)),
            ("min_p", (0.05,)),
            ("repetition_penalty", (1.1, 1.5)),
            ("presence_penalty", (0.5,)),
            ("frequency_penalty", (0.5, -0.2)),
            ("seed", (1, 2)),
            ("logit_bias", ({"5": 3.0},)),
            ("min_tokens", (1,)),
            ("stop", (["e"], ["\n", "the"])),
        ):
            if draw.random() < 0.15:
                body[name] = draw.choice(values)
        return body

    def _length_check(self, body: Body) -> Callable[[Answer], str | None]:
        def check(answer: Answer) -> str | None:
            want = body["max_tokens"]
            if answer.reasons.get(0) == "length" and "stop" not in body:
                return None if answer.num_tokens == want else f"{answer.num_tokens} of {want}"
            return None if answer.num_tokens <= want else f"{answer.num_tokens} of at most {want}"

        return check

    def _bad(self) -> Ask:
        body = {"prompt": "Hello", "max_tokens": 4, **self._random.choice(BAD_FIELDS)}
        return Ask("bad", body, is_bad=True)

    def _structured(self) -> Ask:
        body = {
            "prompt": self._prompt(),
            "max_tokens": 100,
            "stream": self._random.random() < 0.5,
            "temperature": self._random.choice((0.0, 1.0)),
        }
        if self._random.random() < 0.5:
            options = {"structured_outputs": {"choice": CHOICES}}
            return Ask("choice", {**body, **options}, check=_check_choice)
        return Ask("schema", {**body, "structured_outputs": {"json": SCHEMA}}, check=_check_schema)

    def _cancelled(self, body: Body) -> Ask:
        body = {**body, "stream": True, "max_tokens": self._max_output_tokens, "ignore_eos": True}
        body.pop("stop", None)
        return Ask("cancelled", body, cancel_after=self._random.randint(0, 12))

    def _with_logprobs(self, body: Body) -> Ask:
        def check(answer: Answer) -> str | None:
            found = answer.num_logprobs.get(0, 0)
            # Tokens of a stop string are not part of the text.
            if "stop" in body or found == answer.num_tokens:
                return None
            return f"{found} log-probabilities of {answer.num_tokens} tokens"

        return Ask("logprobs", {**body, "logprobs": self._random.randint(0, 5)}, check=check)


def _check_choice(answer: Answer) -> str | None:
    if answer.reasons.get(0) == "stop" and answer.texts[0] not in CHOICES:
        return f"{answer.texts[0]!r} is none of the choices"
    return None


def _check_schema(answer: Answer) -> str | None:
    if answer.reasons.get(0) != "stop":
        return None
    try:
        value = json.loads(answer.texts[0])
    except ValueError:
        return f"{answer.texts[0]!r} is no JSON"
    return None if set(value) == set(SCHEMA["required"]) else f"{value!r} does not fit"
