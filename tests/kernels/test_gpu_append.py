"""Append and compression kernels: every token in its slot, every closed window filed, no more."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu.append import append_kv
from nsa_kernels.metadata import BranchKV, LayerCache, build_metadata
from nsa_kernels.reference import CompressionMLP
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.problem import PASSED

# Summed in fp32 and rounded once: half a unit in the last place, and 0 for a mere copy. The MLP
# rounds four times.
MEAN_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
MLP_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

PAPER = NSASpec()
FLA = NSASpec(cmp_len=16, cmp_stride=16, block_size=16)
SMALL = NSASpec(cmp_len=8, cmp_stride=4, block_size=8)
WIDE = NSASpec(cmp_len=96, cmp_stride=32, block_size=128)


@dataclass
class Sequences:
    """Sequences whose keys and values are known, and a cache that starts out as NaN."""

    spec: NSASpec
    tokens: list[dict[str, Tensor]]
    pages: list[list[int]]
    swa_pages: list[list[int]]
    cache: LayerCache
    separate: bool
    mlps: tuple[CompressionMLP, CompressionMLP] | None

    def step(
        self,
        starts: list[int],
        lens: list[int],
        *,
        num_decode_rows: int = 0,
        skip_decode: bool = False,
        num_padding: int = 0,
        compress: bool = True,
    ) -> None:
        """Append tokens [start, start + len) of every sequence, in one launch of the operator."""
        swa_pages = []
        for owned, start in zip(self.swa_pages, starts, strict=True):
            num_passed = max(0, start - self.spec.cmp_len + 1) // self.spec.block_size
            swa_pages.append([PASSED] * num_passed + owned[num_passed:])
        meta = build_metadata(
            self.pages,
            starts,
            lens,
            self.spec,
            num_decode_rows=num_decode_rows,
            swa_pages=swa_pages if self.separate else None,
        )
        rows = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
        ends = meta.positions + 1
        closes = (ends >= self.spec.cmp_len) & (ends % self.spec.cmp_stride == 0)
        closes &= rows >= num_decode_rows
        seq_lens = meta.seq_lens.clone()
        if num_padding:
            # A padding row stands where a decode row would.
            seq_lens[num_decode_rows - num_padding : num_decode_rows] = 0

        def fused(*names: str) -> list[Tensor]:
            rows_of = list(zip(self.tokens, starts, lens, strict=True))
            parts = [torch.cat([x[name][a : a + n] for x, a, n in rows_of]) for name in names]
            widths = [part.shape[-1] for part in parts]
            return list(torch.cat(parts, dim=-1).to(DEVICE, self.cache.k.dtype).split(widths, -1))

        k, v, *others = fused("k", "v", "k_cmp", "v_cmp", "k_swa", "v_swa")
        separate = meta.branches
        append_kv(
            k,
            v,
            self.cache,
            self.spec,
            token_rows=rows.int().to(DEVICE),
            positions=meta.positions.int().to(DEVICE),
            seq_lens=seq_lens.to(DEVICE),
            cu_seqlens_q=meta.cu_seqlens_q.to(DEVICE),
            page_table=meta.page_table.to(DEVICE),
            window_rows=rows[closes].int().to(DEVICE) if len(lens) > num_decode_rows else None,
            window_ends=ends[closes].int().to(DEVICE) if len(lens) > num_decode_rows else None,
            num_decode_rows=num_decode_rows,
            first_row=num_decode_rows if skip_decode else 0,
            compress=compress,
            mlps=self.mlps,
            branch_kv=BranchKV(*others) if separate else None,
            swa_page_table=separate.swa_page_table.to(DEVICE) if separate else None,
            check=True,
        )

    def check(self, lens: list[int]) -> None:
        """The cache holds `lens` tokens of the sequences and their windows, and else nothing."""
        spec, dtype = self.spec, self.cache.k.dtype
        used: dict[str, Tensor] = {}
        source = "_cmp" if self.separate else ""
        for index, name in enumerate(("k", "v")):
            raw: Tensor = getattr(self.cache, name).cpu()
            filed: Tensor = getattr(self.cache, f"{name}_cmp").cpu()
            for tensor, key in ((raw, name), (filed, f"{name}_cmp")):
                used[key] = torch.zeros(tensor.shape[0] * tensor.shape[2], dtype=torch.bool)
            for row, (tokens, pages, length) in enumerate(
                zip(self.tokens, self.pages, lens, strict=True)
            ):
                table = torch.tensor(pages)
                stored = reference.gather_pages(raw, table, length)
                assert torch.equal(stored, tokens[name][:length].to(dtype))
                x = tokens[name + source][:length].to(dtype)
                if self.mlps is None:
                    expected = reference.compress_mean(x, spec)
                else:
                    expected = reference.compress_mlp(x, spec, _on_host(self.mlps[index]))
                actual = reference.gather_cmp(filed, table, length, spec).float()
                tolerance = (MEAN_TOLERANCE if self.mlps is None else MLP_TOLERANCE)[dtype]
                error = (actual - expected).norm() / expected.norm().clamp(min=1e-6)
                assert error <= tolerance, f"relative error {error:.3g}"
                size, entries = spec.block_size, spec.cmp_entries_per_page
                for position in range(length):
                    used[name][pages[position // size] * size + position % size] = True
                for window in range(spec.num_windows(length)):
                    entry = window + spec.strides_per_window - 1
                    used[f"{name}_cmp"][pages[entry // entries] * entries + entry % entries] = True
                if self.separate:
                    self._check_separate(name, tokens, self.swa_pages[row], length)
        for key, slots in used.items():
            tensor = getattr(self.cache, key).cpu().transpose(1, 2).flatten(0, 1)
            assert tensor[~slots].isnan().all(), f"{key}: a slot of nobody was written"

    def _check_separate(
        self, name: str, tokens: dict[str, Tensor], pages: list[int], length: int
    ) -> None:
        """The window pages hold all tokens, and each the last raw ones of its own in its tail."""
        swa: Tensor = getattr(self.cache, f"{name}_swa").cpu()
        tail: Tensor = getattr(self.cache, f"{name}_tail").cpu()
        stored = reference.gather_pages(swa, torch.tensor(pages), length)
        assert torch.equal(stored, tokens[f"{name}_swa"][:length].to(swa.dtype))
        size, cmp_len = self.spec.block_size, self.spec.cmp_len
        for index, page in enumerate(pages):
            expected = torch.full_like(tail[page], torch.nan)
            stop = min((index + 1) * size, length)
            for position in range(max(index * size, stop - cmp_len), stop):
                expected[:, position % cmp_len] = tokens[f"{name}_cmp"][position].to(tail.dtype)
            torch.testing.assert_close(tail[page], expected, rtol=0, atol=0, equal_nan=True)


def _on_host(mlp: CompressionMLP) -> CompressionMLP:
    return CompressionMLP(mlp.pos.cpu(), mlp.w1.cpu(), mlp.b1.cpu(), mlp.w2.cpu(), mlp.b2.cpu())


def make_sequences(
    spec: NSASpec,
    lengths: list[int],
    *,
    heads: int = 2,
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    hidden: tuple[int, int] | None = None,
    separate: bool = False,
) -> Sequences:
    """Random sequences in shuffled pages."""
    generator = torch.Generator().manual_seed(len(lengths))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size, entries = spec.block_size, spec.cmp_entries_per_page
    counts = [-(-length // size) for length in lengths]
    num_pages = sum(counts) + 2
    shuffled = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    pages = [[shuffled.pop() for _ in range(count)] for count in counts]
    swa_pages = [[num_pages - page for page in owned] for owned in pages]

    def poisoned(num: int, per_page: int, dim: int) -> Tensor:
        return torch.full((num, heads, per_page, dim), torch.nan, dtype=dtype, device=DEVICE)

    branch = [
        poisoned(num_pages, size, dims[0]),
        poisoned(num_pages, size, dims[1]),
        poisoned(num_pages, spec.cmp_len, dims[0]),
        poisoned(num_pages, spec.cmp_len, dims[1]),
    ]
    cache = LayerCache(
        poisoned(num_pages, size, dims[0]),
        poisoned(num_pages, size, dims[1]),
        poisoned(num_pages, entries, dims[0]),
        poisoned(num_pages, entries, dims[1]),
        *(branch if separate else ()),
    )
    names = {"k": 0, "v": 1, "k_cmp": 0, "v_cmp": 1, "k_swa": 0, "v_swa": 1}
    tokens = [
        {name: randn(n, heads, dims[index]).to(dtype).float() for name, index in names.items()}
        for n in lengths
    ]
    mlps = None
    if hidden:
        weights = [
            CompressionMLP(
                *(
                    x.to(DEVICE, dtype)
                    for x in (
                        randn(spec.cmp_len, dim),
                        randn(size, spec.cmp_len * dim) * (spec.cmp_len * dim) ** -0.5,
                        randn(size),
                        randn(dim, size) * size**-0.5,
                        randn(dim),
                    )
                )
            )
            for dim, size in zip(dims, hidden, strict=True)
        ]
        mlps = (weights[0], weights[1])
    return Sequences(spec, tokens, pages, swa_pages, cache, separate, mlps)


@pytest.mark.parametrize("spec", [PAPER, FLA, SMALL, WIDE], ids=["paper", "fla", "small", "wide"])
@pytest.mark.parametrize("separate", [False, True])
def test_chunks_then_decode(spec: NSASpec, separate: bool) -> None:
    first = [spec.cmp_len - 1, spec.block_size + 3, 1]
    second = [spec.cmp_len + spec.block_size, spec.block_size + 4, 3 * spec.cmp_len + 2]
    sequences = make_sequences(spec, [n + 3 for n in second], separate=separate)
    sequences.step([0] * 3, first)
    sequences.check(first)
    sequences.step(first, [b - a for a, b in zip(first, second, strict=True)])
    sequences.check(second)
    for step in range(3):
        sequences.step([n + step for n in second], [1] * 3, num_decode_rows=3)
    sequences.check([n + 3 for n in second])


@pytest.mark.parametrize("separate", [False, True])
def test_learned_compression(separate: bool) -> None:
    sequences = make_sequences(SMALL, [22, 31, 12], hidden=(24, 40), separate=separate)
    sequences.step([0] * 3, [19, 23, 11])
    sequences.check([19, 23, 11])
    # The second row closes a window, the first does not; the third is a chunk.
    sequences.step([19, 23, 11], [1] * 3, num_decode_rows=2)
    sequences.check([20, 24, 12])


@pytest.mark.parametrize("hidden", [None, (24, 24)])
def test_padding_and_skipped_rows_write_nothing(hidden: tuple[int, int] | None) -> None:
    sequences = make_sequences(SMALL, [8, 8, 20], hidden=hidden)
    sequences.step([0, 0, 0], [1, 7, 1], skip_decode=True, num_decode_rows=1)
    sequences.check([0, 7, 1])
    # Row 1 would close a window, but stands for padding here.
    sequences.step([0, 7, 1], [1, 1, 9], num_decode_rows=2, num_padding=1)
    sequences.check([1, 7, 10])


def test_without_compression() -> None:
    sequences = make_sequences(SMALL, [20])
    sequences.step([0], [20], compress=False)
    assert sequences.cache.k_cmp.isnan().all() and sequences.cache.v_cmp.isnan().all()
    assert not sequences.cache.k[sequences.pages[0][0]].isnan().any()


@pytest.mark.parametrize("dims", [(60, 60), (24, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [None, (40, 40)])
def test_widths_and_dtypes(
    dims: tuple[int, int], dtype: torch.dtype, hidden: tuple[int, int] | None
) -> None:
    if hidden and dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter multiplies bf16 matrices as integers")
    sequences = make_sequences(SMALL, [13], dims=dims, dtype=dtype, hidden=hidden, heads=1)
    sequences.step([0], [13])
    sequences.check([13])


def test_branches_need_their_tensors() -> None:
    sequences = make_sequences(SMALL, [8], separate=True)
    sequences.separate = False
    with pytest.raises(ValueError, match="go together"):
        sequences.step([0], [8])


@pytest.mark.gpu
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("hidden", [None, (512, 384)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_size(separate: bool, hidden: tuple[int, int] | None, dtype: torch.dtype) -> None:
    lengths = [3000, 65, 1500, 4000]
    sequences = make_sequences(
        PAPER, lengths, heads=4, dims=(192, 128), dtype=dtype, hidden=hidden, separate=separate
    )
    first = [1700, 64, 1499, 3999]
    sequences.step([0] * 4, first)
    sequences.check(first)
    # Decode rows come first: reorder so that the chunk is the last row.
    for attribute in (sequences.tokens, sequences.pages, sequences.swa_pages):
        attribute.append(attribute.pop(0))  # type: ignore[attr-defined]
    sequences.step([64, 1499, 3999, 1700], [1, 1, 1, 1300], num_decode_rows=3)
    sequences.check([65, 1500, 4000, 3000])
