"""Which blocks chosen queries of a step selected, layer by layer: for looking into a model.

R traced queries, H KV heads, S most selected blocks (`block_table_width`), P blocks of a sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_kernels.metadata import AttnMetadata
from nsa_kernels.spec import NSASpec


class BlockTrace:
    """Records the selection of some queries of one step; pass it to `plan_attention`.

    rows: the queries to trace, as tokens of the step. `layers` then grows by one [R, H, S] int64
    tensor with every layer that attends: block indices in any order, -1 where there is none.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)
        self.layers: list[Tensor] = []
        self._template = torch.empty(0)
        # (index in rows, token of the step) of the queries that have blocks to choose from.
        self._choosing: list[tuple[int, int]] = []
        self._num_decode_rows = 0

    def prepare(
        self, meta: AttnMetadata, spec: NSASpec, *, num_kv_heads: int, uses_slc: bool
    ) -> None:
        """Work out what is known before the scores: a query with few blocks selects all of them.

        uses_slc: False when the model's gates switch selection off; then nothing is selected.
        """
        positions = meta.positions[torch.tensor(self.rows, dtype=torch.int64)]
        current = positions // spec.block_size
        block = torch.arange(spec.block_table_width)
        selects_all = (positions < spec.num_dense_tokens) & uses_slc
        known = (block <= current[:, None]) & selects_all[:, None]  # [R, S]
        template = torch.where(known, block, -1)
        self._template = template[:, None].repeat(1, num_kv_heads, 1)
        self._num_decode_rows = meta.num_decode_rows
        if uses_slc:
            rows = zip(enumerate(self.rows), selects_all.tolist(), strict=True)
            self._choosing = [item for item, is_known in rows if not is_known]

    def begin_layer(self) -> None:
        """Start the record of the next layer."""
        self.layers.append(self._template.clone())

    def record_decode(self, block_indices: Tensor | None) -> None:
        """Take the choice of the decode rows: [B, H, at most S], None if all select everything."""
        chosen = [item for item in self._choosing if item[1] < self._num_decode_rows]
        if block_indices is None or not chosen:
            return
        index, row = torch.tensor(chosen).unbind(1)
        self.layers[-1][index, :, : block_indices.shape[-1]] = block_indices[row]

    def record_tile(self, start: int, stop: int, mask: Tensor | None) -> None:
        """Take the choice of the queries [start, stop): [H, Q, P] bool, or None as above."""
        if mask is None:
            return
        for index, row in self._choosing:
            if start <= row < stop:
                for head, selected in enumerate(mask[:, row - start]):
                    blocks = selected.nonzero().flatten()
                    self.layers[-1][index, head, : len(blocks)] = blocks

    def blocks_of(self, index: int, layers: Sequence[int]) -> list[list[list[int]]]:
        """Return the blocks of `rows[index]` by layer and KV head, ascending, without padding."""
        chosen = torch.stack([self.layers[layer][index] for layer in layers]).sort(-1).values
        return [
            [[block for block in blocks if block >= 0] for blocks in heads]
            for heads in chosen.tolist()
        ]
