"""Write the table of differences from vLLM into docs/serving.md, from benchmarks/results."""

import json
from typing import Any

from workload import ROOT

_BEGIN = "<!-- referee:begin (benchmarks/referee_docs.py writes this) -->"
_END = "<!-- referee:end -->"
_MAX_NAMES = 3


def differences_section(result: dict[str, Any]) -> str:
    """Return the Markdown: what was compared, and each reason with the differences it explains."""
    by_reason: dict[str, list[str]] = {}
    for name, entry in result["differences"].items():
        by_reason.setdefault(entry["reason"] or "no reason is known", []).append(name)
    num_equal = sum(ours == vllm for ours, vllm in result["statuses"].values())
    lines = [
        f"{result['num_cases']} requests to both servers on the same float32 weights (vLLM "
        f"{result['vllm']}, CPU build, `{result['command']}`): {num_equal} have the same status. "
        "What differs, and why; `benchmarks/results/referee.json` has every single one.",
        "",
        "| why | differences | such as |",
        "|---|---|---|",
    ]
    for reason, names in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = ", ".join(f"`{_cell(name)}`" for name in names[:_MAX_NAMES])
        lines.append(f"| {reason} | {len(names)} | {shown} |")
    return "\n".join(lines)


def write_docs() -> None:
    """Replace the text between the markers in docs/serving.md."""
    path = ROOT / "docs" / "serving.md"
    result = json.loads((ROOT / "benchmarks" / "results" / "referee.json").read_text())
    before, _, rest = path.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise SystemExit(f"docs/serving.md lacks the lines {_BEGIN} and {_END}")
    path.write_text(f"{before}{_BEGIN}\n\n{differences_section(result)}\n\n{_END}{after}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")


if __name__ == "__main__":
    write_docs()
