"""Method `compress.autoround`: which way each weight is rounded, and each group's scale, learned by signed gradient descent.

AutoRound (arXiv 2309.05516). A weight w becomes s * round(w / s + v) with v between -1/2 and 1/2, and a group's scale s is a
share of the one at which its largest weight is exact. Block by block, v and the shares go down the sign of the gradient of
the squared error of the block's outputs, against the outputs of the whole model's block on the whole model's inputs; the
block itself reads what the rounded blocks before it give. The step size falls linearly to 0. Of the start (nearest, scales
of least weighted error) and the looks on the way the best is kept. Looks are at texts that nothing is learned from, a fifth of all.

The result is a plain model folder whose weights lie on the grid of `compress.grid`. The table of embeddings and the output matrix
are left to the converter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from slmops.compress import calibrate
from slmops.compress.grid import lowest, scales_of
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive

if TYPE_CHECKING:
    import torch

DECLARATION = Declaration(
    name="compress.autoround",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset", "synthetic?": "dataset", "augmented?": "dataset", "widths?": "widths"},
    extra="train",
    packages=("torch", "transformers", "safetensors"),
    threads=True,
)

LOOKS = 10
"""How many times the texts that were held out are looked at on the way, to keep the best."""
HOLD = 5
"""One text in so many is held out."""
STEP_TOKENS = 1024
"""About how many tokens a step of the descent sees."""
LEAST_SHARE, MOST_SHARE = 0.5, 1.1


class Params(BaseParams):
    """What to calibrate on (`examples` of the files, as `input/file`), how many steps, and the first one's size (1 / `iterations`)."""

    files: tuple[str, ...]
    examples: Positive = 256
    block_size: Literal[16, 32, 64, 128] = 32
    iterations: Positive = 200
    rate: Annotated[float, Field(gt=0, le=1)] | None = None


