"""The most memory that a training will hold on the CPU, from shapes alone: no torch, no model.

It promises the resident bytes of the training process at their peak; `benchmarks/memory.py` measures how near it comes. What
is counted is what the code holds:

- all weights, and gradients and two moments of those that are trained;
- what the written-out forward pass (`slmops.train.network`) keeps of every token for the backward pass, layer by layer; a
  test compares this with what torch keeps. With `checkpointing` the inputs of the layers and the whole of one;
- the loss: the logits of one piece, their log-probabilities and the gradients of both;
- copies: weights in bf16, weights rounded for int4, the best weights when they are read back, the second base that a
  tuning is merged into;
- the examples as Python holds them, and Python with its libraries.

Not all of this is there at the same time, but the C library serves tensors below 32 MB from a heap that hardly shrinks, and
what is freed in it seldom fits what comes next. So for them what comes at different times adds up, with some waste; larger
tensors are given back at once. The constants in capitals were fitted, on other shapes than the benchmark reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slmops.core.spec import Training
from slmops.train.shape import Shape

if TYPE_CHECKING:
    from slmops.train.encode import Ints

LIBRARIES = 440_000_000
"""Resident bytes of Python with torch and transformers, a tokenizer and a model's code loaded."""

WASTE, WASTE_OF_PARTS = 1.2, 1.65
"""What the heap holds for each byte of activations: freed pieces that fit nothing new. The second for batches in parts
(`accumulate`): gradients that stay are strewn among them."""

BF16 = 1.5
"""Bytes that come with each byte of a weight's copy in bf16: the copy itself, and its gradient before it is a float32."""

BEST = 0.7
"""Share of the best weights, read back at the end, that fits no hole in the heap."""

MAPPED = 32 << 20
"""Bytes from which the C library gives a tensor pages of its own, and takes them back when it is freed."""

PER_EXAMPLE = 2_600
"""Bytes of an example beside its tokens: its texts, messages and arrays."""

PER_TOKEN = 60
"""Bytes of a token of the data: while it is encoded it is a Python number in lists, then eight bytes."""

HEAD_ELEMENTS = 1 << 26
"""Logits computed at once; see `slmops.train`'s loss."""

AUTOMATIC = 8_000_000
"""Parameters above which `precision: auto` computes in bf16, where the machine does."""

FLOAT, LOW = 4, 2


@dataclass(frozen=True)
class Load:
    """What one forward pass has to hold at most, and how much data lies about.

    Attributes:
        tokens: positions of the largest part of a batch, padding included.
        losses: of those, the ones that carry loss.
        width: tokens of its longest row.
        examples: all examples; `all_tokens`: theirs together.
        validated: whether there is validation data: the best weights are then read back at the end.
    """

    tokens: int
    losses: int
    width: int
    examples: int
    all_tokens: int
    validated: bool = True

    @classmethod
    def of(cls, lengths: Ints, answer_from: Ints, training: Training, seed: int, held: Ints | None = None) -> Load:
        """The load of tokenised examples, batched as the first epoch will batch them.

        Args:
            lengths: (examples,) tokens of each; `answer_from`: (examples,) index of its first answer token.
            held: (validation examples,) their tokens.
        """
        import numpy as np

        from slmops.train.batches import epoch_plan

        if training.max_length:
            lengths = np.minimum(lengths, training.max_length)
            answer_from = np.minimum(answer_from, lengths - 1)
        inputs = lengths - 1
        answers = inputs if training.prompt_weight > 0 else lengths - answer_from
        best = (0, 0, 0)
        for batch in epoch_plan(lengths, training.batch_size, seed, 0, training.batching):
            for part in np.array_split(batch, training.accumulate):
                if len(part):
                    wide = int(inputs[part].max())
                    tokens = len(part) * wide
                    if training.batching == "pack":
                        wide = max(wide, min(256, training.max_length or 256))
                        tokens = math.ceil(int(inputs[part].sum()) / wide) * wide
                    best = max(best, (tokens, int(answers[part].sum()), wide))
        more = held if held is not None else lengths[:0]
        return cls(*best, len(lengths) + len(more), int(lengths.sum() + more.sum()), bool(len(more)))

    @classmethod
    def guess(cls, training: Training, examples: int, prompt: float, answer: float) -> Load:
        """The load of `examples` that all have `prompt` and `answer` tokens."""
        rows = min(max(1, examples), math.ceil(training.batch_size / training.accumulate))
        width = max(1, round(prompt + answer) - 1)
        losses = rows * (width if training.prompt_weight > 0 else max(1, round(answer)))
        return cls(rows * width, losses, width, examples, round(examples * (prompt + answer)), training.holdout > 0)


@dataclass(frozen=True)
class Memory:
    """Bytes of a training.

    Attributes:
        held: by name, what is there for the whole of it.
        moments: by name, what is there besides at one time; the largest counts.
        left: what the heap keeps of the other moments.
    """

    held: dict[str, int]
    moments: dict[str, int]
    left: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        return sum(self.held.values()) + max(self.moments.values()) + self.left


def computes_in_bf16(training: Training, shape: Shape, hardware: bool) -> bool:
    """Whether products are made in bf16.

    Args:
        hardware: whether the processor multiplies bfloat16.
    """
    if training.precision != "auto":
        return training.precision == "bf16"
    return hardware and shape.parameters > AUTOMATIC


