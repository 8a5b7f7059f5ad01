"""What a request says its output must and must not be, as the engine takes it."""

from collections.abc import Sequence

import msgspec

from nsa_http.protocol import GenerationBody
from nsa_http.state import ServerState
from nsa_http.structured import structured_output
from nsa_serve.errors import RequestError
from nsa_serve.request import MAX_BAD_WORD_CHARS, SamplingParams, StructuredOutput
from nsa_serve.tokenizer import Tokenizer


async def constrain(
    state: ServerState,
    body: GenerationBody,
    params: SamplingParams,
    *,
    structured: StructuredOutput | None = None,
) -> SamplingParams:
    """Return `params` with the body's bad_words and its structured output, checked.

    structured: a checked constraint that the route makes itself, such as a tool's; the body must
    have none beside it. Raises RequestError and QueueFullError.
    """
    # First, since it costs nothing: a grammar is not compiled for a request that is refused.
    params.check_token_ids(state.require_engine().info.vocab_size)
    bad_words = bad_word_ids(state.tokenizer, body.bad_words or ())
    asked = await structured_output(state, body.response_format, body.structured_outputs)
    if asked is not None and structured is not None:
        raise RequestError(
            "the tool choice constrains the output, so response_format and structured_outputs "
            "must be left out",
            param="response_format" if body.structured_outputs is None else "structured_outputs",
        )
    return msgspec.structs.replace(params, bad_words=bad_words, structured=structured or asked)


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the sequences of tokens that would write the words, at a start and after a space."""
    found: list[tuple[int, ...]] = []
    for word in words:
        if not word.strip():
            raise RequestError(
                "bad_words must not contain an empty string or one of spaces", param="bad_words"
            )
        if len(word) > MAX_BAD_WORD_CHARS:
            raise RequestError(
                f"a bad word has {len(word)} characters; at most {MAX_BAD_WORD_CHARS} are allowed",
                param="bad_words",
            )
        for text in (word, " " + word.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            # A sequence that ends with another is prevented with it.
            if ids and not any(ids[-len(other) :] == other for other in found):
                found.append(ids)
    return tuple(found)
