"""The examples as a reader runs them, against a server with the default model.

LangChain and LiteLLM have requirements of their own; `examples/check.sh` runs those.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.process import Server

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LINES = {
    "openai_chat.py": ["completion: ", "usage: 8 tokens", "error: temperature must be from 0 to 2"],
    "openai_async.py": ["cat: ", "whale: ", "bee: ", "cancelled after 5 chunks"],
    "openai_tools.py": ["call: get_weather {'city': 'Paris'", "streamed call in ", "answer: "],
    "openai_structured.py": ["pydantic: City(name=", "streamed schema: ", "choice: ", "regex: "],
    "nsa_client_chat.py": ["ready: True", "tools: (ToolCall(", "  layer 15, KV head 0 read blocks"],
    "curl.sh": ["health: 200", "data: [DONE]", '"param":"temperature"'],
}


@pytest.mark.e2e
@pytest.mark.parametrize("name", LINES)
def test_example(name: str, default_server: Server) -> None:
    program = ["bash"] if name.endswith(".sh") else [sys.executable]
    done = subprocess.run(
        [*program, str(EXAMPLES / name), "--base-url", f"{default_server.url}/v1"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "clients")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in LINES[name]:
        assert line in done.stdout


def test_every_example_is_run() -> None:
    """Here, or by examples/check.sh, which runs all of them."""
    examples = {path.name for path in EXAMPLES.glob("*") if path.is_file()}
    examples -= {"check.sh", "README.md"}
    check = (EXAMPLES / "check.sh").read_text(encoding="utf-8")
    assert set(LINES) <= examples
    assert {name for name in examples if name not in check} == set()