def trained(shape: Shape, training: Training) -> int:
    """How many weights move."""
    if training.tuning == "full":
        return shape.parameters
    if training.tuning == "adapter":
        return shape.layers * 3 * shape.hidden * training.adapter_width
    lora = training.lora
    wanted = {target.rpartition(".")[2] for target in lora.targets} if lora.targets else set(shape.linears)
    chosen = [sizes for name, sizes in shape.linears.items() if name in wanted]
    moved = sum(lora.rank * (inputs + outputs) for inputs, outputs in chosen)
    if training.tuning == "dora":
        moved += sum(outputs for _inputs, outputs in chosen)
    return shape.layers * moved


def per_token(shape: Shape, training: Training, bf16: bool) -> tuple[int, int]:
    """Bytes that one layer keeps of a token for the backward pass: of its attention, and of all after it."""
    low = LOW if bf16 else FLOAT
    h, a, s, f = shape.hidden, shape.attention, shape.shared, shape.ffn
    full = training.tuning == "full"
    normed = FLOAT * h if full else 0  # for the gradient of a norm's weight
    attention = FLOAT * h + normed + low * h + FLOAT * (2 * a + 2 * s) + low * a
    if shape.kind == "qwen3":
        attention += FLOAT * (a + s) * (2 if full else 1)
    rest = FLOAT * h + normed + low * h + 4 * low * f
    if training.dropout > 0:
        rest += 2 * FLOAT * h
    if training.tuning in ("lora", "rslora", "dora", "qlora"):
        attention += low * (a + s + s)  # the layer's own result, before the addition, where the sum is a new tensor
    if training.tuning == "adapter":
        rest += 4 * low * training.adapter_width
    if not shape.written_out:  # the model's own code: norms and rotations keep every step
        attention += FLOAT * 3 * (h + a + s)
        rest += FLOAT * 3 * h
    return attention, rest


def activations(shape: Shape, training: Training, load: Load, bf16: bool) -> int:
    """Bytes that the forward pass of one part keeps for the backward pass, without the loss."""
    attention, rest = per_token(shape, training, bf16)
    after = load.losses if shape.written_out else load.tokens  # the last layer goes on at loss positions alone
    layer = load.tokens * (attention + rest)
    last = load.tokens * attention + after * (rest + FLOAT * shape.attention)
    mask = load.tokens * load.width * (FLOAT + 1) if training.batching == "pack" else 0
    if training.checkpointing:
        return (
            (shape.layers - 1) * load.tokens * FLOAT * shape.hidden + max(last, layer if shape.layers > 1 else 0) + mask
        )
    return (shape.layers - 1) * layer + last + shape.layers * mask


def loss(shape: Shape, training: Training, load: Load, bf16: bool, distilled: bool) -> int:
    """Bytes of logits, log-probabilities and their gradients, of one piece."""
    rows = min(load.losses, max(1, HEAD_ELEMENTS // shape.vocabulary))
    copies = 3 * FLOAT + (LOW if bf16 else 0)
    if distilled:
        copies += 3 * FLOAT
    if training.label_smoothing > 0:
        copies += FLOAT
    return rows * shape.vocabulary * copies


def memory(
    shape: Shape, training: Training, load: Load, *, bf16: bool = False, distilled: bool = False, beside: int = 0
) -> Memory:
    """The memory of a training on the CPU.

    Args:
        bf16: products are made in bf16 (`computes_in_bf16`).
        distilled: the loss also has a teacher's distributions.
        beside: weights of other models that are held meanwhile, such as a teacher's.
    """
    n, full = trained(shape, training), training.tuning == "full"
    base = FLOAT * shape.parameters
    if training.tuning == "qlora":
        base = FLOAT * (shape.parameters - shape.in_blocks) + round(0.53 * shape.in_blocks)
    held = {
        "libraries": LIBRARIES,
        "data": PER_EXAMPLE * load.examples + PER_TOKEN * load.all_tokens,
        "weights": base + FLOAT * (beside + (0 if full else n)),
        "moments": 2 * FLOAT * n,
    }  # fmt: skip
    rounded = FLOAT * shape.matrices if training.quantization_aware == "int4" else 0
    copies = round(BF16 * LOW * (shape.in_blocks + shape.table)) if bf16 else 0
    kept = activations(shape, training, load, bf16) + loss(shape, training, load, bf16, distilled)
    kept = round((WASTE if training.accumulate == 1 else WASTE_OF_PARTS) * kept)
    gradients = FLOAT * n
    best = FLOAT * n if load.validated else 0
    table = FLOAT * shape.table if full else 0  # the embedding's gradient is a tensor of its own before it is added
    moments = {
        "forward": rounded + copies + kept + (gradients if training.accumulate > 1 else 0),
        "backward": rounded + gradients + table + kept // max(1, shape.layers),
        "best": gradients + best,
    }
    if not full:
        moments["merging"] = gradients + FLOAT * shape.parameters
    together = rounded + copies + kept + gradients + round(BEST * best)
    left = max(0, round(shape.below(MAPPED // FLOAT) * (together - max(moments.values()))))
    return Memory(held, moments, left)
