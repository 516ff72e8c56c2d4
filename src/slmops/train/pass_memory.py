"""The most memory that a teacher's pass will hold on the CPU (`train.cache_logits`, `train.cache_aligned`), from shapes alone:
no torch, no model; and whether it fits, and what would make it fit.

It promises, as `slmops.train.memory` does for trainings, the resident bytes of the process at their peak. Nothing is learned, so
there is no backward pass. What is counted:

- the teachers' weights;
- the forward pass of one batch, and what comes after it: tensors as large as the logits of some of its answer tokens;
- what is kept of every answer token, more than once when it is put together at the end. How many draws fall on the same token is not
  known before, so all are taken to be different: of a teacher that is sure, less is kept;
- the examples as Python holds them, and Python with its libraries.

The constants in capitals were fitted, on other shapes than the benchmark reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slmops.core.method import Context
from slmops.train import activations
from slmops.train.activations import FLOAT, LOW
from slmops.train.fit import SHORTEST, gigabytes, require, say
from slmops.train.memory import LIBRARIES, MAPPED, PER_EXAMPLE, PER_TOKEN, RANKS, WASTE, Memory, computes_in_bf16
from slmops.train.shape import Shape, lower_bytes

if TYPE_CHECKING:
    from slmops.train.encode import Encoded, Ints

WASTE_OF_PASS, WASTE_IN_BF16 = 2.0, 3.0
"""What the heap holds for each byte of a forward pass, of tensors that are not given back: freed pieces that fit nothing new. In
bf16 the weights are cast for each batch, between them."""

TOGETHER = 3
"""Bytes that are there besides for each byte of what was kept, when it is put together and written."""

TENSOR = 600
"""Bytes of a small tensor beside its values."""

BATCH = 64
"""Examples in one pass, unless told."""

PIECE, ROWS = 1 << 20, 64
"""Logits that are looked at together, and the fewest positions of them: with small pieces little of the heap is lost between
those that are kept and those that are not."""

NAMES = {"batch_size": "teacher_batch", "samples": "logit_samples", "max_length": "max_length"}
"""What the project file calls the settings of a pass."""


@dataclass(frozen=True)
class Load:
    """What one forward pass has to hold at most, and how much data lies about.

    Attributes:
        tokens: positions of the largest batch, padding included; `losses`: the most answer tokens of a batch.
        examples: all examples; `all_tokens`: theirs together; `answers`: those of their answers.
        width: tokens of the longest example.
    """

    tokens: int
    losses: int
    examples: int
    all_tokens: int
    answers: int
    width: int

    @classmethod
    def of(cls, lengths: Ints, answer_from: Ints, batch: int) -> Load:
        """The load of tokenised examples, which go through in batches of nearly the same length.

        Args:
            lengths: (examples,) tokens of each; `answer_from`: (examples,) index of its first answer token.
        """
        import numpy as np

        order, answers, tokens, losses = np.argsort(lengths, kind="stable"), lengths - answer_from, 0, 0
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            tokens = max(tokens, len(chosen) * int(lengths[chosen[-1]] - 1))
            losses = max(losses, int(answers[chosen].sum()))
        longest = int(lengths.max()) if len(lengths) else 0
        return cls(tokens, losses, len(lengths), int(lengths.sum()), int(answers.sum()), longest)

    @classmethod
    def guess(cls, batch: int, examples: int, longest: float, prompt: float, answer: float) -> Load:
        """The load of `examples` with `prompt` and `answer` tokens on average, of which a batch is as long as the longest."""
        rows, share = min(max(1, examples), batch), answer / (prompt + answer)
        return cls(
            rows * max(1, round(longest) - 1), rows * max(1, round(longest * share)), examples,
            round(examples * (prompt + answer)), round(examples * answer), round(longest),
        )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What of a pass decides its memory.

    Attributes:
        kind: which of the two passes.
        batch_size: examples in one forward pass.
        max_length: as of the pass.
        samples: draws per position, or k; of distributions.
        selection: as of the pass.
        precision: as of the pass.
    """

    kind: Literal["logits", "aligned"]
    batch_size: int = BATCH
    max_length: int | None = None
    samples: int = 12
    selection: str = "sampled"
    precision: str = "auto"


