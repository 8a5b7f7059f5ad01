"""An engine that needs no model: it says a fixed reply, one byte a token."""

import asyncio
from collections.abc import AsyncIterator

import tokenizers
from starlette.types import ASGIApp

from nsa_http.app import create_app
from nsa_http.config import ServerConfig
from nsa_http.state import ServerState
from nsa_kernels.spec import NSASpec
from nsa_serve.cache_reads import ReadCosts
from nsa_serve.engine_client import EngineClient, OutputStream
from nsa_serve.errors import EngineDeadError, RequestError
from nsa_serve.messages import CacheComponent, EngineInfo, EngineStats, TraceGeometry
from nsa_serve.metrics import Metrics
from nsa_serve.request import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    TraceParams,
)
from nsa_serve.tokenizer import Tokenizer
from nsa_serve.trace import check_trace, traced_layers

MODEL = "tiny"
REPLY = "Hello, world"
MAX_MODEL_LEN = 111
TRACE_SPEC = NSASpec(cmp_len=8, cmp_stride=4, block_size=16, num_selected_blocks=4, window_size=24)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last or "
    "add_generation_prompt %};{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def make_tokenizer(chat_template: str = CHAT_TEMPLATE) -> Tokenizer:
    """One token for each byte, and an <eos>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, special_tokens={"eos_token": "<eos>"}, chat_template=chat_template)


class FakeEngine:
    """Implements `EngineClient`. Attributes set what it does; lists record what it was asked.

    gate: tokens wait for it. die_after: tokens after which the engine dies, or None. stream_error:
    what a stream raises instead of its first output.
    """

    def __init__(self, *, reply: str = REPLY) -> None:
        self.tokenizer = make_tokenizer()
        self.reply = reply
        self.gate = asyncio.Event()
        self.gate.set()
        self.delay_s = 0.0
        self.die_after: int | None = None
        self.fail_after: int | None = None
        self.stream_error: Exception | None = None
        self.refusal: Exception | None = None
        self.refuse_after = 0
        self.is_dead = asyncio.Event()
        self.calls: list[tuple[list[int], SamplingParams, dict[str, object]]] = []
        self.aborted: list[str] = []
        self.is_closed = False
        self.info = EngineInfo(
            family="native",
            dtype="float32",
            device="cpu",
            num_parameters=1_234_567,
            weight_bytes=4_938_268,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=32,
            vocab_size=self.tokenizer.vocab_size,
            page_size=16,
            num_pages=70,
            cache=[
                CacheComponent("raw", 512.0, 573_440),
                CacheComponent("compressed", 64.0, 71_680),
            ],
            phase_s={"weights": 0.25},
            eos_token_ids=(self.tokenizer.vocab_size - 1,),
            trace=TraceGeometry(
                num_layers=3,
                num_kv_heads=2,
                costs=ReadCosts(spec=TRACE_SPEC, key_bytes=48, value_bytes=48),
            ),
        )
        self.stats = EngineStats(num_pages=70, num_free_pages=70)

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        n: int = 1,
        priority: int = 0,
        cache_salt: str | None = None,
        trace: TraceParams | None = None,
    ) -> OutputStream:
        if self.is_dead.is_set():
            raise EngineDeadError("the fake engine is dead")
        if self.refusal is not None and len(self.calls) >= self.refuse_after:
            raise self.refusal
        if not prompt_token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if len(prompt_token_ids) + 1 > self.info.max_model_len:
            raise RequestError("the prompt is too long", param="prompt")
        params.check_token_ids(self.info.vocab_size)
        if trace is not None:
            check_trace(trace, self.info)
        facts: dict[str, object] = {
            "request_id": request_id,
            "n": n,
            "priority": priority,
            "cache_salt": cache_salt,
        }
        self.calls.append((prompt_token_ids, params, facts))
        return FakeStream(self, prompt_token_ids, params, request_id=request_id, n=n, trace=trace)

    def check_health(self) -> None:
        if self.is_dead.is_set():
            raise EngineDeadError("the fake engine is dead")

    async def wait_dead(self) -> EngineDeadError:
        await self.is_dead.wait()
        return EngineDeadError("the fake engine is dead")

    async def close(self) -> None:
        self.is_closed = True


class FakeStream(AsyncIterator[RequestOutput]):
    """The tokens of one request, its samples in turn."""

    def __init__(
        self,
        engine: FakeEngine,
        prompt: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        n: int,
        trace: TraceParams | None = None,
    ) -> None:
        self._engine = engine
        self._prompt = prompt
        self._params = params
        self._request_id = request_id
        self._trace = trace
        tokens = engine.tokenizer.encode(engine.reply, add_special_tokens=False)
        limit = engine.info.max_model_len - len(prompt)
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens)
        self._reason = FinishReason.LENGTH if limit <= len(tokens) else FinishReason.STOP
        self._tokens = tokens[:limit]
        self._steps = [(i, index) for i in range(len(self._tokens)) for index in range(n)]
        self._next = 0
        self._is_over = False

    async def __anext__(self) -> RequestOutput:
        engine = self._engine
        if self._next == len(self._steps):
            self._is_over = True
            raise StopAsyncIteration
        await engine.gate.wait()
        await asyncio.sleep(engine.delay_s)
        if engine.die_after == self._next or engine.is_dead.is_set():
            self._is_over = True
            engine.is_dead.set()
            raise EngineDeadError("the fake engine died at /secret/path 0x7f00")
        if engine.stream_error is not None:
            self._is_over = True
            raise engine.stream_error
        if engine.fail_after == self._next:
            self._is_over = True
            raise ZeroDivisionError("a bug at /secret/path")
        position, index = self._steps[self._next]
        self._next += 1
        return self._output(position, index)

    async def aclose(self) -> None:
        if not self._is_over and self._next < len(self._steps):
            self._engine.aborted.append(self._request_id)
        self._is_over = True

    def _output(self, position: int, index: int) -> RequestOutput:
        params, tokenizer = self._params, self._engine.tokenizer
        token_id = self._tokens[position]
        is_last = position == len(self._tokens) - 1
        is_first = position == 0
        wants_prompt = is_first and params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self._request_id,
            index=index,
            text=tokenizer.decode([token_id], skip_special_tokens=False),
            token_ids=[token_id],
            logprobs=(
                None if params.logprobs is None else [fake_logprobs(token_id, params.logprobs)]
            ),
            prompt_token_ids=self._prompt if is_first else None,
            prompt_logprobs=(
                [fake_logprobs(i, params.prompt_logprobs or 0) for i in self._prompt[1:]]
                if wants_prompt
                else None
            ),
            finish_reason=self._reason if is_last else None,
            num_prompt_tokens=len(self._prompt),
            num_output_tokens=position + 1,
            num_prefix_hit_tokens=3,
            blocks=self._blocks(position),
        )

    def _blocks(self, position: int) -> list[list[list[list[int]]]] | None:
        """The first block and the query's own, whatever the layer; head 1 has one between."""
        if self._trace is None or position >= self._trace.max_tokens:
            return None
        geometry = self._engine.info.trace
        assert geometry is not None
        own = (len(self._prompt) + position - 1) // geometry.costs.spec.block_size
        heads = [sorted({0, own}), sorted({0, own // 2, own})]
        return [[heads for _ in traced_layers(self._trace, geometry)]]


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The token at rank 2, token 0 above it and one that cannot occur below."""
    top = [(0, -0.5), (token_id, -1.25), (1, float("-inf"))][:num_top]
    return TokenLogprobs(token_id, -1.25, 2, top)


def make_state(engine: EngineClient | None, **options: object) -> ServerState:
    """A server state that is ready, or loading without an engine."""
    config = ServerConfig.model_validate(options)
    names = config.served_model_name or [MODEL]
    metrics = Metrics(names[0], has_vllm_names=config.metrics_compat == "vllm")
    state = ServerState(config, metrics, names, settings=config.model_dump(mode="json"))
    if engine is not None:
        state.set_ready(engine)
    return state


def make_app(engine: EngineClient | None, **options: object) -> ASGIApp:
    """The ASGI app of such a state."""
    return create_app(make_state(engine, **options))
