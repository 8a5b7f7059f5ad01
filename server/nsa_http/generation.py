"""From prompts to outputs: start the engine's streams, merge them, count, fold."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from nsa_http.errors import GenerationError
from nsa_http.logs import log_prompt
from nsa_http.prompts import PromptInput
from nsa_http.protocol import MAX_PROMPTS, GenerationBody
from nsa_http.state import ServerState
from nsa_http.trace import trace_params
from nsa_serve.engine_client import OutputStream
from nsa_serve.errors import RequestError
from nsa_serve.fold import fold as join_outputs
from nsa_serve.request import FinishReason, RequestOutput, SamplingParams, TokenLogprobs

IndexedStream = AsyncGenerator[tuple[int, RequestOutput], None]

_QUEUE_SIZE = 256


async def start_streams(
    state: ServerState,
    prompts: Sequence[PromptInput],
    params: SamplingParams,
    body: GenerationBody,
    *,
    request_id: str,
) -> IndexedStream:
    """Submit every prompt, all or none, and return their outputs as (choice index, output).

    Raises what `EngineClient.generate` raises. Closing the stream aborts what is unfinished.
    """
    num_samples = body.num_samples
    if len(prompts) * num_samples > MAX_PROMPTS:
        raise RequestError(
            f"{len(prompts)} prompts with n={num_samples} are more than the "
            f"{MAX_PROMPTS} choices that one request may have",
            param="n",
        )
    if state.config.log_prompts:
        for prompt in prompts:
            log_prompt(prompt.text, prompt.token_ids)
    trace = trace_params(state, body, len(prompts))
    engine = state.require_engine()
    streams: list[OutputStream] = []
    try:
        for i, prompt in enumerate(prompts):
            outputs = engine.generate(
                prompt.token_ids,
                params,
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
                n=num_samples,
                priority=body.priority or 0,
                cache_salt=body.cache_salt,
                trace=trace,
            )
            streams.append(outputs)
    except BaseException:
        for stream in streams:
            await stream.aclose()
        raise
    if len(streams) == 1:
        return _indexed(streams[0])
    return _merged(streams, num_samples)


async def _indexed(stream: OutputStream) -> IndexedStream:
    async with aclosing(stream):
        async for output in stream:
            yield output.index, _checked(output)


async def _merged(streams: Sequence[OutputStream], num_samples: int) -> IndexedStream:
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(_QUEUE_SIZE)
    tasks = [asyncio.create_task(_feed(queue, i, stream)) for i, stream in enumerate(streams)]
    num_open = len(streams)
    try:
        while num_open:
            prompt_index, item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield prompt_index * num_samples + item.index, _checked(item)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A task cancelled before it ran never entered the stream it should close.
        for stream in streams:
            await stream.aclose()


async def _feed(
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]],
    prompt_index: int,
    stream: OutputStream,
) -> None:
    end: Exception | None = None
    try:
        async with aclosing(stream):
            async for output in stream:
                await queue.put((prompt_index, output))
    except Exception as error:
        end = error
    await queue.put((prompt_index, end))


def _checked(output: RequestOutput) -> RequestOutput:
    if output.finish_reason is FinishReason.ERROR:
        raise GenerationError
    return output


async def drop_output(stream: IndexedStream) -> IndexedStream:
    """Keep only what belongs to the prompt: `max_tokens=0` runs one token that nobody asked for."""
    async with aclosing(stream):
        async for index, output in stream:
            reason = None if output.finish_reason is None else FinishReason.LENGTH
            logprobs: list[TokenLogprobs] | None = None if output.logprobs is None else []
            yield (
                index,
                msgspec.structs.replace(
                    output,
                    text="",
                    token_ids=[],
                    logprobs=logprobs,
                    finish_reason=reason,
                    stop_reason=None,
                    num_output_tokens=0,
                    blocks=None,
                ),
            )


class UsageCounter:
    """Token counts of one HTTP request: each prompt once, the output of every choice."""

    def __init__(self, prompts: Sequence[PromptInput], num_samples: int) -> None:
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._num_samples = num_samples
        self._output_tokens: dict[int, int] = {}
        self._hit_tokens: dict[int, int] = {}

    def add(self, index: int, output: RequestOutput) -> None:
        """Take over the counts of a choice, which are totals."""
        self._output_tokens[index] = output.num_output_tokens
        # The first sample of a prompt stands for it: its siblings find the pages it just filled.
        if index % self._num_samples == 0:
            self._hit_tokens[index] = output.num_prefix_hit_tokens

    def as_dict(self) -> dict[str, Any]:
        """Return the `usage` object."""
        num_output_tokens = sum(self._output_tokens.values())
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": self._num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._hit_tokens.values())},
        }


async def fold(
    stream: IndexedStream, usage: UsageCounter, *, num_choices: int
) -> list[RequestOutput]:
    """Run the stream to its end and return one whole output for each choice."""
    parts: list[list[RequestOutput]] = [[] for _ in range(num_choices)]
    async with aclosing(stream):
        async for index, output in stream:
            parts[index].append(output)
            usage.add(index, output)
    return [_join(choice) for choice in parts]


def _join(parts: Sequence[RequestOutput]) -> RequestOutput:
    if not parts or parts[-1].finish_reason is None:
        raise GenerationError
    return join_outputs(parts)
