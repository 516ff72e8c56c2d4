"""The most memory that a training will hold on the CPU, from shapes alone: no torch, no model.

It promises the resident bytes of the training process at their peak; `benchmarks/memory.py` measures how near it comes. What
is counted is what the code holds:

- all weights, and gradients and two moments of those that are trained;
- what the forward pass keeps of every token for the backward pass, and the loss (`slmops.train.activations`);
- a teacher that is asked meanwhile: its weights, its forward pass, what the loss keeps of it; or what its pass has left;
- copies: weights in bf16, weights rounded for int4, the best weights when they are read back, the second base that a
  tuning is merged into;
- the examples as Python holds them, and Python with its libraries.

Not all of this is there at the same time, but the C library serves tensors below 32 MB from a heap that hardly shrinks, and
what is freed in it seldom fits what comes next. So for them what comes at different times adds up, with some waste; larger
tensors are given back at once. The constants in capitals were fitted, on other shapes than the benchmark reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slmops.core.spec import PREFERENCE, Train, Training
from slmops.train import activations
from slmops.train.activations import FLOAT, LOW
from slmops.train.shape import Shape

if TYPE_CHECKING:
    from slmops.train.encode import Ints

LIBRARIES = 440_000_000
"""Resident bytes of Python with torch and transformers, a tokenizer and a model's code loaded."""

TUNING_LIBRARIES = 50_000_000
"""Resident bytes of peft, and of bitsandbytes which it loads, for tunings that are theirs."""

WASTE, WASTE_OF_PARTS = 1.2, 1.65
"""What the heap holds for each byte of activations: freed pieces that fit nothing new. The second for batches in parts
(`accumulate`) and for layers that are computed again (`checkpointing`): gradients that stay are strewn among them."""

WASTE_OF_ADDITIONS = 1.55
"""The same where few new weights are trained beside frozen ones: their results are small pieces that lie between large ones."""

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

AUTOMATIC = 8_000_000
"""Parameters above which `precision: auto` computes in bf16, where the machine does."""

FOUR_BIT = 0.53
"""Bytes of a weight held in 4 bits, its scales included."""

EXAMPLE_OF_CACHE = 400
"""Bytes of an example's entry beside its positions, where a teacher's pass is read from a file."""

RANKS = 32
"""Probabilities of a place that `train.cache_aligned` keeps."""


def method_of(training: Training) -> str:
    """The method that `training` asks for, as `activations.COPIES` names it."""
    name = training.method if isinstance(training, Train) else "sequence"
    return "sft" if name == "sequence" else name


@dataclass(frozen=True)
class Load:
    """What one forward pass has to hold at most, and how much data lies about.

    Attributes:
        tokens: positions of the largest part of a batch, padding included.
        losses: of those, the ones that carry loss.
        width: tokens of its longest row.
        examples: all examples; `all_tokens`: theirs together; `answers`: those of the answers that are trained on.
        held: validation examples. Where there are any, the best weights are read back at the end.
        prompt: tokens of the longest prompt.
    """

    tokens: int
    losses: int
    width: int
    examples: int
    all_tokens: int
    answers: int = 0
    held: int = 0
    prompt: int = 0

    @classmethod
    def of(
        cls, lengths: Ints, answer_from: Ints, training: Training, seed: int, held: Ints | None = None,
        rejected: Ints | None = None,
    ) -> Load:  # fmt: skip
        """The load of tokenised examples, batched as the first epoch will batch them.

        Args:
            lengths: (examples,) tokens of each; `answer_from`: (examples,) index of its first answer token.
            held: (validation examples,) their tokens.
            rejected: (examples,) tokens of each with its rejected answer; for preference methods.
        """
        import numpy as np

        from slmops.train.batches import epoch_plan

        both = [lengths] if rejected is None else [lengths, rejected]
        if training.max_length:
            both = [np.minimum(one, training.max_length) for one in both]
            answer_from = np.minimum(answer_from, both[0] - 1)
        longest, inputs = np.max(both, 0), np.sum(both, 0) - len(both)
        answers = inputs if training.prompt_weight > 0 else np.sum([one - answer_from for one in both], 0)
        best = (0, 0, 0)
        for batch in epoch_plan(longest, training.batch_size, seed, 0, training.batching):
            for part in np.array_split(batch, training.accumulate):
                if len(part):
                    wide = int(longest[part].max()) - 1
                    tokens = len(both) * len(part) * wide
                    if training.batching == "pack":
                        wide = max(wide, min(256, training.max_length or 256))
                        tokens = math.ceil(int(inputs[part].sum()) / wide) * wide
                    best = max(best, (tokens, int(answers[part].sum()), wide))
        more = held if held is not None else lengths[:0]
        total = int(sum(one.sum() for one in both) + len(both) * more.sum())
        prompt = int(answer_from.max()) if len(answer_from) else 0
        load = cls(*best, len(both) * (len(lengths) + len(more)), total, int(answers.sum()), len(more), prompt)
        return load.written(training, min(len(lengths), math.ceil(training.batch_size / training.accumulate)))

    @classmethod
    def guess(cls, training: Training, examples: int, prompt: float, answer: float, held: int = 0) -> Load:
        """The load of `examples` that all have `prompt` and `answer` tokens.

        Args:
            held: validation examples beside them; 0: some of them are held out.
        """
        rows = min(max(1, examples), math.ceil(training.batch_size / training.accumulate))
        both = 2 if method_of(training) in PREFERENCE else 1
        width = max(1, round(prompt + answer) - 1)
        losses = both * rows * (width if training.prompt_weight > 0 else max(1, round(answer)))
        every = both * (examples + held)
        held = held or (max(1, round(training.holdout * examples)) if training.holdout > 0 else 0)
        load = cls(
            both * rows * width, losses, width, every, round(every * (prompt + answer)), round(examples * answer), held,
            round(prompt),
        )  # fmt: skip
        return load.written(training, rows)

    def written(self, training: Training, rows: int) -> Load:
        """The load where the student may write the answers, up to `on_policy.max_new_tokens`; else this one."""
        if not isinstance(training, Train) or training.method != "on_policy" or training.on_policy.share == 0:
            return self
        room = (training.max_length or 1 << 20) - self.prompt
        new = max(1, min(training.on_policy.max_new_tokens, room))
        width = self.prompt + new - 1
        most = max((self.tokens, self.losses, self.width), (rows * width, rows * new, width))
        return replace(self, tokens=most[0], losses=most[1], width=most[2])


