"""Direct preference optimisation (arXiv 2305.18290): raise the chosen answer above the rejected one, near a reference.

With the summed log likelihoods p of the model and r of the reference, the loss of a pair is

    -log sigmoid(h),  h = beta * ((p_chosen - r_chosen) - (p_rejected - r_rejected))

and with `label_smoothing` e the conservative form -(1 - e) log sigmoid(h) - e log sigmoid(-h), for data of which a share e
is the wrong way round. The reward of an answer is beta * (p - r), so h is the reward margin that validation reports.

The reference is the model as it starts, and where a tuning adds to a frozen base, the base with additions of zero. It is
run once over all pairs before the first step and then forgotten: no second model lies in memory. Its log likelihoods stay
in the scratch folder, so that a training that goes on does not compute them again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.digest import digest_json
from slmops.core.method import Context, Declaration, Facts
from slmops.core.spec import Train
from slmops.train import pairs, sft

if TYPE_CHECKING:
    import torch

    from slmops.train.encode import Encoded
    from slmops.train.network import Network

DECLARATION = Declaration(
    name="train.dpo",
    version="3",
    makes="model",
    takes=pairs.TAKES,
    extra="train",
    packages=sft.PACKAGES,
    threads=True,
)


class Params(pairs.Params):
    """As for all preference methods. The model must exist (input `base`): the reference is what it says at the start."""

    training: Train = Train(method="dpo")


def reference(data: Encoded, network: Network, size: int, mark: str, label: str, ctx: Context) -> torch.Tensor:
    """(2N,) float64 log likelihood of each answer under the model as it is; pairs as in `pairs.with_rejected`.

    Args:
        size: pairs in one pass.
        mark: digest of all that decides the values; they are taken from the scratch folder if it holds some of this mark.
        label: what the progress bar says.
    """
    import pickle

    import numpy as np
    import torch

    from slmops.train import loop
    from slmops.train.checkpoint import write
    from slmops.train.objective import to_device, token_logps

    count = len(data.ids) // 2
    file = ctx.scratch / f"reference-{mark[7:23]}.pt"
    out, done = torch.zeros(2 * count, dtype=torch.float64), 0
    try:
        kept = torch.load(file, weights_only=True)
        out, done = kept["logps"], int(kept["done"])
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError):
        pass
    order = np.argsort(np.maximum(*np.split(data.lengths, 2)), kind="stable")
    if done == count:
        return out
    ctx.scratch.mkdir(parents=True, exist_ok=True)
    ctx.progress.start(label, count, "pairs")
    ctx.progress.advance(done)
    saved = time.monotonic()
    network.learn(False)
    with loop.deterministic(ctx.threads), torch.no_grad():
        for start in range(done, count, size):
            part = to_device(pairs.collate_pairs(data, order[start : start + size], "bucket"), network.device)
            logps = token_logps(network, network.weights, part).double().cpu()
            out.index_add_(0, part.owner.cpu(), logps)
            done = min(count, start + size)
            ctx.progress.advance(done - start)
            if done == count or time.monotonic() - saved >= loop.EVERY_S:
                write(file, {"logps": out, "done": done})
                saved = time.monotonic()
    ctx.progress.stop()
    return out


class Loss:
    """The loss of the module, over reference log likelihoods of the training and the validation pairs."""

    def __init__(self, training: Train, train: torch.Tensor, validation: torch.Tensor, depends: Any) -> None:
        self.beta, self.smoothing = training.preference.beta, training.preference.label_smoothing
        self.margins = {on: (logps[: len(logps) // 2] - logps[len(logps) // 2 :]).float()
                        for on, logps in ((False, train), (True, validation))}  # fmt: skip
        self.depends = depends

    def losses(self, found: pairs.Sums, validating: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module."""
        before = self.margins[validating][found.pairs.cpu()].to(found.chosen.device)
        margin = self.beta * ((found.chosen - found.rejected) - before)
        return pairs.smoothed(margin, self.smoothing), margin


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Train on pairs; write a Hugging Face model folder with its tokenizer and training.json."""

    def loss(data: Encoded, validation: Encoded, network: Network) -> pairs.Pairwise:
        import torch

        from slmops.train.loop import digest_weights

        size = max(1, params.training.batch_size // params.training.accumulate)
        start = {
            "weights": digest_weights(network.weights), "torch": torch.__version__, "threads": ctx.threads,
            "device": network.device, "bf16": network.bf16, "path": network.path, "size": size,
        }  # fmt: skip
        marks = [digest_json([e.digest(), start]) for e in (data, validation)]
        labels = ("the reference on training pairs", "the reference on validation pairs")
        found = [
            reference(e, network, size, mark, label, ctx)
            for e, mark, label in zip((data, validation), marks, labels, strict=True)
        ]
        return Loss(params.training, found[0], found[1], [digest_json(logps.tolist()) for logps in found])

    return pairs.learn(params, inputs, out, ctx, DECLARATION.name, loss)
