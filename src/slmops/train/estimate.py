"""What a training will need, from the project file alone: no torch, no model.

Parameter counts are exact (`slmops.train.shape`), memory is near (`slmops.train.memory`). Seconds are guesses for `slmops
plan`: they were fitted on two cores of a server CPU and are off by a factor of two elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slmops.core.spec import Architecture, Training
from slmops.train.memory import Load, computes_in_bf16, memory
from slmops.train.shape import Shape, parameters


@dataclass(frozen=True)
class Estimate:
    """A guess.

    Attributes:
        parameters: weights of the model.
        model_bytes: the model's file in float32.
        memory_bytes: peak of the training process, Python and its libraries included; see `slmops.train.memory`.
        disk_bytes: checkpoints in scratch.
        steps: optimiser steps if training is not stopped early.
        tokens: tokens seen in those.
        seconds: wall time of those.
    """

    parameters: int
    model_bytes: int
    memory_bytes: int
    disk_bytes: int
    steps: int
    tokens: int
    seconds: float


def estimate(
    architecture: Architecture,
    vocabulary: int,
    training: Training,
    examples: int,
    tokens_per_example: float = 24.0,
    threads: int = 2,
    bf16: bool = False,
    answers: int = 1,
) -> Estimate:
    """Guess memory, disk and time of a training from scratch.

    Args:
        examples: training examples.
        tokens_per_example: mean length of prompt and answer; messages of ten words have about 20.
        bf16: whether the processor multiplies bfloat16.
        answers: of an example, each read with its prompt: 2 where methods learn from pairs.
    """
    count = parameters(architecture, vocabulary)
    per_epoch = max(1, math.ceil(examples / training.batch_size))
    steps = training.max_steps or max(1, math.ceil(training.epochs * per_epoch))
    tokens = int(steps * min(training.batch_size, max(1, examples)) * answers * tokens_per_example)
    shape = Shape.of(architecture, vocabulary)
    load = Load.guess(training, examples, 0.6 * tokens_per_example, 0.4 * tokens_per_example)
    needed = memory(shape, training, load, bf16=computes_in_bf16(training.precision, shape, bf16)).peak
    body = count - vocabulary * architecture.hidden * (1 if architecture.tie_embeddings else 2)
    millions = 4.0 + 26.0 * body / 1e6 + 6.0 * architecture.layers  # seconds for a million tokens on two cores
    seconds = tokens / 1e6 * millions * 2 / max(1, min(threads, 16)) + 5
    return Estimate(count, 4 * count, needed, 20 * count, steps, tokens, round(seconds, 1))
