"""Offline generation: the engine in this process, all prompts at once."""

import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from tqdm import tqdm

from nsa_serve.collector import rare_full_collections, set_aside
from nsa_serve.config import EngineConfig, make_config
from nsa_serve.engine import Engine
from nsa_serve.errors import NSAServeError, RequestError
from nsa_serve.fold import fold
from nsa_serve.messages import EngineInfo
from nsa_serve.model_source import load_tokenizer
from nsa_serve.output import OutputProcessor
from nsa_serve.request import EngineRequest, RequestOutput, SamplingParams, TokenOutput
from nsa_serve.request_check import check_request, sample_params
from nsa_serve.structured.grammar import check_size
from nsa_serve.tokenizer import Tokenizer

Prompts = str | Sequence[str] | Sequence[Sequence[int]]
Message = dict[str, Any]


class InProcessEngine(Protocol):
    """What `LLM` needs of `Engine`."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def has_unfinished(self) -> bool: ...

    def add(self, request: EngineRequest) -> None: ...

    def abort(self, request_ids: Sequence[str]) -> None: ...

    def step(self) -> list[TokenOutput]: ...

    def close(self) -> None: ...


class LLM:
    """A model in this process.

        with LLM("smollm2-135m-nsa", max_model_len=2048) as llm:
            for output in llm.generate(["The sky is", "1 + 1 ="]):
                print(output.text)

    model: built-in name, folder, .gguf file or hub id. engine_options: fields of `EngineConfig`.
    Raises ConfigError, ModelError or CapacityError. Not safe to use from several threads at once.
    """

    def __init__(self, model: str | None = None, **engine_options: Any) -> None:
        if model is not None:
            engine_options["model"] = model
        config = make_config(EngineConfig, engine_options)
        self.tokenizer: Tokenizer = load_tokenizer(config)
        self._engine: InProcessEngine = Engine(config)

    @classmethod
    def from_engine(cls, engine: InProcessEngine, tokenizer: Tokenizer) -> "LLM":
        """Wrap an engine that is loaded already."""
        self = cls.__new__(cls)
        self.tokenizer = tokenizer
        self._engine = engine
        return self

    @property
    def info(self) -> EngineInfo:
        """What was loaded and what fits."""
        return self._engine.info

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; return whole outputs in the order of the prompts.

        prompts: text, a list of texts, or a list of lists of token ids. params: for all prompts,
        or one for each. n: samples a prompt; they follow each other in the result, `index` 0 to
        n - 1. Raises RequestError that names the prompt at fault, before anything runs, and
        NSAServeError when a request fails later; then nothing is left running.
        """
        token_ids = self._encode(prompts)
        run = _Run(self._engine, self.tokenizer)
        with rare_full_collections():
            for number, (prompt, item) in enumerate(
                zip(token_ids, _one_each(params, len(token_ids)), strict=True)
            ):
                run.queue(number, prompt, item, n)
            return run.finish(use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; see `generate`.

        A message is a dict with "role" and "content". Raises RequestError when the model has no
        chat template or the template refuses the messages.
        """
        conversations = [item for item in messages if not isinstance(item, dict)]
        if not conversations:
            conversations = [[item for item in messages if isinstance(item, dict)]]
        elif len(conversations) != len(messages):
            raise RequestError("messages must be one conversation or a list of them, not a mixture")
        texts = [
            self.tokenizer.apply_chat_template(list(item), add_generation_prompt=True)
            for item in conversations
        ]
        # The template wrote the special tokens already.
        prompts = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return self.generate(prompts, params, n=n, use_tqdm=use_tqdm)

    def _encode(self, prompts: Prompts) -> list[list[int]]:
        items: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [item for item in items if isinstance(item, str)]
        if not texts:
            if any(isinstance(item, int) for item in items):
                raise RequestError(
                    "prompts must be text, a list of texts or a list of lists of token ids, got "
                    "a list of ids: put it in a list"
                )
            return [list(item) for item in items]
        if len(texts) != len(items):
            raise RequestError("prompts must be all texts or all lists of token ids, got a mixture")
        return self.tokenizer.encode_batch(texts, add_special_tokens=True)


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(
            f"params must be one for all prompts or one for each: got {len(params)} "
            f"for {num_prompts} prompts"
        )
    return list(params)


class _Run:
    """One call of `generate`: its requests, and what they gave so far."""

    def __init__(self, engine: InProcessEngine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._processor = OutputProcessor(tokenizer)
        self._requests: list[tuple[EngineRequest, int]] = []
        self._parts: dict[str, list[RequestOutput]] = {}
        self._live_ids: set[str] = set()

    def queue(self, number: int, prompt: list[int], params: SamplingParams, n: int) -> None:
        """Check prompt `number` and note its `n` samples."""
        try:
            check_request(prompt, params, n, self._engine.info)
            if params.structured is not None:
                check_size(params.structured)
        except RequestError as error:
            raise RequestError(f"prompt {number}: {error}", param=error.param) from None
        for index in range(n):
            request = EngineRequest(
                request_id=f"{number}-{index}-{uuid.uuid4().hex}",
                prompt_token_ids=prompt,
                params=sample_params(params, index),
            )
            self._requests.append((request, index))

    def finish(self, *, use_tqdm: bool) -> list[RequestOutput]:
        """Run everything to its end; abort what is left when that fails or is interrupted."""
        try:
            for request, index in self._requests:
                self._add(request, index)
            num_requests = len(self._requests)
            with set_aside(), tqdm(total=num_requests, unit="req", disable=not use_tqdm) as bar:
                while self._live_ids:
                    bar.update(self._step())
        finally:
            if self._live_ids:
                self._engine.abort(list(self._live_ids))
        return [fold(self._parts[request.request_id]) for request, _ in self._requests]

    def _add(self, request: EngineRequest, index: int) -> None:
        self._engine.add(request)
        self._live_ids.add(request.request_id)
        self._parts[request.request_id] = []
        number = request.request_id.split("-", 1)[0]
        self._processor.add(
            request.request_id,
            index=index,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
            output_request_id=number,
        )

    def _step(self) -> int:
        """Run one step; return how many requests ended."""
        assert self._engine.has_unfinished, "requests are live but the engine has none"
        num_live = len(self._live_ids)
        for output in self._engine.step():
            if output.request_id not in self._live_ids:
                continue
            if output.error is not None:
                self._live_ids.discard(output.request_id)
                raise NSAServeError(
                    f"prompt {output.request_id.split('-', 1)[0]} failed: {output.error}"
                )
            result, needs_abort = self._processor.process(output)
            if result is not None:
                self._parts[output.request_id].append(result)
                if result.finish_reason is not None:
                    self._live_ids.discard(output.request_id)
            if needs_abort:
                self._engine.abort([output.request_id])
        return num_live - len(self._live_ids)
