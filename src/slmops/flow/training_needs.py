"""What training a model of the catalogue takes in memory, by method: `slmops.train.memory` asked for a model that need not be here.

Promises the same figures that `slmops run` refuses by, of a process that trains on the processor: `benchmarks/needs_training.py` compares
them with the measured peak on real architectures. All examples are taken to be as long as the context that is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from slmops.core.parameters import count, head_width, kind_of, language
from slmops.core.spec import Train, TrainMethod, Tuning
from slmops.errors import ModelError, UsageError
from slmops.train.memory import Load, Memory, computes_in_bf16, memory
from slmops.train.shape import KINDS, Shape, lower_bytes

WAYS = (
    "full", "lora", "dora", "qlora", "adapter", "logits", "cross_tokenizer", "on_policy", "hidden_states", "dpo", "orpo", "dpo+lora",
)  # fmt: skip
"""What a table shows; any METHOD+TUNING can be asked for."""
TUNINGS: tuple[str, ...] = get_args(Tuning)
METHODS: tuple[str, ...] = get_args(TrainMethod)
ASKED = ("on_policy", "hidden_states")
"""Methods whose teacher is in memory while the student learns."""


@dataclass(frozen=True)
class Model:
    """A model to train, or to learn from. `file_bytes`: of its weights where they are not float32, else 0."""

    name: str
    shape: Shape
    file_bytes: int


@dataclass(frozen=True)
class TrainingNeeds:
    """Bytes of a training by `way`.

    Attributes:
        bf16: products are made in bf16.
        teacher: the name of the teacher in memory; "" for none.
        memory: what is held and what comes and goes.
    """

    way: str
    bf16: bool
    teacher: str
    memory: Memory

    @property
    def weights(self) -> int:
        """Of the model, its additions and a teacher in memory."""
        return self.memory.held["weights"] + self.memory.held.get("teacher", 0)

    @property
    def moments(self) -> int:
        """What the optimiser keeps of the weights that move."""
        return self.memory.held["moments"]

    @property
    def program(self) -> int:
        """Python with its libraries, and the examples."""
        return self.memory.held["libraries"] + self.memory.held["data"]

    @property
    def working(self) -> int:
        """The rest of the peak: gradients, what the forward pass keeps, or another copy of the weights."""
        return self.memory.peak - self.weights - self.moments - self.program


def model_of(name: str, config: Mapping[str, Any], folder: Path | None = None) -> Model:
    """A model by its configuration; its file is as the folder has it, or in 16 bits.

    Raises:
        ModelError: no training of its architecture can be foreseen.
    """
    kind = kind_of(config)
    if kind not in KINDS:
        raise ModelError(
            f"the memory of training {name} is not known: its architecture is {kind}", f"foreseen: {', '.join(KINDS)}"
        )
    weights = count(config)
    inner = {**language(config), "head_dim": head_width(language(config)), "tie_word_embeddings": weights.output == 0}
    shape = Shape.of_config({"model_type": kind, **inner}, weights.total)
    here = folder is not None and any(folder.glob("*.safetensors"))
    return Model(name, shape, lower_bytes(folder) if folder and here else 2 * weights.total)


def way_of(text: str) -> tuple[str, str]:
    """Method and tuning of `TUNING`, `METHOD` or `METHOD+TUNING`.

    Raises:
        UsageError: there is no such way.
    """
    if text in TUNINGS:
        return "sequence", text
    method, _, tuning = text.partition("+")
    known = {"method": (method, METHODS), "tuning": (tuning or "full", TUNINGS)}
    for what, (name, names) in known.items():
        if name not in names:
            every = (*TUNINGS, *METHODS) if not tuning else names
            close = difflib.get_close_matches(name, every, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UsageError(
                f"there is no training {what} {name}",
                f"{hint}tunings: {', '.join(TUNINGS)}; methods: {', '.join(METHODS)}; both: METHOD+TUNING; all",
            )
    return method, tuning or "full"


def foresee(
    way: str, model: Model, teacher: Model, batch: int, context: int, answer: int, examples: int, settings: Mapping[str, Any],
    hardware: bool,
) -> TrainingNeeds:  # fmt: skip
    """What one training takes.

    Args:
        batch: examples of an optimiser step; `context`: tokens of each, the last `answer` of which are learned.
        examples: that lie in memory.
        settings: more of `train`, such as `accumulate`, `checkpointing` and `precision`.
        hardware: whether the processor multiplies bfloat16.

    Raises:
        UsageError: there is no such way.
    """
    method, tuning = way_of(way)
    asked_for = {"method": method, "tuning": tuning, "batch_size": batch, "max_length": context}
    training = Train.model_validate({"on_policy": {"max_new_tokens": answer}, **settings, **asked_for}, strict=False)
    load = Load.guess(training, examples, context - answer, answer)
    low = computes_in_bf16(training.precision, model.shape, hardware)
    asked = teacher if method in ASKED else None
    found = memory(
        model.shape, training, load, bf16=low, teacher=asked.shape if asked else None, file_bytes=model.file_bytes
    )
    return TrainingNeeds(way, low, asked.name if asked else "", found)
