"""What the HTTP server needs of an engine; `AsyncEngine` implements it."""

from collections.abc import AsyncIterable
from typing import Protocol

from nsa_serve.messages import EngineInfo, EngineStats
from nsa_serve.request import RequestOutput, SamplingParams, TraceParams
from nsa_serve.tokenizer import Tokenizer


class OutputStream(AsyncIterable[RequestOutput], Protocol):
    """Outputs as they come. Close it when it is not read to its end."""

    async def aclose(self) -> None:
        """Abort what is unfinished; nothing more is read. Closing twice is allowed."""
        ...


class EngineClient(Protocol):
    """An engine that has started."""

    @property
    def info(self) -> EngineInfo:
        """What was loaded and what fits."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Counters and gauges after the last step."""
        ...

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
        """Stream the outputs of `n` samples, interleaved; each carries its sample's index.

        Checks the request before it returns: RequestError (prompt too long or empty, ids outside
        the vocabulary), QueueFullError, EngineDeadError are raised by the call itself; the stream
        raises RequestError only for what the engine alone can know. Text and tokens of an output
        are new since the last one of the same index; the last output of an index has a
        finish_reason. prompt_token_ids and prompt_logprobs come with the first output of each
        index. trace: which blocks to report, see `RequestOutput.blocks`; RequestError when the
        engine cannot. Closing the stream aborts what is unfinished.
        """
        ...

    def check_health(self) -> None:
        """Raise EngineDeadError when the engine is gone or makes no progress."""
        ...

    async def close(self) -> None:
        """Abort what runs and stop the engine."""
        ...
