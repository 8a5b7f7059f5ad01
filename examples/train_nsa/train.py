"""Train the gates and low-rank updates that turn a dense Llama into its NSA student.

    python examples/train_nsa/train.py --data DATA --out OUT --minutes 10

DATA is what data.py wrote. OUT gets settings.json, log.jsonl (a line a step), a checkpoint every
--checkpoint-every seconds, and at the end adapter/, which `nsa-serve --model OUT/adapter` serves.
--resume goes on from the checkpoint. --tiny is the same program at sizes for a CPU. Several GPUs of
one host: torchrun --nproc-per-node 2 examples/train_nsa/train.py ...
"""

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import attention
import numpy as np
import torch
import torch.distributed as dist
from data import Corpus, open_corpus
from export import (
    CHECKPOINT,
    SETTINGS,
    load_checkpoint,
    make_student,
    read_adapter,
    save_checkpoint,
    write_adapter,
)
from losses import head_loss, share_floor
from numpy.typing import NDArray
from schedule import (
    SCHEDULES,
    Clock,
    Phase,
    Source,
    choose,
    learning_rate,
    usable_phases,
)
from student import open_base
from torch import Tensor

from nsa_kernels.spec import NSASpec
from nsa_serve.config import DEFAULT_MODEL
from nsa_serve.model_source import BUILT_IN_MODELS, read_asset

MAX_BAD_STEPS = 5
"""Steps in a row without a finite gradient after which training stops."""

NUM_PROBES = 256
"""Queries of a row whose selection is compared with full attention."""

AMPLE_GIB = 64
"""Memory of a GPU in which what 32k tokens leave for the backward pass fits (README.md)."""

SPARE_S = 5.0
"""Seconds of --minutes that are kept for the last checkpoint and the adapter."""


