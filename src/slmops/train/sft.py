"""Supervised fine-tuning: learn the answers, from scratch or from an existing model.

On a teacher's answers this is sequence-level distillation (arXiv 1606.07947). Loss falls on the answer tokens and the
end token; prompt tokens count `prompt_weight` each. With a prompt weight the model also learns to write messages: given
`<|user|>` alone it samples one (the `sample` synthesis, arXiv 2406.08464).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.digest import digest_text
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as Base
from slmops.core.spec import PREFERENCE, Architecture, Training
from slmops.errors import DataError, MissingExtraError, ModelError, TrainingError

if TYPE_CHECKING:
    from slmops.train.encode import Encoded, Ints, Row
    from slmops.train.network import Network
    from slmops.train.objective import Objective

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")

TAKES = {
    "data": "dataset",
    "synthetic?": "dataset",
    "augmented?": "dataset",
    "tokenizer?": "tokenizer",
    "base?": "model",
}
"""Inputs of every training: examples, and a tokenizer for a model from scratch or a base that exists."""

DECLARATION = Declaration(
    name="train.sft",
    version="5",
    makes="model",
    takes=TAKES,
    extra="train",
    packages=PACKAGES,
    threads=True,
)


class Params(Base):
    """What is learned from what.

    Attributes:
        training: how.
        architecture: the model from scratch (input `tokenizer`); None: go on from input `base`.
        files: `input/file` of the examples, for instance `data/teacher.jsonl`.
        validation: `input/file` of validation examples; None, or a file without any: `training.holdout` of the examples, chosen by
            content. Preference methods look at its pairs alone.
        keep_zeros: weights of the base's linear layers that are zero stay zero: for a base that was made sparse.
    """

    training: Training = Training()
    architecture: Architecture | None = None
    files: tuple[str, ...]
    validation: str | None = None
    keep_zeros: bool = False


@dataclass(frozen=True)
class Prepared:
    """All that a training needs, checked: data fits the model, tokenizer and model agree.

    Attributes:
        tokenizer: the one in `tokenizer_folder`.
        limit: most tokens of an example.
        left_out: augmented copies that are too long for the model or for its teacher.
    """

    data: Encoded
    validation: Encoded
    model: Any
    tokenizer_folder: Path
    tokenizer: Any
    limit: int
    left_out: int = 0


def hold_out(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Training and validation rows. An example goes by the digest of its prompt, so equal prompts stay together.

    At least one example is held out where `share` is above 0 and there are at least ten. What was derived from a
    held-out example is in neither list: it would tell the answer, and is no message that somebody wrote.
    """
    places = [int(digest_text(f"holdout:{row.example.parent or row.example.id}")[7:20], 16) / 16**13 for row in rows]
    own = [place for row, place in zip(rows, places, strict=True) if not row.example.parent]
    bound = share
    if share > 0 and len(own) >= 10:
        bound = max(share, min(own) * (1 + 1e-9))
    kept = [row for row, place in zip(rows, places, strict=True) if place > bound or share == 0]
    held = [row for row, place in zip(rows, places, strict=True) if place <= bound and share > 0]
    return kept, [row for row in held if not row.example.parent]


def validation_rows(params: Params, inputs: Mapping[str, Path]) -> list[Row]:
    """The validation examples that are given, of which preference methods can use the pairs; none where there are none."""
    from slmops.train import encode

    rows = encode.read(inputs, (params.validation,)) if params.validation else []
    if getattr(params.training, "method", "") in PREFERENCE:
        rows = [row for row in rows if row.example.rejected is not None]
    return rows


def check_rows(rows: list[Row], files: tuple[str, ...]) -> None:
    """Refuse data from which nothing can be learned.

    Raises:
        DataError: no example at all, or the same answer everywhere.
    """
    if not rows:
        raise DataError(f"no examples in {', '.join(files)}", "give the model something to learn from")
    first = rows[0].example.answer
    if len(rows) > 1 and all(row.example.answer == first for row in rows):
        raise DataError(
            f"every one of the {len(rows)} examples has the answer {str(first)[:60]!r}",
            "examples of at least two answers are needed",
        )


