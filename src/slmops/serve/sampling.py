"""Picking the next token of many answers at once.

In this order, as the servers do that people know: penalties and biases, what a grammar allows, temperature, then min-p, top-k and
top-p. Each answer draws from a generator of its own, so that what it says depends on its seed and its prompt, never on the answers
beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LIKELY = 1024
"""So many of the most likely tokens are sorted at first; all of them only where these are not enough for top-p."""


@dataclass(frozen=True)
class Picking:
    """How an answer's tokens are picked. Values as in the API of OpenAI where it has them.

    Attributes:
        temperature: 0 is greedy: the most likely token, the lowest id on ties.
        top_k: of the so many most likely tokens; 0: of all.
        top_p: of the most likely tokens that have this share together.
        min_p: of the tokens with at least this share of the most likely one's probability.
        repetition_penalty: divides the logits of tokens that prompt or answer have, where they are positive, and multiplies them
            where they are negative; 1: none.
        frequency_penalty: taken from a logit for each time that the answer has the token.
        presence_penalty: taken once from those that the answer has.
        logit_bias: added, by token id.
        seed: None: another answer each time.
        logprobs: how many of the most likely tokens are told with each; None: not even of the token itself.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    @property
    def changes(self) -> bool:
        """Whether logits are changed before the temperature."""
        return bool(self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty or self.logit_bias)


@dataclass(frozen=True)
class Picked:
    """A token. `logprob` and the `likely` ones (id, log probability) are those of the model, before anything changed them."""

    token: int
    logprob: float | None = None
    likely: tuple[tuple[int, float], ...] = ()


class Picker:
    """Picks the tokens of one answer, one after the other.

    Args:
        prompt: its ids, for the repetition penalty.
        chance: what seeds it where `how.seed` is None.
    """

    def __init__(self, how: Picking, prompt: Sequence[int], chance: int) -> None:
        import numpy as np

        self._how = how
        self._random = np.random.default_rng(chance if how.seed is None else how.seed) if how.temperature else None
        self._answer: Counter[int] = Counter()
        self._seen = set(prompt) if how.repetition_penalty != 1 else set()

    def pick(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> Picked:
        """The next token.

        Args:
            logits: (vocabulary,); left as they are.
            allowed: (vocabulary,) which tokens may come; None: all.
        """
        import numpy as np

        how, row = self._how, logits
        if how.changes:
            row = self._changed(logits)
        if allowed is not None:
            row = np.where(allowed, row, -np.inf)
        if self._random is None:
            token = int(row.argmax())
        else:
            token = draw(row, how, float(self._random.random()))
        if how.frequency_penalty or how.presence_penalty:
            self._answer[token] += 1
        if how.repetition_penalty != 1:
            self._seen.add(token)
        if how.logprobs is None:
            return Picked(token)
        return told(logits, token, how.logprobs)

    def _changed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        import numpy as np

        how = self._how
        row = logits.copy()
        if self._seen:
            ids = np.fromiter(self._seen, np.int64)
            some = row[ids]
            row[ids] = np.where(some > 0, some / how.repetition_penalty, some * how.repetition_penalty)
        if self._answer:
            ids = np.fromiter(self._answer, np.int64)
            counts = np.fromiter(self._answer.values(), np.float32)
            row[ids] -= how.frequency_penalty * counts + how.presence_penalty
        for id, bias in how.logit_bias.items():
            row[id] += bias
        return row


def draw(row: NDArray[np.float32], how: Picking, chance: float) -> int:
    """A token by chance.

    Args:
        row: logits (vocabulary,), −inf where a token may not come.
        chance: uniform in [0, 1).
    """
    import numpy as np

    best = float(row.max())
    some = how.top_k if 0 < how.top_k < len(row) else min(LIKELY, len(row)) if how.top_p < 1 else 0
    while True:
        ids: Any = np.argpartition(row, -some)[-some:] if 0 < some < len(row) else np.arange(len(row))
        weights = np.exp((row[ids].astype(np.float64) - best) / how.temperature)
        if how.min_p:
            weights[weights < how.min_p] = 0.0
        if how.top_p >= 1:
            order = np.argsort(ids) if some else slice(None)
            break
        # of all that top-k leaves, of which `ids` are the most likely
        whole = weights.sum() if some in (0, how.top_k) or some == len(row) else _whole(row, best, how)
        order = np.lexsort((ids, -weights))
        heap = weights[order].cumsum()
        cut = how.top_p * whole
        if heap[-1] >= cut or some in (0, how.top_k) or some == len(row):
            count = int(np.searchsorted(heap, cut)) + 1
            order = order[:count]
            break
        some = len(row)
    heap = weights[order].cumsum()
    place = min(int(np.searchsorted(heap, chance * heap[-1], "right")), len(heap) - 1)
    while weights[order][place] == 0.0:  # chance × sum was rounded up to the sum
        place -= 1
    return int(ids[order][place])


def _whole(row: NDArray[np.float32], best: float, how: Picking) -> float:
    import numpy as np

    weights = np.exp((row.astype(np.float64) - best) / how.temperature)
    return float(weights[weights >= how.min_p].sum())


def told(logits: NDArray[np.float32], token: int, count: int) -> Picked:
    """A token with its log probability and the `count` most likely ones, most likely first, the lower id on ties."""
    import numpy as np

    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    if not count:
        return Picked(token, float(row[token]))
    count = min(count, len(row))
    ids = np.argpartition(-row, count - 1)[:count]
    ids = ids[np.lexsort((ids, -row[ids]))]
    return Picked(token, float(row[token]), tuple((int(i), float(row[i])) for i in ids))
