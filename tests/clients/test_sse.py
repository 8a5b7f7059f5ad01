"""The event stream decoder against the examples and rules of the WHATWG standard."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_client.sse import ServerSentEvent, SSEDecoder

CASES = {
    "one line": (b"data: a\n\n", [("message", "a")]),
    "no space after the colon": (b"data:a\n\n", [("message", "a")]),
    "only one space is removed": (b"data:  a\n\n", [("message", " a")]),
    "several data lines": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10")]),
    "empty data lines": (b"data\n\ndata\ndata\n\ndata:", [("message", ""), ("message", "\n")]),
    "comments": (b": keep-alive\n\n:\ndata: a\n: b\n\n", [("message", "a")]),
    "CR": (b"data: a\rdata: b\r\rdata: c\r\r", [("message", "a\nb"), ("message", "c")]),
    "CRLF": (b"data: a\r\ndata: b\r\n\r\ndata: c\r\n\r\n", [("message", "a\nb"), ("message", "c")]),
    "mixed line ends": (b"data: a\r\n\ndata: b\n\r", [("message", "a"), ("message", "b")]),
    "event name": (b"event: add\ndata: 1\n\ndata: 2\n\n", [("add", "1"), ("message", "2")]),
    "event without data": (b"event: add\n\ndata: 2\n\n", [("message", "2")]),
    "unknown fields": (b"foo: bar\nretry: 10\ndata: a\nfoo\n\n", [("message", "a")]),
    "colon in the value": (b"data: a:b: c\n\n", [("message", "a:b: c")]),
    "byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [("message", "a")]),
    "byte order mark later": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [("message", "a")]),
    "unfinished event": (b"data: a\n\ndata: b\n", [("message", "a")]),
    "UTF-8": ("data: é€😀\n\n".encode(), [("message", "é€😀")]),
    "invalid UTF-8": (b"data: \xff\n\n", [("message", "�")]),
    "separators that are no line ends": (
        "data: a\u2028b\x0bc\x0cd\x1ce\x85f\n\n".encode(),
        [("message", "a\u2028b\x0bc\x0cd\x1ce\x85f")],
    ),
}


def decode(*pieces: bytes) -> list[tuple[str, str]]:
    decoder = SSEDecoder()
    return [(event.event, event.data) for piece in pieces for event in decoder.feed(piece)]


@pytest.mark.parametrize(("data", "expected"), CASES.values(), ids=CASES)
def test_events_are_the_same_however_the_bytes_are_cut(
    data: bytes, expected: list[tuple[str, str]]
) -> None:
    assert decode(data) == expected
    assert decode(*(data[i : i + 1] for i in range(len(data)))) == expected
    for cut in range(len(data) + 1):
        assert decode(data[:cut], b"", data[cut:]) == expected


def test_last_event_id_stays_until_replaced_and_may_not_hold_nul() -> None:
    decoder = SSEDecoder()
    events = decoder.feed(b"id: 1\ndata: a\n\ndata: b\n\nid: 2\0\ndata: c\n\nid\ndata: d\n\n")
    assert events == [
        ServerSentEvent("a", last_event_id="1"),
        ServerSentEvent("b", last_event_id="1"),
        ServerSentEvent("c", last_event_id="1"),
        ServerSentEvent("d", last_event_id=""),
    ]


@given(
    lines=st.lists(st.sampled_from([b"data: x", b"data", b": c", b"", b"event: e", b"id: 3"])),
    ends=st.lists(st.sampled_from([b"\n", b"\r", b"\r\n"]), min_size=1),
    cuts=st.lists(st.integers(0, 200)),
)
def test_random_streams_are_cut_anywhere(
    lines: list[bytes], ends: list[bytes], cuts: list[int]
) -> None:
    # A CR that an LF-ended empty line follows would read as one CRLF, so the end is one per stream.
    stream = b"".join(line + ends[0] for line in lines)
    expected = []
    data: list[str] = []
    name = "message"
    for line in lines:
        if line == b"event: e":
            name = "e"
        elif line.startswith(b"data"):
            data.append("x" if line.endswith(b"x") else "")
        elif not line:
            if data:
                expected.append((name, "\n".join(data)))
            data, name = [], "message"
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    assert decode(*(stream[a:b] for a, b in pairwise(edges))) == expected
