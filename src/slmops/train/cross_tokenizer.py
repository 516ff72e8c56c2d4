"""Distillation from a teacher with another tokenizer, from what `train.cache_aligned` kept of one teacher pass.

Teacher and student cut the same answer into other tokens. Where both have a cut at the same character they have read the
same text, and there they can be compared. Per such place:

- `ranks` (universal logit distillation, arXiv 2402.12030, at aligned places alone): the L1 distance between the sorted next-token
  probabilities of both, the k largest one by one and the rest as one;
- `chunks` (approximate likelihood matching, arXiv 2503.20083): between two common cuts lies a chunk of text, for which teacher and student
  each have a likelihood, p and q; the loss is KL between the two-valued distributions (p, 1 - p) and (q, 1 - q).

The loss of an example is (1 - w) * cross-entropy + w * (ranks + chunks), each summed over its places; `logit_weight` is w.
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
from slmops.train.objective import Supervised, piecewise

if TYPE_CHECKING:
    import torch

    from slmops.train.batches import Part
    from slmops.train.network import Network
    from slmops.train.objective import Objective, PartLoss, Weights
    from slmops.train.sft import Prepared

LEAST = 1e-6
"""Least probability of a chunk and of its opposite."""

DECLARATION = Declaration(
    name="train.cross_tokenizer",
    version="3",
    makes="model",
    takes={"aligned": "logits"} | sft.TAKES,
    extra="train",
    packages=sft.PACKAGES,
    threads=True,
)


class Params(sft.Params):
    """As for `train.sft`, with `logit_weight`."""

    training: Train = Train(method="cross_tokenizer")


@dataclass(frozen=True)
class Aligned:
    """What the teacher's pass left, for the examples in the order of the training data.

    Attributes:
        first: (examples,) int64 where an example's places begin.
        count: (examples,) int64 how many places it has; the last one ends the answer.
        ends: (places,) int64 which student token, counted from the answer's first, ends the chunk of a place.
        likelihood: (places,) float32 log likelihood that the teacher gives the chunk.
        ranks: (places, k) float32 the teacher's largest next-token probabilities where the chunk begins, descending.
    """

    first: torch.Tensor
    count: torch.Tensor
    ends: torch.Tensor
    likelihood: torch.Tensor
    ranks: torch.Tensor

    @classmethod
    def load(cls, folder: Path, ready: Prepared, tokenizer_digest: str) -> Aligned:
        """Read a folder of `train.cache_aligned`.

        Raises:
            TrainingError: it was made for another tokenizer or for other examples.
        """
        import torch
        from safetensors.torch import load_file

        from slmops.train.encode import answer_digest

        again = "make it again with train.cache_aligned on the same files"
        index = json.loads((folder / "index.json").read_text("utf-8"))
        if index.get("student_tokenizer") != tokenizer_digest:
            raise TrainingError("the teacher's pass was aligned with another student's tokenizer", again)
        tensors = load_file(folder / "aligned.safetensors")
        starts = dict(zip(index["examples"], torch.cumsum(tensors["counts"], 0) - tensors["counts"], strict=True))
        sizes = dict(zip(index["examples"], tensors["counts"], strict=True))
        first, count = [], []
        for row in ready.data.rows:
            name = answer_digest(row)
            if name not in starts:
                raise TrainingError(f"{row.file}:{row.line}: the example is not in the teacher's pass", again)
            first.append(int(starts[name]))
            count.append(int(sizes[name]))
        return cls(
            torch.tensor(first), torch.tensor(count), tensors["ends"].long(), tensors["likelihood"], tensors["ranks"]
        )


def comparing(training: Train, aligned: Aligned) -> PartLoss:
    """The loss of a part, as the module defines it."""
    k = aligned.ranks.shape[1]

    def loss(network: Network, weights: Weights, part: Part, dropout: float) -> torch.Tensor:
        import torch

        hidden = network.hidden(weights, part, dropout)
        share = torch.where(part.offset >= 0, 1 - training.logit_weight, 1.0) * part.weights

        def piece(a: int, b: int) -> torch.Tensor:
            """Per position: weighted cross-entropy, log likelihood of the target, then the k largest probabilities."""
            targets, logits = part.targets[a:b], network.project(weights, hidden[a:b])
            text, plain = (
                torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
                for smoothing in (training.label_smoothing, 0.0)
            )
            top = torch.softmax(logits, -1).topk(min(k, logits.shape[1]), -1).values
            top = torch.nn.functional.pad(top, (0, k - top.shape[1]))
            return torch.cat([(text * share[a:b])[:, None], -plain[:, None], top], 1)

        table = torch.cat(piecewise(hidden.shape[0], network.vocabulary, piece))
        return table[:, 0].sum() + training.logit_weight * places(table[:, 1], table[:, 2:], part, aligned)

    return loss


def places(logp: torch.Tensor, top: torch.Tensor, part: Part, aligned: Aligned) -> torch.Tensor:
    """Sum of `ranks` and `chunks` over the places of a part.

    Args:
        logp: (P,) log likelihood of each target.
        top: (P, k) the student's largest probabilities at each position, descending.
    """
    import torch

    at = torch.nonzero(part.offset >= 0)[:, 0]
    owner, offset = part.owner[at], part.offset[at]
    begins = torch.nonzero(offset == 0)[:, 0]  # where in `at` an example's answer begins
    total = logp.new_zeros(())
    before = torch.cumsum(torch.cat([logp.new_zeros(1), logp[at].double()]), 0)
    for begin in begins.tolist():
        example = int(owner[begin])
        a, n = int(aligned.first[example]), int(aligned.count[example])
        stops = begin + aligned.ends[a : a + n].to(logp.device) + 1
        starts = torch.cat([stops.new_tensor([begin]), stops[:-1]])
        ours = (before[stops] - before[starts]).float()
        total = total + two_valued(aligned.likelihood[a : a + n].to(logp.device), ours).sum()
        total = total + rank_distance(aligned.ranks[a : a + n].to(logp.device), top[at[starts]]).sum()
    return total


def two_valued(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL between (p, 1 - p) and (q, 1 - q) of log likelihoods, same shapes; both kept off 0 and 1 by LEAST."""
    import torch

    p, q = (torch.exp(value).clamp(LEAST, 1 - LEAST) for value in (teacher, student))
    return p * (p.log() - q.log()) + (1 - p) * ((1 - p).log() - (1 - q).log())


def rank_distance(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """(places,) L1 distance of (places, k) descending probabilities, and of what is missing to 1."""
    rest = ((1 - teacher.sum(-1)) - (1 - student.sum(-1))).abs()
    return (teacher - student).abs().sum(-1) + rest


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Train; write a Hugging Face model folder with its tokenizer and training.json."""

    def objective(ready: Prepared, net: Network) -> Objective:
        from slmops.train.encode import tokenizer_digest

        aligned = Aligned.load(inputs["aligned"], ready, tokenizer_digest(ready.tokenizer_folder))
        depends = digest_file(inputs["aligned"] / "aligned.safetensors")
        return Supervised(ready.data, ready.validation, params.training, comparing(params.training, aligned), depends)

    return sft.learn(params, inputs, out, ctx, DECLARATION.name, objective)