@dataclass(frozen=True)
class Memory:
    """Bytes of a training.

    Attributes:
        held: by name, what is there for the whole of it.
        moments: by name, what is there besides at one time (less than nothing, where something held is not there); the largest
            counts.
        left: what the heap keeps of the other moments.
    """

    held: dict[str, int]
    moments: dict[str, int]
    left: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        return sum(self.held.values()) + max(self.moments.values()) + self.left

    @property
    def needed(self) -> int:
        """What must be free: the most at any time but while a base is loaded. Then a part of the memory is pages of its file,
        which the system takes back where it needs them."""
        return sum(self.held.values()) + max(v for n, v in self.moments.items() if n != "loading") + self.left


def computes_in_bf16(precision: str, shape: Shape, hardware: bool) -> bool:
    """Whether products are made in bf16.

    Args:
        hardware: whether the processor multiplies bfloat16.
    """
    if precision != "auto":
        return precision == "bf16"
    return hardware and shape.parameters > AUTOMATIC


def trained(shape: Shape, training: Training) -> int:
    """How many weights move."""
    if training.tuning == "full":
        return shape.parameters
    if training.tuning == "adapter":
        return shape.layers * 3 * shape.hidden * training.adapter_width
    chosen = activations.chosen(shape, training).values()
    moved = sum(training.lora.rank * (inputs + outputs) for inputs, outputs in chosen)
    if training.tuning == "dora":
        moved += sum(outputs for _inputs, outputs in chosen)
    return shape.layers * moved + embeddings(shape, training)


def embeddings(shape: Shape, training: Training) -> int:
    """Weights of the token embedding and the output matrix that move beside low-rank additions."""
    whole = training.tuning in activations.LORA and training.lora.embeddings
    return shape.table * (1 if shape.tied else 2) if whole else 0


def kept_of_teacher(shape: Shape, training: Training, load: Load, teacher: Shape) -> tuple[int, int]:
    """What an asked teacher adds for hidden states: bytes kept until the backward pass, and weights of the learned maps."""
    if not isinstance(training, Train) or training.method != "hidden_states":
        return 0, 0
    transfer, kept, maps = training.transfer, 0, 0
    if transfer.hidden_weight:
        maps = shape.layers * shape.hidden * teacher.hidden
        kept += FLOAT * load.tokens * teacher.layers * teacher.hidden
        kept += FLOAT * load.losses * shape.layers * (shape.hidden + 2 * teacher.hidden)
    if transfer.attention_weight:
        heads = transfer.relation_heads or activations.relation_heads(shape, teacher)
        relation = FLOAT * heads * load.width
        widths = sum(one.attention + 2 * one.shared for one in (shape, teacher))
        kept += 3 * relation * (load.tokens + load.losses) + FLOAT * load.tokens * widths
        kept += relation * (2 * load.tokens + load.losses)  # what one kind needs at a time
    return kept, maps


