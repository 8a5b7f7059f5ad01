"""One request, from arrival to its last token. Plain Python: no torch, no web framework.

`SamplingParams`, `EngineRequest` and the `*Output` structs cross the process boundary as
msgpack; `Request` is the engine's own mutable state of one request.
"""

import enum
import math
import random
import time
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from nsa_serve.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_TRACED_TOKENS = 512
MAX_TRACED_LAYERS = 64
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 1024

StructuredKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]


class FinishReason(enum.StrEnum):
    """Why a request ended; the values are those of the OpenAI API (and vLLM's `abort`, `error`)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(enum.Enum):
    """WAITING -> RUNNING -> FINISHED, and RUNNING -> WAITING when preempted."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class StructuredOutput(msgspec.Struct, frozen=True):
    """What the output must match.

    kind: "json_object" (value is not looked at), "json_schema" (value: the schema as JSON text),
    "regex", "choice" (value: a JSON list of strings) or "grammar" (value: Lark).
    """

    kind: StructuredKind
    value: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens, and when to stop. Ranges and meanings are those of vLLM.

    temperature: 0 is greedy. top_k: 0 or -1 is off. top_p in (0, 1], min_p in [0, 1].
    max_tokens: None fills the context. seed: same seed, same prompt, same tokens.
    logprobs: None, or how many of the likeliest tokens to report beside the chosen one (0..20).
    prompt_logprobs: the same for every prompt token after the first.
    stop: strings that end the text; they are not part of the output unless
    include_stop_str_in_output. stop_token_ids: ids that end it.
    allowed_token_ids: the only ids that may be sampled, None = all. bad_words: sequences of ids
    that must not be completed. structured: what the output must match.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 0, None)
        _check_int("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_int("top_k", self.top_k, -1, None)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_logprobs("logprobs", self.logprobs)
        _check_logprobs("prompt_logprobs", self.prompt_logprobs)
        _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_stop(self.stop)
        if self.logit_bias is not None:
            if len(self.logit_bias) > MAX_LOGIT_BIAS:
                raise RequestError(
                    f"logit_bias has {len(self.logit_bias)} entries; "
                    f"at most {MAX_LOGIT_BIAS} are allowed",
                    param="logit_bias",
                )
            for token_id, bias in self.logit_bias.items():
                _check_float(f"logit_bias[{token_id}]", bias, -100.0, 100.0, param="logit_bias")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids must name at least one token id", param="allowed_token_ids"
            )
        _check_bad_words(self.bad_words)

    @property
    def is_greedy(self) -> bool:
        """True when the likeliest token is taken and no random number is drawn."""
        return self.temperature == 0.0

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise RequestError when a token id named by the request is outside the vocabulary."""
        allowed = self.allowed_token_ids or ()
        if len(allowed) > vocab_size:
            raise RequestError(
                f"allowed_token_ids has {len(allowed)} ids, more than the {vocab_size} tokens of "
                "the vocabulary; name each id once",
                param="allowed_token_ids",
            )
        named = (
            ("logit_bias", self.logit_bias or ()),
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", allowed),
            *(("bad_words", word) for word in self.bad_words),
        )
        for param, ids in named:
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{param} names token id {token_id}, which is outside the vocabulary "
                        f"of {vocab_size} tokens",
                        param=param,
                    )


def _check_int(name: str, value: int | None, low: int | None, high: int | None) -> None:
    if value is None:
        return
    if (low is not None and value < low) or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} must be {bound}, got {value}", param=name)


def _check_logprobs(name: str, value: int | None) -> None:
    if value == -1:
        raise RequestError(
            f"{name} -1, the whole vocabulary, is not supported; ask for at most {MAX_LOGPROBS}",
            param=name,
        )
    _check_int(name, value, 0, MAX_LOGPROBS)


def _check_bad_words(bad_words: Sequence[Sequence[int]]) -> None:
    # A word is tokenized in two ways: as it starts a text, and after a space.
    if len(bad_words) > 2 * MAX_BAD_WORDS:
        raise RequestError(
            f"bad_words has {len(bad_words)} sequences of tokens; at most {2 * MAX_BAD_WORDS} "
            "are allowed",
            param="bad_words",
        )
    if not all(bad_words):
        raise RequestError("bad_words must not contain an empty sequence", param="bad_words")


def _check_float(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    above: bool = False,
    param: str | None = None,
) -> None:
    if not math.isfinite(value) or value < low or value > high or (above and value == low):
        bound = f"{'above' if above else 'from'} {low:g}"
        bound += " and finite" if high == math.inf else f" to {high:g}"
        raise RequestError(f"{name} must be {bound}, got {value}", param=param or name)


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed", param="stop"
        )
    for text in stop:
        if not text:
            raise RequestError("stop must not contain an empty string", param="stop")
        if len(text) > MAX_STOP_CHARS:
            raise RequestError(
                f"a stop string has {len(text)} characters; at most {MAX_STOP_CHARS} are allowed",
                param="stop",
            )


class TraceParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which blocks to report that the tokens of a request selected; `trace.check_trace` checks it.

    layers: which, in this order; None is all. max_tokens: of the output; those after are not
    traced.
    """

    layers: tuple[int, ...] | None = None
    max_tokens: int = MAX_TRACED_TOKENS


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request as the engine receives it: validated, tokenized.

    priority: lower runs earlier (vLLM's order). cache_salt: prompts share cached pages only with
    prompts of the same salt. trace: report which blocks the tokens selected, None = do not.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    trace: TraceParams | None = None


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position: the token itself, its rank, and the likeliest tokens."""

    token_id: int
    logprob: float
    rank: int  # 1 = the likeliest
    top: list[tuple[int, float]]  # (token id, logprob), best first


class TokenOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step produced for one request.

    prompt_logprobs and queued_s (seconds from arrival in the engine to the first row) come once,
    with the first token; prompt_logprobs[i] is for prompt token i + 1. error: why finish_reason is
    ERROR, error_kind: class name of that error, error_param: the field at fault.
    blocks: for every token of token_ids, traced layer and KV head, the blocks that the query which
    led to it selected, when the request asked for a trace and its bound is not reached.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prefix_hit_tokens: int = 0
    error: str | None = None
    error_kind: str | None = None
    error_param: str | None = None
    queued_s: float = 0.0
    num_preemptions: int = 0
    blocks: list[list[list[list[int]]]] | None = None


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller of `generate` sees. In a stream: the text and tokens since the last one.

    index: which of the `n` samples. text, token_ids, logprobs, blocks (see TokenOutput): new since
    the last output.
    """

    request_id: str
    index: int = 0
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    blocks: list[list[list[list[int]]]] | None = None


class RequestMatcher(Protocol):
    """Follows the output of one request through its grammar; `nsa_serve.structured` has it."""

    @property
    def is_done(self) -> bool:
        """True once nothing but the end of the sequence may follow."""
        ...


class Request:
    """The engine's state of one request; lives from arrival to its last token.

    `pages[i]` is the page that holds tokens [i * page_size, (i + 1) * page_size), and so is
    `swa_pages[i]` among the window pages, 0 once it is passed; empty where a model has none. The
    tokens [0, num_computed_tokens) are in the cache; `num_tokens - num_computed_tokens` are still
    to run.
    """

    __slots__ = (
        "arrival_s",
        "cache_salt",
        "matcher",
        "num_computed_tokens",
        "num_preemptions",
        "num_prefix_hit_tokens",
        "output_token_ids",
        "page_hashes",
        "pages",
        "params",
        "priority",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "sampling_seed",
        "scheduled_s",
        "status",
        "swa_pages",
        "token_ids",
        "trace",
    )

    def __init__(self, message: EngineRequest, *, arrival_s: float | None = None) -> None:
        self.request_id = message.request_id
        self.params = message.params
        self.priority = message.priority
        self.cache_salt = message.cache_salt
        self.trace = message.trace
        self.arrival_s = time.monotonic() if arrival_s is None else arrival_s
        self.scheduled_s: float | None = None  # when it first left the queue
        self.prompt_token_ids = message.prompt_token_ids
        self.output_token_ids: list[int] = []
        # Prompt and output in one list, kept in step with the two above by `append_token`.
        self.token_ids = list(message.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_prefix_hit_tokens = 0
        self.num_preemptions = 0
        self.pages: list[int] = []
        self.swa_pages: list[int] = []
        self.page_hashes: list[bytes] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.status = RequestStatus.WAITING
        # Set when the request has `params.structured`; here, so that it outlives a preemption.
        self.matcher: RequestMatcher | None = None
        seed = message.params.seed
        self.sampling_seed = random.getrandbits(63) if seed is None else seed

    @property
    def queued_s(self) -> float:
        """Seconds that the request waited before it first ran; 0 while it waits."""
        return 0.0 if self.scheduled_s is None else self.scheduled_s - self.arrival_s

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    def append_token(self, token_id: int) -> None:
        """Add a sampled token."""
        self.output_token_ids.append(token_id)
        self.token_ids.append(token_id)
