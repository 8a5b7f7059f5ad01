"""The engine's token outputs to what a caller sees: text, stop strings, counts."""

from typing import NamedTuple

from nsa_serve.detokenizer import IncrementalDetokenizer, StopStrings
from nsa_serve.request import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from nsa_serve.tokenizer import Tokenizer


class ProcessedOutput(NamedTuple):
    """What came of one TokenOutput.

    output: None when there is nothing to show yet; its tokens come with a later one. needs_abort:
    a stop string ended the request here, but the engine still runs it and must be told to abort.
    """

    output: RequestOutput | None
    needs_abort: bool


_NOTHING = ProcessedOutput(None, False)


class OutputProcessor:
    """The state of all requests between the engine and their callers.

    A request is forgotten with its last output. Tokens that the engine still sends for one that is
    forgotten (it stopped on a stop string, or was aborted) have no reader and are dropped.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, _RequestState] = {}

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def add(
        self,
        request_id: str,
        *,
        index: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        output_request_id: str | None = None,
    ) -> None:
        """Expect outputs of a request.

        index: which of the `n` samples it is. output_request_id: what its outputs are to carry
        instead of request_id. Raises ValueError when the id is in use.
        """
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is in use")
        self._requests[request_id] = _RequestState(
            self._tokenizer, output_request_id or request_id, index, prompt_token_ids, params
        )

    def process(self, output: TokenOutput) -> ProcessedOutput:
        """Turn one step's tokens of a request into its next output.

        A stop string ends the text, but token_ids and logprobs stay as they were generated, as
        elsewhere in the field. So does a stop token: its id is reported, its text only with
        include_stop_str_in_output. `TokenOutput.error` is for the caller to report.
        """
        request = self._requests.get(output.request_id)
        if request is None:
            return _NOTHING
        result = request.process(output)
        if result.output is not None and result.output.finish_reason is not None:
            del self._requests[output.request_id]
        return result

    def abort(self, request_id: str) -> None:
        """Forget a request. One that has ended already is none to forget."""
        self._requests.pop(request_id, None)


class _RequestState:
    """One request's text so far, and what is still to be reported."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request_id: str,
        index: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
    ) -> None:
        self._request_id = request_id
        self._index = index
        self._prompt_token_ids: list[int] | None = prompt_token_ids
        self._num_prompt_tokens = len(prompt_token_ids)
        self._params = params
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            prompt_token_ids=prompt_token_ids,
        )
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._num_output_tokens = 0
        self._num_prefix_hit_tokens = 0
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        self._blocks: list[list[list[list[int]]]] | None = None

    def process(self, output: TokenOutput) -> ProcessedOutput:
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs or ()
        self._num_prefix_hit_tokens = max(self._num_prefix_hit_tokens, output.num_prefix_hit_tokens)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if output.blocks is not None:
            self._blocks = [*(self._blocks or ()), *output.blocks]
        text, matched = self._extend_text(output)
        finish_reason, stop_reason = output.finish_reason, output.stop_reason
        if matched is not None:
            finish_reason, stop_reason = FinishReason.STOP, matched
        if not text and finish_reason is None:
            return _NOTHING
        needs_abort = matched is not None and output.finish_reason is None
        return ProcessedOutput(self._take(text, finish_reason, stop_reason), needs_abort)

    def _extend_text(self, output: TokenOutput) -> tuple[str, str | None]:
        """Return the new text and the stop string that ends it, if any."""
        shown = output.token_ids
        if (
            output.finish_reason is FinishReason.STOP
            and not self._params.include_stop_str_in_output
        ):
            # The engine stops on tokens only, so the last one is EOS or a stop token.
            shown = shown[:-1]
        free_text = ""
        num_free = min(self._params.min_tokens - self._num_output_tokens, len(shown))
        self._num_output_tokens += len(output.token_ids)
        if num_free > 0:
            # Text of the first min_tokens tokens is not searched, so no match can reach into it.
            free_text = self._detokenizer.push(shown[:num_free])
            shown = shown[num_free:]
        new_text = self._detokenizer.push(shown)
        if output.finish_reason is not None:
            new_text += self._detokenizer.finish()
        text, matched = self._stops.push(new_text)
        if output.finish_reason is not None and matched is None:
            text += self._stops.finish()
        return free_text + text, matched

    def _take(
        self, text: str, finish_reason: FinishReason | None, stop_reason: int | str | None
    ) -> RequestOutput:
        """Make the output that reports everything that is still to be reported."""
        token_ids, self._token_ids = self._token_ids, []
        logprobs, self._logprobs = self._logprobs, []
        prompt_token_ids, self._prompt_token_ids = self._prompt_token_ids, None
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        blocks, self._blocks = self._blocks, None
        return RequestOutput(
            request_id=self._request_id,
            index=self._index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs if self._params.logprobs is not None else None,
            prompt_token_ids=prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
            blocks=blocks,
        )
