"""What is trained on when: phases, the learning rate, and the clock that both follow.

Everything depends on progress, from 0 to 1: of the time (--minutes) or of the steps (--steps). A
shorter budget is the same recipe with fewer steps.
"""

import bisect
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

WARM_UP = 0.03
"""Progress at which the learning rate has risen to its height."""

FINAL_LR = 0.05
"""Learning rate at the end, of its height."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one kind and length; share: of the phase's steps."""

    kind: str
    length: int
    share: float


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the training.

    share: of the whole. mse_weight: of the error of each layer's attention. Which predictions the
    teacher teaches and which the text itself: `losses.split_weight`.
    """

    name: str
    share: float
    mse_weight: float
    sources: tuple[Source, ...]


PHASES = (
    Phase(
        "warm-up",
        0.12,
        1.0,
        (Source("books", 2048, 0.5), Source("text", 2048, 0.2), Source("chat", 2048, 0.3)),
    ),
    Phase(
        "main",
        0.48,
        0.0,
        (
            Source("books", 2048, 0.10),
            Source("books", 4096, 0.10),
            Source("books", 8192, 0.30),
            Source("text", 2048, 0.10),
            Source("chat", 2048, 0.20),
            Source("retrieval", 4096, 0.075),
            Source("retrieval", 8192, 0.125),
        ),
    ),
    Phase(
        "long",
        0.40,
        0.0,
        (
            Source("books", 2048, 0.10),
            Source("books", 8192, 0.15),
            Source("books", 16384, 0.20),
            Source("chat", 2048, 0.20),
            Source("retrieval", 2048, 0.025),
            Source("retrieval", 8192, 0.10),
            Source("retrieval", 16384, 0.225),
        ),
    ),
)

# The same three phases at a hundredth of the length, for a CPU.
TINY_PHASES = (
    Phase("warm-up", 0.3, 1.0, (Source("books", 96, 0.5), Source("text", 96, 0.5))),
    Phase("main", 0.4, 0.0, (Source("books", 160, 0.5), Source("text", 160, 0.5))),
    Phase("long", 0.3, 0.0, (Source("books", 480, 0.5), Source("text", 480, 0.5))),
)


class Clock:
    """Progress by time or by steps.

    budget_s: seconds for all steps, or None; num_steps: steps, or None; one of them is set.
    elapsed_s: seconds that earlier runs took.
    """

    def __init__(
        self, budget_s: float | None, num_steps: int | None, *, elapsed_s: float = 0.0
    ) -> None:
        if (budget_s is None) == (num_steps is None):
            raise ValueError(f"expected a time or a number of steps, got {budget_s}, {num_steps}")
        self.budget_s, self.num_steps = budget_s, num_steps
        self._start = time.monotonic() - elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, earlier runs included."""
        return time.monotonic() - self._start

    def progress(self, step: int, step_s: float) -> float:
        """Return what is done before `step`; at least 1 if a step of step_s would overrun."""
        if self.num_steps is not None:
            return step / self.num_steps
        assert self.budget_s is not None
        elapsed_s = self.elapsed_s
        return 1.0 if elapsed_s + step_s > self.budget_s else elapsed_s / self.budget_s


def usable_phases(phases: Sequence[Phase], kinds: Sequence[str]) -> list[Phase]:
    """Leave out sources whose kind there is no data of, and say so.

    Raises SystemExit when a phase has none left.
    """
    result = []
    for phase in phases:
        sources = tuple(source for source in phase.sources if source.kind in kinds)
        if not sources:
            wanted = ", ".join(sorted({source.kind for source in phase.sources}))
            raise SystemExit(
                f"phase {phase.name} needs one of {wanted}; the data has {', '.join(kinds)}"
            )
        result.append(Phase(phase.name, phase.share, phase.mse_weight, sources))
    missing = {s.kind for p in phases for s in p.sources} - set(kinds)
    if missing:
        print(f"no data of kind {', '.join(sorted(missing))}: the others take its share")
    return result


def fit(phase: Phase, context: int) -> Phase:
    """Leave out what is longer than the student's context."""
    sources = tuple(source for source in phase.sources if source.length <= context)
    if not sources:
        raise SystemExit(
            f"phase {phase.name} has no rows of {context} tokens or less, which is the student's "
            "context: raise --max-length, or use --rope yarn:4"
        )
    return Phase(phase.name, phase.share, phase.mse_weight, sources)


def shorten(phase: Phase, longest: int) -> Phase:
    """Give longer rows a length of `longest`."""
    sources = tuple(replace(source, length=min(source.length, longest)) for source in phase.sources)
    return replace(phase, sources=sources)


def pick_phases(phases: Sequence[Phase], names: Sequence[str] | None) -> list[Phase]:
    """Return the phases of these names, or all. Raises SystemExit for a name that none has."""
    known = {phase.name: phase for phase in phases}
    if names is None:
        return list(phases)
    if unknown := set(names) - set(known):
        raise SystemExit(
            f"--phases: no phase is named {', '.join(sorted(unknown))}; {', '.join(known)} are"
        )
    return [known[name] for name in names]


def choose(
    phases: Sequence[Phase], progress: float, rng: np.random.Generator
) -> tuple[Phase, Source]:
    """Return the phase at `progress`, and one of its sources by their shares."""
    ends = list(_ends(phases))
    index = min(bisect.bisect_right(ends, progress), len(ends) - 1)
    phase = phases[index]
    shares = np.array([source.share for source in phase.sources])
    return phase, phase.sources[int(rng.choice(len(shares), p=shares / shares.sum()))]


def learning_rate(progress: float) -> float:
    """Return the factor of the learning rate: a linear rise, then half a cosine."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    done = min(1.0, (progress - WARM_UP) / (1.0 - WARM_UP))
    return FINAL_LR + (1.0 - FINAL_LR) * 0.5 * (1.0 + math.cos(math.pi * done))


def _ends(phases: Sequence[Phase]) -> Iterator[float]:
    total, done = sum(phase.share for phase in phases), 0.0
    for phase in phases:
        done += phase.share
        yield done / total
