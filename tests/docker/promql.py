"""Finds what a PromQL expression names: series, label matchers, labels it groups by."""

import re
from dataclasses import dataclass

_KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
_MATCHER = re.compile(r'\s*(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*(?:,|$)')
_NAME = re.compile(r"(?<![\w.:$])([a-zA-Z_:][\w:]*)\b(?!\s*\()")


@dataclass(frozen=True, slots=True)
class Matcher:
    """One label matcher of the series `name`."""

    name: str
    label: str
    operator: str
    value: str


def matchers(expression: str) -> list[Matcher]:
    """Return all label matchers."""
    return [
        Matcher(name, *found)
        for name, inside in _SELECTOR.findall(expression)
        for found in _MATCHER.findall(inside)
    ]


def grouping_labels(expression: str) -> set[str]:
    """Return the labels of `by (...)` and its relatives."""
    lists = (inside for _, inside in _GROUPING.findall(expression))
    return {label.strip() for inside in lists for label in inside.split(",") if label.strip()}


def series_names(expression: str) -> set[str]:
    """Return the names of series."""
    text = re.sub(r'"[^"]*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", text)
    text = _GROUPING.sub("", text)
    return set(_NAME.findall(text)) - _KEYWORDS
