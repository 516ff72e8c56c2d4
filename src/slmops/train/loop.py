"""The one training loop: every method hands it a model, tokenised examples and a loss.

It promises:
- the final weights are a function of model, data, `Training`, seed, number of threads and machine;
- a training killed at any moment and started again ends with the same bytes as one that was not: the order of the data
  is a pure function of the epoch, random numbers are seeded anew for each step, and all else is in the checkpoint;
- the weights that did best on validation data are the final ones (the last ones, without validation data), rounded in
  `quantization_aware: ternary`;
- the loss of a batch does not depend on how it is split into parts.

The optimiser is AdamW (arXiv 1711.05101), learning rate linear up, then cosine down (arXiv 1608.03983).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.digest import digest_json
from slmops.core.method import Context, Facts
from slmops.core.runtimes import ternary
from slmops.core.spec import Training
from slmops.errors import TrainingError
from slmops.train.batches import Order
from slmops.train.checkpoint import Checkpoints
from slmops.train.objective import Measured
from slmops.train.quantization_aware import START, fake

if TYPE_CHECKING:
    import torch

    from slmops.train.network import Network
    from slmops.train.objective import Objective

VERSION = "4"
EVERY_S = 20.0
POINTS = 200
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class State:
    """Where a training stands, beside weights and moments. All of it is in the checkpoint."""

    step: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    first_loss: float | None = None
    smooth_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    best_file: str = ""
    stale: int = 0
    stopped: bool = False
    seconds: float = 0.0
    points: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Schedule:
    """When things happen. Steps count from 0; `at(step)` values belong to the step about to be made."""

    total: int
    per_epoch: int
    training: Training

    @classmethod
    def of(cls, training: Training, examples: int) -> Schedule:
        """The schedule of a training on that many examples."""
        per_epoch = max(1, math.ceil(examples / training.batch_size))
        return cls(training.max_steps or max(1, math.ceil(training.epochs * per_epoch)), per_epoch, training)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to the peak, then a cosine to its final share."""
        t = self.training
        warm = max(1, math.ceil(t.warmup * self.total))
        if step < warm:
            return t.learning_rate * (step + 1) / warm
        along = (step - warm) / max(1, self.total - warm)
        low = t.final_learning_rate
        return t.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * along)))

    def looks(self, done: int) -> bool:
        """Whether validation is looked at after `done` steps: evenly spread, always at the end."""
        n = min(self.training.evaluations, self.total)
        return done == self.total or done * n // self.total > (done - 1) * n // self.total

    def marks(self, done: int) -> bool:
        """Whether the loss curve gets a point after `done` steps."""
        n = min(POINTS, self.total)
        return self.looks(done) or done * n // self.total > (done - 1) * n // self.total

    @property
    def rounding_from(self) -> int | None:
        """The first step that sees rounded weights, or None."""
        start = START.get(self.training.quantization_aware)
        return None if start is None else int(self.total * start)

    def rounds(self, step: int) -> bool:
        """Whether the step sees rounded weights."""
        return self.rounding_from is not None and step >= self.rounding_from


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Fixed number of threads, deterministic algorithms, and the caller's random state given back."""
    import torch

    fill: Any = torch.utils.deterministic
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), fill.fill_uninitialized_memory)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    fill.fill_uninitialized_memory = False  # a write for every result; nothing is read unwritten
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        fill.fill_uninitialized_memory = before[2]


def digest_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Digest of the names and bytes of all weights."""
    import hashlib

    sha = hashlib.sha256()
    for name, weight in weights.items():
        sha.update(name.encode())
        sha.update(weight.detach().cpu().contiguous().numpy().data)
    return "sha256:" + sha.hexdigest()


def sparkline(values: list[float], width: int = 24) -> str:
    """The last values as blocks, lowest to highest."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    return "".join(BLOCKS[int((v - low) / ((high - low) or 1) * (len(BLOCKS) - 1))] for v in shown)


