"""Request fields that other servers know and this one does not.

Those that would change the output are refused, unless the value says "off"; those that cannot are
ignored in silence. Every other field is unknown: ignored, with one warning.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from nsa_serve.errors import RequestError

# Field -> the values that change nothing. None always changes nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "custom_logit_processor": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "input_embeds": (),
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
    "repetition_detection": (),
    "return_token_offsets": (False,),
    "session_params": (),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ([],),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "web_search_options": (),
}

# Former or foreign names of what this server has.
_RENAMED = {
    "ebnf": "structured_outputs.grammar",
    "grammar": "structured_outputs.grammar",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_whitespace_pattern": "structured_outputs.whitespace_pattern",
    "json_schema": "structured_outputs.json",
    "regex": "structured_outputs.regex",
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


REFUSED_FIELDS = frozenset(_REFUSED)
_KNOWN = _REFUSED.keys() | _RENAMED.keys() | _HARMLESS


def check_unsupported(extra: Mapping[str, Any]) -> None:
    """Raise RequestError for a field that is not supported and would change the output."""
    for name, value in extra.items():
        if value is not None and name in _RENAMED:
            raise RequestError(
                f"{name} is not supported; send {_RENAMED[name]} instead", param=name
            )
        if name in _REFUSED and value is not None and not _is_neutral(value, _REFUSED[name]):
            raise RequestError(
                f"{name} is not supported by this server yet; leave it out", param=name
            )


def unknown_fields(extra: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names that no server is known to have."""
    return (name for name in extra if name not in _KNOWN)


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # True == 1 in Python, and `length_penalty: true` is not a 1.
    return any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral
    )
