"""On-policy distillation: the student writes answers, the teacher scores every token of them (GKD, arXiv 2306.13649).

A share of the batches holds what the student wrote at that time, the rest the data's answers. On both the loss is the
generalised Jensen-Shannon divergence between teacher and student; on the data's answers it is mixed with cross-entropy by
`logit_weight`. With M = b * teacher + (1 - b) * student it is b * KL(teacher || M) + (1 - b) * KL(student || M); b = 0 means
KL(teacher || student), b = 1 means KL(student || teacher).

The student writes for `refresh` batches at once: what is written is up to that many steps old. It lies in the checkpoint, so
that a training that was killed goes on with the same text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.method import Context, Declaration, Facts
from slmops.core.spec import Train
from slmops.train import sft
from slmops.train.objective import Supervised, cross_entropy, on_logits, split, to_device

if TYPE_CHECKING:
    import torch

    from slmops.train.batches import Part
    from slmops.train.encode import Encoded, Ints
    from slmops.train.network import Network
    from slmops.train.objective import Objective, Weights
    from slmops.train.sft import Prepared

DECLARATION = Declaration(
    name="train.on_policy",
    version="4",
    makes="model",
    takes={"teacher": "model"} | sft.TAKES,
    extra="train",
    packages=sft.PACKAGES,
    threads=True,
)


class Params(sft.Params):
    """As for `train.sft`, with the fields of `Train` that speak of distributions and of writing."""

    training: Train = Train(method="on_policy")


def jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence of each position, as the module defines it.

    Args:
        student, teacher: (P, vocabulary) float32 log probabilities.

    Returns:
        (P,) float32.
    """
    import torch

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(-1)

    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


@dataclass
class OnPolicy:
    """The objective.

    Attributes:
        plain: the data's answers, and validation.
        teacher: the network that scores.
        order: which examples a step sees.
        end: the token that ends an answer.
        context: most tokens of an example.
        written: by step, the answers of its examples.
    """

    plain: Supervised
    teacher: Network
    training: Train
    seed: int
    end: int
    context: int
    mark: str
    written: dict[int, list[list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from slmops.train.batches import Order

        t = self.training
        self.order = Order(self.plain.lengths, t.batch_size, self.seed, t.batching)
        self.steps = t.max_steps or max(1, math.ceil(t.epochs * self.order.per_epoch))

    @property
    def lengths(self) -> Ints:
        """As the data's."""
        return self.plain.lengths

    @property
    def rows(self) -> Any:
        """As the data's."""
        return self.plain.rows

    @property
    def validation_examples(self) -> int:
        """As the data's."""
        return self.plain.validation_examples

    def digest(self) -> Any:
        """The data and the teacher."""
        return [self.plain.digest(), self.mark]

    def student_writes(self, step: int) -> bool:
        """Whether a step sees the student's own answers: drawn by the seed, the same on every machine."""
        import random

        return random.Random(f"{self.seed}:{step}").random() < self.training.on_policy.share

    def parts(self, chosen: Ints, step: int, network: Network, weights: Weights) -> list[Part]:
        """The data's answers, or the student's: written for the steps ahead when this step has none yet."""
        if not self.student_writes(step):
            return self.plain.parts(chosen, step, network, weights)
        if step not in self.written:
            self._write(step, network, weights)
        answers = dict(zip((int(i) for i in chosen), self.written[step], strict=True))
        return [to_device(self._collate(some, answers), network.device) for some in split(chosen, self.training)]

    def _write(self, step: int, network: Network, weights: Weights) -> None:
        from slmops.train.sample import sample

        options = self.training.on_policy
        ahead = [s for s in range(step, min(step + options.refresh, self.steps)) if self.student_writes(s)]
        members = [int(i) for s in ahead for i in self.order.batch(s)]
        data = self.plain.data
        prompts = [data.ids[i][: int(data.answer_from[i])].tolist() for i in members]
        room = self.context - max(len(p) for p in prompts)
        limit = max(1, min(options.max_new_tokens, room))
        network.learn(False)
        texts = sample(
            network, weights, prompts, limit, self.end, options.temperature, self.seed * 1_000_003 + 7 * step + 1
        )
        network.learn(True)
        self.written, at = {}, 0
        for s in ahead:
            count = len(self.order.batch(s))
            self.written[s] = texts[at : at + count]
            at += count

    def _collate(self, chosen: Ints, answers: Mapping[int, list[int]]) -> Part:
        import numpy as np

        from slmops.train.batches import collate
        from slmops.train.encode import Encoded

        data: Encoded = self.plain.data
        members = [int(i) for i in chosen]
        ids = tuple(
            np.concatenate([data.ids[i][: int(data.answer_from[i])], np.array(answers[i], np.int64)]) for i in members
        )
        own = Encoded(ids, data.answer_from[members], tuple(data.rows[i] for i in members))
        return replace(collate(own, range(len(members)), 0.0, self.training.batching), written=True)

    def loss(self, network: Network, weights: Weights, part: Part, dropout: float) -> torch.Tensor:
        """Divergence from the teacher on answer tokens; on the data's answers mixed with cross-entropy."""
        import torch

        from slmops.train.objective import piecewise

        t = self.training
        with torch.no_grad():
            theirs = self.teacher.hidden(self.teacher.weights, part)
        ours = network.hidden(weights, part, dropout)
        plain = cross_entropy(t)

        def piece(a: int, b: int) -> torch.Tensor:
            some = part.narrow(a, b)
            logits = network.project(weights, ours[a:b])
            with torch.no_grad():
                target = torch.log_softmax(self.teacher.project(self.teacher.weights, theirs[a:b]) / t.temperature, -1)
            answers = some.offset >= 0
            divergence = jsd(torch.log_softmax(logits / t.temperature, -1), target, t.on_policy.beta) * t.temperature**2
            if some.written:
                return (divergence * some.weights).sum()
            mixed = t.logit_weight * (divergence * some.weights)[answers].sum()
            share = torch.where(answers, 1 - t.logit_weight, 1.0)
            return mixed + plain(logits, replace(some, weights=some.weights * share))

        sums = piecewise(ours.shape[0], network.vocabulary, piece)
        total: torch.Tensor = sum(sums[1:], start=sums[0])
        return total

    def validate(self, network: Network, weights: Weights) -> float | None:
        """Mean negative log likelihood of the held-out answers."""
        return self.plain.validate(network, weights)

    def state(self) -> dict[str, Any]:
        """What was written and not yet learned from."""
        return {"written": self.written}

    def restore(self, state: dict[str, Any]) -> None:
        """Take it up."""
        self.written = dict(state["written"])


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Train; write a Hugging Face model folder with its tokenizer and training.json.

    Raises:
        TrainingError: the teacher has another tokenizer or another number of tokens.
    """

    def objective(ready: Prepared, net: Network) -> Objective:
        from slmops.train.teachers import scoring

        teacher, mark = scoring(inputs["teacher"], ready, net, params.training.precision)
        loss = on_logits(cross_entropy(params.training))
        plain = Supervised(ready.data, ready.validation, params.training, loss)
        end = int(ready.tokenizer.eos_token_id)
        return OnPolicy(plain, teacher, params.training, ctx.seed, end, ready.limit, mark)

    return sft.learn(params, inputs, out, ctx, DECLARATION.name, objective)