def left_by_pass(training: Training, load: Load) -> int:
    """Bytes of what a teacher's earlier pass has left, as it is read into memory."""
    method = method_of(training)
    if method == "logits" and isinstance(training, Train):
        return load.answers * (12 * training.logit_samples + 12) + EXAMPLE_OF_CACHE * load.examples
    if method == "cross_tokenizer":
        return load.answers * (12 + FLOAT * RANKS) + EXAMPLE_OF_CACHE * load.examples
    return 0


def writing(shape: Shape, training: Training, load: Load, bf16: bool) -> int:
    """Bytes that are there while the student writes: keys and values twice, where rows that end are taken out."""
    if not isinstance(training, Train) or training.method != "on_policy" or training.on_policy.share == 0:
        return 0
    ahead = min(training.on_policy.refresh, training.max_steps or training.on_policy.refresh)
    rows = min(load.examples, training.batch_size) * ahead
    total = load.prompt + training.on_policy.max_new_tokens
    cache = FLOAT * 2 * shape.layers * shape.shared * rows * total
    first = activations.passing(shape, rows * load.prompt, bf16)
    return cache + max(cache, first, 3 * FLOAT * rows * shape.vocabulary)


def memory(
    shape: Shape, training: Training, load: Load, *, bf16: bool = False, teacher: Shape | None = None, file_bytes: int = 0
) -> Memory:  # fmt: skip
    """The memory of a training on the CPU.

    Args:
        bf16: products are made in bf16 (`computes_in_bf16`).
        teacher: that is asked while it goes on.
        file_bytes: of the base's weights in another precision than float32; 0: they are float32, or there is no base.
    """
    n, full, method = trained(shape, training), training.tuning == "full", method_of(training)
    own = True if method == "hidden_states" else None
    relations, maps = kept_of_teacher(shape, training, load, teacher) if teacher else (0, 0)
    n, whole = n + maps, embeddings(shape, training)
    base = FLOAT * shape.parameters
    if training.tuning == "qlora":
        base = FLOAT * (shape.parameters - shape.in_blocks) + round(FOUR_BIT * shape.in_blocks)
    held = {
        "libraries": LIBRARIES + (TUNING_LIBRARIES if training.tuning in activations.LORA else 0),
        "data": PER_EXAMPLE * load.examples + PER_TOKEN * load.all_tokens + left_by_pass(training, load),
        "weights": base + FLOAT * (maps if full else n - whole),
        "moments": 2 * FLOAT * n,
    }  # fmt: skip
    if teacher:
        held["teacher"] = FLOAT * teacher.parameters
    rounded = FLOAT * {"int4": shape.matrices, "ternary": shape.in_blocks}.get(training.quantization_aware, 0)
    cast = shape.in_blocks // (shape.layers if training.checkpointing else 1) + shape.table
    copies = round((BF16 if full else 1) * LOW * cast) if bf16 else 0
    waste = WASTE if full else WASTE_OF_ADDITIONS
    if training.accumulate > 1 or training.checkpointing:  # two causes, each with its own waste
        waste *= WASTE_OF_PARTS / WASTE
    forward = activations.activations(shape, training, load, bf16, own)
    last = min(forward, load.tokens * sum(activations.per_token(shape, training, bf16, own or not shape.written_out)))
    rest = relations + activations.loss(shape, training, load, bf16, method)
    kept = round(waste * forward + (waste if training.accumulate > 1 else WASTE) * rest)
    gradients = FLOAT * n
    best = FLOAT * n if load.held else 0
    table = (
        FLOAT * shape.table if full or whole else 0
    )  # the embedding's gradient is a tensor of its own before it is added
    moments = {
        "forward": rounded + copies + kept + (gradients if training.accumulate > 1 else 0),
        "backward": rounded + gradients + table + round(waste * last),
        "best": gradients + best,
    }
    if teacher:
        logits = FLOAT * 2 * min(load.losses * teacher.vocabulary, activations.HEAD_ELEMENTS)
        moments["asking"] = gradients + activations.passing(teacher, load.tokens, bf16) + logits
    if method == "on_policy":
        moments["writing"] = gradients + writing(shape, training, load, bf16)
    if file_bytes:
        moments["loading"] = FLOAT * shape.parameters + file_bytes - held["weights"] - held["moments"]
    if training.tuning == "qlora":
        file = file_bytes or FLOAT * shape.parameters
        moments["loading"] = file - held["moments"]
    if not full:
        wider = 3 * shape.layers * shape.hidden * shape.ffn if training.tuning == "adapter" else 0  # new matrices
        merged = FLOAT * (shape.parameters + wider + n)
        moments["merging"] = merged + file_bytes - held["weights"] - held["moments"] - held.get("teacher", 0)
    together = rounded + copies + kept + gradients + round(BEST * best)
    left = max(0, round(shape.below(MAPPED // FLOAT) * (together - max(moments.values()))))
    return Memory(held, moments, left)
