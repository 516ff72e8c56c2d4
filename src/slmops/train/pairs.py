"""Pairs of a chosen and a rejected answer: what the preference methods (`train.dpo`, `train.orpo`) share.

It promises:
- the two answers of a pair lie in the same part, and accumulation splits a batch by pairs;
- every pair counts the same: the loss of a step is the mean over its pairs, however the batch is split. A method gives
  one loss per pair; how answers of different length compare is for it to say;
- only answers carry loss: the tokens of the prompt, which both answers share, do not.

The loop divides by the sum of all weights, so the first token of a chosen answer weighs 1 and any other token 0: the sum
is the number of pairs, exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from slmops.core.method import Context, Facts
from slmops.core.spec import Train
from slmops.errors import DataError
from slmops.train import sft
from slmops.train.batches import Part, collate

if TYPE_CHECKING:
    import torch

    from slmops.train.encode import Encoded, Ints, Row
    from slmops.train.network import Network
    from slmops.train.objective import Objective, Weights
    from slmops.train.sft import Prepared

TAKES = {"data": "dataset", "tokenizer?": "tokenizer", "base?": "model"}


class Params(sft.Params):
    """As for `train.sft`, with the fields of `Train` that speak of preferences. All examples to learn from must be pairs."""

    training: Train


def check_pairs(rows: Sequence[Row], method: str) -> None:
    """Refuse examples that are no pairs.

    Raises:
        DataError: none is, or some are not; the first is named.
    """
    lacking = [row for row in rows if row.example.rejected is None]
    if not lacking:
        return
    hint = "give rows with prompt, chosen and rejected (data.format: preference, or data.columns.rejected)"
    if len(lacking) == len(rows):
        raise DataError(f"{method} learns from pairs, but none of the {len(rows)} examples has a rejected answer", hint)
    row = lacking[0]
    more = f" ({len(lacking) - 1} more have none)" if len(lacking) > 1 else ""
    raise DataError(
        f"the example has no rejected answer, which {method} needs{more}", hint, file=row.file, line=row.line
    )


def with_rejected(chosen: Encoded, folder: Path, limit: int) -> Encoded:
    """Both answers of each pair: N chosen ones, then the N rejected ones in the same order.

    Args:
        folder: of the tokenizer.
        limit: most tokens of prompt and answer.

    Raises:
        DataError: a rejected answer is too long or holds a control mark.
    """
    import numpy as np

    from slmops.train.encode import Encoded, encode, load_tokenizer

    rows = [replace(row, example=replace(row.example, answer=row.example.rejected)) for row in chosen.rows]
    try:
        rejected = encode(rows, load_tokenizer(folder), limit)
    except DataError as error:
        raise DataError(f"{error.message} (with the rejected answer)", error.hint) from error
    starts = np.concatenate([chosen.answer_from, rejected.answer_from])
    return Encoded(chosen.ids + rejected.ids, starts, chosen.rows + rejected.rows)


def collate_pairs(
    both: Encoded, chosen: Sequence[int] | Ints, mode: Literal["bucket", "pack"], capacity: int = 256
) -> Part:
    """The two answers of some pairs in one part; see the module for its weights.

    Args:
        both: as `with_rejected` gives it.
        chosen: (n,) indices of pairs, below N.
    """
    import torch

    count = len(both.ids) // 2
    members = [int(i) for i in chosen]
    part = collate(both, members + [i + count for i in members], 0.0, mode, capacity)
    return replace(part, weights=((part.owner < count) & (part.offset == 0)).to(torch.float32))


class Sums(NamedTuple):
    """Per pair of a part, in ascending order of the pairs.

    Attributes:
        pairs: (n,) int64 which pairs.
        chosen, rejected: (n,) float32 log likelihood of each answer, summed over its tokens.
        chosen_tokens, rejected_tokens: (n,) float32 how many those are.
    """

    pairs: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


def sums(logps: torch.Tensor, owner: torch.Tensor, count: int) -> Sums:
    """Token log likelihoods (P,) to answers.

    Args:
        owner: (P,) int64 as in `Part`: below `count` a chosen answer, else the rejected one of pair `owner - count`.
        count: pairs in the data.
    """
    import torch

    pairs, place = torch.unique(owner % count, return_inverse=True)
    rejected = owner >= count
    zero = torch.zeros(2 * len(pairs), dtype=logps.dtype, device=logps.device)
    where = place + rejected * len(pairs)
    total = zero.index_add(0, where, logps)
    tokens = zero.index_add(0, where, torch.ones_like(logps))
    half = len(pairs)
    return Sums(pairs, total[:half], total[half:], tokens[:half], tokens[half:])


@dataclass
class Paired:
    """The objective of a preference method, but for its loss. Everything counts pairs.

    Attributes:
        data, validation: both answers of each pair, as `with_rejected` gives them; `validation` may have none.
        measured: mean reward accuracy and margin of the last look at validation pairs; see `Pairwise`.
    """

    data: Encoded
    validation: Encoded
    training: Train
    pairwise: Pairwise
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def lengths(self) -> Ints:
        """(pairs,) tokens of the longer answer with its prompt: what decides the width of a row."""
        import numpy as np

        return np.maximum(*np.split(self.data.lengths, 2))

    @property
    def rows(self) -> Sequence[Row]:
        """(pairs,) where each stands."""
        return self.data.rows[: len(self.data.rows) // 2]

    @property
    def validation_examples(self) -> int:
        """How many validation pairs there are."""
        return len(self.validation.ids) // 2

    def digest(self) -> Any:
        """Data, validation and what the loss reads."""
        return [self.data.digest(), self.validation.digest(), self.pairwise.depends]

    def parts(self, chosen: Ints, step: int, network: Network, weights: Weights) -> list[Part]:
        """The chosen pairs, laid out in `accumulate` parts."""
        from slmops.train.objective import split, to_device

        t = self.training
        capacity = min(256, t.max_length or 256)
        return [
            to_device(collate_pairs(self.data, some, t.batching, capacity), network.device) for some in split(chosen, t)
        ]

    def _sums(self, network: Network, weights: Weights, part: Part, data: Encoded, dropout: float = 0.0) -> Sums:
        from slmops.train.objective import token_logps

        return sums(token_logps(network, weights, part, dropout), part.owner, len(data.ids) // 2)

    def loss(self, network: Network, weights: Weights, part: Part, dropout: float) -> torch.Tensor:
        """The sum of the losses of the part's pairs."""
        each, _rewards = self.pairwise.losses(self._sums(network, weights, part, self.data, dropout), False)
        return each.sum()

    def validate(self, network: Network, weights: Weights) -> float | None:
        """The method's loss, mean over the validation pairs; `measured` keeps their rewards."""
        import numpy as np
        import torch

        from slmops.train.objective import to_device

        count = self.validation_examples
        if not count:
            return None
        size = max(1, self.training.batch_size // self.training.accumulate)
        order = np.argsort(np.maximum(*np.split(self.validation.lengths, 2)), kind="stable")
        total = right = margin = 0.0
        with torch.no_grad():
            for start in range(0, count, size):
                part = collate_pairs(self.validation, order[start : start + size], "bucket")
                found = self._sums(network, weights, to_device(part, network.device), self.validation)
                each, difference = self.pairwise.losses(found, True)
                total += float(each.double().sum())
                right += float((difference > 0).double().sum())
                margin += float(difference.double().sum())
        self.measured = {"reward_accuracy": round(right / count, 6), "reward_margin": round(margin / count, 6)}
        return total / count

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing."""


class Pairwise(Protocol):
    """What a preference method adds."""

    @property
    def depends(self) -> Any:
        """Whatever the losses read beside the parameters, as JSON."""

    def losses(self, found: Sums, validating: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each pair (n,), and by how much the chosen answer's reward exceeds the rejected one's (n,).

        Args:
            validating: whether these are pairs of the validation data.
        """


def smoothed(margin: torch.Tensor, smoothing: float) -> torch.Tensor:
    """-log sigmoid of the margins, where a share of the pairs is taken to be the wrong way round (conservative DPO)."""
    from torch.nn import functional as F

    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def learn(
    params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context, method: str,
    make: Callable[[Encoded, Encoded, Network], Pairwise],
) -> Facts:  # fmt: skip
    """The whole of a preference method.

    Args:
        make: the method's losses, from training and validation pairs and the model before its first step.

    Raises:
        DataError: as `sft.learn`, and before a model is loaded: examples that are no pairs.
    """
    from slmops.train import encode, network

    check_pairs(encode.read(inputs, params.files), method)

    def objective(ready: Prepared, net: Network) -> Objective:
        context = network.context_of(ready.model)
        limit = min(context, params.training.max_length or context)
        data, held = (with_rejected(e, ready.tokenizer_folder, limit) for e in (ready.data, ready.validation))
        return Paired(data, held, params.training, make(data, held, net))

    facts = sft.learn(params, inputs, out, ctx, method, objective)
    points = json.loads((out / "training.json").read_text("utf-8"))["points"]
    best: dict[str, Any] = next((point for point in points if point["step"] == facts["best_step"]), {})
    return facts | {f"validation_{name}": best[name] for name in ("reward_accuracy", "reward_margin") if name in best}
