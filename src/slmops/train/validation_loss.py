"""How well a trained model foretells the answers of the validation data: what a search may choose by.

`loss.json` holds the mean negative log likelihood of an answer with its end token, in nats: per answer, so that models
with different tokenizers compare, and per token. Nothing is sampled; test data is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as Base
from slmops.errors import DataError, MissingExtraError
from slmops.train.sft import PACKAGES

DECLARATION = Declaration(
    name="train.validation_loss",
    version="1",
    makes="measurement",
    takes={"model": "model", "data": "dataset"},
    extra="train",
    packages=PACKAGES,
    threads=True,
)

BATCH = 64


class Params(Base):
    """Nothing to choose."""


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write loss.json.

    Raises:
        DataError: there is no validation data, or an example of it does not fit the model's context.
    """
    try:
        import numpy as np
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "train") from error
    from slmops.store.files import write_json
    from slmops.train import encode, network
    from slmops.train.loop import deterministic

    rows = encode.read(inputs, ("data/validation.jsonl",))
    if not rows:
        raise DataError("the validation split is empty", "give validation data or a larger data.splits.validation")
    model = network.load(inputs["model"]).eval()
    data = encode.encode(rows, encode.load_tokenizer(inputs["model"]), network.context_of(model))
    order = np.argsort(data.lengths, kind="stable")
    total = 0.0
    ctx.progress.start("validation loss", len(order), "examples")
    with deterministic(ctx.threads), torch.no_grad():
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            width = int(data.lengths[chosen].max())
            ids = torch.zeros((len(chosen), width), dtype=torch.int64)
            targets = torch.full((len(chosen), width), -100, dtype=torch.int64)
            real = torch.zeros((len(chosen), width), dtype=torch.int64)
            for row, example in enumerate(chosen):
                own = torch.from_numpy(data.ids[example])
                ids[row, : len(own)], real[row, : len(own)] = own, 1
                begin = int(data.answer_from[example])
                targets[row, begin : len(own)] = own[begin:]
            logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].float()
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), targets[:, 1:].reshape(-1), reduction="sum"
                )
            )
            ctx.progress.advance(len(chosen))
    ctx.progress.stop()
    loss = {
        "nats_per_answer": round(total / len(rows), 6),
        "nats_per_token": round(total / int(data.answer_tokens.sum()), 6),
        "examples": len(rows),
    }
    write_json(out / "loss.json", loss)
    return loss
