"""Grammars of strangers: sizes, the process that compiles them, its limits and its cache."""

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from nsa_serve.errors import NSAServeError, QueueFullError, RequestError
from nsa_serve.request import StructuredOutput
from nsa_serve.structured import grammar
from nsa_serve.structured.compiler import GrammarCompiler
from nsa_serve.structured.matcher import (
    GrammarError,
    TokenTable,
    Vocabulary,
    check_matcher,
    make_table,
)
from tests.engine.byte_tokenizer import make_byte_tokenizer
from tests.engine.tiny_tokenizers import tokenizer_of

TABLE = TokenTable(
    tokens=[*(bytes([i]) for i in range(256)), b"<eos>"], special_ids=[256], eos_ids=[256]
)
OBJECT = grammar.json_object()


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    # Long limits: a busy machine must not turn a good grammar into a refused one.
    compiler = GrammarCompiler(lambda: TABLE, time_limit_s=30.0)
    yield compiler
    compiler.close()


def check(compiler: GrammarCompiler, structured: StructuredOutput) -> StructuredOutput:
    return compiler.submit(structured, param="p").result()


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def properties(count: int) -> dict[str, Any]:
    names = [f"p{i}" for i in range(count)]
    return {"properties": {name: {"type": "integer"} for name in names}, "required": names}


ACCEPTED: list[tuple[str, Callable[[], StructuredOutput]]] = [
    ("schema", lambda: grammar.json_schema(properties(5), param="p")),
    ("nested-plus", lambda: grammar.regex("(a+)+b", param="p")),
    ("nested-counts", lambda: grammar.regex("((a{1,200}){1,200}){1,200}b", param="p")),
    ("dots", lambda: grammar.regex("(.{0,1000}x){0,50}", param="p")),
    ("exponential-dfa", lambda: grammar.regex("(a|b)*a(a|b){24}", param="p")),
    ("counted-tail", lambda: grammar.regex(".*a.{30}", param="p")),
    ("many-properties", lambda: grammar.json_schema(properties(1400), param="p")),
    ("long-string", lambda: grammar.json_schema({"maxLength": 10**7}, param="p")),
    ("long-array", lambda: grammar.json_schema({"minItems": 10**6}, param="p")),
    (
        "recursive",
        lambda: grammar.json_schema({"properties": {"a": {"$ref": "#"}}}, param="p"),
    ),
    ("all-of", lambda: grammar.json_schema({"allOf": [{"type": "object"}] * 24}, param="p")),
]
REFUSED: list[tuple[str, Callable[[], StructuredOutput], str]] = [
    ("parentheses", lambda: grammar.regex("(" * 30_000 + ")" * 30_000, param="p"), "at most 8192"),
    ("parentheses-short", lambda: grammar.regex("(" * 4000 + ")" * 4000, param="p"), "p: "),
    ("deep-schema", lambda: grammar.json_schema(nested(300), param="p"), "601 levels"),
    (
        "large-enum",
        lambda: grammar.json_schema({"enum": [f"v{i}" for i in range(100_000)]}, param="p"),
        "at most 65536",
    ),
    ("if", lambda: grammar.json_schema({"if": {}, "then": {}}, param="p"), 'keys: \\["if", "then"'),
    ("not", lambda: grammar.json_schema({"not": {"type": "null"}}, param="p"), 'keys: \\["not"'),
    ("look-ahead", lambda: grammar.json_schema({"pattern": "(?=a)b"}, param="p"), "look-around"),
    ("left-over", lambda: grammar.grammar("start: " + "(" * 20_000, param="p"), "p: "),
    ("format", lambda: grammar.json_schema({"format": "no-such"}, param="p"), "no-such"),
    (
        "lenient",
        lambda: grammar.json_schema({"x-guidance": {"lenient": True}, "not": {}}, param="p"),
        'keys: \\["not"',
    ),
    ("ref-loop", lambda: grammar.json_schema({"$ref": "#"}, param="p"), "p: "),
    ("remote", lambda: grammar.json_schema({"$ref": "http://x/y"}, param="p"), "not fetch"),
]


@pytest.mark.parametrize("make", [item[1] for item in ACCEPTED], ids=[item[0] for item in ACCEPTED])
def test_a_heavy_grammar_that_can_be_followed_is_accepted(
    compiler: GrammarCompiler, make: Callable[[], StructuredOutput]
) -> None:
    structured = make()
    assert check(compiler, structured) == structured
    assert check(compiler, OBJECT) == OBJECT


