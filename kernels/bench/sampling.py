"""Sampling: the kernels that choose the next token of every row, by what the rows ask for.

    python kernels/bench/sampling.py [--quick] [--vocab-size 128256]

Everything runs from a CUDA graph over rotated logits (timing.py), so these are not in L2, as they
are after the model's last matrix product. "greedy graph" holds the one kernel that greedy rows
need; "greedy" is the graph for all rows. Logits are normal, with a standard deviation of 3 or as
given; "edits" is a penalty of 4000 seen tokens and a mask, for every row.
"""

import time
from typing import Any

import numpy as np
import torch
from timing import Call, environment, finish, make_parser, num_sets, time_graph

from nsa_kernels.gpu import logit_edits
from nsa_kernels.gpu.sampling import SamplingWorkspace, sample_tokens

# temperature, top_k, top_p, min_p, uniform; the deviation of the logits.
OPTIONS: dict[str, tuple[tuple[float, ...], float]] = {
    "greedy": ((0.0, 0, 1.0, 0.0, 0.0), 3.0),
    "temperature": ((0.8, 0, 1.0, 0.0, 0.4), 3.0),
    "top_k 50": ((0.8, 50, 1.0, 0.0, 0.4), 3.0),
    "top_p 0.95": ((0.8, 0, 0.95, 0.0, 0.4), 3.0),
    "all": ((0.8, 50, 0.95, 0.02, 0.4), 3.0),
    "top_p, flat": ((1.0, 0, 0.95, 0.0, 0.4), 0.1),
    "top_k 5000 top_p": ((1.0, 5000, 0.95, 0.0, 0.4), 1.0),
}


def make_sets(num_rows: int, vocab_size: int, deviation: float) -> list[torch.Tensor]:
    """Logits of enough steps not to stay in L2."""
    generator = torch.Generator("cuda").manual_seed(num_rows)
    return [
        torch.randn(num_rows, vocab_size, device="cuda", generator=generator) * deviation
        for _ in range(num_sets(num_rows * vocab_size * 4))
    ]


def sampling_calls(
    sets: list[torch.Tensor], params: tuple[float, ...], *, is_greedy: bool = False
) -> list[Call]:
    """One call for each set, all with the same parameters in every row."""
    num_rows, vocab_size = sets[0].shape
    device = sets[0].device
    workspace = SamplingWorkspace.create(num_rows, vocab_size, device)
    table = torch.tensor(params, dtype=torch.float64, device=device)[:, None]
    table = table.repeat(1, num_rows)
    token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
    peaks = torch.zeros(num_rows, device=device)

    def call(logits: torch.Tensor) -> Call:
        return lambda: sample_tokens(
            logits, table, token_ids, peaks, workspace=workspace, is_greedy=is_greedy
        )

    return [call(logits) for logits in sets]


def edit_calls(sets: list[torch.Tensor], num_seen: int = 4000) -> list[Call]:
    """Penalties and a mask for every row."""
    num_rows, vocab_size = sets[0].shape
    device = sets[0].device
    seen, allowed = logit_edits.new_tables(num_rows, num_seen, vocab_size, device)
    ids = torch.arange(num_seen, dtype=torch.int32, device=device) * (vocab_size // num_seen)
    seen[:, 0] = ids
    allowed.fill_(0x55555555)
    fields = np.zeros((num_rows, logit_edits.NUM_FIELDS), dtype=np.int32)
    fields[:, logit_edits.ROW] = np.arange(num_rows)
    fields[:, logit_edits.SEEN_SLOT] = np.arange(num_rows)
    fields[:, logit_edits.NUM_SEEN] = num_seen
    fields[:, logit_edits.MASK_FIRST] = logit_edits.ABSENT
    fields[:, logit_edits.ALLOWED_SLOT] = np.arange(num_rows)
    fields[:, logit_edits.REPETITION] = np.array([1.1], np.float32).view(np.int32)
    edits = torch.from_numpy(fields.reshape(-1)).to(device)

    def call(logits: torch.Tensor) -> Call:
        return lambda: logit_edits.edit_logits(
            logits, edits, num_rows, seen=seen, allowed=allowed, has_masks=True
        )

    return [call(logits) for logits in sets]


def main() -> None:
    """Print a table, microseconds of one step, and the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--vocab-size", type=int, default=128256)
    args = parser.parse_args()
    started = time.perf_counter()
    row_counts = [1, 32] if args.quick else [1, 8, 32, 256]
    budget_s = 0.05 if args.quick else 0.15
    print(environment()["gpu"], f"V {args.vocab_size}, microseconds")
    print(f"{'':18}" + "".join(f"{f'R {num_rows}':>10}" for num_rows in row_counts))
    cells: dict[str, list[dict[str, Any]]] = {}
    for num_rows in row_counts:
        sets: dict[float, list[torch.Tensor]] = {}
        todo: dict[str, list[Call]] = {}
        for name, (params, deviation) in OPTIONS.items():
            if deviation not in sets:
                sets[deviation] = make_sets(num_rows, args.vocab_size, deviation)
            if name == "greedy":
                todo["greedy graph"] = sampling_calls(sets[deviation], params, is_greedy=True)
            todo[name] = sampling_calls(sets[deviation], params)
        # Last, as it changes the logits.
        todo["edits"] = edit_calls(sets[0.1])
        for name, calls in todo.items():
            timing = time_graph(calls, budget_s=budget_s)
            cells.setdefault(name, []).append(
                {
                    "rows": num_rows,
                    "us": timing.ms * 1e3,
                    "spread": timing.spread,
                    "how": timing.how,
                }
            )
    for name, row in cells.items():
        print(f"{name:18}" + "".join(f"{cell['us']:10.1f}" for cell in row))
    results = {"vocab_size": args.vocab_size, "steps": cells}
    finish("sampling", results, out=args.out, started=started)


if __name__ == "__main__":
    main()
