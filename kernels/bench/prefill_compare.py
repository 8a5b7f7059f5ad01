"""Two ways to score blocks in prefill, stage by stage, and other tiles for every stage.

`prefill.py --compare` runs it. The old way leaves scores behind in compression attention, the new
one computes them afterwards (`prefill_scores`). Both select, and their choices and outputs are
compared. The models are those of benchmarks/gpu_models.py, one layer of random data.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from problem import Heads, Problem, make_problem
from timing import kernel_times, time_graph
from torch import Tensor
from triton.runtime.jit import JITFunction

from nsa_kernels.gpu import plan, prefill_scores, prefill_short, prefill_slc, prefill_swa
from nsa_kernels.gpu.common import WORKSPACE_BYTES
from nsa_kernels.gpu.prefill_cmp import CmpScores, prefill_cmp
from nsa_kernels.gpu.select import select_blocks
from nsa_kernels.gpu.select_groups import select_group_blocks
from nsa_kernels.metadata import build_metadata
from nsa_kernels.spec import NSASpec

BUDGET_S = 0.03


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model matters to attention."""

    spec: NSASpec
    heads: Heads


MODELS = {
    "a": Model(
        NSASpec(
            cmp_len=16,
            cmp_stride=16,
            block_size=16,
            num_selected_blocks=16,
            num_init_blocks=0,
            num_local_blocks=1,
            window_size=128,
            selection="fla_legacy",
        ),
        Heads(num_q_heads=32, num_kv_heads=2, head_dim=64, v_head_dim=64),
    ),
    "b": Model(NSASpec(), Heads()),
}
# Tokens in the cache before the step, and tokens of the step, of each row.
CASES = {
    "8k": ([0], [8192]),
    "32k": ([24576], [8192]),
    "64k": ([57344], [8192]),
    "4x2k": ([0] * 4, [2048] * 4),
}
# What is tried for a stage: its options. The first is the default.
EIGHT = {"row_split": 1, "num_warps": 8}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cmp_old": [
        {},
        {**EIGHT, "num_stages": 2},
        {**EIGHT, "num_stages": 3},
        {**EIGHT, "num_stages": 2, "max_registers": 128},
    ],
    "cmp": [
        {},
        {"row_split": 2, "num_warps": 4, "num_stages": 2},
        {"row_split": 2, "num_warps": 4, "num_stages": 3},
        {"row_split": 1, "num_warps": 4, "num_stages": 2},
        {**EIGHT, "num_stages": 2},
        {**EIGHT, "num_stages": 3},
        {**EIGHT, "num_stages": 2, "max_registers": 128},
        {**EIGHT, "num_stages": 3, "max_registers": 128},
        {**EIGHT, "num_stages": 2, "block_n": 128},
        {**EIGHT, "num_stages": 2, "block_n": 128, "max_registers": 128},
    ],
    "scores": [
        {},
        {"row_split": 1, "num_warps": 8, "num_stages": 2},
        {"row_split": 1, "num_warps": 8, "num_stages": 3},
        {"row_split": 1, "num_warps": 8, "num_stages": 2, "max_registers": 80},
        {"row_split": 1, "num_warps": 8, "num_stages": 3, "max_registers": 80},
        {"row_split": 1, "num_warps": 8, "num_stages": 4, "max_registers": 80},
        {"row_split": 2, "num_warps": 4, "num_stages": 3},
        {"row_split": 1, "num_warps": 4, "num_stages": 3},
        {"row_split": 1, "num_warps": 4, "num_stages": 3, "max_registers": 128},
    ],
    "select_old": [{}],
    "select": [
        {},
        {"chunk_blocks": 256},
        {"chunk_blocks": 1024},
        {"num_warps": 4, "chunk_blocks": 4096},
    ],
    "swa": [
        {},
        {"block_n": 64, "num_warps": 8, "num_stages": 2},
        {"block_n": 64, "num_warps": 8, "num_stages": 3},
        {"block_n": 64, "num_warps": 8, "num_stages": 3, "max_registers": 128},
        {"block_n": 128, "num_warps": 8, "num_stages": 2},
        {"block_n": 32, "num_warps": 8, "num_stages": 3, "max_registers": 128},
    ],
    "slc": [
        {},
        {"forced_maxnreg": None},
        {"forced_maxnreg": None, "forced_stages": 3},
        {"forced_block_n": 32, "forced_stages": 3},
        {"queries_per_item": 64},
        {"queries_per_item": 128},
        {"merge_unroll": 8},
        {"merge_warps": 8, "merge_unroll": 4},
        {"merge_warps": 2, "merge_unroll": 8},
    ],
    "short": [
        {},
        {"block_n": 64, "num_warps": 8, "num_stages": 2, "max_registers": 128, "by_token": False},
        {"block_n": 64, "num_warps": 8, "num_stages": 3, "by_token": False},
        {"block_n": 64, "num_warps": 8, "num_stages": 2, "max_registers": 128},
        {"block_n": 64, "num_warps": 8, "num_stages": 2},
        {"block_n": 64, "num_warps": 8, "num_stages": 3},
        {"block_n": 32, "num_warps": 8, "num_stages": 3, "max_registers": 128},
        {"block_n": 128, "num_warps": 8, "num_stages": 2},
    ],
    "operator_old": [{}],
    "operator": [{}],
}