def prepare(params: Params, inputs: Mapping[str, Path], ctx: Context) -> Prepared:
    """Read, check and tokenise the data, then build or load the model.

    Raises:
        DataError: no or useless data, an example that does not fit the context.
        ModelError: model and tokenizer missing or not fitting each other.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("torch or transformers", "train") from error
    from slmops.train import encode, network, tuning

    before = encode.left_out_before(inputs)
    every = encode.read(inputs, params.files)
    rows = [row for row in every if encode.answer_digest(row) not in before] if before else every
    held = validation_rows(params, inputs)
    check_rows(rows, params.files)
    pairs = sum(row.example.rejected is not None for row in rows)
    if pairs and getattr(params.training, "method", "") not in PREFERENCE:
        ctx.progress.log(
            f"{pairs} of {len(rows)} examples have a rejected answer too: only train.method dpo and orpo use it, this step "
            "learns the chosen one"
        )
    for setting in tuning.unread(params.training):
        ctx.progress.log(f"train.{setting} is given, but tuning {params.training.tuning} does not use it")
    taught = rows
    if not held:
        taught, held = hold_out(rows, params.training.holdout)
    needed = "tokenizer" if params.architecture else "base"
    if needed not in inputs:
        raise ModelError(
            f"there is no input called {needed!r}",
            "a model from scratch needs a tokenizer, any other a base model folder",
        )
    folder = inputs[needed]
    tokenizer = encode.load_tokenizer(folder)
    model: Any = None
    if params.architecture is None:
        four = params.training.tuning == "qlora"
        model = tuning.load_4bit(folder, params.training.precision) if four else network.load(folder)
        if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
            raise ModelError(
                f"{folder}: the tokenizer has {len(tokenizer)} entries, the model only "
                f"{model.get_input_embeddings().weight.shape[0]}",
                "use the tokenizer that came with the model",
            )
    context = params.architecture.context if params.architecture else network.context_of(model)
    limit = min(context, params.training.max_length or context)
    seen = network.context_in(inputs["teacher"]) if "teacher" in inputs else limit
    data, validation = encode.encode(taught, tokenizer, limit, seen), encode.encode(held, tokenizer, limit)
    left_out = len(every) - len(rows) + len(data.left_out)
    encode.say_left_out(left_out, ctx)
    if not len(data.ids):
        raise DataError("all examples were held out for validation", "lower train.holdout or give more examples")
    require_memory(params, inputs, len(tokenizer), data, validation, ctx)
    if params.architecture:
        model = network.build(params.architecture, tokenizer, ctx.seed)
    return Prepared(data, validation, model, folder, tokenizer, limit, left_out)


def counted(ready: Prepared, params: Params) -> str:
    """For the first example, which tokens count in the loss: those of the answer, each shown between bars."""
    tokenizer = ready.tokenizer
    ids, start = ready.data.ids[0].tolist(), int(ready.data.answer_from[0])
    weight = params.training.prompt_weight
    prompt = tokenizer.decode(ids[:start]).replace("\n", "↵")
    prompt = prompt if len(prompt) <= 60 else f"…{prompt[-59:]}"
    answer = [tokenizer.decode([token]).replace("\n", "↵") for token in ids[start : start + 12]]
    more = f" and {len(ids) - start - 12} more" if len(ids) - start > 12 else ""
    return (
        f"what counts, in the first example: |{'|'.join(answer)}|{more}; not its {start} prompt tokens ({prompt})"
        if weight == 0
        else f"what counts, in the first example: |{'|'.join(answer)}|{more}, and {weight:g} of each of its {start} prompt tokens "
        f"({prompt})"
    )


def supervised(params: Params, ready: Prepared) -> Objective:
    """The plain objective: cross-entropy of the given answers."""
    from slmops.train.objective import Supervised, cross_entropy, on_logits

    loss = on_logits(cross_entropy(params.training))
    return Supervised(ready.data, ready.validation, params.training, loss)


def rejected_lengths(data: Encoded) -> Ints:
    """(examples,) tokens of each prompt with its rejected answer: by its characters, as long as those of the chosen one."""
    import numpy as np

    share = [
        len(row.example.rejected or "") / max(1, len(row.example.answer or "")) if row.example.rejected else 1.0
        for row in data.rows
    ]
    return np.asarray(data.answer_from + np.ceil(data.answer_tokens * np.array(share)), dtype=np.int64)


def require_memory(
    params: Params, inputs: Mapping[str, Path], vocabulary: int, data: Encoded, validation: Encoded, ctx: Context
) -> None:  # fmt: skip
    """Refuse a training that does not fit into what is free, by the tokens that it will really see; say what it needs. Not on a GPU.

    Raises:
        ResourceError: with what would make it fit.
    """
    import torch

    from slmops.train.available import available, resident
    from slmops.train.fit import Plan
    from slmops.train.memory import Load
    from slmops.train.network import precision_for
    from slmops.train.shape import Shape, lower_bytes

    scratch = params.architecture is not None
    shape = Shape.of(params.architecture, vocabulary) if params.architecture else Shape.of_folder(inputs["base"])
    free = available()
    if torch.cuda.is_available() or shape is None or free is None:
        return

    rejected = rejected_lengths(data) if getattr(params.training, "method", "") in PREFERENCE else None

    def load(training: Training) -> Load:
        return Load.of(data.lengths, data.answer_from, training, ctx.seed, validation.lengths, rejected)

    low = precision_for("auto", shape.parameters, "cpu") == "bf16"
    teacher = Shape.of_folder(inputs["teacher"]) if "teacher" in inputs else None
    file = 0 if scratch else lower_bytes(inputs["base"])
    plan = Plan("the model", "", shape, params.training, load, scratch, low, teacher, file)
    plan.require(free + resident())
    ctx.progress.log(plan.say(free + resident()))


def learn(
    params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context, method: str,
    make_objective: Callable[[Prepared, Network], Objective] | None = None,
) -> Facts:  # fmt: skip
    """The whole of a training method: prepare, tune, loop, save.

    Writes a plain model folder; where the tuning added weights to a frozen base, they are merged into it and lie beside it
    in the folder `adapter`.

    Args:
        make_objective: what is learned; default: `supervised`.
    """
    if params.keep_zeros and params.training.tuning != "full":
        raise TrainingError(f"tuning {params.training.tuning} would fill the zeros of the base", "use `tuning: full`")
    ready = prepare(params, inputs, ctx)

    from slmops.train import heap, network, tuning
    from slmops.train.loop import Loop, write_record

    training = params.training
    handle = tuning.apply(ready.model, training, ctx.seed)
    device = network.device_here()
    model = ready.model if training.tuning in ("full", "adapter") else handle.get_base_model()
    count = sum(p.numel() for p in model.parameters())
    bf16 = network.precision_for(training.precision, count, device) == "bf16"
    net = network.Network(model, device, bf16, training.checkpointing)
    if training.dropout:
        net.may_drop()
    if params.keep_zeros:
        net.keep_zeros()
    moved = sum(w.numel() for w in net.trained.values())
    ctx.progress.log(
        f"{count / 1e6:.2f} M parameters{'' if handle is None else f', {moved / 1e6:.3f} M of them trained ({training.tuning})'}, "
        f"{len(ready.data.ids)} examples ({int(ready.data.lengths.sum())} tokens), "
        f"{len(ready.validation.ids)} for validation, {'bf16' if bf16 else 'fp32'} on {device}"
    )
    ctx.progress.log(counted(ready, params))
    objective = make_objective(ready, net) if make_objective else supervised(params, ready)
    loop = Loop(net, objective, training, ctx, identity=method)
    record = {"method": method, "tuning": training.tuning, **loop.run()}
    facts = loop.facts() | {"copies_left_out": ready.left_out}
    plain, folder = ready.model, ready.tokenizer_folder
    if handle is not None:
        tuning.save_adapter(handle, training, inputs["base"], out)
        del ready, handle, model, net, objective, loop, plain
        gc.collect()  # the tuned model goes before its base is read again: they are never there together
        heap.give_back()
        plain = tuning.merged(out / tuning.ADAPTER, inputs["base"])
    network.save(plain.to("cpu"), folder, out)
    write_record(record, out)
    return facts


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Train and write a Hugging Face model folder with its tokenizer and training.json."""
    return learn(params, inputs, out, ctx, DECLARATION.name)
