"""Prompts and chat messages of a request become token ids."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nsa_http import reasoning
from nsa_http.protocol import (
    MAX_MESSAGES,
    MAX_PROMPTS,
    ChatBody,
    TokenizeBody,
    TruncationSide,
    is_token_ids,
)
from nsa_http.state import ServerState
from nsa_http.tools.definitions import Tool, read_tools
from nsa_http.tools.formats import choose_format
from nsa_http.tools.messages import check_tool_fields, write_as_text
from nsa_serve.errors import RequestError
from nsa_serve.tokenizer import Tokenizer

# Longer text is encoded in a thread, so that other streams go on meanwhile.
_MAX_INLINE_CHARS = 8192
# A normalizer may shorten text; no real one to less than a quarter.
_NORMALIZER_MARGIN = 4
_TEMPLATE_ARGUMENTS = frozenset(
    {"self", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize"}
)


@dataclass(frozen=True, slots=True)
class PromptInput:
    """One prompt: its ids, and its text when the client sent text."""

    token_ids: list[int]
    text: str | None = None


async def encode_prompts(
    state: ServerState,
    prompt: Any,
    *,
    add_special_tokens: bool,
    truncate: int | None,
    truncation_side: TruncationSide | None = None,
) -> list[PromptInput]:
    """Read `prompt` (text, ids, or a list of either) into token ids. Raises RequestError."""
    items = _split_batch(prompt)
    if len(items) > MAX_PROMPTS:
        raise RequestError(
            f"prompt has {len(items)} prompts; at most {MAX_PROMPTS} are allowed", param="prompt"
        )
    inputs = []
    for item in items:
        if isinstance(item, str):
            if truncate is None:
                check_text_length(state, item, param="prompt")
            token_ids = await encode_text(state.tokenizer, item, add_special_tokens)
            kept = truncate_ids(state, token_ids, truncate, truncation_side)
            # Once truncated, the prompt is no longer the text that the client sent.
            inputs.append(PromptInput(kept, item if len(kept) == len(token_ids) else None))
        else:
            inputs.append(PromptInput(truncate_ids(state, item, truncate, truncation_side)))
    return inputs


async def encode_text(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Tokenize `text`; long text in a thread."""
    if len(text) <= _MAX_INLINE_CHARS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def check_text_length(state: ServerState, text: str, *, param: str) -> None:
    """Refuse text that cannot fit however it is tokenized, before any time is spent on it."""
    max_model_len = state.require_engine().info.max_model_len
    limit = max_model_len * state.max_token_chars * _NORMALIZER_MARGIN
    if len(text) > limit:
        raise RequestError(
            f"{param} has {len(text)} characters, which is more than max_model_len "
            f"({max_model_len} tokens) can hold; shorten it",
            param=param,
        )


def truncate_ids(
    state: ServerState,
    token_ids: list[int],
    limit: int | None,
    side: TruncationSide | None = None,
) -> list[int]:
    """Keep `limit` tokens; -1 keeps what leaves room for one output token.

    side: where tokens are cut off, the left unless given.
    """
    if limit is None:
        if side is not None:
            raise RequestError(
                "truncation_side needs truncate_prompt_tokens", param="truncation_side"
            )
        return token_ids
    if limit == 0:
        raise RequestError(
            "truncate_prompt_tokens must be -1 or at least 1, got 0", param="truncate_prompt_tokens"
        )
    max_prompt_len = state.require_engine().info.max_model_len - 1
    if limit > max_prompt_len:
        raise RequestError(
            f"truncate_prompt_tokens must be at most {max_prompt_len} "
            f"(max_model_len less one output token), got {limit}",
            param="truncate_prompt_tokens",
        )
    num_kept = max_prompt_len if limit == -1 else limit
    return token_ids[:num_kept] if side == "right" else token_ids[-num_kept:]


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """Chat messages as one prompt. is_block_open: it ends inside a reasoning block."""

    text: str
    is_block_open: bool


async def encode_chat(state: ServerState, body: TokenizeBody) -> list[int]:
    """Apply the chat template and tokenize. Raises RequestError."""
    tools = read_tools(body.tools, None, None).tools
    return await encode_rendered(state, body, render_chat(state, body, tools))


async def encode_rendered(
    state: ServerState, body: ChatBody | TokenizeBody, rendered: RenderedChat
) -> list[int]:
    """Tokenize what `render_chat` made."""
    return await encode_text(state.tokenizer, rendered.text, bool(body.add_special_tokens))