def pieces(positions: int, vocabulary: int) -> list[tuple[int, int]]:
    """Where the pieces begin and end in which the answer tokens of a batch are looked at."""
    rows = max(ROWS, PIECE // vocabulary)
    return [(start, min(start + rows, positions)) for start in range(0, positions, rows)]


def copies(settings: Settings, teachers: int) -> int:
    """How many tensors as large as the logits of a piece are there at one time, after the forward pass."""
    if settings.kind == "aligned":
        return 2
    drawing = 4 if settings.selection == "sampled" else 3
    return drawing if teachers == 1 else max(4 * teachers + 1, teachers + drawing + 1)


def kept(settings: Settings, load: Load, vocabulary: int) -> int:
    """Bytes of what is kept of all examples until the end."""
    if settings.kind == "aligned":
        return load.answers * (12 + FLOAT * RANKS) + 3 * TENSOR * load.examples
    return load.answers * (12 * min(settings.samples, vocabulary) + 20)


def memory(settings: Settings, load: Load, teachers: Sequence[Shape], hardware: bool, file_bytes: int = 0) -> Memory:
    """The memory of a pass on the CPU.

    Args:
        hardware: whether the processor multiplies bfloat16.
        file_bytes: of the teachers' weights in another precision than float32.
    """
    vocabulary = max(shape.vocabulary for shape in teachers)
    results = kept(settings, load, vocabulary)
    held = {
        "libraries": LIBRARIES,
        "data": PER_EXAMPLE * load.examples + PER_TOKEN * load.all_tokens,
        "weights": FLOAT * sum(shape.parameters for shape in teachers),
        "results": results,
    }
    one = FLOAT * pieces(load.losses, vocabulary)[0][1] * vocabulary if load.losses else 0
    states = FLOAT * load.losses * sum(shape.hidden for shape in teachers)
    passing, cast = 0, 0
    for shape in teachers:
        bf16 = computes_in_bf16(settings.precision, shape, hardware)
        most = min(load.tokens, MAPPED // (FLOAT * shape.hidden))  # tensors of more are given back
        waste = ((WASTE_IN_BF16 if bf16 else WASTE_OF_PASS) - WASTE) * activations.passing(shape, most, bf16)
        passing = max(passing, round(WASTE * activations.passing(shape, load.tokens, bf16) + waste))
        if bf16:
            cast = max(cast, LOW * max(shape.table, *(a * b for a, b in shape.linears.values())) + one // 2)
    moments = {
        "forward": passing + states + copies(settings, len(teachers)) * one + cast,
        "together": TOGETHER * results,
    }
    left = sum(moments.values()) - max(moments.values())  # the heap keeps what the other moment took
    if file_bytes:
        moments["loading"] = file_bytes - results
    return Memory(held, moments, left)


@dataclass(frozen=True)
class PassPlan:
    """A teacher's pass whose size is known; see `slmops.train.fit.Plan`.

    Attributes:
        what: the step's name; `key`: what stands before the names of its settings.
        load: what its batches hold, for any settings.
        teachers: all that answer.
        bf16: whether the processor multiplies bfloat16.
        file_bytes: of the teachers' weights where they are not float32.
    """

    what: str
    key: str
    settings: Settings
    load: Callable[[Settings], Load]
    teachers: tuple[Shape, ...]
    bf16: bool
    file_bytes: int = 0

    def memory(self, **changes: object) -> Memory:
        """The estimate, with some settings changed."""
        settings = replace(self.settings, **changes)  # type: ignore[arg-type]
        return memory(settings, self.load(settings), self.teachers, self.bf16, self.file_bytes)

    def ways_out(self, bytes_: int) -> list[str]:
        """Settings with which the pass fits into `bytes_`, each with its own figure: one at a time, or, where none is enough, the
        smallest batches with the fewest draws."""

        def halved(name: str, start: int, least: int) -> dict[str, object]:
            value = start // 2
            while value > least and self.memory(**{name: value}).needed > bytes_:
                value //= 2
            return {name: max(value, least)}

        single = [halved("batch_size", self.settings.batch_size, 1)]
        if self.settings.kind == "logits":
            single.append(halved("samples", self.settings.samples, 1))
        longest = self.load(self.settings).width
        if longest >= 2 * SHORTEST:
            single.append(halved("max_length", longest, SHORTEST))
        found = [line for line in (self._line(change, bytes_) for change in single) if line]
        if found:
            return found
        return [line for line in [self._line({"batch_size": 1, "samples": 1}, bytes_)] if line]

    def _line(self, change: dict[str, object], bytes_: int) -> str:
        needed = self.memory(**change).needed
        if needed > bytes_:
            return ""
        if self.settings.kind == "aligned":
            change = {name: value for name, value in change.items() if name != "samples"}
        words = " with ".join(f"{self.key}{NAMES[name]}: {value}" for name, value in change.items())
        more = ", longer examples taken out" if "max_length" in change else ""
        return f"{words} ({gigabytes(needed)}{more})"

    def say(self, bytes_: int) -> str:
        """What the pass needs of `bytes_` that may be taken, and what for."""
        return say(self.memory(), bytes_)

    def require(self, bytes_: int | None, where: str = "") -> None:
        """Refuse the pass if it does not fit.

        Args:
            bytes_: what may be taken; None: not known, so nothing is refused.
            where: file and line of its settings, for the message.

        Raises:
            ResourceError: it does not fit; the hint says what would.
        """
        who = f"{where}the teacher's pass {self.what}"
        require(
            who,
            self.memory(),
            self.ways_out,
            bytes_,
            "a smaller teacher (or train.method: sequence, which has no pass)",
        )


def require_pass(
    inputs: Mapping[str, Path], names: Sequence[str], settings: Settings, data: Encoded, ctx: Context
) -> None:  # fmt: skip
    """Refuse a pass that does not fit into what is free, by the tokens that it will really see; say what it needs. Not on a GPU.

    Args:
        names: the teachers among the inputs.

    Raises:
        ResourceError: with what would make it fit.
    """
    import torch

    from slmops.train.available import available, resident
    from slmops.train.network import precision_for

    shapes = [Shape.of_folder(inputs[name]) for name in names]
    known = tuple(shape for shape in shapes if shape is not None)
    free = available()
    if torch.cuda.is_available() or len(known) < len(shapes) or free is None:
        return

    def load(changed: Settings) -> Load:
        import numpy as np

        lengths = np.minimum(data.lengths, changed.max_length or 1 << 30)
        return Load.of(lengths, np.minimum(data.answer_from, lengths - 1), changed.batch_size)

    low = precision_for("auto", max(shape.parameters for shape in known), "cpu") == "bf16"
    file = sum(lower_bytes(inputs[name]) for name in names)
    plan = PassPlan("over the examples", "train.", settings, load, known, low, file)
    plan.require(free + resident())
    ctx.progress.log(plan.say(free + resident()))