@pytest.mark.parametrize(
    ("make", "words"), [item[1:] for item in REFUSED], ids=[item[0] for item in REFUSED]
)
def test_a_hostile_grammar_is_refused_with_its_reason(
    compiler: GrammarCompiler, make: Callable[[], StructuredOutput], words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        check(compiler, make())
    assert caught.value.param == "p"
    assert len(str(caught.value)) < 600
    assert check(compiler, OBJECT) == OBJECT


@pytest.mark.parametrize(
    "structured",
    [
        grammar.regex("(a{1,200}){1,200}b", param="p"),
        grammar.regex(".*a.{30}", param="p"),
        grammar.grammar('start: a\na: a a | "x" | "xx" | "xxx"', param="p"),
        grammar.json_schema({"type": "string", "maxLength": 10**7}, param="p"),
    ],
    ids=lambda item: item.value[:20],
)
def test_following_a_hostile_grammar_ends_in_masks_or_a_clean_error(
    structured: StructuredOutput,
) -> None:
    matcher = Vocabulary(TABLE).compile(structured)
    for token_id in b'"' * (structured.kind == "json_schema") + b"ax" * 300:
        bits = matcher.compute_bitmask()
        try:
            check_matcher(matcher)
        except GrammarError as error:
            assert "limit" in str(error) or "too" in str(error).lower()
            return
        if bits[token_id // 8] >> token_id % 8 & 1:
            matcher.consume_token(token_id)


@pytest.mark.parametrize(
    ("options", "spaces"),
    [({}, 40), ({"whitespace_flexible": False, "whitespace_pattern": None}, 0)],
    ids=["flexible", "compact"],
)
def test_white_space_in_json_is_bounded(options: dict[str, Any], spaces: int) -> None:
    schema = {"type": "object", "x-guidance": options}
    matcher = Vocabulary(TABLE).compile(grammar.json_schema(schema, param="p"))
    matcher.consume_tokens(list(b"{"))
    num_allowed = 0
    while matcher.compute_bitmask()[ord("\n") // 8] >> ord("\n") % 8 & 1:
        matcher.consume_token(ord("\n"))
        num_allowed += 1
    assert num_allowed == spaces


def test_gbnf_becomes_lark(compiler: GrammarCompiler) -> None:
    lark = check(compiler, grammar.grammar('root ::= "yes" | "no"', param="p"))
    assert lark.kind == "grammar" and "start:" in lark.value
    assert check(compiler, lark) == lark


@pytest.mark.parametrize(
    "make",
    [
        lambda: grammar.regex("", param="p"),
        lambda: grammar.regex(3, param="p"),
        lambda: grammar.regex("\ud800", param="p"),
        lambda: grammar.choice([], param="p"),
        lambda: grammar.choice("yes", param="p"),
        lambda: grammar.choice(["a", ""], param="p"),
        lambda: grammar.choice(["a"] * 1025, param="p"),
        lambda: grammar.choice(["a" * 70_000], param="p"),
        lambda: grammar.grammar(None, param="p"),
        lambda: grammar.grammar("start: " + "x" * 70_000, param="p"),
        lambda: grammar.json_schema(True, param="p"),
        lambda: grammar.json_schema(nested(16), param="p"),
        lambda: grammar.json_schema({"const": "x" * 70_000}, param="p"),
    ],
)
def test_sizes_and_types_are_checked_before_anything_compiles(
    make: Callable[[], StructuredOutput],
) -> None:
    with pytest.raises(RequestError) as caught:
        make()
    assert caught.value.param == "p"


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput("json_schema", "{"),
        StructuredOutput("json_schema", "[" * 5000),
        StructuredOutput("choice", '["a", 1]'),
        StructuredOutput("regex", "a" * 9000),
        StructuredOutput("grammar", ""),
    ],
    ids=lambda item: item.value[:9],
)
def test_check_size_takes_constraints_of_any_origin(structured: StructuredOutput) -> None:
    with pytest.raises(RequestError):
        grammar.check_size(structured)
    grammar.check_size(StructuredOutput("choice", '["a"]'))


def test_a_table_has_the_bytes_of_every_token() -> None:
    for kind in ("byte_level", "llama", "metaspace"):
        tokenizer = tokenizer_of(kind)
        size = tokenizer.vocab_size + 9
        table = make_table(tokenizer, size, (2,))
        assert len(table.tokens) == size and table.tokens[-9:] == [b""] * 9
        vocabulary = Vocabulary(table)
        matcher = vocabulary.compile(grammar.regex("(the|quick)?.{0,3}", param="p"))
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        for token_id in range(size):
            is_eos = token_id == 2
            if (tokenizer.is_special(token_id) and not is_eos) or not table.tokens[token_id]:
                assert not allowed >> token_id & 1, token_id
        assert allowed >> 2 & 1
    with pytest.raises(GrammarError, match="no end-of-sequence"):
        make_table(make_byte_tokenizer(), 256, ())


def fake_worker(code: str) -> tuple[str, ...]:
    """A worker that answers the vocabulary and then runs `code` for each task."""
    program = (
        "import sys, time, os\n"
        "from nsa_serve.structured.worker import Verdict, read_frame, make_frame\n"
        "out = sys.stdout.buffer\n"
        "def answer(verdict):\n"
        "    out.write(make_frame(verdict)); out.flush()\n"
        "read_frame(sys.stdin.buffer); answer(Verdict())\n"
        "while (frame := read_frame(sys.stdin.buffer)) is not None:\n"
        f"    {code}\n"
    )
    return (sys.executable, "-c", program)


def test_a_grammar_over_the_time_limit_is_refused_and_its_process_killed() -> None:
    compiler = GrammarCompiler(
        lambda: TABLE, time_limit_s=0.2, command=fake_worker("time.sleep(3600)")
    )
    for _ in range(2):
        with pytest.raises(RequestError, match=r"took more than 0\.2 s"):
            check(compiler, OBJECT)
        assert compiler._worker is not None and not compiler._worker.is_alive
    assert compiler.find(OBJECT, param="p") is None
    compiler.close()


def test_a_worker_that_dies_refuses_one_grammar_and_is_replaced() -> None:
    code = "os._exit(1) if b'bad' in frame else answer(Verdict(reason='fine'))"
    compiler = GrammarCompiler(lambda: TABLE, time_limit_s=30.0, command=fake_worker(code))
    with pytest.raises(RequestError, match="too much memory"):
        check(compiler, grammar.regex("bad", param="p"))
    with pytest.raises(RequestError, match="fine"):
        check(compiler, grammar.regex("good", param="p"))
    # Known by now: no process is started for it.
    with pytest.raises(RequestError, match="too much memory"):
        compiler.find(grammar.regex("bad", param="p"), param="p")
    compiler.close()


def test_memory_of_the_worker_is_limited() -> None:
    code = "x = bytearray(4 << 30)"
    program = (
        "from nsa_serve.structured.worker import _limit_memory\n_limit_memory()\n"
        f"try:\n    {code}\nexcept MemoryError:\n    raise SystemExit(7)\n"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", program]) == 7


def test_the_cache_is_bounded_by_bytes_and_keeps_what_is_used() -> None:
    compiler = GrammarCompiler(lambda: TABLE, time_limit_s=30.0, max_cache_bytes=8000)
    kept = grammar.regex("k" * 100, param="p")
    check(compiler, kept)
    for i in range(40):
        check(compiler, grammar.regex(f"{i}" + "x" * 100, param="p"))
        assert compiler.find(kept, param="p") == kept
        assert compiler._cache._num_bytes <= 8000
    assert compiler.find(grammar.regex("0" + "x" * 100, param="p"), param="p") is None
    compiler.close()


def test_more_than_the_queue_holds_is_refused() -> None:
    gate = threading.Event()

    def slow_table() -> TokenTable:
        gate.wait()
        return TABLE

    compiler = GrammarCompiler(slow_table, time_limit_s=30.0, max_waiting=3)
    futures: list[Future[StructuredOutput]] = [
        compiler.submit(grammar.regex("a" * i, param="p"), param="p") for i in (1, 2, 3)
    ]
    with pytest.raises(QueueFullError) as caught:
        compiler.submit(OBJECT, param="p")
    assert caught.value.retry_after_s == 30
    assert futures[2].cancel()
    gate.set()
    assert [future.result().value for future in futures[:2]] == ["a", "aa"]
    assert check(compiler, OBJECT) == OBJECT
    compiler.close()


def test_closing_ends_the_process_and_what_waits() -> None:
    compiler = GrammarCompiler(
        lambda: TABLE, time_limit_s=60.0, command=fake_worker("time.sleep(3600)")
    )
    running = compiler.submit(OBJECT, param="p")
    waiting = compiler.submit(grammar.regex("a", param="p"), param="p")
    while compiler._worker is None:
        time.sleep(0.01)
    pid = compiler._worker._process.pid
    compiler.close()
    with pytest.raises(RequestError):
        running.result(timeout=60)
    assert waiting.cancelled()
    with pytest.raises(NSAServeError, match="shutting down"):
        compiler.submit(OBJECT, param="p")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_compiler_that_nobody_closes_leaves_no_process() -> None:
    compiler = GrammarCompiler(lambda: TABLE, time_limit_s=30.0)
    check(compiler, OBJECT)
    assert compiler._worker is not None
    pid = compiler._worker._process.pid
    del compiler
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_model_without_an_end_of_sequence_is_told() -> None:
    def no_table() -> TokenTable:
        raise GrammarError("the model has no end-of-sequence token")

    compiler = GrammarCompiler(no_table)
    with pytest.raises(RequestError, match="no end-of-sequence"):
        check(compiler, OBJECT)
    compiler.close()