def render_chat(
    state: ServerState, body: ChatBody | TokenizeBody, tools: Sequence[Tool]
) -> RenderedChat:
    """Apply the chat template. Raises RequestError.

    A template that knows no tools gets them in the system message, calls and results as text.
    """
    messages = _normalize_messages(body.messages)
    continue_final = bool(body.continue_final_message)
    if continue_final and body.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true",
            param="continue_final_message",
        )
    add_prompt = body.add_generation_prompt
    variables = _template_variables(state, body)
    reserved = sorted(_TEMPLATE_ARGUMENTS & variables.keys())
    if reserved:
        raise RequestError(
            f"chat_template_kwargs must not set {reserved[0]}", param="chat_template_kwargs"
        )
    for message in messages:
        check_text_length(state, message["content"], param="messages")
    knows_tools = "tools" in state.tokenizer.template_variables
    if not knows_tools:
        template = state.tokenizer.chat_template
        tool_format = choose_format(state.config.tool_call_parser, template)
        messages = write_as_text(messages, tools, tool_format)
    text = state.tokenizer.apply_chat_template(
        messages,
        tools=[tool.as_dict() for tool in tools] if tools and knows_tools else None,
        add_generation_prompt=not continue_final if add_prompt is None else add_prompt,
        continue_final_message=continue_final,
        **variables,
    )
    check_text_length(state, text, param="messages")
    if continue_final:
        return RenderedChat(text, reasoning.is_block_open(messages[-1]["content"]))
    return RenderedChat(text, reasoning.ends_with_open(text))


def _template_variables(state: ServerState, body: ChatBody | TokenizeBody) -> dict[str, Any]:
    """Return the variables that the body sets; `reasoning_effort` sets those the template has."""
    variables = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort if isinstance(body, ChatBody) else None
    if effort is None:
        return variables
    known = state.tokenizer.template_variables
    offered = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    chosen = {name: value for name, value in offered.items() if name in known}
    if not chosen and effort != "none":
        raise RequestError(
            "reasoning_effort is not supported by the model: its chat template reads neither "
            "reasoning_effort nor enable_thinking; leave it out",
            param="reasoning_effort",
        )
    return {**chosen, **variables}


def echoed_text(body: ChatBody) -> str:
    """Return what `echo` puts before the answer: the last message, when the answer is of its role.

    The answer is the assistant's, or the last message's own without a generation prompt.
    """
    last = _normalize_messages(body.messages)[-1]
    opens_turn = body.add_generation_prompt is not False and not body.continue_final_message
    return str(last["content"]) if not opens_turn or last["role"] == "assistant" else ""


def _split_batch(prompt: Any) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            "prompt must be a string, an array of strings, an array of token ids or an array of "
            "arrays of token ids, and not empty",
            param="prompt",
        )
    first = prompt[0]
    if isinstance(first, str) and all(isinstance(item, str) for item in prompt):
        return prompt
    if isinstance(first, int) and is_token_ids(prompt):
        return [prompt]
    if isinstance(first, list) and all(
        isinstance(item, list) and is_token_ids(item) for item in prompt
    ):
        return prompt
    raise RequestError(
        "prompt must hold only strings, only token ids (integers >= 0) or only arrays of token ids",
        param="prompt",
    )


_ROLES_WITH_CONTENT = frozenset({"developer", "system", "tool", "user"})


def _normalize_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be an array of at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(
            f"messages has {len(messages)} messages; at most {MAX_MESSAGES} are allowed",
            param="messages",
        )
    return [_normalize_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _normalize_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a string `role`", param=where)
    present = {name: value for name, value in message.items() if value is not None}
    thoughts = present.get("reasoning", present.get("reasoning_content"))
    if thoughts is not None:
        if not isinstance(thoughts, str):
            raise RequestError(f"{where}.reasoning must be a string", param=where)
        # Templates know it under either name.
        present |= {"reasoning": thoughts, "reasoning_content": thoughts}
    content = _text_of(message.get("content"), f"{where}.content")
    checked = check_tool_fields({**present, "content": content}, where)
    if "content" not in present and message["role"] in _ROLES_WITH_CONTENT:
        raise RequestError(
            f"{where}.content must be a string or an array of parts; only a message of the "
            "assistant may go without",
            param=f"{where}.content",
        )
    return checked


def _text_of(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or an array of parts", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(
                f"{where}.{i}: only parts of type 'text' are supported, got {str(kind)[:64]!r}",
                param=f"{where}.{i}",
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}.{i}.text must be a string", param=f"{where}.{i}.text")
        texts.append(part["text"])
    return "\n".join(texts)
