"""llguidance behind one module: the vocabulary, and matchers that say which tokens may follow."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from nsa_serve.request import StructuredOutput
from nsa_serve.structured.grammar import choice_pattern

if TYPE_CHECKING:
    # The worker gets a table instead, and starts faster without the tokenizer's libraries.
    from nsa_serve.tokenizer import Tokenizer

Encode = Callable[[str], list[int]]

_MAX_REASON_CHARS = 400
# Between the tokens of JSON. With no bound, a weak model can go on with line ends to its limit.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
# A state takes 1 to 2 kB.
_MAX_LEXER_STATES = 25_000
# One mask: 10 ms of the lexer and 2 ms of the parser at most, whatever the grammar is.
_STEP_LEXER_FUEL = 150_000
_STEP_MAX_ITEMS = 40_000


class GrammarError(ValueError):
    """A grammar that cannot be used; the text says why, for the one who wrote it."""


class TokenTable(msgspec.Struct, frozen=True):
    """The bytes of every token id, and which ids are special; enough to build matchers from."""

    tokens: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]


def make_table(tokenizer: "Tokenizer", vocab_size: int, eos_ids: tuple[int, ...]) -> TokenTable:
    """Return the table of a model's `vocab_size` tokens; ids beyond the tokenizer's never match.

    Raises GrammarError when the model has no end-of-sequence token: no grammar could end then.
    """
    if not eos_ids:
        raise GrammarError("the model has no end-of-sequence token")
    return TokenTable(
        tokens=[tokenizer.token_bytes(token_id) for token_id in range(vocab_size)],
        special_ids=[token_id for token_id in range(vocab_size) if tokenizer.is_special(token_id)],
        eos_ids=list(eos_ids),
    )


class _TokenizerWrapper:
    """What LLTokenizer wants to see of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, table: TokenTable, encode: Encode) -> None:
        self.tokens = table.tokens
        self.special_token_ids = table.special_ids
        self.eos_token_id = table.eos_ids[0]
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())


class Vocabulary:
    """A vocabulary in llguidance's form.

    encode: the model's tokenization of text. Where a grammar leaves one text only, that text is
    tokenized as the model would; None is the longest match, which will do to check a grammar.
    """

    def __init__(self, table: TokenTable, encode: Encode | None = None) -> None:
        wrapper = _TokenizerWrapper(table, encode or _longest_match(table))
        self._tokenizer = LLTokenizer(
            wrapper,  # type: ignore[arg-type]
            n_vocab=len(table.tokens),
            eos_token=table.eos_ids,
        )
        self._limits = LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES,
            step_lexer_fuel=_STEP_LEXER_FUEL,
            step_max_items=_STEP_MAX_ITEMS,
            verbose_errors=False,
        )

    @property
    def size(self) -> int:
        """Number of token ids."""
        return self._tokenizer.vocab_size

    def compile(self, structured: StructuredOutput) -> LLMatcher:
        """Return a matcher at the start of the output. Raises GrammarError."""
        try:
            text = grammar_text(structured)
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        except ValueError as error:
            raise GrammarError(_one_line(str(error))) from None
        check_matcher(matcher)
        # These are keywords that would be ignored.
        warnings = matcher.get_grammar_warnings()
        if warnings:
            raise GrammarError(_one_line(warnings[0]))
        return matcher


def grammar_text(structured: StructuredOutput) -> str:
    """Return the constraint in llguidance's own form. Raises GrammarError."""
    match structured.kind:
        case "regex":
            return LLMatcher.grammar_from_regex(structured.value)
        case "choice":
            return LLMatcher.grammar_from_regex(choice_pattern(json.loads(structured.value)))
        case "grammar":
            return LLMatcher.grammar_from_lark(structured.value)
        case "json_object":
            schema = '{"type": "object"}'
        case "json_schema":
            schema = structured.value
    # A schema can carry options of its own, and one of them makes llguidance ignore keywords.
    return LLMatcher.grammar_from_json_schema(
        schema, {"whitespace_pattern": _WHITESPACE}, {"lenient": False}
    )


def to_lark(structured: StructuredOutput) -> StructuredOutput:
    """Return a grammar that came as GBNF as Lark, and everything else as it is.

    Raises GrammarError.
    """
    if structured.kind != "grammar":
        return structured
    try:
        return StructuredOutput("grammar", any_to_lark(structured.value))
    # The converter raises bare Exceptions.
    except Exception as error:
        raise GrammarError(_one_line(str(error))) from None


def check_matcher(matcher: LLMatcher) -> None:
    """Raise GrammarError when the matcher has given up."""
    if matcher.is_error():
        raise GrammarError(_one_line(matcher.get_error()))


def _one_line(text: str) -> str:
    joined = " ".join(text.replace("<non-verbose/>", "").split())
    return joined if len(joined) <= _MAX_REASON_CHARS else joined[:_MAX_REASON_CHARS] + "..."


def _longest_match(table: TokenTable) -> Encode:
    specials = set(table.special_ids)
    ids = {token: i for i, token in enumerate(table.tokens) if token and i not in specials}
    longest = max(map(len, ids), default=0)

    def encode(text: str) -> list[int]:
        rest, found = text.encode(), list[int]()
        while rest:
            size = next((n for n in range(min(longest, len(rest)), 0, -1) if rest[:n] in ids), 0)
            if not size:
                # A byte without a token: nothing after it can be reached either.
                return found
            found.append(ids[rest[:size]])
            rest = rest[size:]
        return found

    return encode
