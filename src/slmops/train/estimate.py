"""What a training will need, from the project file alone: no torch, no model.

Parameter counts are exact (a test compares them with the instantiated model). Bytes and seconds are guesses for
`slmops plan`: seconds were fitted on two cores of a server CPU and are off by a factor of two elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slmops.core.spec import Architecture, Training


@dataclass(frozen=True)
class Estimate:
    """A guess.

    Attributes:
        parameters: weights of the model.
        model_bytes: the model's file in float32.
        memory_bytes: peak of the training process: weights, gradients, two moments, activations, torch itself.
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


def ffn_width(architecture: Architecture) -> int:
    """The feed-forward width: as given, or 8/3 of hidden rounded up to a multiple of 32."""
    return architecture.ffn or math.ceil(architecture.hidden * 8 / 3 / 32) * 32


def parameters(architecture: Architecture, vocabulary: int) -> int:
    """The exact number of weights of a decoder from scratch."""
    hidden, head = architecture.hidden, architecture.hidden // architecture.heads
    shared = (architecture.kv_heads or architecture.heads) * head
    layer = 2 * hidden * hidden + 2 * hidden * shared + 3 * hidden * ffn_width(architecture) + 2 * hidden
    if architecture.type == "qwen3":
        layer += 2 * head
    tables = vocabulary * hidden * (1 if architecture.tie_embeddings else 2)
    return tables + architecture.layers * layer + hidden


def estimate(
    architecture: Architecture,
    vocabulary: int,
    training: Training,
    examples: int,
    tokens_per_example: float = 24.0,
    threads: int = 2,
) -> Estimate:
    """Guess memory, disk and time of a training from scratch.

    Args:
        examples: training examples.
        tokens_per_example: mean length of prompt and answer; messages of ten words have about 20.
    """
    count = parameters(architecture, vocabulary)
    per_epoch = max(1, math.ceil(examples / training.batch_size))
    steps = training.max_steps or max(1, math.ceil(training.epochs * per_epoch))
    tokens = int(steps * min(training.batch_size, max(1, examples)) * tokens_per_example)
    in_flight = training.batch_size / training.accumulate * tokens_per_example
    per_token = architecture.layers * (14 * architecture.hidden + 4 * ffn_width(architecture)) * 4
    memory = 20 * count + int(in_flight * (per_token + 12 * vocabulary)) + 450_000_000
    body = count - vocabulary * architecture.hidden * (1 if architecture.tie_embeddings else 2)
    millions = 4.0 + 26.0 * body / 1e6 + 6.0 * architecture.layers  # seconds for a million tokens on two cores
    seconds = tokens / 1e6 * millions * 2 / max(1, min(threads, 16)) + 5
    return Estimate(count, 4 * count, memory, 20 * count, steps, tokens, round(seconds, 1))
