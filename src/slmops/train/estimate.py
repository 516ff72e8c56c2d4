"""What a training will need, from the project file alone: no torch, no model.

Parameter counts are exact (`slmops.train.shape`). Seconds are guesses for `slmops plan`: they were fitted on two cores of a
server CPU and are off by a factor of two elsewhere. Memory is `slmops.train.memory`'s to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slmops.core.spec import Architecture, Training
from slmops.train.shape import parameters


@dataclass(frozen=True)
class Estimate:
    """A guess.

    Attributes:
        parameters: weights of the model.
        model_bytes: the model's file in float32.
        disk_bytes: checkpoints in scratch.
        steps: optimiser steps if training is not stopped early.
        tokens: tokens seen in those.
        seconds: wall time of those.
    """

    parameters: int
    model_bytes: int
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
    answers: int = 1,
) -> Estimate:
    """Guess disk and time of a training from scratch.

    Args:
        examples: training examples.
        tokens_per_example: mean length of prompt and answer; messages of ten words have about 20.
        answers: of an example, each read with its prompt: 2 where methods learn from pairs.
    """
    count = parameters(architecture, vocabulary)
    per_epoch = max(1, math.ceil(examples / training.batch_size))
    steps = training.max_steps or max(1, math.ceil(training.epochs * per_epoch))
    tokens = int(steps * min(training.batch_size, max(1, examples)) * answers * tokens_per_example)
    body = count - vocabulary * architecture.hidden * (1 if architecture.tie_embeddings else 2)
    millions = 4.0 + 26.0 * body / 1e6 + 6.0 * architecture.layers  # seconds for a million tokens on two cores
    seconds = tokens / 1e6 * millions * 2 / max(1, min(threads, 16)) + 5
    return Estimate(count, 4 * count, 20 * count, steps, tokens, round(seconds, 1))
