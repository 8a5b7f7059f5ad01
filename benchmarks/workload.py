"""What the CPU benchmark asks of every engine: the same token ids, the same output lengths."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nsa_serve.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
# Distance between the first tokens of two concurrent prompts.
_STRIDE = 211


@dataclass(frozen=True)
class Scenario:
    """Prompts that are sent at once, and how many tokens each is to produce."""

    name: str
    prompts: list[list[int]]
    output_len: int


def documentation_text() -> str:
    """English prose that every checkout has: this project's own documents."""
    files = [ROOT / "README.md", ROOT / "LICENSE", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n\n".join(path.read_text() for path in files if path.name != "performance.md")


def make_scenarios(tokenizer: Tokenizer) -> list[Scenario]:
    """Return the scenarios of the CPU benchmark."""
    ids = tokenizer.encode(documentation_text(), add_special_tokens=False)
    if len(ids) < 7000:
        raise SystemExit(f"the documents have {len(ids)} tokens; the benchmark needs 7000")
    many = [ids[i * _STRIDE : i * _STRIDE + 128] for i in range(16)]
    return [
        Scenario("single", [ids[:128]], 129),
        Scenario("concurrent_16", many, 129),
        Scenario("prompt_2048", [ids[:2048]], 1),
        Scenario("prompt_7000", [ids[:7000]], 1),
        Scenario("context_1k", [ids[:1024]], 129),
        Scenario("context_7k", [ids[:7000]], 129),
    ]


def write_workload(path: Path, scenarios: list[Scenario], *, repeats: int) -> None:
    """Write the workload that the peers' scripts read."""
    data = {"repeats": repeats, "scenarios": [asdict(scenario) for scenario in scenarios]}
    path.write_text(json.dumps(data))
