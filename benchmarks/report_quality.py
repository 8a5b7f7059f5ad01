"""The part of docs/performance.md about quality: tables of what `quality.py` measured."""

import json
from pathlib import Path
from typing import Any

_BRANCHES = ("cmp", "slc", "swa")


def quality_section(results: Path) -> str:
    """Return the Markdown, empty when nothing has been measured."""
    path = results / "quality.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text())
    return "\n".join(
        [
            "## Quality of the default model",
            "",
            f"{result['device_name']}, torch {result['torch']}, commit {result['commit']}, "
            f"{result['date']}. Command: `{result['command']}`.",
            "",
            quality_tables(result),
        ]
    )


def quality_tables(result: dict[str, Any]) -> str:
    """Return the tables of one run; parts that were not run are left out."""
    models, sizes = result["models"], result["sizes"]
    lines: list[str] = []
    if any("ppl" in row for row in models.values()):
        lines += [
            f"Perplexity on held-out books: the same {sizes['num_spans']} x "
            f"{sizes['num_targets']} tokens at every context and for every model. The dense base "
            "was made for 8192 tokens and is not extended.",
            "",
            *_by_size(models, "ppl", sizes["contexts"], "ppl", "{:.3f}"),
        ]
    ablation = {name: row for name, row in result["ablation"].items() if "ppl" in row}
    if ablation:
        whole = {"whole": models["student"]} if "ppl" in models.get("student", {}) else {}
        lines += ["Perplexity of the student without a branch:", ""]
        lines += _by_size(whole | ablation, "ppl", sizes["ablation_contexts"], "ppl", "{:.3f}")
    for part, label in (("passkey", "Passkey"), ("pairs", "Key-value")):
        if any(part in row for row in models.values()):
            lines += [
                f"{label} retrieval, greedy, accuracy by length of the prompt with its answer:",
                "",
            ]
            lines += _by_size(models, part, sizes["lengths"], "accuracy", "{:.2f}")
            lines += ["By depth:", ""]
            lines += _by_depth(models, part, sizes["lengths"])
    lines += _others(models)
    shares = models.get("student", {}).get("branches")
    if shares:
        lines += ["Share of output norm of each branch of the student, by layer:", ""]
        rows = [
            [branch, *(f"{row[i]:.2f}" for row in shares)] for i, branch in enumerate(_BRANCHES)
        ]
        lines += _table(["", *map(str, range(len(shares)))], rows)
    return "\n".join(lines)


def chat_section(result: dict[str, Any]) -> str:
    """Return the fixed prompts with every model's greedy answers, for a model card."""
    models = {name: row["chat"] for name, row in result["models"].items() if "chat" in row}
    if not models:
        return ""
    prompts = next(iter(models.values()))["prompts"]
    lines: list[str] = []
    for index, prompt in enumerate(prompts):
        lines += [f"**{prompt}**", ""]
        for name, row in models.items():
            lines += [f"{name}:", "", *(f"> {line}" for line in row["answers"][index].split("\n"))]
            lines.append("")
    return "\n".join(lines)


def fill_card(text: str, result: dict[str, Any]) -> str:
    """Return a model card whose generated parts are those of a result.

    They stand between `<!-- NAME -->` and `<!-- end of NAME -->`, NAME being "figures" and "chats".
    Raises ValueError where a mark is missing.
    """
    for name, part in (("figures", quality_tables(result)), ("chats", chat_section(result))):
        first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(first)
        _, also_found, after = rest.partition(last)
        if not found or not also_found:
            raise ValueError(f"the model card has no {first} with {last} after it")
        text = f"{before}{first}\n\n{part.strip()}\n\n{last}{after}"
    return text


def _by_size(
    rows: dict[str, Any], part: str, sizes: list[int], figure: str, form: str
) -> list[str]:
    cells = [
        [name, *(_cell(row[part].get(str(size), {}).get(figure), form) for size in sizes)]
        for name, row in rows.items()
        if part in row
    ]
    return _table(["tokens", *map(str, sizes)], cells)


def _by_depth(models: dict[str, Any], part: str, sizes: list[int]) -> list[str]:
    rows, depths = [], []
    for name, row in models.items():
        for size in sizes:
            if by_depth := row.get(part, {}).get(str(size), {}).get("by_depth"):
                depths = list(by_depth)
                cells = [_cell(value, "{:.2f}") for value in by_depth.values()]
                rows.append([name, str(size), *cells])
    return _table(["", "tokens", *depths], rows)


def _others(models: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in models.items():
        chat, cloze = row.get("chat", {}), row.get("cloze", {})
        if chat or cloze:
            figures = (cloze.get("accuracy"), chat.get("next_token"), chat.get("equal"))
            cells = [_cell(value, "{:.3f}") for value in figures]
            rows.append([name, *cells, _cell(chat.get("prefix"), "{:.1f}")])
    if not rows:
        return []
    return [
        "Cloze: the last word of a held-out passage among four, by likelihood. Chat: the first 64 "
        "tokens of greedy answers beside the dense base's: its tokens that are this model's "
        "likeliest next ones, equal tokens by place, and equal tokens at the beginning.",
        "",
        *_table(["", "cloze", "chat: next token", "equal", "prefix, tokens"], rows),
    ]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]