class Case:
    """One step of one model: its stages as callables."""

    def __init__(self, model: Model, case: str, *, device: str) -> None:
        starts, query_lens = CASES[case]
        self.spec, self.heads = model.spec, model.heads
        self.problem: Problem = make_problem(
            model.spec, model.heads, starts=starts, query_lens=query_lens, device=device
        )
        self.inputs = self.problem.sets[0]
        meta = build_metadata(self.problem.pages, starts, query_lens, model.spec)
        self.plans = [
            plan.plan_attention(
                meta,
                model.spec,
                num_q_heads=model.heads.num_q_heads,
                num_kv_heads=model.heads.num_kv_heads,
                dtype=model.heads.dtype,
                device=torch.device(device),
                score_pass=score_pass,
            )
            for score_pass in (False, True)
        ]
        shape = (sum(query_lens), model.heads.num_q_heads, model.heads.v_head_dim)
        self.out, self.o_cmp, self.o_swa = (
            torch.empty(shape, dtype=model.heads.dtype, device=device) for _ in range(3)
        )
        blocks = (shape[0], model.heads.num_kv_heads, model.spec.num_selected_blocks)
        self.blocks = [torch.empty(blocks, dtype=torch.int32, device=device) for _ in range(2)]
        self.kept: dict[str, list[Any]] = {}

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in the order in which they need each other."""
        last = "short" if self._prefill(0).is_short else "slc"
        names = ["cmp_old", "select_old", "cmp", "scores", "select", "swa", last]
        return [*names, "operator_old", "operator"]

    def run(self, stage: str, options: dict[str, Any], *, keep: bool = False) -> Any:
        """Run a stage once, over all sub-chunks, on what the stages before it have kept."""
        if stage.startswith("operator"):
            return self.problem.run(self.inputs, self.plans[stage == "operator"])
        run: Callable[..., Any] = getattr(self, f"_{stage}")
        kept = run(options)
        if keep:
            self.kept[stage] = kept
        return kept

    def _prefill(self, way: int) -> plan.PrefillPlan:
        prefill = self.plans[way].prefill
        assert prefill is not None
        return prefill

    def _chunks(
        self, way: int
    ) -> Iterator[tuple[plan.ScoreChunk, tuple[Any, ...], dict[str, Any]]]:
        """Score chunks with the arguments that prefill_cmp and prefill_scores share."""
        step, prefill = self.plans[way], self._prefill(way)
        for chunk in prefill.score_chunks:
            tiles = prefill.tile_rows[chunk.tiles], prefill.tile_starts[chunk.tiles]
            arguments = (*tiles, step.cu_seqlens_q, step.seq_lens, step.page_table, self.spec)
            options = {
                "softmax_scale": self.problem.softmax_scale,
                "first_token": chunk.first_token,
                "num_tokens": chunk.num_tokens,
                "num_score_tiles": chunk.num_score_tiles,
            }
            yield chunk, arguments, options

    def _attend(self, way: int, options: dict[str, Any]) -> list[CmpScores]:
        return [
            prefill_cmp(
                self.inputs.q,
                self.inputs.cache,
                *arguments,
                **shared,
                with_scores=way == 0,
                out=self.o_cmp,
                **options,
            )
            for _, arguments, shared in self._chunks(way)
        ]

    def _cmp_old(self, options: dict[str, Any]) -> list[CmpScores]:
        return self._attend(0, options)

    def _cmp(self, options: dict[str, Any]) -> list[CmpScores]:
        return self._attend(1, options)

    def _scores(self, options: dict[str, Any]) -> list[Any]:
        tuning = prefill_scores.ScoreTuning(**options) if options else None
        pairs = zip(self._chunks(1), self.kept["cmp"], strict=True)
        return [
            prefill_scores.prefill_scores(
                self.inputs.q, self.inputs.cache, attended.lse2, *arguments, **shared, tuning=tuning
            )
            for (_, arguments, shared), attended in pairs
        ]

    def _select_old(self, options: dict[str, Any]) -> None:
        for (chunk, _, _), part in zip(self._chunks(0), self.kept["cmp_old"], strict=True):
            tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
            select_blocks(
                part,
                self.plans[0].positions[tokens],
                self.spec,
                num_kv_heads=self.heads.num_kv_heads,
                out=self.blocks[0][tokens],
                **options,
            )

    def _select(self, options: dict[str, Any]) -> None:
        for (chunk, _, _), part in zip(self._chunks(1), self.kept["scores"], strict=True):
            tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
            positions = self.plans[1].positions[tokens]
            select_group_blocks(part, positions, self.spec, out=self.blocks[1][tokens], **options)

    def _tiles(self) -> dict[str, Any]:
        step, prefill = self.plans[1], self._prefill(1)
        return {
            "tile_rows": prefill.tile_rows,
            "tile_starts": prefill.tile_starts,
            "cu_seqlens_q": step.cu_seqlens_q,
            "seq_lens": step.seq_lens,
            "page_table": step.page_table,
            "softmax_scale": self.problem.softmax_scale,
        }

    def _swa(self, options: dict[str, Any]) -> None:
        tuning = prefill_swa.SwaTuning(**options) if options else None
        prefill_swa.prefill_swa(
            self.inputs.q,
            self.inputs.cache,
            self.spec,
            **self._tiles(),
            out=self.o_swa,
            tuning=tuning,
        )

    def _short(self, options: dict[str, Any]) -> None:
        tiles = {name: value for name, value in options.items() if name != "by_token"}
        tuning = prefill_swa.SwaTuning(**tiles) if tiles else None
        prefill_short.prefill_short(
            self.inputs.q,
            self.blocks[1],
            self.o_cmp,
            self.o_swa,
            self.inputs.gates,
            self.inputs.cache,
            self.spec,
            **self._tiles(),
            first_token=0,
            out=self.out,
            tuning=tuning,
            by_token=options.get("by_token", True),
        )

    def _slc(self, options: dict[str, Any]) -> None:
        heads, step, prefill = self.heads, self.plans[1], self._prefill(1)
        widest = max(heads.head_dim, heads.v_head_dim)
        group_size = heads.num_q_heads // heads.num_kv_heads
        tuning = prefill_slc.default_tuning(group_size, widest, self.spec.block_size, heads.dtype)
        tokens = prefill_slc.sub_chunk_tokens(
            WORKSPACE_BYTES,
            self.spec,
            num_q_heads=heads.num_q_heads,
            num_kv_heads=heads.num_kv_heads,
            v_head_dim=heads.v_head_dim,
            dtype=heads.dtype,
        )
        for start in range(0, len(self.out), tokens):
            prefill_slc.prefill_slc(
                self.inputs.q,
                self.blocks[1][start : start + tokens],
                self.o_cmp,
                self.o_swa,
                self.inputs.gates,
                self.inputs.cache,
                step.token_rows,
                step.positions,
                step.seq_lens,
                step.page_table,
                prefill.cu_blocks,
                self.spec,
                num_blocks=prefill.num_blocks,
                softmax_scale=self.problem.softmax_scale,
                first_token=start,
                out=self.out,
                tuning=replace(tuning, **options),
            )


@contextmanager
def compile_only() -> Iterator[None]:
    """Let kernel launches compile and not run, so that inputs may be without memory."""
    if not torch.cuda.is_available():
        import offline

        with offline.capture():
            yield
        return
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = warm_up
    try:
        yield
    finally:
        JITFunction.run = run


def variants(stage: str, *, tune: bool) -> list[dict[str, Any]]:
    """Options to try for a stage, the default first."""
    return VARIANTS[stage] if tune else VARIANTS[stage][:1]


def compile_share(models: list[str], cases: list[str], part: str, *, tune: bool) -> None:
    """Compile the stages number i, i + n, ... of all, where part is "i/n"."""
    index, count = (int(number) for number in part.split("/"))
    jobs = [
        (model, stage, options)
        for model in models
        for stage in VARIANTS
        for options in variants(stage, tune=tune)
    ]
    with compile_only():
        made = {
            (model, case): Case(MODELS[model], case, device="meta")
            for model in models
            for case in cases
        }
        for model, stage, options in jobs[index::count]:
            for case in (made[model, name] for name in cases):
                if stage not in case.stages:
                    continue
                try:
                    _prepare(case, stage)
                    case.run(stage, options)
                except Exception as error:  # the bench will meet it again, and say so
                    print(f"{model} {stage} {options}: {type(error).__name__}: {error}"[:300])


def _prepare(case: Case, stage: str) -> None:
    """Let the stages run that `stage` takes its inputs from."""
    for needed in {"select_old": ("cmp_old",), "scores": ("cmp",), "select": ("cmp", "scores")}.get(
        stage, ()
    ):
        if needed not in case.kept:
            case.run(needed, {}, keep=True)


def compile_all(arguments: list[str], num_workers: int) -> float:
    """Compile in so many processes; return the seconds that it took."""
    started = time.perf_counter()
    script = Path(__file__).with_name("prefill.py")
    command = [sys.executable, str(script), *arguments]
    workers = [
        subprocess.Popen([*command, "--part", f"{i}/{num_workers}"]) for i in range(num_workers)
    ]
    for worker in workers:
        worker.wait()
    return time.perf_counter() - started


def compare(models: list[str], cases: list[str], *, tune: bool) -> dict[str, Any]:
    """Measure every model and case; print as it goes."""
    rows = []
    for name in models:
        for case_name in cases:
            case = Case(MODELS[name], case_name, device="cuda")
            row: dict[str, Any] = {"model": name, "case": case_name}
            row["stages"] = {
                stage: [_measure(case, stage, options) for options in variants(stage, tune=tune)]
                for stage in case.stages
            }
            row |= _difference(case)
            for stage in ("operator_old", "operator"):
                try:
                    run = lambda case=case, stage=stage: case.run(stage, {})  # noqa: E731
                    row[f"{stage}_kernels_ms"] = dict(kernel_times(run, repeats=2))
                except Exception as error:  # no profiler on this machine
                    row[f"{stage}_kernels_ms"] = f"{type(error).__name__}: {error}"
            print_row(row)
            rows.append(row)
            del case
            torch.cuda.empty_cache()
    return {"rows": rows}


def _measure(case: Case, stage: str, options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a stage with these options, or why there are none."""
    try:
        # Not in a graph, whose memory is its own.
        case.run(stage, {}, keep=True)
        timing = time_graph([lambda: case.run(stage, options)], min_calls=2, budget_s=BUDGET_S)
    except Exception as error:
        torch.cuda.synchronize()
        return {"options": options, "error": f"{type(error).__name__}: {error}"[:300]}
    return {"options": options, **asdict(timing)}


