"""Keys and values of every branch: windows over two pages, tails by page, prefixes taken over.

Passed entries of the window page table lie far outside of the cache, on both paths.
"""

import pytest
import torch

from nsa_kernels.metadata import build_metadata
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.problem import PAPER, Problem, assert_close, make_problem
from tests.kernels.test_gpu_append import make_sequences

# l, d, l'. With 24 and 96, token p and p + page_size are not the same entry of their tails.
GEOMETRIES = [
    (8, 8, 8),
    (8, 4, 8),
    (8, 4, 16),
    (8, 2, 32),
    (16, 16, 16),
    (24, 8, 32),
    (32, 32, 64),
    (32, 16, 64),
    (48, 16, 64),
    (64, 16, 64),
    (96, 32, 128),
]
PATHS = ["torch", "gpu"]


def make(spec: NSASpec, lengths: list[int], path: str, **arguments: object) -> Problem:
    device = DEVICE if path == "gpu" else None
    return make_problem(
        spec, lengths, path=path, device=device, separate=True, heads=1, group=2, **arguments  # type: ignore[arg-type]
    )  # fmt: skip


def spec_of(geometry: tuple[int, int, int], window_size: int | None = None) -> NSASpec:
    cmp_len, cmp_stride, block_size = geometry
    return NSASpec(
        cmp_len=cmp_len,
        cmp_stride=cmp_stride,
        block_size=block_size,
        num_selected_blocks=4,
        window_size=block_size + 3 if window_size is None else window_size,
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_steps_end_anywhere_around_a_page_boundary(
    geometry: tuple[int, int, int], path: str
) -> None:
    """Chunks and single tokens; windows narrower than compression's, and wider than a page."""
    cmp_len, cmp_stride, size = geometry
    cuts = {size - 1, size, size + 1, size + cmp_stride, 2 * size - cmp_len + 1, 2 * size + 1}
    for window_size in (3, size + 3):
        problem = make(spec_of(geometry, window_size), [3 * size + 2], path)
        start = 0
        for cut in sorted(cuts):
            for stop in (cut, cut + 1):
                if stop > start:
                    is_decode = stop == start + 1
                    output = problem.run([start], [stop - start], num_decode_rows=int(is_decode))
                    assert_close(output[0], problem.expected(0, start, stop))
                    start = stop


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_token_after_any_other(geometry: tuple[int, int, int]) -> None:
    """A prompt cut at any token of its second page, then one token at a time."""
    cmp_len, _, size = geometry
    spec = spec_of(geometry)
    length = 2 * size + cmp_len
    for cut in range(size - 1, 2 * size + 1):
        problem = make(spec, [length], "torch", dim=4, v_dim=4)
        problem.run([0], [cut])
        stop = min(cut + cmp_len + 1, length)
        outputs = [
            problem.run([position], [1], num_decode_rows=1)[0] for position in range(cut, stop)
        ]
        assert_close(torch.cat(outputs), problem.expected(0, cut, stop))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("hidden", [None, (20, 12)])
def test_kernels_file_windows_and_tails_however_chunks_are_cut(
    geometry: tuple[int, int, int], hidden: tuple[int, int] | None
) -> None:
    """Every tail holds the last tokens of its page, and nothing else."""
    cmp_len, cmp_stride, size = geometry
    cuts = [size + 1, size + cmp_len - 1, 2 * size - cmp_stride, 2 * size]
    for cut in cuts:
        sequences = make_sequences(
            spec_of(geometry), [cut + size + 1, cut + 2], separate=True, hidden=hidden, heads=1
        )
        sequences.step([0, 0], [cut, cut])
        sequences.check([cut, cut])
        # A single token beside a chunk.
        sequences.tokens.reverse()
        sequences.pages.reverse()
        sequences.swa_pages.reverse()
        sequences.step([cut, cut], [1, size + 1], num_decode_rows=1)
        sequences.check([cut + 1, cut + size + 1])


def share_prefix(problem: Problem, num_pages: int) -> None:
    """Let sequence 1 begin with the tokens of sequence 0, and with its pages."""
    count = num_pages * problem.spec.block_size
    for tensors in (
        problem.q, problem.k, problem.v, problem.k_cmp, problem.v_cmp, problem.k_swa, problem.v_swa,
    ):  # fmt: skip
        tensors[1][:count] = tensors[0][:count]
    for pages in (problem.pages, problem.swa_pages):
        pages[1][:num_pages] = pages[0][:num_pages]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("num_shared", [1, 2, 3])
def test_a_sequence_starts_from_the_pages_of_another(num_shared: int, mlp: bool, path: str) -> None:
    """The pages were filled by a chunk that went on behind them, and are left as they are."""
    spec = NSASpec(cmp_len=24, cmp_stride=8, block_size=32, num_selected_blocks=4, window_size=40)
    size = spec.block_size
    start = num_shared * size
    problem = make(spec, [4 * size + 5, start + size + 9], path, mlp=mlp)
    share_prefix(problem, num_shared)
    problem.run([0], [4 * size + 5], rows=[0])
    cache = problem.cache
    tensors = (cache.k, cache.v, cache.k_swa, cache.v_swa, cache.k_tail, cache.v_tail)
    shared = (problem.pages[0], problem.swa_pages[0])

    def contents() -> list[torch.Tensor]:
        bits = [x.view(torch.int32).clone() for x in tensors if x is not None]
        return [x[shared[i >= 2]] for i, x in enumerate(bits)]

    before = contents()
    # The first row is the other's only window: it closes two tokens after the shared pages.
    for stop, is_decode in ((start + 1, True), (start + size + 6, False), (start + size + 7, True)):
        output = problem.run([start], [stop - start], rows=[1], num_decode_rows=int(is_decode))[0]
        assert_close(output, problem.expected(1, start, stop))
        start = stop
    assert all(torch.equal(a, b) for a, b in zip(before, contents(), strict=True))


def test_metadata_names_tails_by_window_page() -> None:
    """Windows of 32 every 16 over pages of 64: the ones that a chunk closes, and what it keeps."""
    meta = build_metadata([[5, 6]], [60], [20], PAPER, swa_pages=[[7, 9]])
    assert meta.branches is not None
    branches = meta.branches
    # Windows [32, 64) and [48, 80): tokens before 60 are in the tail of page 7, entry p % 32.
    tail = 20 + 7 * 32
    assert branches.window_sources.tolist() == [
        [*range(tail, tail + 28), 0, 1, 2, 3],
        [*range(tail + 16, tail + 28), *range(20)],
    ]
    # The last tokens of page 7, all of which are newer than those in their place, and of page 9.
    assert branches.tail_tokens.tolist() == list(range(20))
    assert branches.tail_rows.tolist() == [
        *(7 * 32 + p % 32 for p in range(60, 64)),
        *(9 * 32 + p % 32 for p in range(64, 80)),
    ]
    long = build_metadata([[5, 6]], [0], [128], PAPER, swa_pages=[[7, 9]]).branches
    assert long is not None
    assert long.tail_tokens.tolist() == [*range(32, 64), *range(96, 128)]
