"""What a training learns, apart from how the loop goes about it: what a step feeds, what it costs, how good the model is.

`Supervised` is the plain objective: answers are given, and the loss is a sum over their tokens. Methods that need more (the
student's own answers, pairs) bring an `Objective` of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from slmops.core.spec import Training
from slmops.train.batches import Part, collate

if TYPE_CHECKING:
    import torch

    from slmops.train.encode import Encoded, Ints, Row
    from slmops.train.network import Network

    LossFunction = Callable[[torch.Tensor, Part], torch.Tensor]
    Weights = Mapping[str, torch.Tensor]
    PartLoss = Callable[[Network, Weights, Part, float], torch.Tensor]

HEAD_ELEMENTS = 1 << 26
"""Logits computed at once; more are computed again in the backward pass."""


class Objective(Protocol):
    """What the loop asks of a method. All of it is a function of its arguments and of `state`."""

    @property
    def lengths(self) -> Ints:
        """(examples,) tokens of each: what batches are sorted by. Their number is the examples of an epoch."""

    @property
    def rows(self) -> Sequence[Row]:
        """(examples,) where each stands, for error messages."""

    @property
    def validation_examples(self) -> int:
        """How many examples `validate` looks at."""

    def digest(self) -> Any:
        """What decides the outcome beside the parameters, as JSON: a checkpoint must agree with it."""

    def parts(self, chosen: Ints, step: int, network: Network, weights: Weights) -> list[Part]:
        """The passes of one step over the chosen examples."""

    def loss(self, network: Network, weights: Weights, part: Part, dropout: float) -> torch.Tensor:
        """Scalar: the weighted sum of the losses of a part. The step divides by the sum of all weights."""

    def validate(self, network: Network, weights: Weights) -> float | None:
        """The loss to stop by, lower is better; None without validation examples."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep so that the rest goes as it would have gone."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""


@runtime_checkable
class Measured(Protocol):
    """An objective whose `validate` finds more than a loss: `measured` is what the last one found, for the curve."""

    measured: dict[str, float]


def cross_entropy(training: Training) -> LossFunction:
    """The plain loss: weighted sum of the negative log likelihood of the targets."""

    def loss(logits: torch.Tensor, part: Part) -> torch.Tensor:
        import torch

        each = torch.nn.functional.cross_entropy(
            logits, part.targets, reduction="none", label_smoothing=training.label_smoothing
        )
        return (each * part.weights).sum()

    return loss


def to_device(part: Part, device: str) -> Part:
    """The part's tensors on a device."""
    if device == "cpu":
        return part
    import torch

    moved: dict[str, Any] = {k: v.to(device) for k, v in vars(part).items() if isinstance(v, torch.Tensor)}
    return replace(part, **moved)


def piecewise(count: int, vocabulary: int, piece: Callable[[int, int], torch.Tensor]) -> list[torch.Tensor]:
    """What `piece` gives for positions 0 to `count`: at once, or, where the logits are large, in pieces (start, stop) that are
    computed again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    size = max(1, HEAD_ELEMENTS // vocabulary)
    if count <= size:
        return [piece(0, count)]
    return [checkpoint(piece, a, min(a + size, count), use_reentrant=False) for a in range(0, count, size)]


def in_pieces(
    network: Network, weights: Weights, part: Part, hidden: torch.Tensor, loss: LossFunction
) -> list[torch.Tensor]:
    """What `loss` gives for the logits of (P, hidden) states."""

    def piece(a: int, b: int) -> torch.Tensor:
        return loss(network.project(weights, hidden[a:b]), part.narrow(a, b))

    return piecewise(hidden.shape[0], network.vocabulary, piece)


def part_loss(network: Network, weights: Weights, part: Part, loss: LossFunction, dropout: float = 0.0) -> torch.Tensor:
    """Loss sum of a part."""
    sums = in_pieces(network, weights, part, network.hidden(weights, part, dropout), loss)
    total: torch.Tensor = sum(sums[1:], start=sums[0])
    return total


def on_logits(loss: LossFunction) -> PartLoss:
    """The loss of a part from a loss that looks at logits alone."""

    def whole(network: Network, weights: Weights, part: Part, dropout: float) -> torch.Tensor:
        return part_loss(network, weights, part, loss, dropout)

    return whole


def token_logps(network: Network, weights: Weights, part: Part, dropout: float = 0.0) -> torch.Tensor:
    """(P,) float32 log likelihood of each target."""
    import torch

    def logps(logits: torch.Tensor, some: Part) -> torch.Tensor:
        return -torch.nn.functional.cross_entropy(logits, some.targets, reduction="none")

    return torch.cat(in_pieces(network, weights, part, network.hidden(weights, part, dropout), logps))


def validation_loss(network: Network, weights: Weights, data: Encoded, training: Training) -> float:
    """Mean negative log likelihood of the answer tokens: no dropout, no smoothing, no prompt tokens."""
    import numpy as np
    import torch

    order = np.argsort(data.lengths, kind="stable")
    size = max(1, training.batch_size // training.accumulate) * 2
    plain = cross_entropy(training.model_copy(update={"label_smoothing": 0.0}))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(order), size):
            part = to_device(collate(data, order[start : start + size], 0.0, "bucket"), network.device)
            total += float(part_loss(network, weights, part, plain))
    return total / float(data.answer_tokens.sum())


def split(chosen: Ints, training: Training) -> list[Ints]:
    """The examples of a batch in `accumulate` parts, none of them empty."""
    import numpy as np

    return [part for part in np.array_split(chosen, training.accumulate) if len(part)]


@dataclass
class Supervised:
    """Answers are given, and the loss is a sum over their tokens.

    Attributes:
        data, validation: tokenised examples; `validation` may have none.
        part_loss: the weighted sum of the losses of a part.
        depends: whatever else the loss reads, for the checkpoint.
    """

    data: Encoded
    validation: Encoded
    training: Training
    part_loss: PartLoss
    depends: Any = ""

    @property
    def lengths(self) -> Ints:
        """(examples,) tokens of each."""
        return self.data.lengths

    @property
    def rows(self) -> Sequence[Row]:
        """(examples,) where each stands."""
        return self.data.rows

    @property
    def validation_examples(self) -> int:
        """How many validation examples there are."""
        return len(self.validation.ids)

    def digest(self) -> Any:
        """Data, validation and what the loss reads."""
        return [self.data.digest(), self.validation.digest(), self.depends]

    def parts(self, chosen: Ints, step: int, network: Network, weights: Weights) -> list[Part]:
        """The chosen examples, laid out in `accumulate` parts."""
        t = self.training
        capacity = min(256, t.max_length or 256)
        return [
            to_device(collate(self.data, some, t.prompt_weight, t.batching, capacity), network.device)
            for some in split(chosen, t)
        ]

    def loss(self, network: Network, weights: Weights, part: Part, dropout: float) -> torch.Tensor:
        """See `part_loss`."""
        return self.part_loss(network, weights, part, dropout)

    def validate(self, network: Network, weights: Weights) -> float | None:
        """See `validation_loss`."""
        if not len(self.validation.ids):
            return None
        return validation_loss(network, weights, self.validation, self.training)

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing."""
