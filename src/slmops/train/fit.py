"""Whether a training fits into memory, and what would make it fit. Nothing is loaded for it, and torch is not needed.

Each way out is found by asking the estimate again with it; only those that really fit are named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slmops.core.spec import Training
from slmops.errors import ResourceError
from slmops.train.memory import Load, Memory, computes_in_bf16, memory
from slmops.train.shape import Shape

SHORTEST = 16
"""Tokens below which `max_length` is not proposed."""


@dataclass(frozen=True)
class Plan:
    """A training whose size is known.

    Attributes:
        what: its name for people, such as `student`.
        key: what stands before the names of its settings: `train.`, `teacher.train.`, or nothing where that is not known.
        load: what the training's batches hold, for any settings.
        scratch: the model starts from random weights, so that all of them have to move.
        bf16: whether the processor multiplies bfloat16.
        teacher: that is asked while it goes on.
        file_bytes: of the base's weights where they are not float32.
    """

    what: str
    key: str
    shape: Shape
    training: Training
    load: Callable[[Training], Load]
    scratch: bool
    bf16: bool
    teacher: Shape | None = None
    file_bytes: int = 0

    def memory(self, **changes: object) -> Memory:
        """The estimate, with some settings changed."""
        training = self.training.model_copy(update=changes)
        low = computes_in_bf16(training.precision, self.shape, self.bf16)
        return memory(
            self.shape, training, self.load(training), bf16=low, teacher=self.teacher, file_bytes=self.file_bytes
        )

    def ways_out(self, bytes_: int) -> list[str]:
        """Settings with which the training fits into `bytes_`, each with its own figure.

        One setting at a time; where none is enough, all of them together, if that is.
        """
        tuned: list[dict[str, object]] = (
            [] if self.scratch or self.training.tuning == "qlora" else [{"tuning": "qlora"}]
        )
        if tuned and self.training.tuning == "full":
            tuned = [{"tuning": "lora"}, *tuned]
        parts, length = self._parts(bytes_), self._length(bytes_)
        single: list[dict[str, object]] = []
        if parts:
            single.append({"accumulate": parts})
        if not self.training.checkpointing:
            single.append({"checkpointing": True})
        single += tuned
        if length:
            single.append({"max_length": length})
        found = [self._line(change, bytes_) for change in single]
        if any(found):
            return [line for line in found if line]
        least: dict[str, object] = {"accumulate": self.training.batch_size, "checkpointing": True}
        together = [self._line({**least, **change}, bytes_) for change in ({}, *tuned)]
        return [line for line in together if line][:1]

    def _line(self, change: dict[str, object], bytes_: int) -> str:
        needed = self.memory(**change).needed
        if needed > bytes_:
            return ""
        words = " with ".join(f"{self.key}{name}: {_yaml(value)}" for name, value in change.items())
        more = ", longer examples taken out" if "max_length" in change else ""
        return f"{words} ({gigabytes(needed)}{more})"

    def _parts(self, bytes_: int) -> int:
        """The fewest parts, doubling, with which it fits; 0 if it never does."""
        parts = self.training.accumulate * 2
        while parts < self.training.batch_size and self.memory(accumulate=parts).needed > bytes_:
            parts *= 2
        parts = min(parts, self.training.batch_size)
        return parts if parts > self.training.accumulate and self.memory(accumulate=parts).needed <= bytes_ else 0

    def _length(self, bytes_: int) -> int:
        """The longest limit on the examples, halving, with which it fits; 0 if there is none."""
        length = (self.load(self.training).width + 1) // 2
        while length >= SHORTEST:
            if self.memory(max_length=length).needed <= bytes_:
                return length
            length //= 2
        return 0

    def say(self, bytes_: int) -> str:
        """What the training needs of `bytes_` that may be taken, and what for."""
        return say(self.memory(), bytes_)

    def require(self, bytes_: int | None, where: str = "") -> None:
        """Refuse the training if it does not fit.

        Args:
            bytes_: what may be taken; None: not known, so nothing is refused.
            where: file and line of its settings, for the message.

        Raises:
            ResourceError: it does not fit; the hint says what would.
        """
        require(f"{where}training {self.what}", self.memory(), self.ways_out, bytes_, "a smaller model")


def say(needed: Memory, bytes_: int) -> str:
    """What is needed of `bytes_` that may be taken, and what for."""
    return (
        f"about {gigabytes(needed.peak)} of memory at the peak ({_made_of(needed)}), {gigabytes(bytes_)} are available"
    )


def require(
    who: str, needed: Memory, ways_out: Callable[[int], list[str]], bytes_: int | None, instead: str
) -> None:  # fmt: skip
    """Refuse what does not fit.

    Args:
        who: place and name, for the message.
        ways_out: of the bytes that may be taken: settings with which it fits.
        bytes_: what may be taken; None: not known, so nothing is refused.
        instead: what to take where no setting helps.

    Raises:
        ResourceError: it does not fit; the hint says what would.
    """
    if bytes_ is None or needed.needed <= bytes_:
        return
    ways = ways_out(bytes_)
    raise ResourceError(
        f"{who} needs about {gigabytes(needed.needed)} of memory ({_made_of(needed)}), {gigabytes(bytes_)} are available",
        f"any of these makes it fit: {'; '.join(ways)}" if ways
        else f"no setting makes it fit here: take {instead}, or a machine with more memory",
    )  # fmt: skip


def _made_of(needed: Memory) -> str:
    """The three largest parts."""
    largest = sorted({**needed.held, **_largest(needed.moments)}.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in largest)


def _largest(moments: dict[str, int]) -> dict[str, int]:
    name = max(moments, key=lambda key: moments[key])
    return {{"forward": "activations", "backward": "gradients"}.get(name, name): moments[name]}


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def gigabytes(value: float) -> str:
    """Bytes for people, in powers of 1000: MB below one GB."""
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
