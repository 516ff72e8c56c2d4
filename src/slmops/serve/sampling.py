"""Picking the next token of many answers at once.

In this order, as the servers do that people know: penalties and biases, what a grammar allows, temperature, then min-p, top-k and
top-p. Each answer draws from a generator of its own, and all are picked in the same few operations over a matrix of logits.

Law: what an answer says depends on its seed and its prompt, bit for bit, never on the answers beside it: every operation is element by
element, or goes along one row in an order that the other rows do not change. A token is one of the vocabulary, whatever is asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slmops.serve import drawing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_] | NDArray[np.int32]
    """Which tokens may come: (vocabulary,), or in 32 bits of each number, the lowest first. Tokens beyond its end may not."""


@dataclass(frozen=True)
class Picking:
    """How an answer's tokens are picked. Values as in the API of OpenAI where it has them.

    Attributes:
        temperature: 0, or below `drawing.COLD`, is greedy: the most likely token, the lowest id on ties.
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
    """What one answer's tokens are picked by, one after the other; see `pick`.

    Args:
        prompt: its ids, for the repetition penalty.
        chance: what seeds it where `how.seed` is None.
    """

    def __init__(self, how: Picking, prompt: Sequence[int], chance: int) -> None:
        import numpy as np

        self.how = how
        warm = how.temperature >= drawing.COLD
        self.random = np.random.default_rng(chance if how.seed is None else how.seed) if warm else None
        self.plain = self.random is None and not how.changes
        """The most likely token, whatever came before."""
        self.places: dict[int, int] = {}
        self.answer, self.counts = array("q"), array("f")
        """The tokens of the answer and how often it has them, where a penalty counts them."""
        self.known = set(prompt) if how.repetition_penalty != 1 else set[int]()
        self.seen = array("q", self.known)
        self.biased = array("q", how.logit_bias)
        self.biases = array("f", how.logit_bias.values())

    def pick(self, logits: NDArray[np.float32], allowed: Mask | None = None) -> Picked:
        """The next token of this answer alone."""
        return pick([self], [logits], [allowed])[0]

    def _note(self, token: int) -> None:
        if self.how.frequency_penalty or self.how.presence_penalty:
            place = self.places.setdefault(token, len(self.answer))
            if place == len(self.answer):
                self.answer.append(token)
                self.counts.append(0.0)
            self.counts[place] += 1
        if self.how.repetition_penalty != 1 and token not in self.known:
            self.known.add(token)
            self.seen.append(token)


def pick(
    pickers: Sequence[Picker], logits: Sequence[NDArray[np.float32]], allowed: Sequence[Mask | None] = ()
) -> list[Picked]:
    """The next token of each answer.

    Args:
        logits: of each, (vocabulary,); left as they are.
        allowed: which tokens may come in each; None or nothing: all.
    """
    import numpy as np

    masks = allowed or [None] * len(pickers)
    tokens = [-1] * len(pickers)
    others = []
    for place, (picker, row, mask) in enumerate(zip(pickers, logits, masks, strict=True)):
        if picker.plain and mask is None:
            tokens[place] = int(row.argmax())
        else:
            others.append(place)
    if others:
        some = [pickers[place] for place in others]
        matrix = np.stack([logits[place] for place in others])
        with np.errstate(all="ignore"):  # what is too large is infinite
            _change(matrix, some)
        for row, place in zip(matrix, others, strict=True):
            mask = masks[place]
            if mask is not None:
                row[~_plain(mask, len(row))] = -np.inf
        for place, token in zip(others, _chosen(matrix, some), strict=True):
            tokens[place] = token
        for picker, place in zip(some, others, strict=True):
            if picker.how.changes:
                picker._note(tokens[place])
    if all(picker.how.logprobs is None for picker in pickers):
        return [Picked(token) for token in tokens]
    return _told(pickers, logits, tokens)


def _plain(mask: Mask, vocabulary: int) -> NDArray[np.bool_]:
    import numpy as np

    bits: NDArray[Any] = (
        mask if mask.dtype == bool else np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
    )
    if len(bits) >= vocabulary:
        return bits[:vocabulary]
    return np.concatenate([bits, np.zeros(vocabulary - len(bits), bool)])


def _change(matrix: NDArray[np.float32], pickers: Sequence[Picker]) -> None:
    """Penalties and biases, in place."""
    import numpy as np

    def places(lists: Sequence[array[int]]) -> tuple[Any, Any, list[int]]:
        lengths = [len(ids) for ids in lists]
        ids = np.concatenate([np.frombuffer(ids, np.int64) if ids else np.empty(0, np.int64) for ids in lists])
        return np.repeat(np.arange(len(lists)), lengths), ids, lengths

    def each(values: Sequence[float], lengths: list[int]) -> Any:
        return np.repeat(np.array(values, np.float32), lengths)

    hows = [picker.how for picker in pickers]
    if any(picker.seen for picker in pickers):
        rows, ids, lengths = places([picker.seen for picker in pickers])
        some, penalty = matrix[rows, ids], each([how.repetition_penalty for how in hows], lengths)
        matrix[rows, ids] = np.where(some > 0, some / penalty, some * penalty)
    if any(picker.answer for picker in pickers):
        rows, ids, lengths = places([picker.answer for picker in pickers])
        counts = np.concatenate([np.array(picker.counts, np.float32) for picker in pickers])
        often, once = ([getattr(how, f"{kind}_penalty") for how in hows] for kind in ("frequency", "presence"))
        matrix[rows, ids] -= each(often, lengths) * counts + each(once, lengths)
    if any(picker.biased for picker in pickers):
        rows, ids, lengths = places([picker.biased for picker in pickers])
        matrix[rows, ids] += np.concatenate([np.array(picker.biases, np.float32) for picker in pickers])


def _chosen(matrix: NDArray[np.float32], pickers: Sequence[Picker]) -> list[int]:
    """A token of each row, greedily or by chance."""
    if all(picker.random is None for picker in pickers):
        return [int(token) for token in matrix.argmax(axis=1)]
    tokens = [-1] * len(pickers)
    alike: dict[int, list[int]] = {}
    for row, picker in enumerate(pickers):
        if picker.random is None:
            tokens[row] = int(matrix[row].argmax())
        else:
            alike.setdefault(drawing.first(picker.how, matrix.shape[1]), []).append(row)
    for count, rows in alike.items():
        chances = [float(picker.random.random()) for picker in (pickers[row] for row in rows) if picker.random]
        some = matrix if len(rows) == len(pickers) else matrix[rows]
        for row, token in zip(
            rows, drawing.draw(some, [pickers[row].how for row in rows], chances, count), strict=True
        ):
            tokens[row] = token
    return tokens


def _told(pickers: Sequence[Picker], logits: Sequence[NDArray[np.float32]], tokens: Sequence[int]) -> list[Picked]:
    """Tokens with what is to be told of them."""
    found = [Picked(token) for token in tokens]
    alike: dict[int, list[int]] = {}
    for place, picker in enumerate(pickers):
        if picker.how.logprobs is not None:
            alike.setdefault(picker.how.logprobs, []).append(place)
    for count, places in alike.items():
        told = drawing.told([logits[place] for place in places], [tokens[place] for place in places], count)
        for place, (logprob, likely) in zip(places, told, strict=True):
            found[place] = Picked(tokens[place], logprob, likely)
    return found
