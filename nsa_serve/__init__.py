"""nsa-serve: an inference engine for language models with Native Sparse Attention.

    from nsa_serve import LLM, SamplingParams
    outputs = LLM("smollm2-135m-nsa").generate(["The sky is"], SamplingParams(max_tokens=16))

The names below are imported on first use, so that `import nsa_serve` does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nsa_serve.version import __version__

if TYPE_CHECKING:
    from nsa_serve.async_engine import AsyncEngine
    from nsa_serve.config import EngineConfig
    from nsa_serve.engine import Engine
    from nsa_serve.llm import LLM
    from nsa_serve.request import RequestOutput, SamplingParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "Engine",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_MODULES = {
    "LLM": "nsa_serve.llm",
    "AsyncEngine": "nsa_serve.async_engine",
    "Engine": "nsa_serve.engine",
    "EngineConfig": "nsa_serve.config",
    "RequestOutput": "nsa_serve.request",
    "SamplingParams": "nsa_serve.request",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nsa_serve' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
