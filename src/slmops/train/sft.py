"""Supervised fine-tuning: learn the answers, from scratch or from an existing model.

On a teacher's answers this is sequence-level distillation (arXiv 1606.07947). Loss falls on the answer tokens and the
end token; prompt tokens count `prompt_weight` each. With a prompt weight the model also learns to write messages: given
`<|user|>` alone it samples one (the `sample` synthesis, arXiv 2406.08464).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.digest import digest_text
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as Base
from slmops.core.spec import Architecture, Training
from slmops.errors import DataError, MissingExtraError, ModelError

if TYPE_CHECKING:
    from slmops.train.encode import Encoded, Row
    from slmops.train.loop import LossFunction

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")

DECLARATION = Declaration(
    name="train.sft",
    version="2",
    makes="model",
    takes={
        "data": "dataset",
        "synthetic?": "dataset",
        "augmented?": "dataset",
        "tokenizer?": "tokenizer",
        "base?": "model",
    },
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
        validation: `input/file` of validation examples; None: `training.holdout` of the examples, chosen by content.
    """

    training: Training = Training()
    architecture: Architecture | None = None
    files: tuple[str, ...]
    validation: str | None = None


@dataclass(frozen=True)
class Prepared:
    """All that a training needs, checked: data fits the model, tokenizer and model agree."""

    data: Encoded
    validation: Encoded
    model: Any
    tokenizer_folder: Path


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
    from slmops.train import encode, network

    rows = encode.read(inputs, params.files)
    held = encode.read(inputs, (params.validation,)) if params.validation else []
    check_rows(rows, params.files)
    if not params.validation:
        rows, held = hold_out(rows, params.training.holdout)
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
        model = network.load(folder)
        if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
            raise ModelError(
                f"{folder}: the tokenizer has {len(tokenizer)} entries, the model only "
                f"{model.get_input_embeddings().weight.shape[0]}",
                "use the tokenizer that came with the model",
            )
    context = params.architecture.context if params.architecture else network.context_of(model)
    limit = min(context, params.training.max_length or context)
    data, validation = encode.encode(rows, tokenizer, limit), encode.encode(held, tokenizer, limit)
    if not len(data.ids):
        raise DataError("all examples were held out for validation", "lower train.holdout or give more examples")
    if params.architecture:
        model = network.build(params.architecture, tokenizer, ctx.seed)
    return Prepared(data, validation, model, folder)


def learn(
    params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context, method: str,
    make_loss: Callable[[Prepared], tuple[LossFunction, str]] | None = None,
) -> Facts:  # fmt: skip
    """The whole of a training method: prepare, loop, save.

    Args:
        make_loss: the loss and a digest of what it depends on; default: cross-entropy.
    """
    ready = prepare(params, inputs, ctx)
    import torch

    from slmops.train import network
    from slmops.train.loop import Loop, write_record

    loss, depends = make_loss(ready) if make_loss else (None, "")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = sum(p.numel() for p in ready.model.parameters())
    bf16 = network.precision_for(params.training.precision, count, device) == "bf16"
    net = network.Network(ready.model, device, bf16)
    ctx.progress.log(
        f"{count / 1e6:.2f} M parameters, {len(ready.data.ids)} examples ({int(ready.data.lengths.sum())} tokens), "
        f"{len(ready.validation.ids)} for validation, {'bf16' if bf16 else 'fp32'} on {device}"
    )
    loop = Loop(net, ready.data, ready.validation, params.training, ctx, loss=loss, identity=[method, depends])
    record = {"method": method, **loop.run()}
    network.save(ready.model.to("cpu"), ready.tokenizer_folder, out)
    write_record(record, out)
    return loop.facts()


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Train and write a Hugging Face model folder with its tokenizer and training.json."""
    return learn(params, inputs, out, ctx, DECLARATION.name)