@dataclass(slots=True)
class Ranks:
    """The processes that train together, one a GPU."""

    rank: int
    size: int
    device: torch.device

    def agree(self, value: float) -> float:
        """Return rank 0's value."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average all gradients over the ranks, in one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))


class Trainer:
    """One run: student, optimizer, data, clock and log."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args, self.ranks = args, ranks
        torch.manual_seed(args.seed)
        base = open_base(args.base, ranks.device, getattr(torch, args.dtype))
        self.settings = make_settings(args)
        self.student, self.model = make_student(
            self.settings,
            base,
            backend=args.attention,
            use_checkpoints=args.recompute,
        )
        self.parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self._named("gate_"), "lr": args.lr * args.gate_lr_scale},
                {"params": self._named("a.") + self._named("b."), "lr": args.lr},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.corpus: Corpus = open_corpus(args.data, tokens_per_batch=args.tokens_per_batch)
        phases = usable_phases(SCHEDULES[args.schedule], self.corpus.kinds)
        if args.longest is not None:
            phases = [shorten(phase, args.longest) for phase in phases]
        self.phases = [fit(phase, self.student.config.max_position_embeddings) for phase in phases]
        self.step, elapsed_s = 0, 0.0
        if args.init is not None:
            read_adapter(args.init, self.student)
        if args.resume:
            state = load_checkpoint(args.out / CHECKPOINT, self.student, self.optimizer)
            self.step, elapsed_s = state["step"], state["elapsed_s"]
            self.say(f"resumed at step {self.step}, {elapsed_s:.0f} s")
        budget_s = None if args.minutes is None else max(1.0, args.minutes * 60 - SPARE_S)
        self.clock = Clock(budget_s, args.steps, elapsed_s=elapsed_s)
        # The last step of each kind and length; kinds and lengths that were trained on.
        self.step_s: dict[tuple[str, int], float] = {}
        self.seen: set[tuple[str, int]] = set()

    def rehearse(self) -> None:
        """Take a step of each length without using it, longest first, and print what it needs.

        So that a length which does not fit is known at once, and how long its steps are.
        """
        sources: dict[int, Source] = {}
        for phase in self.phases:
            for source in phase.sources:
                # The first of a length is the one with a teacher, where there is one.
                sources.setdefault(source.length, source)
        rng = np.random.default_rng([self.args.seed, self.ranks.rank])
        for length, source in sorted(sources.items(), reverse=True):
            batch = self.corpus.batch(source.kind, length, rng)
            ids, weight = (torch.from_numpy(item) for item in batch)
            for _ in range(2):  # The first one compiles.
                start = time.monotonic()
                self._train_step(self.phases[0], source, ids, weight, 0.0, is_rehearsal=True)
                step_s = time.monotonic() - start
            self.step_s[source.kind, length] = step_s
            self.say(f"rehearsal, {length:5} tokens: {step_s:.2f} s a step{self._memory()}")
        if self.clock.budget_s is not None:
            left_s = self.clock.budget_s - self.clock.elapsed_s
            mean_s = self._mean_step_s()
            self.say(f"about {left_s / mean_s:.0f} steps of {mean_s:.2f} s are left")

    def run(self) -> None:
        """Train to the end of the schedule, and write the adapter."""
        args, bad_steps, last_save = self.args, 0, time.monotonic()
        mode = "a" if args.resume else "w"
        with (
            (args.out / f"log{self._suffix()}.jsonl").open(mode) as log,
            ThreadPoolExecutor(1) as pool,
        ):
            progress = self.ranks.agree(self.clock.progress(self.step, 0.0))
            pending = pool.submit(self._batch, self.step, progress)
            while progress < 1.0:
                start = time.monotonic()
                phase, source, ids, weight = pending.result()
                # The next batch is made while this one is trained on.
                ahead = self.ranks.agree(self.clock.progress(self.step + 1, 0.0))
                pending = pool.submit(self._batch, self.step + 1, ahead)
                entry = self._train_step(phase, source, ids, weight, progress)
                bad_steps = 0 if entry["is_finite"] else bad_steps + 1
                if bad_steps == MAX_BAD_STEPS:
                    raise SystemExit(
                        f"the gradient was not finite {MAX_BAD_STEPS} times in a row, up to step "
                        f"{self.step}; lower --lr, or try --attention plain"
                    )
                step_s = time.monotonic() - start
                self._report(log, entry, source, step_s)
                self.step += 1
                slowest = max(self.step_s.values())
                progress = self.ranks.agree(self.clock.progress(self.step, slowest))
                if time.monotonic() - last_save > args.checkpoint_every:
                    self._save()
                    last_save = time.monotonic()
            pending.result()
        self._finish()

    def say(self, text: str) -> None:
        """Print once, whatever the number of ranks."""
        if self.ranks.rank == 0:
            print(text, flush=True)

    def _batch(
        self, step: int, progress: float
    ) -> tuple[Phase, Source, torch.Tensor, torch.Tensor]:
        # All ranks take the same source, so that they take the same time.
        phase, source = choose(self.phases, progress, np.random.default_rng([self.args.seed, step]))
        rng = np.random.default_rng([self.args.seed, step, 1 + self.ranks.rank])
        ids, weight = self.corpus.batch(source.kind, source.length, rng)
        if self.args.loss_tokens is not None and source.kind != "retrieval":
            thin_out(weight, self.args.loss_tokens, rng)
        return phase, source, torch.from_numpy(ids), torch.from_numpy(weight)

    def _train_step(
        self,
        phase: Phase,
        source: Source,
        ids: Tensor,
        weight: Tensor,
        progress: float,
        *,
        is_rehearsal: bool = False,
    ) -> dict[str, Any]:
        student, args = self.student, self.args
        ids, weight = ids.to(self.ranks.device), weight.to(self.ranks.device)
        has_teacher = (
            source.kind != "retrieval"
            and source.length <= student.base.config.max_position_embeddings
        )
        theirs, kept = None, None
        if has_teacher:
            theirs, kept = student.teacher(ids, keep_attention=phase.mse_weight > 0)
        output = student(ids, kept or None, probes=self._probes(source))
        loss = head_loss(
            output.hidden,
            student.head,
            ids,
            weight,
            teacher_hidden=theirs,
            kl_weight=1.0 if has_teacher else 0.0,
            ce_weight=self._ce_weight(source, has_teacher=has_teacher),
        )
        floor = share_floor(output.shares, args.share_floor)
        total = loss.total + phase.mse_weight * output.mse + args.share_weight * floor
        total = total + args.selection_weight * output.selection
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.ranks.average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, args.clip)
        is_finite = bool(torch.isfinite(norm))
        factor = learning_rate(progress)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        if is_finite and not is_rehearsal:
            self.optimizer.step()
        shares = output.shares.detach()
        return {
            "step": self.step,
            "progress": round(progress, 4),
            "phase": phase.name,
            "kind": source.kind,
            "length": source.length,
            "tokens": ids.numel() * self.ranks.size,
            "loss": float(total.detach()),
            "kl": float(loss.kl) if has_teacher else None,
            "ce": float(loss.ce),
            "mse": float(output.mse.detach()) if kept else None,
            "share_floor": float(floor.detach()),
            "selection": float(output.selection.detach()) if args.selection_weight else None,
            "shares": [round(x, 4) for x in shares.mean(dim=0).tolist()],
            "least_shares": [round(x, 4) for x in shares.amin(dim=0).tolist()],
            "gradient_norm": float(norm),
            "is_finite": is_finite,
            "lr": self.peaks[1] * factor,
        }

    def _probes(self, source: Source) -> Tensor | None:
        """Return the queries whose selection is trained: int64 [P], the same in all ranks."""
        if not self.args.selection_weight:
            return None
        rng = np.random.default_rng([self.args.seed, self.step, 0])
        probes = rng.integers(source.length // 4, source.length, NUM_PROBES)
        if source.kind == "retrieval":
            # The questions and answers are at the end.
            num_last = min(source.length, NUM_PROBES * 3 // 4)
            probes[:num_last] = np.arange(source.length - num_last, source.length)
        return torch.from_numpy(probes).to(self.ranks.device)

    def _ce_weight(self, source: Source, *, has_teacher: bool) -> float:
        """Return the weight of the next-token loss; what the teacher wrote itself has none."""
        if not has_teacher:
            return float(self.args.ce_weight)
        return 0.0 if source.kind == "chat" else float(self.args.ce_mix)

    def _report(self, log: Any, entry: dict[str, Any], source: Source, step_s: float) -> None:
        """Write the step's line; print some."""
        key = (source.kind, source.length)
        is_new = key not in self.seen
        self.seen.add(key)
        self.step_s[key] = step_s
        entry["step_s"] = round(step_s, 4)
        entry["tokens_per_s"] = round(entry["tokens"] / step_s)
        entry["elapsed_s"] = round(self.clock.elapsed_s, 2)
        log.write(json.dumps(entry) + "\n")
        log.flush()
        if is_new or entry["step"] % self.args.print_every == 0:
            name = "ce" if entry["kl"] is None else "kl"
            found = entry["selection"]
            selection = "" if found is None else f"selection {found:.3f}, "
            self.say(
                f"{entry['progress']:6.1%} step {entry['step']:5} {entry['phase']:8}"
                f"{source.kind:>9} {source.length:5}: {name} {entry[name]:.4f}, shares "
                f"{'/'.join(f'{x:.2f}' for x in entry['shares'])}, "
                f"{selection}{step_s:.2f} s a step, "
                f"{entry['tokens_per_s']} tokens/s{self._memory()}"
            )

    def _memory(self) -> str:
        """Return the peak so far, as the end of a printed line."""
        if self.ranks.device.type != "cuda":
            return ""
        return f", {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB"

    def _mean_step_s(self) -> float:
        """Return the seconds of a step of this schedule, from what each length takes."""
        by_length = {length: step_s for (_, length), step_s in self.step_s.items()}
        return sum(
            phase.share * source.share * by_length[source.length]
            for phase in self.phases
            for source in phase.sources
        ) / sum(phase.share * source.share for phase in self.phases for source in phase.sources)

    def _save(self) -> None:
        if self.ranks.rank == 0:
            state = {"step": self.step, "elapsed_s": self.clock.elapsed_s}
            save_checkpoint(self.args.out, self.student, self.optimizer, state)

    def _finish(self) -> None:
        self._save()
        if self.ranks.rank == 0:
            folder = self.args.out / "adapter"
            generation = self.settings["generation_config"]
            num_bytes = write_adapter(self.student, folder, self.model, generation)
            for (kind, length), step_s in sorted(self.step_s.items(), key=lambda i: i[0][1]):
                self.say(f"{kind:>9} {length:5}: {step_s:.3f} s a step")
            self.say(
                f"{folder}: {num_bytes / 2**20:.2f} MiB after {self.step} steps, "
                f"{self.clock.elapsed_s:.0f} s"
            )

    def _named(self, part: str) -> list[Tensor]:
        # Names are layers.{i}.a.q, layers.{i}.gate_bias and so on.
        return [
            value
            for name, value in self.student.named_parameters()
            if name.split(".", 2)[2].startswith(part)
        ]

    def _suffix(self) -> str:
        return f".{self.ranks.rank}" if self.ranks.rank else ""


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


def thin_out(weight: NDArray[np.float32], count: int, rng: np.random.Generator) -> None:
    """Leave `count` of the weights [B, T] that are not 0, in place."""
    places = np.flatnonzero(weight)
    if len(places) > count:
        weight.flat[rng.permutation(places)[count:]] = 0.0


def make_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as JSON has them, and the sampling defaults of the adapter."""
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    asset = read_asset(args.base) if args.base in BUILT_IN_MODELS else {}
    settings["generation_config"] = asset.get("generation_config", {})
    return settings


def check_kernels(device: torch.device) -> None:
    """Compare the Triton kernels with the plain way on this device. Raises SystemExit."""
    spec, generator = NSASpec(num_selected_blocks=4, window_size=100), torch.Generator(device)
    generator.manual_seed(0)
    q, k, v, weight = (
        torch.randn(2, 523, heads, 64, device=device, generator=generator).bfloat16()
        for heads in (9, 3, 3, 9)
    )
    k_cmp, v_cmp = (attention.compress_mean(x, spec) for x in (k, v))
    rule = attention.Rule("cmp", spec)
    _, lse = attention.attend(q, k_cmp, v_cmp, rule, scale=0.125, backend="plain")
    selected = attention.select(q, k_cmp, lse, spec, scale=0.125, backend="plain")
    by_kernel = attention.select(q, k_cmp, lse, spec, scale=0.125, backend="triton")
    problems = []
    if (selected != by_kernel).float().mean() > 0.01:
        problems.append("selection")
    rules = (rule, attention.Rule("slc", spec, selected), attention.Rule("swa", spec))
    for rule in rules:
        inputs = [q, k_cmp, v_cmp] if rule.branch == "cmp" else [q, k, v]
        results = []
        backends: tuple[attention.Backend, ...] = ("plain", "triton")
        for backend in backends:
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            queries, keys, values = leaves
            o, _ = attention.attend(queries, keys, values, rule, scale=0.125, backend=backend)
            results.append((o.detach(), *torch.autograd.grad(o, leaves, weight)))
        for name, want, got in zip(("o", "dq", "dk", "dv"), *results, strict=True):
            error = (got.float() - want.float()).norm() / want.float().norm()
            if not error < 0.03:  # also where it is NaN
                problems.append(f"{name} of {rule.branch} ({float(error):.3f})")
    if problems:
        raise SystemExit(
            f"the Triton kernels differ from plain PyTorch on this device: {', '.join(problems)}; "
            "use --attention plain"
        )


def start_ranks(device: str) -> Ranks:
    """Join the processes that torchrun started, if it did."""
    if not dist.is_torchelastic_launched():
        return Ranks(0, 1, torch.device(device))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    where = torch.device(device, dist.get_node_local_rank()) if device == "cuda" else device
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(where))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; --tiny changes what is not named there."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Train an NSA student of a dense Llama.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="what data.py wrote")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--base", default=DEFAULT_MODEL, help="a built-in model's base, a .gguf file or a folder")
    add("--init", type=Path, help="adapter folder of an earlier run to start from")
    add(
        "--schedule",
        choices=tuple(SCHEDULES),
        default="full",
        help="which rows, when (schedule.py; default: full, or tiny with --tiny)",
    )
    add("--rope", default="theta:250000", help="yarn:FACTOR, theta:NUMBER or none")
    add("--max-length", type=int, default=32768, help="the student's context, unless yarn says it")
    add("--minutes", type=float, help="wall time of training; the recipe scales (default: 10)")
    add("--steps", type=int, help="a number of steps instead of a time")
    add("--seed", type=int, default=0)
    add("--rank", type=int, default=32, help="of the low-rank updates")
    add("--gates", type=float, nargs=3, default=[0.1, 0.65, 0.35], help="cmp, slc, swa at first")
    add("--lr", type=float, default=1e-3, help="of the low-rank updates")
    add("--gate-lr-scale", type=float, default=2.0, help="learning rate of the gates, of --lr")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--ce-weight", type=float, default=1.0, help="of the next-token loss without a teacher")
    add("--ce-mix", type=float, default=0.2, help="of it beside a teacher, on books and texts")
    add("--share-floor", type=float, default=0.1, help="below it a branch is pushed up")
    add("--share-weight", type=float, default=0.2, help="of that push")
    add(
        "--selection-weight",
        type=float,
        default=0.0,
        help="of the error of the block scores against full attention (default: not computed)",
    )
    add("--tokens-per-batch", type=int, default=32768, help="of each GPU")
    add("--loss-tokens", type=int, help="of a batch, chosen by chance (default: all that count)")
    add("--longest", type=int, help="longer rows of the schedule are made as short as this")
    add("--checkpoint-every", type=float, default=60.0, help="seconds")
    add("--print-every", type=int, default=20, help="steps")
    add("--resume", action="store_true", help="go on from OUT's checkpoint")
    add(
        "--rehearse",
        action=argparse.BooleanOptionalAction,
        default=has_gpu,
        help="take a step of each length first, and print what it needs (default: on a GPU)",
    )
    add("--tiny", action="store_true", help="sizes for a CPU")
    add("--device", choices=("cuda", "cpu"), default="cuda" if has_gpu else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="of the base; default: bfloat16 on a GPU")
    add(
        "--attention",
        choices=("triton", "sdpa", "plain"),
        help="default: triton on a GPU, sdpa on a CPU",
    )
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help=f"layers in the backward pass: slower, a fraction of the memory (default: on a GPU of "
        f"less than {AMPLE_GIB} GiB, and on a CPU)",
    )
    first, _ = parser.parse_known_args(arguments)
    if first.tiny:
        parser.set_defaults(schedule="tiny", rank=4, lr=2e-2, tokens_per_batch=960, print_every=5)
    args = parser.parse_args(arguments)
    if args.steps is not None and args.minutes is not None:
        parser.error("--steps and --minutes both say when to end: leave one out")
    if args.steps is None and args.minutes is None:
        if args.tiny:
            args.steps = 30
        else:
            args.minutes = 10.0
    if args.attention == "sdpa" and args.device == "cuda":
        parser.error(
            "--attention sdpa is for CPUs: PyTorch 2.11 computes some last queries as 0 on a GPU "
            "with such masks; use triton or plain"
        )
    args.attention = args.attention or ("triton" if args.device == "cuda" else "sdpa")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.recompute is None:
        memory = torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else 0
        args.recompute = memory < AMPLE_GIB << 30
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train."""
    args = parse(arguments)
    ranks = start_ranks(args.device)
    if args.device == "cuda":
        # Products of fp32 matrices, the logits' above all: bf16 numbers are exact in TF32.
        torch.set_float32_matmul_precision("high")
    if args.attention == "triton":
        check_kernels(ranks.device)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args, ranks)
    if ranks.rank == 0:
        (args.out / SETTINGS).write_text(json.dumps(trainer.settings, indent=1) + "\n")
    num_trained = sum(p.numel() for p in trainer.parameters)
    trainer.say(f"{num_trained} numbers are trained, on {ranks.size} x {ranks.device}")
    if args.rehearse:
        trainer.rehearse()
    trainer.run()
    if ranks.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
