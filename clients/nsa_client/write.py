"""An answer written to a terminal or a pipe as it comes."""

import re
import time
from dataclasses import dataclass
from typing import TextIO

from nsa_client.client import Stream
from nsa_client.errors import APIError

# Everything that can move the cursor or send a terminal a command; tab and newline stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Written:
    """An answer that was written. ttft_s: None when nothing came; num_tokens: when unknown."""

    text: str
    is_interrupted: bool
    ttft_s: float | None
    duration_s: float
    num_tokens: int | None

    def summary(self) -> str:
        """Say how long it took, for a person."""
        if self.ttft_s is None or self.num_tokens is None:
            return ""
        text = f"({self.num_tokens} tokens, the first after {self.ttft_s:.2f} s"
        decode_s = self.duration_s - self.ttft_s
        if self.num_tokens > 1 and decode_s > 0:
            text += f", then {(self.num_tokens - 1) / decode_s:.1f} tokens/s"
        return text + ")"


def write_stream(stream: Stream, out: TextIO) -> Written:
    """Write the pieces as they come. Ctrl-C ends the answer early, quietly.

    On a terminal, control characters that a model may produce are shown as U+FFFD, and the thought
    that the server separates is shown dim; elsewhere only the answer is written, as it is.
    """
    is_terminal = out.isatty()
    pieces: list[str] = []
    start_s = time.perf_counter()
    ttft_s = num_tokens = None
    is_interrupted = False
    try:
        with stream:
            for chunk in stream:
                if ttft_s is None and (chunk.text or chunk.reasoning):
                    ttft_s = time.perf_counter() - start_s
                if chunk.usage is not None:
                    num_tokens = chunk.usage.completion_tokens
                pieces.append(chunk.text)
                if is_terminal:
                    _write_terminal(chunk.text, chunk.reasoning, out)
                else:
                    out.write(chunk.text)
                out.flush()
    except KeyboardInterrupt:
        is_interrupted = True
    except APIError:
        if ttft_s is not None:
            out.write("\n")
        raise
    duration_s = time.perf_counter() - start_s
    out.write("\n")
    out.flush()
    return Written("".join(pieces), is_interrupted, ttft_s, duration_s, num_tokens)


def _write_terminal(text: str, reasoning: str, out: TextIO) -> None:
    if reasoning:
        out.write(_DIM + _CONTROL.sub("\ufffd", reasoning) + _NORMAL)
    out.write(_CONTROL.sub("\ufffd", text))