def _difference(case: Case) -> dict[str, Any]:
    """Compare what both ways select and return: of float32, against the largest value."""
    for stage in case.stages[:5]:
        case.run(stage, {}, keep=True)
    old, new = (blocks.sort(dim=-1).values for blocks in case.blocks)
    output_old, output = (case.run(stage, {}).float() for stage in ("operator_old", "operator"))
    again = case.run("operator", {}).float()
    return {
        "equal_selections": float((old == new).all(-1).double().mean()),
        "equal_blocks": _share_of_equal(old, new),
        "max_error": float((output - output_old).abs().max()),
        "relative_error": float((output - output_old).norm() / output_old.norm()),
        "is_finite": bool(output.isfinite().all()),
        "is_repeatable": bool(output.equal(again)),
    }


def _share_of_equal(old: Tensor, new: Tensor) -> float:
    """Share of the chosen blocks of [R, H, S] that the other way chose, too."""
    both = sum(
        (new == old[..., i : i + 1]).any(-1) & (old[..., i] >= 0) for i in range(old.shape[-1])
    )
    return float(both.sum() / (old >= 0).sum())


def print_row(row: dict[str, Any]) -> None:
    """Print one case: the default of every stage, the fastest other, and the differences."""
    print(
        f"{row['model']} {row['case']}: equal selections {row['equal_selections']:.5f}, blocks "
        f"{row['equal_blocks']:.6f}, output differs by {row['max_error']:.4f} at most, relative "
        f"{row['relative_error']:.2e}, finite {row['is_finite']}, "
        f"repeatable {row['is_repeatable']}"
    )
    for stage, results in row["stages"].items():
        timed = [result for result in results if "ms" in result]
        default = results[0].get("ms")
        text = f"  {stage:13} {default:8.3f} ms" if default else f"  {stage:13} {results[0]}"
        if timed and len(results) > 1:
            best = min(timed, key=lambda result: float(result["ms"]))
            text += f"   best {best['ms']:8.3f} ms {best['options']}"
        for result in results:
            if "error" in result:
                text += f"\n      {result['options']}: {result['error']}"
        print(text, flush=True)
    for stage in ("operator_old", "operator"):
        times = row[f"{stage}_kernels_ms"]
        if isinstance(times, dict):
            parts = [f"{name[:28].strip('_')} {ms:.3f}" for name, ms in list(times.items())[:9]]
            print(f"  {stage}: {', '.join(parts)}", flush=True)
        else:
            print(f"  {stage}: no kernel times: {times}")
