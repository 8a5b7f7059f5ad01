"""A request on its way into the engine, and what comes back when the engine refuses it."""

import msgspec

from nsa_serve.errors import NSAServeError, RequestError
from nsa_serve.messages import EngineInfo
from nsa_serve.request import SamplingParams, TokenOutput

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
    params.check_token_ids(info.vocab_size)


def sample_params(params: SamplingParams, index: int) -> SamplingParams:
    """Return the parameters of sample `index`: those of a seeded request have seed + index.

    Past the largest int64 the seeds go on from the smallest.
    """
    if index == 0 or params.seed is None:
        return params
    seed = params.seed + index
    return msgspec.structs.replace(params, seed=seed if seed <= _MAX_SEED else seed - 2**64)


def make_request_error(output: TokenOutput) -> NSAServeError:
    """Return the error of an output that has one: RequestError when the request is at fault."""
    if output.error_kind == RequestError.__name__:
        return RequestError(str(output.error), param=output.error_param)
    return NSAServeError(f"the request failed in the engine: {output.error}")