@dataclass
class Matrix:
    """A matrix (outputs, inputs) whose rounding is learned.

    Attributes:
        exact: (outputs, groups, 1) scale at which the largest weight of a group is exact.
        groups: (outputs, groups, block_size) the weights, filled with zeros.
        largest: like `groups`: which weight is the largest of its group.
        offset: like `groups`: v.
        share: like `exact`: the scale's share of it.
    """

    groups: torch.Tensor
    exact: torch.Tensor
    largest: torch.Tensor
    offset: torch.Tensor
    share: torch.Tensor
    columns: int
    bits: int

    @classmethod
    def of(cls, weight: torch.Tensor, importance: torch.Tensor, block_size: int, bits: int) -> Matrix:
        """Nearest, under the scales of `scales_of`."""
        import torch

        rows, columns = weight.shape
        padding = -columns % block_size
        pad = torch.nn.functional.pad

        def cut(value: torch.Tensor) -> torch.Tensor:
            return pad(value, (0, padding)).reshape(rows, -1, block_size)

        work = weight.detach().float()
        scale, largest = scales_of(work, importance, block_size, bits)
        groups, mark = cut(work), cut(largest)
        exact = (groups * mark).sum(2, keepdim=True) / lowest(bits)
        first = cut(scale)[:, :, :1]
        share = torch.where(exact == 0, torch.ones_like(exact), first / torch.where(exact == 0, 1.0, exact))
        offset = torch.zeros_like(groups)
        return cls(groups, exact, mark, offset.requires_grad_(), share.requires_grad_(), columns, bits)

    def values(self) -> torch.Tensor:
        """What it is rounded to, (outputs, inputs); gradients go through every rounding as if it were not there."""
        import torch

        scale = self.exact * self.share
        scale = scale + (scale.detach().half().float() - scale.detach())
        steps = self.groups / torch.where(scale == 0, 1.0, scale) + self.offset
        steps = steps + (steps.detach().round() - steps.detach())
        steps = torch.where(
            self.largest, float(lowest(self.bits)), steps.clamp(lowest(self.bits), -lowest(self.bits) - 1)
        )
        return (steps * scale).reshape(len(self.groups), -1)[:, : self.columns]

    def step(self, rate: float) -> None:
        """Go one step down, and forget the gradients."""
        for value, low, high in ((self.offset, -0.5, 0.5), (self.share, LEAST_SHARE, MOST_SHARE)):
            if value.grad is not None:
                value.data.add_(value.grad.sign(), alpha=-rate).clamp_(low, high)
                value.grad = None


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the model folder with rounded weights.

    Raises:
        CompressionError: the model has other layers than those that are known.
        DataError: there is no example to calibrate on.
        ModelError: the model cannot be loaded.
    """
    import torch

    before = after = 0.0
    widths = calibrate.read_widths(inputs)
    random = torch.Generator().manual_seed(ctx.seed)
    with calibrate.opened(inputs, params.files, params.examples, ctx, HOLD) as it:
        ctx.progress.start("rounding", len(it.blocks), "blocks")
        with torch.no_grad():
            whole, settings = calibrate.first_inputs(it.model, it.blocks, it.batches)
        hidden = whole
        for number, block in enumerate(it.blocks):
            kwargs = settings[number]
            with torch.no_grad():
                wanted = [calibrate.call(block, h, k) for h, k in zip(whole, kwargs, strict=True)]
                matrices = matrices_of(block, number, hidden, kwargs, params.block_size, widths)
            start, end = descend(
                matrices, block_loss(block, hidden, kwargs, wanted), [h.shape[0] * h.shape[1] for h in hidden],
                it.held, params.iterations, params.rate, random,
            )  # fmt: skip
            before, after = before + start, after + end
            with torch.no_grad():
                for name, matrix in matrices.items():
                    block.get_submodule(name).weight.copy_(matrix.values())
                hidden = [calibrate.call(block, h, k) for h, k in zip(hidden, kwargs, strict=True)]
            whole = wanted
            ctx.progress.advance()
        facts: Facts = {"tokens": it.tokens, "blocks": len(it.blocks)}
        facts["error_to_nearest"] = round(after / before, 6) if before else None
        ctx.progress.stop()
        calibrate.save(it.model, inputs["model"], out)
    ctx.progress.log(
        f"rounded on {facts['tokens']:,} tokens of training examples"
        + (
            f": squared error of the blocks' outputs {after / before:.2f} times that at the start, on texts held out"
            if before
            else ""
        )
    )
    return facts


def matrices_of(
    block: Any, number: int, hidden: Sequence[torch.Tensor], settings: Sequence[Mapping[str, Any]], block_size: int,
    widths: Mapping[str, int],
) -> dict[str, Matrix]:  # fmt: skip
    """The linear layers of a block, at the start of the descent."""
    found = {}
    for layers in calibrate.staged(block):
        importance = calibrate.moments(block, next(iter(layers.values())), hidden, settings).diagonal()
        for name, layer in layers.items():
            found[name] = Matrix.of(layer.weight, importance, block_size, calibrate.width_of(widths, number, name))
    return found


Loss = Callable[[Mapping[str, Any], int], Any]
"""From the values by name of parameter and the number of a batch: the loss, summed over what it looks at."""


def block_loss(
    block: Any, hidden: Sequence[torch.Tensor], settings: Sequence[Mapping[str, Any]], wanted: Sequence[torch.Tensor]
) -> Loss:
    """Squared error of a block's outputs, over the mean square of what is wanted."""
    total = float(sum(w.square().sum() for w in wanted)) or 1.0

    def of(values: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
        made = calibrate.call(block, hidden[batch], settings[batch], values)
        return (made - wanted[batch]).square().sum() / total

    return of


def descend(
    matrices: Mapping[str, Matrix], loss: Loss, sizes: Sequence[int], held: range, iterations: int, rate: float | None,
    random: torch.Generator,
) -> tuple[float, float]:  # fmt: skip
    """Learn the matrices' rounding, and leave the best of the looks in them.

    Args:
        sizes: tokens of each batch.
        held: the last batches, which are only looked at; none: all are looked at.

    Returns:
        The loss over the batches that are looked at, at the start and where it was least.
    """
    import torch

    rate = rate or 1 / iterations

    def values() -> dict[str, torch.Tensor]:
        return {f"{name}.weight": matrix.values() for name, matrix in matrices.items()}

    def look() -> float:
        with torch.no_grad():
            now = values()
            return float(sum(loss(now, batch) for batch in held or range(len(sizes))))

    def copy() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(m.offset.detach().clone(), m.share.detach().clone()) for m in matrices.values()]

    start = least = look()
    best = copy()
    count = len(sizes) - len(held)
    order = _forever(count, random)
    for step in range(iterations):
        seen = 0
        part: list[int] = []
        while not part or (seen < STEP_TOKENS and len(part) < count):
            part.append(next(order))
            seen += sizes[part[-1]]
        now = values()
        sum(loss(now, batch) for batch in part).backward()
        for matrix in matrices.values():
            matrix.step(rate * (1 - step / iterations))
        if (step + 1) % max(1, iterations // LOOKS) == 0:
            found = look()
            if found < least:
                least, best = found, copy()
    for matrix, (offset, share) in zip(matrices.values(), best, strict=True):
        matrix.offset.data, matrix.share.data = offset, share
    return start, least


def _forever(count: int, random: torch.Generator) -> Iterator[int]:
    import torch

    while True:
        yield from torch.randperm(count, generator=random).tolist()
