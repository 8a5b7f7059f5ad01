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
from typing import Any

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
from kernel_check import check_kernels
from losses import head_loss, share_floor, split_weight, thin_out
from options import make_settings, parse
from ranks import Ranks, start_ranks
from schedule import (
    PHASES,
    TINY_PHASES,
    Clock,
    Phase,
    Source,
    choose,
    fit,
    learning_rate,
    pick_phases,
    shorten,
    usable_phases,
)
from student import open_base
from torch import Tensor

MAX_BAD_STEPS = 5
"""Steps in a row without a finite gradient after which training stops."""

NUM_PROBES = 256
"""Queries of a row whose selection is compared with full attention."""

SPARE_S = 5.0
"""Seconds of --minutes that are kept for the last checkpoint and the adapter."""


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
        every = TINY_PHASES if args.tiny else PHASES
        phases = usable_phases(pick_phases(every, args.phases), self.corpus.kinds)
        if args.longest is not None:
            phases = [shorten(phase, args.longest) for phase in phases]
        self.phases = [fit(phase, self.student.config.max_position_embeddings) for phase in phases]
        self.step, elapsed_s = 0, 0.0
        if args.init is not None:
            read_adapter(args.init, self.student, self.model)
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
                # Retrieval has every loss, and needs most.
                if source.kind == "retrieval" or source.length not in sources:
                    sources[source.length] = source
        rng = np.random.default_rng([self.args.seed, self.ranks.rank])
        for length, source in sorted(sources.items(), reverse=True):
            batch = self._make_batch(source, rng)
            for _ in range(2):  # The first one compiles.
                start = time.monotonic()
                self._train_step(self.phases[0], source, batch, 0.0, is_rehearsal=True)
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
                phase, source, batch = pending.result()
                # The next batch is made while this one is trained on.
                ahead = self.ranks.agree(self.clock.progress(self.step + 1, 0.0))
                pending = pool.submit(self._batch, self.step + 1, ahead)
                entry = self._train_step(phase, source, batch, progress)
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

    def _batch(self, step: int, progress: float) -> tuple[Phase, Source, list[Tensor]]:
        # All ranks take the same source, so that they take the same time.
        phase, source = choose(self.phases, progress, np.random.default_rng([self.args.seed, step]))
        rng = np.random.default_rng([self.args.seed, step, 1 + self.ranks.rank])
        return phase, source, self._make_batch(source, rng)

    def _make_batch(self, source: Source, rng: np.random.Generator) -> list[Tensor]:
        """Return ids and the two weights of `split_weight`, each [B, T]."""
        ids, weight = self.corpus.batch(source.kind, source.length, rng)
        context = self.student.base.config.max_position_embeddings
        taught, own = split_weight(source.kind, weight, context, rng)
        if self.args.loss_tokens is not None:
            thin_out(taught, self.args.loss_tokens, rng)
            if source.kind != "retrieval":  # Whose answers are few.
                thin_out(own, self.args.loss_tokens, rng)
        return [torch.from_numpy(x) for x in (ids, taught, own)]

    def _train_step(
        self,
        phase: Phase,
        source: Source,
        batch: Sequence[Tensor],
        progress: float,
        *,
        is_rehearsal: bool = False,
    ) -> dict[str, Any]:
        student, args = self.student, self.args
        ids, taught, own = (item.to(self.ranks.device) for item in batch)
        context = student.base.config.max_position_embeddings
        keep = phase.mse_weight > 0 and source.length <= context
        theirs, kept = student.teacher(ids[:, :context], keep_attention=keep)
        probes = self._probes(source)
        output = student(ids, kept or None, probes=probes)
        loss, kl, ce = self._prediction_loss(source, output.hidden, theirs, ids, taught, own)
        floor = share_floor(output.shares, args.share_floor)
        total = loss + phase.mse_weight * output.mse + args.share_weight * floor
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
            "kl": float(kl),
            "ce": None if ce is None else float(ce),
            "mse": float(output.mse.detach()) if kept else None,
            "share_floor": float(floor.detach()),
            "selection": None if probes is None else float(output.selection.detach()),
            "shares": [round(x, 4) for x in shares.mean(dim=0).tolist()],
            "least_shares": [round(x, 4) for x in shares.amin(dim=0).tolist()],
            "gradient_norm": float(norm),
            "is_finite": is_finite,
            "lr": self.peaks[1] * factor,
        }

    def _probes(self, source: Source) -> Tensor | None:
        """Return the queries whose selection is trained: int64 [P], the same in all ranks."""
        if not self.args.selection_weight or source.kind not in self.args.selection_kinds:
            return None
        rng = np.random.default_rng([self.args.seed, self.step, 0])
        probes = rng.integers(source.length // 4, source.length, NUM_PROBES)
        if source.kind == "retrieval":
            # The questions and answers are at the end.
            num_last = min(source.length, NUM_PROBES * 3 // 4)
            probes[:num_last] = np.arange(source.length - num_last, source.length)
        return torch.from_numpy(probes).to(self.ranks.device)

    def _prediction_loss(
        self,
        source: Source,
        hidden: Tensor,
        teacher_hidden: Tensor,
        ids: Tensor,
        taught: Tensor,
        own: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the loss of the predictions, their KL to the teacher and the text's own loss.

        The latter is of `own` tokens: of answers, or past the teacher's context. None without any.
        """
        args, num_taught, head = self.args, teacher_hidden.shape[1], self.student.head
        is_text = source.kind in ("books", "text")
        first = head_loss(
            hidden[:, :num_taught],
            head,
            ids[:, :num_taught],
            taught[:, :num_taught],
            teacher_hidden=teacher_hidden,
            kl_weight=1.0,
            ce_weight=args.ce_mix if is_text else 0.0,
        )
        if source.kind != "retrieval" and source.length <= num_taught:
            return first.total, first.kl, None
        second = head_loss(
            hidden, head, ids, own, teacher_hidden=None, kl_weight=0.0, ce_weight=1.0
        )
        if source.kind == "retrieval":
            return first.total + args.ce_weight * second.total, first.kl, second.ce
        share = num_taught / source.length
        beyond = args.ce_beyond * second.total
        return share * first.total + (1.0 - share) * beyond, first.kl, second.ce

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
            answer = "" if entry["ce"] is None else f"ce {entry['ce']:.4f}, "
            found = entry["selection"]
            selection = "" if found is None else f"selection {found:.3f}, "
            self.say(
                f"{entry['progress']:6.1%} step {entry['step']:5} {entry['phase']:8}"
                f"{source.kind:>9} {source.length:5}: {answer}kl {entry['kl']:.4f}, shares "
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
