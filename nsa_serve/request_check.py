"""A request on its way into the engine, and what comes back when the engine refuses it."""

import msgspec

from nsa_serve.errors import NSAServeError, RequestError
from nsa_serve.messages import EngineInfo
from nsa_serve.request import FinishReason, SamplingParams, TokenOutput

_MAX_SEED = 2**63 - 1


def check_request(prompt: list[int], params: SamplingParams, n: int, info: EngineInfo) -> None:
    """Raise RequestError when `n` samples of a prompt can never be served by this engine."""
    if n < 1:
        raise RequestError(f"n must be at least 1, got {n}", param="n")
    if not prompt:
        raise RequestError("the prompt is empty; it needs at least one token", param="prompt")
    if min(prompt) < 0 or max(prompt) >= info.vocab_size:
        bad = next(token_id for token_id in prompt if not 0 <= token_id < info.vocab_size)
        raise RequestError(
            f"the prompt holds token id {bad}, which is outside the vocabulary "
            f"of {info.vocab_size} tokens",
            param="prompt",
        )
    num_needed = len(prompt) + (params.max_tokens != 0)
    if num_needed > info.max_model_len:
        room = " and needs room for one more" if num_needed > len(prompt) else ""
        raise RequestError(
            f"the prompt has {len(prompt)} tokens{room}, but max_model_len is "
            f"{info.max_model_len}; shorten it or raise --max-model-len",
            param="prompt",
        )
    if params.max_tokens is not None and params.max_tokens > info.max_model_len:
        raise RequestError(
            f"max_tokens is {params.max_tokens}, but max_model_len, which prompt and output share, "
            f"is {info.max_model_len}; lower it, or leave it out to fill the context",
            param="max_tokens",
        )
    params.check_token_ids(info.vocab_size)
    _check_allowed(params, info)


def _check_allowed(params: SamplingParams, info: EngineInfo) -> None:
    """Raise RequestError when min_tokens holds back every token that is allowed."""
    if params.allowed_token_ids is None or not params.min_tokens:
        return
    held_back = {*info.eos_token_ids, *params.stop_token_ids}
    if held_back.issuperset(params.allowed_token_ids):
        raise RequestError(
            "allowed_token_ids names only tokens that end the output, but min_tokens is "
            f"{params.min_tokens}; allow another token or leave min_tokens out",
            param="allowed_token_ids",
        )


def sample_params(params: SamplingParams, index: int) -> SamplingParams:
    """Return the parameters of sample `index`: those of a seeded request have seed + index.

    Past the largest int64 the seeds go on from the smallest.
    """
    if index == 0 or params.seed is None:
        return params
    seed = params.seed + index
    return msgspec.structs.replace(params, seed=seed if seed <= _MAX_SEED else seed - 2**64)


def make_refusal(request_id: str, error: Exception) -> TokenOutput:
    """Return the last output of a request that was not taken in.

    An unforeseen error is told by its class alone: its text may hold what is not for a client.
    """
    is_known = isinstance(error, NSAServeError)
    return TokenOutput(
        request_id,
        [],
        finish_reason=FinishReason.ERROR,
        error=str(error) if is_known else f"internal error: {type(error).__name__}",
        error_kind=type(error).__name__,
        error_param=error.param if isinstance(error, RequestError) else None,
    )


def make_request_error(output: TokenOutput) -> NSAServeError:
    """Return the error of an output that has one: RequestError when the request is at fault."""
    if output.error_kind == RequestError.__name__:
        return RequestError(str(output.error), param=output.error_param)
    return NSAServeError(f"the request failed in the engine: {output.error}")
