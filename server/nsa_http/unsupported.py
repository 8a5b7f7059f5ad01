"""Request fields that other servers know and this one does not.

Those that would change the output are refused, unless the value says "off"; those that cannot are
ignored in silence. Every other field is unknown: ignored, with one warning.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from nsa_serve.errors import RequestError

# Field -> the values that change nothing. None always changes nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "custom_logit_processor": (),
    "documents": ([],),
    "ebnf": (),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "input_embeds": (),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logit_processors": ([],),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "lora_path": (),
    "modalities": (["text"], []),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning_effort": ("none",),
    "regex": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "session_params": (),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "web_search_options": (),
}

_HARMLESS = frozenset(
    {
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "separate_reasoning",
        "service_tier",
        "session_id",
        "store",
        "stream_interval",
        "stream_reasoning",
        "user",
        "verbosity",
    }
)


def check_unsupported(extra: Mapping[str, Any]) -> None:
    """Raise RequestError for a field that is not supported and would change the output."""
    for name, value in extra.items():
        if name in _REFUSED and value is not None and not _is_neutral(value, _REFUSED[name]):
            raise RequestError(
                f"{name} is not supported by this server yet; leave it out", param=name
            )


def unknown_fields(extra: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names that no server is known to have."""
    return (name for name in extra if name not in _REFUSED and name not in _HARMLESS)


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # True == 1 in Python, and `length_penalty: true` is not a 1.
    return any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral
    )
