"""Odds ratio preference optimisation (arXiv 2403.07691): learn the chosen answer and, in the same step, prefer it.

With a the mean log likelihood per token of an answer, and its odds exp(a) / (1 - exp(a)), the loss of a pair is

    -a_chosen - lambda * log sigmoid(log odds(a_chosen) - log odds(a_rejected))

where lambda is `preference.beta`. It needs no reference and no supervised step before: a model from scratch can start
with it. `label_smoothing` softens the second term as it does for `train.dpo`. The reward of an answer is
beta * a. As in the paper, both terms look at the answers alone and every pair counts the same; implementations that
average the first term over the tokens of a batch, or let it run over the prompt, give other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.core.method import Context, Declaration, Facts
from slmops.core.spec import Train
from slmops.train import pairs, sft

if TYPE_CHECKING:
    import torch

LEAST = 1e-6
"""Distance of a mean log likelihood from 0 below which it counts as this: the odds of a sure answer have no end."""

DECLARATION = Declaration(
    name="train.orpo",
    version="3",
    makes="model",
    takes=pairs.TAKES,
    extra="train",
    packages=sft.PACKAGES,
    threads=True,
)


class Params(pairs.Params):
    """As for all preference methods."""

    training: Train = Train(method="orpo")


def log_odds(mean: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log likelihoods (n,)."""
    import torch

    mean = mean.clamp_max(-LEAST)
    return mean - torch.log(-torch.expm1(mean))


class Loss:
    """The loss of the module. It reads nothing beside the parameters."""

    depends = ""

    def __init__(self, training: Train) -> None:
        self.beta, self.smoothing = training.preference.beta, training.preference.label_smoothing

    def losses(self, found: pairs.Sums, validating: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module."""
        chosen, rejected = found.chosen / found.chosen_tokens, found.rejected / found.rejected_tokens
        ratio = pairs.smoothed(log_odds(chosen) - log_odds(rejected), self.smoothing)
        return self.beta * ratio - chosen, self.beta * (chosen - rejected).detach()


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Train on pairs; write a Hugging Face model folder with its tokenizer and training.json."""
    return pairs.learn(
        params, inputs, out, ctx, DECLARATION.name, lambda _data, _validation, _network: Loss(params.training)
    )
