"""Requests that an engine runs before it is ready, so that no user's request is the first one.

On a GPU a kernel is compiled, and loaded, when it first runs: every path that a request can take
must have been taken. The runner sees to kernels and graphs by shape; these requests see to the
rest: sampling with each option, grammars, log-probabilities, prompts that take several steps,
prompts beside decode rows, and prefixes that are found.
"""

from nsa_serve.request import EngineRequest, SamplingParams, StructuredOutput

# Longer than a window or a page of any dialect, and no multiple of either.
_LONG_PROMPT = 1111


def first_request(max_request_tokens: int) -> EngineRequest | None:
    """Return a short greedy request; None when there is no room for a prompt and a token."""
    length = min(4, max_request_tokens - 1)
    if length < 1:
        return None
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    return EngineRequest(request_id="warm-up", prompt_token_ids=[0] * length, params=params)


def gpu_batches(
    *, max_request_tokens: int, max_num_batched_tokens: int, vocab_size: int
) -> list[list[EngineRequest]]:
    """Return requests to be run one batch after the other; those of a batch run together.

    Each fits a cache that holds one request of `max_request_tokens` tokens, if one after the other.
    """
    room = max_request_tokens - 8
    if room < 1:
        return []
    last_id = vocab_size - 1
    # Runs on while the others are prefilled: steps of decode rows and prompt chunks together.
    companion = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    options = [
        SamplingParams(max_tokens=3, temperature=0.8, seed=1),
        SamplingParams(max_tokens=3, temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, seed=1),
        SamplingParams(max_tokens=3, temperature=0.0, logprobs=3, prompt_logprobs=2),
        SamplingParams(
            max_tokens=3,
            temperature=0.8,
            repetition_penalty=1.1,
            presence_penalty=0.1,
            frequency_penalty=0.1,
            logit_bias={0: 1.0},
            min_tokens=2,
            logprobs=0,
        ),
        SamplingParams(max_tokens=3, temperature=0.8, allowed_token_ids=(0, last_id)),
        SamplingParams(max_tokens=3, temperature=0.0, bad_words=((last_id,),)),
    ]
    batches = [
        [
            _request("companion", min(3, room), companion),
            *(_request(f"option-{i}", min(5, room), item) for i, item in enumerate(options)),
        ]
    ]
    for length in (min(_LONG_PROMPT, room), min(max_num_batched_tokens + 1, room)):
        # The second time its prefix is found.
        for turn in range(2):
            name = f"long-{length}-{turn}"
            # With a prefix of its own, or the first turn would find some of it as well.
            prompt = _request(name, length, companion, cache_salt=f"warm-up-{length}")
            batches.append([_request("companion", min(3, room), companion), prompt])
    return batches


def grammar_request() -> EngineRequest:
    """Return a request of one token whose output a grammar decides."""
    grammar = StructuredOutput("choice", '["a"]')
    params = SamplingParams(max_tokens=2, temperature=0.0, structured=grammar)
    return _request("grammar", 1, params)


def _request(
    name: str, length: int, params: SamplingParams, *, cache_salt: str | None = None
) -> EngineRequest:
    return EngineRequest(
        request_id=f"warm-up-{name}",
        prompt_token_ids=[0] * length,
        params=params,
        cache_salt=cache_salt,
    )
