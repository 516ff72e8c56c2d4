"""What a forward pass keeps for the backward pass, in bytes, from shapes alone: of every token in the layers, and of the loss.

`slmops.train.written` keeps less than the models' own code, which the `hidden_states` method and every architecture but
Llama and Qwen3 go through. A test compares all of this with what torch keeps, for each tuning and each of `shape.KINDS`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from slmops.core.spec import Train, Training
from slmops.train.shape import Shape

if TYPE_CHECKING:
    from slmops.train.memory import Load

HEAD_ELEMENTS = 1 << 26
"""Logits computed at once; see `slmops.train.objective`."""

COPIES = {"sft": 3, "logits": 4, "cross_tokenizer": 5, "dpo": 3, "orpo": 3, "hidden_states": 3}
"""Tensors as large as the logits of a piece that are there at one time at most, by method. On-policy is in `copies`."""

FLOAT, LOW = 4, 2
LORA = ("lora", "rslora", "dora", "qlora")


def chosen(shape: Shape, training: Training) -> dict[str, tuple[int, int]]:
    """The linear layers of a block that get low-rank additions, with (inputs, outputs)."""
    if training.tuning not in LORA:
        return {}
    targets = training.lora.targets
    wanted = {target.rpartition(".")[2] for target in targets} if targets else set(shape.linears)
    return {name: sizes for name, sizes in shape.linears.items() if name in wanted}


def per_token(shape: Shape, training: Training, bf16: bool, own: bool) -> tuple[int, int]:
    """Bytes that a layer in the middle keeps of a token: of its attention, and of all after it.

    Args:
        own: the model's own code computes it.
    """
    low = LOW if bf16 else FLOAT
    h, a, s, f = shape.hidden, shape.attention, shape.shared, shape.ffn
    full, picked = training.tuning == "full", chosen(shape, training)
    dropped = bool(picked) and training.lora.dropout > 0
    times = 2 if full else 1  # a norm whose weight is trained keeps what it multiplies besides
    before, beside = (_inputs(shape, training, names, bf16 and own) for names in (shape.first, shape.wide))
    inner = 0 if dropped or not (full or "down_proj" in picked) else low * f
    norms = shape.form.norms // 2  # on each side
    attention, rest = norms * FLOAT * h * times + low * h * before, norms * FLOAT * h * times + low * h * beside
    if shape.form.heads_normed:
        attention += FLOAT * (a + s) * times
    if own:
        attention += low * (2 * a + 2 * s)
        attention += low * (2 * a + s) if shape.form.fused else 0  # values hold the product that they are a part of
        attention += low * a if bf16 and "o_proj" in picked else 0
    else:
        attention += FLOAT * (2 * a + 2 * s) + (low * a if (full or "o_proj" in picked) and not dropped else 0)
        rest += 2 * FLOAT * h if training.dropout > 0 else 0
    rest += 3 * low * f + inner
    for name, (inputs, outputs) in picked.items():
        more = low * training.lora.rank
        if dropped:
            more += ((FLOAT if own else low) + low) * inputs
        if training.tuning == "dora":
            more += (2 if own or dropped else 1) * low * outputs
        if name in shape.wide or name == "down_proj":
            rest += more
        else:
            attention += more
    if training.tuning == "adapter":
        rest += low * (h * (2 if bf16 and own else 1) + 4 * training.adapter_width)
    return attention, rest


def _inputs(shape: Shape, training: Training, names: tuple[str, ...], each: bool) -> int:
    """How many copies of their common input linear layers keep: one, or with `each` one of their own."""
    picked = chosen(shape, training)
    if picked and training.lora.dropout > 0:
        return 0  # each keeps what dropout left
    count = len(names) if training.tuning == "full" else sum(name in picked for name in names)
    return count if each else min(1, count)


def first_spared(shape: Shape, training: Training, bf16: bool, own: bool) -> int:
    """Bytes of a token that the first layer does not keep, since nothing before its additions is trained."""
    if training.tuning == "full" or (training.tuning in LORA and training.lora.embeddings):
        return 0
    low = LOW if bf16 else FLOAT
    if training.tuning != "adapter":
        dropped = sum(name in shape.first for name in chosen(shape, training)) if training.lora.dropout > 0 else 0
        return FLOAT * shape.hidden + (FLOAT if own else low) * shape.hidden * dropped
    kept = low * (shape.hidden * (2 if bf16 and own else 1) + 4 * training.adapter_width)
    return max(0, sum(per_token(shape, training, bf16, own)) - kept)


def activations(shape: Shape, training: Training, load: Load, bf16: bool, own: bool | None = None) -> int:
    """Bytes that the forward pass of one part keeps for the backward pass, without the loss.

    Args:
        own: the model's own code computes it; default: where slmops has not written it out.
    """
    own = not shape.written_out if own is None else own
    attention, rest = per_token(shape, training, bf16, own)
    layer = load.tokens * (attention + rest)
    last = layer if own else load.tokens * attention + load.losses * (rest + FLOAT * shape.attention)
    mask = load.tokens * load.width * (FLOAT + 1) if training.batching == "pack" else 0
    end = 2 * FLOAT * shape.hidden * load.tokens if own else 0
    if training.checkpointing:
        within = (shape.layers - 1) * load.tokens * FLOAT * shape.hidden
        low = LOW if bf16 else FLOAT
        within += load.tokens * (
            3 * low * shape.ffn + 2 * FLOAT * shape.hidden
        )  # gradients on their way through a layer
        return within + max(last, layer if shape.layers > 1 else 0) + mask + end
    spared = load.tokens * first_spared(shape, training, bf16, own)
    return max(layer, (shape.layers - 1) * layer + last - spared) + shape.layers * mask + end


def copies(method: str, training: Training) -> int:
    """How many tensors as large as the logits of a piece are there at one time."""
    if method == "on_policy" and isinstance(training, Train):
        return 6 if training.on_policy.beta in (0, 1) else 10
    return COPIES[method]


def loss(shape: Shape, training: Training, load: Load, bf16: bool, method: str = "sft") -> int:
    """Bytes of logits, log-probabilities and their gradients, of one piece."""
    return min(load.losses * shape.vocabulary, HEAD_ELEMENTS) * (
        copies(method, training) * FLOAT + (LOW if bf16 else 0)
    )


def passing(shape: Shape, tokens: int, bf16: bool = False) -> int:
    """Bytes that a forward pass without gradients holds at one time, without logits."""
    low = LOW if bf16 else FLOAT
    attention = FLOAT * (shape.hidden + 2 * shape.attention + 2 * shape.shared) + low * shape.attention
    rest = FLOAT * shape.hidden + low * (shape.hidden + 3 * shape.ffn)
    return tokens * max(attention, rest)


def relation_heads(shape: Shape, teacher: Shape) -> int:
    """Relation heads of the `hidden_states` method where none are given."""
    common = math.gcd(shape.attention, shape.shared, teacher.attention, teacher.shared)
    return max(n for n in range(1, shape.heads + 1) if common % n == 0)