class Loop:
    """One training. `run` does it; the rest is its parts.

    Args:
        network: the model; its trained weights are changed in place.
        objective: what is learned.
        training: the parameters.
        ctx: seed, threads, scratch and progress.
        identity: the method's name, for the checkpoint.
        every_s: seconds of training between checkpoints; default: EVERY_S.

    Raises:
        TrainingError: layers are of widths that `quantization_aware` has no place for.
    """

    def __init__(
        self, network: Network, objective: Objective, training: Training, ctx: Context, *,
        identity: str = "", every_s: float | None = None,
    ) -> None:  # fmt: skip
        import torch

        self.network, self.objective, self.training, self.ctx = network, objective, training, ctx
        self.every_s = EVERY_S if every_s is None else every_s
        self.lengths = objective.lengths
        self.schedule = Schedule.of(training, len(self.lengths))
        if training.quantization_aware == "ternary":
            widths = {name: int(network.weights[name].shape[1]) for name in network.inner}
            refusal = ternary({name.split(".")[-2]: width for name, width in widths.items()})
            if refusal:
                raise TrainingError(*refusal)
        self.state = State()
        self.order = Order(self.lengths, training.batch_size, ctx.seed, training.batching)
        decayed = [w for w in network.trained.values() if w.ndim >= 2]
        rest = [w for w in network.trained.values() if w.ndim < 2]
        groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, betas=(0.9, 0.98), fused=True)
        mark = digest_json(
            {
                "loop": VERSION, "torch": torch.__version__, "threads": ctx.threads, "seed": ctx.seed,
                "training": training.model_dump(mode="json"), "objective": objective.digest(),
                "start": digest_weights(network.weights), "identity": identity,
                "device": network.device, "bf16": network.bf16, "path": network.path,
            }
        )  # fmt: skip
        self.checkpoints = Checkpoints(ctx.scratch / "training", mark)

    def resume(self) -> bool:
        """Take up the last checkpoint; False if there is none of this training."""
        import torch

        found = self.checkpoints.load()
        if found is None:
            return False
        with torch.no_grad():
            for name, weight in self.network.trained.items():
                weight.copy_(found["weights"][name])
        self.optimizer.load_state_dict(found["optimizer"])
        self.objective.restore(found["objective"])
        self.state = State(**found["state"])
        return True

    def keep(self) -> None:
        """Write a checkpoint."""
        weights = {n: w.detach().cpu() for n, w in self.network.trained.items()}
        self.checkpoints.save(
            {
                "weights": weights, "optimizer": self.optimizer.state_dict(), "state": vars(self.state).copy(),
                "objective": self.objective.state(), "best_file": self.state.best_file,
            }
        )  # fmt: skip

    def seen_weights(self, step: int) -> dict[str, torch.Tensor]:
        """What the forward pass of a step sees: the weights themselves, or rounded copies that collect gradients."""
        weights = self.network.weights | self.network.trained  # an objective may have brought weights of its own
        if self.schedule.rounds(step):
            mode = self.training.quantization_aware
            for name in self.network.inner if mode == "ternary" else self.network.matrices:
                weights[name] = fake(weights[name], mode, self.training.block_size).requires_grad_()
        return weights

    def step(self) -> None:
        """One optimiser step.

        Raises:
            TrainingError: the loss or the gradient is not a number, or the loss runs away.
        """
        import torch

        s, step = self.state, self.state.step
        torch.manual_seed((self.ctx.seed * 1_000_003 + step) % (1 << 62))
        self.network.learn(True)
        seen = self.seen_weights(step)
        parts = self.objective.parts(self.order.batch(step), step, self.network, seen)
        weight = max(float(sum(float(p.weights.sum()) for p in parts)), 1e-9)
        self.optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for part in parts:
            loss = self.objective.loss(self.network, seen, part, self.training.dropout) / weight
            loss.backward()  # type: ignore[no-untyped-call]
            value += float(loss.detach())
        for name, own in self.network.trained.items():
            if seen[name] is not own:
                own.grad = seen[name].grad
        for name, may in self.network.kept.items():
            grad = self.network.trained[name].grad
            if grad is not None:
                grad.mul_(may)  # without gradients moments stay zero, and decay of a zero is none
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.trained.values(), self.training.clip))
        self.check(value, norm)
        rate = self.schedule.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        s.step += 1
        s.tokens += sum(p.tokens for p in parts)
        s.loss_sum += value * weight
        s.loss_weight += weight

    def check(self, value: float, norm: float) -> None:
        """Refuse to go on with a loss that is lost."""
        s = self.state
        finite = math.isfinite(value) and math.isfinite(norm)
        if finite:
            s.first_loss = value if s.first_loss is None else s.first_loss
            s.smooth_loss = value if s.smooth_loss is None else 0.95 * s.smooth_loss + 0.05 * value
        bound = max(1.5 * (s.first_loss or 0.0), (s.first_loss or 0.0) + 2.0)
        if finite and (s.smooth_loss or 0.0) <= bound:
            return
        rows = [self.objective.rows[int(i)] for i in self.order.batch(s.step)[:3]]
        first = ", ".join(f"{r.file}:{r.line}" for r in rows)
        epoch, index = divmod(s.step, self.schedule.per_epoch)
        what = "the loss runs away" if finite else "the loss is not a number"
        raise TrainingError(
            f"{what} at step {s.step + 1} of {self.schedule.total} (epoch {epoch + 1}, batch {index + 1} of "
            f"{self.schedule.per_epoch}, with {first}, …): loss {value:.4g}, gradient norm {norm:.4g}",
            f"lower learning_rate (now {self.training.learning_rate:g}), raise warmup, or set precision: fp32",
        )

    def mark(self, looked: bool) -> None:
        """Add a point to the loss curve; look at validation data, keep the best weights and the count of vain looks."""
        s, done = self.state, self.state.step
        point: dict[str, Any] = {
            "step": done,
            "train_loss": round(s.loss_sum / max(s.loss_weight, 1e-9), 6),
            "validation_loss": None,
            "learning_rate": float(f"{self.schedule.learning_rate(done - 1):.6g}"),
        }
        s.loss_sum = s.loss_weight = 0.0
        s.points.append(point)
        value = None
        if looked:
            self.network.learn(False)
            value = self.objective.validate(self.network, self.seen_weights(done - 1))
        if value is None:
            return
        rounding = self.schedule.rounding_from
        if rounding is not None and done > rounding >= s.best_step and s.best_file:
            s.best_loss, s.best_file, s.stale = None, "", 0  # losses of exact and rounded weights do not compare
        point["validation_loss"] = round(value, 6)
        if isinstance(self.objective, Measured):
            point |= self.objective.measured
        self.ctx.progress.point(done, {"validation_loss": point["validation_loss"]})
        if s.best_loss is None or value < s.best_loss:
            s.best_loss, s.best_step, s.stale = value, done, 0
            s.best_file = self.checkpoints.save_best(done, self.network.trained)
        else:
            s.stale += 1
            may = rounding is None or done > rounding
            s.stopped = bool(self.training.patience and s.stale >= self.training.patience and may)

    def run(self) -> dict[str, Any]:
        """Train to the end and leave the final weights in the network.

        Returns:
            The deterministic record: steps, best step, loss curve, tokens; see `record`.
        """
        import torch

        progress, total = self.ctx.progress, self.schedule.total
        with deterministic(self.ctx.threads):
            if self.resume():
                progress.log(f"going on from step {self.state.step} of {total}")
            s = self.state
            for point in s.points:
                if point["validation_loss"] is not None:
                    progress.point(point["step"], {"validation_loss": point["validation_loss"]})
            progress.start("training", total, "steps")
            progress.advance(s.step)
            mark = saved = time.monotonic()
            done_tokens, begun = s.tokens, mark
            while s.step < total and not s.stopped:
                self.step()
                looks = self.schedule.looks(s.step)
                if self.schedule.marks(s.step):
                    self.mark(looks)
                now = time.monotonic()
                s.seconds, mark = s.seconds + now - mark, now
                progress.advance(1, self.note((s.tokens - done_tokens) / max(now - begun, 1e-9)))
                if looks or s.stopped or now - saved >= self.every_s:
                    self.keep()
                    saved = time.monotonic()
            if s.best_file:
                with torch.no_grad():
                    for name, value in self.checkpoints.load_best(s.best_file).items():
                        self.network.trained[name].copy_(value)
            if self.training.quantization_aware == "ternary":
                with torch.no_grad():
                    for name in self.network.inner:
                        self.network.trained[name].copy_(fake(self.network.trained[name], "ternary", 0))
            progress.stop()
        return self.record()

    def note(self, rate: float) -> str:
        """What stands beside the progress bar."""
        s = self.state
        parts = [f"loss {s.smooth_loss:.3f}" if s.smooth_loss is not None else ""]
        looks = [p["validation_loss"] for p in s.points if p["validation_loss"] is not None]
        parts += [f"validation {looks[-1]:.3f}"] if looks else []
        parts += [f"{rate:,.0f} tokens/s"]
        parts += [sparkline([p["train_loss"] for p in s.points])] if len(s.points) > 1 else []
        return "  ".join(p for p in parts if p)

    def record(self) -> dict[str, Any]:
        """What goes into training.json: nothing in it depends on time."""
        s = self.state
        return {
            "steps": s.step, "planned_steps": self.schedule.total, "steps_per_epoch": self.schedule.per_epoch,
            "best_step": s.best_step if s.best_file else s.step,
            "best_validation_loss": round(s.best_loss, 6) if s.best_loss is not None else None,
            "stopped_early": s.stopped, "tokens": s.tokens, "examples": len(self.lengths),
            "validation_examples": self.objective.validation_examples, "parameters": self.network.parameters,
            "trained_parameters": sum(w.numel() for w in self.network.trained.values()),
            "precision": "bf16" if self.network.bf16 else "fp32", "rounding_from": self.schedule.rounding_from,
            "seed": self.ctx.seed, "threads": self.ctx.threads, "points": s.points,
        }  # fmt: skip

    def facts(self) -> Facts:
        """The record without the curve, and the timings."""
        s = self.state
        facts = {k: v for k, v in self.record().items() if k != "points"}
        return {**facts, "seconds": round(s.seconds, 2), "tokens_per_s": round(s.tokens / max(s.seconds, 1e-9), 1)}


def write_record(record: dict[str, Any], out: Path) -> None:
    """training.json, with sorted keys."""
    import json

    (out / "training.json").write_text(json.dumps(record, sort_keys=True, indent=1) + "\n", "utf-8")
