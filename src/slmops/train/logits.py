"""Distillation from the teacher's cached distributions, mixed with learning its text.

Per answer token: (1 - w) * cross-entropy of the answer + w * T^2 * KL(teacher || student), both softened by the
temperature T (arXiv 1503.02531). The teacher's side comes from `train.cache_logits`:

- `sampled`: KL is estimated by sum(c / n * -log q) minus the teacher's entropy: unbiased, so it can dip below 0;
- `top_k`: exact KL between the k listed tokens plus one outcome for all others:
  sum(p * (log p - log q)) + t * (log t - log s), with t and s the teacher's and the student's mass outside the list.

Prompt tokens, if they carry weight, have cross-entropy alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.core.digest import digest_file
from slmops.core.method import Context, Declaration, Facts
from slmops.core.spec import Train
from slmops.errors import TrainingError
from slmops.train import sft
from slmops.train.batches import Part

if TYPE_CHECKING:
    import torch

    from slmops.train.network import Network
    from slmops.train.objective import LossFunction, Objective
    from slmops.train.sft import Prepared

TAIL = 1e-7  # least mass outside the list: float32 cannot tell less from nothing

DECLARATION = Declaration(
    name="train.logits",
    version="5",
    makes="model",
    takes={"logits": "logits"} | sft.TAKES,
    extra="train",
    packages=sft.PACKAGES,
    threads=True,
)


class Params(sft.Params):
    """As for `train.sft`, with the fields of `Train` that speak of distributions."""

    training: Train = Train(method="logits")


@dataclass(frozen=True)
class Cache:
    """Cached distributions, in memory.

    Attributes:
        offsets: (positions + 1,) int64 where each position's entries begin.
        ids: (entries,) int64 token ids.
        weights: (entries,) float32 shares of the draws, or probabilities.
        entropy: (positions,) float32.
        first: example's answer digest to its first position.
        positions: example's answer digest to its number of positions.
        selection, samples, temperature, tokenizer, vocabulary: as in index.json.
    """

    offsets: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor
    first: Mapping[str, int]
    positions: Mapping[str, int]
    selection: str
    samples: int
    temperature: float
    tokenizer: str
    vocabulary: int

    @classmethod
    def load(cls, folder: Path) -> Cache:
        """Read a folder of kind `logits`."""
        import torch
        from safetensors.torch import load_file

        index = json.loads((folder / "index.json").read_text("utf-8"))
        tensors = load_file(folder / "distributions.safetensors")
        weights = tensors["weights"].to(torch.float32)
        if index["selection"] == "sampled":
            weights = weights / index["samples"]
        first: dict[str, int] = {}
        at = 0
        for name, count in zip(index["examples"], index["positions"], strict=True):
            first.setdefault(name, at)
            at += count
        return cls(
            tensors["offsets"], tensors["ids"].to(torch.int64), weights, tensors["entropy"], first,
            dict(zip(index["examples"], index["positions"], strict=True)), index["selection"], index["samples"],
            index["temperature"], index["tokenizer"], index["vocabulary"],
        )  # fmt: skip


def divergence(logits: torch.Tensor, cache: Cache, rows: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each position, as the module defines it.

    Args:
        logits: (P, vocabulary) float32 of the student.
        rows: (P,) int64 positions in the cache.

    Returns:
        (P,) float32.
    """
    import torch

    logq = torch.log_softmax(logits / cache.temperature, -1)
    start = cache.offsets[rows]
    counts = cache.offsets[rows + 1] - start
    owner = torch.repeat_interleave(torch.arange(len(rows)), counts)
    entry = torch.arange(len(owner)) - (torch.cumsum(counts, 0) - counts)[owner] + start[owner]
    owner, entry = owner.to(logits.device), entry
    ids, weights = cache.ids[entry].to(logits.device), cache.weights[entry].to(logits.device)
    chosen = logq.flatten()[owner * logq.shape[1] + ids]
    zero = torch.zeros(len(rows), device=logits.device)
    total = zero.index_add(0, owner, -weights * chosen)
    if cache.selection == "top_k":
        listed = zero.index_add(0, owner, weights)
        inside = zero.index_add(0, owner, chosen.exp())
        total = total - (1 - listed).clamp_min(0) * torch.log((1 - inside).clamp_min(TAIL))
    return total - cache.entropy[rows].to(logits.device)


def mixed(training: Train, cache: Cache, first: torch.Tensor) -> LossFunction:
    """The loss of this method.

    Args:
        first: (examples,) int64 cache position of each example's first answer token.
    """

    def loss(logits: torch.Tensor, part: Part) -> torch.Tensor:
        import torch

        each = torch.nn.functional.cross_entropy(
            logits, part.targets, reduction="none", label_smoothing=training.label_smoothing
        )
        answers = part.offset >= 0
        rows = (first[part.owner.cpu()] + part.offset.cpu())[answers.cpu()]
        teacher = divergence(logits if bool(answers.all()) else logits[answers], cache, rows)
        share = torch.where(answers, 1 - training.logit_weight, 1.0)
        text = (each * part.weights * share).sum()
        return text + training.logit_weight * training.temperature**2 * (teacher * part.weights[answers]).sum()

    return loss


def align(ready: Prepared, cache: Cache, training: Train, tokenizer_digest: str) -> torch.Tensor:
    """(examples,) int64: where each example's positions begin in the cache.

    Raises:
        TrainingError: the cache was made for another tokenizer, other settings or other examples.
    """
    import torch

    from slmops.train.encode import answer_digest

    again = "make the distributions again with train.cache_logits on the same files"
    if cache.tokenizer != tokenizer_digest:
        raise TrainingError(
            "the cached distributions belong to another tokenizer", "set student.tokenizer: teacher, then run again"
        )
    if cache.vocabulary != ready.model.get_input_embeddings().weight.shape[0]:
        raise TrainingError(f"the teacher has {cache.vocabulary} tokens, the student another number", again)
    for name, kept, wanted in (
        ("temperature", cache.temperature, training.temperature),
        ("logit_selection", cache.selection, training.logit_selection),
        ("logit_samples", cache.samples, training.logit_samples),
    ):
        if kept != wanted:
            raise TrainingError(f"the distributions were made with {name} {kept}, the training wants {wanted}", again)
    starts = []
    for row, count in zip(ready.data.rows, ready.data.answer_tokens.tolist(), strict=True):
        name = answer_digest(row)
        if name not in cache.first:
            raise TrainingError(f"{row.file}:{row.line}: the example is not among the cached distributions", again)
        if cache.positions[name] != count:
            raise TrainingError(f"{row.file}:{row.line}: {count} answer tokens, {cache.positions[name]} cached", again)
        starts.append(cache.first[name])
    return torch.tensor(starts, dtype=torch.int64)


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Train on text and distributions; write a Hugging Face model folder with its tokenizer and training.json."""

    def objective(ready: Prepared, net: Network) -> Objective:
        from slmops.train.encode import tokenizer_digest
        from slmops.train.objective import Supervised, on_logits

        cache = Cache.load(inputs["logits"])
        first = align(ready, cache, params.training, tokenizer_digest(ready.tokenizer_folder))
        loss = on_logits(mixed(params.training, cache, first))
        depends = digest_file(inputs["logits"] / "distributions.safetensors")
        return Supervised(ready.data, ready.validation, params.training, loss, depends)

    return sft.learn(params, inputs, out, ctx, DECLARATION.name, objective)
