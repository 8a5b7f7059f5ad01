"""POST /tokenize and /detokenize, in vLLM's shapes."""

import asyncio

import orjson
from starlette.responses import Response

from nsa_http.prompts import check_text_length, encode_chat, encode_text
from nsa_http.protocol import DetokenizeBody, TokenizeBody, check_token_ids
from nsa_http.state import ServerState
from nsa_http.unsupported import check_unsupported, unknown_fields
from nsa_serve.errors import RequestError


async def tokenize(body: TokenizeBody, state: ServerState) -> Response:
    """Return the token ids of a prompt or of chat messages."""
    extra = body.model_extra or {}
    check_unsupported(extra)
    state.check_model(body.model)
    state.warn_unknown_fields(unknown_fields(extra))
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    tokenizer = state.tokenizer
    if body.prompt is not None:
        check_text_length(state, body.prompt, param="prompt")
        token_ids = await encode_text(tokenizer, body.prompt, body.add_special_tokens is not False)
    else:
        token_ids = await encode_chat(state, body)
    strings = [tokenizer.token_to_str(i) for i in token_ids] if body.return_token_strs else None
    content = {
        "count": len(token_ids),
        "max_model_len": state.require_engine().info.max_model_len,
        "tokens": token_ids,
        "token_strs": strings,
    }
    return Response(orjson.dumps(content), media_type="application/json")


async def detokenize(body: DetokenizeBody, state: ServerState) -> Response:
    """Return the text of token ids."""
    extra = body.model_extra or {}
    state.check_model(body.model)
    state.warn_unknown_fields(unknown_fields(extra))
    token_ids = check_token_ids(body.tokens, param="tokens")
    vocab_size = state.tokenizer.vocab_size
    outside = next((token_id for token_id in token_ids if token_id >= vocab_size), None)
    if outside is not None:
        raise RequestError(
            f"tokens has id {outside}, which is outside the vocabulary of {vocab_size} tokens",
            param="tokens",
        )
    text = await asyncio.to_thread(state.tokenizer.decode, token_ids, skip_special_tokens=False)
    return Response(orjson.dumps({"prompt": text}), media_type="application/json")
