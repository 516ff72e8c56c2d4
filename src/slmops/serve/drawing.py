"""Tokens by chance and the most likely tokens, of many rows of logits at once.

Only what may be needed is sorted: a row's k most likely tokens are all at least as likely as the k-th best of the maxima of some
disjoint parts of it, so few are left after one comparison.

Law: what comes of a row does not depend on the other rows, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from slmops.serve.sampling import Picking

LIKELY = 64
"""So many of the most likely tokens are sorted at first where top-p decides; all of them only where these are not enough."""
BLOCK = 256
"""Tokens that are summed first where one is drawn from all."""
COLD = 1e-6
"""A temperature below is greedy: a row divided by it would be numbers that float32 has not."""
HOT = 1e30
"""A temperature above is as this one."""
Likely = tuple[tuple[int, float], ...]


def first(how: Picking, vocabulary: int) -> int:
    """How many of the most likely tokens have to be sorted; 0: none, as one is drawn from all."""
    if 0 < how.top_k < vocabulary:
        return how.top_k
    return min(LIKELY, vocabulary) if how.top_p < 1 else 0


def draw(
    rows: NDArray[np.float32], hows: Sequence[Picking], chances: Sequence[float], count: int
) -> list[int]:  # fmt: skip
    """A token of each row by chance.

    Args:
        rows: logits (rows, vocabulary), −inf where a token may not come. Of a row whose largest is no finite number, the first such
            token is taken.
        chances: uniform in [0, 1).
        count: what `first` says of all of them.
    """
    import numpy as np

    best = rows.max(axis=1)
    if not np.isfinite(best).all():
        good = np.flatnonzero(np.isfinite(best)).tolist()
        found = [int(token) for token in rows.argmax(axis=1)]
        some = draw(rows[good], [hows[row] for row in good], [chances[row] for row in good], count) if good else []
        for place, token in zip(good, some, strict=True):
            found[place] = token
        return found
    heat = np.array([how.temperature for how in hows]).clip(COLD, HOT)
    chance = np.array(chances)
    least = np.minimum([how.min_p for how in hows], 1.0)
    if not count:
        return _from_all(rows, best, heat, least, chance)
    share = np.array([how.top_p for how in hows])
    ids, values = top(rows, count)
    weights = _weights(values, values[:, :1], heat, least)
    given = np.array([0 < how.top_k < rows.shape[1] for how in hows])
    weights[given, count:] = 0.0
    heap = weights.cumsum(axis=1)
    whole = heap[:, -1].copy()
    for row in np.flatnonzero(~given):
        scaled = (rows[row] - values[row, 0]) / np.float32(heat[row])
        part = np.exp(scaled)
        whole[row] = float(part[part >= least[row]].sum())
    cut = np.where(share < 1, share * whole, np.inf)
    ends = np.minimum((heap < cut[:, None]).sum(axis=1), heap.shape[1] - 1)
    tokens = [int(ids[row, place]) for row, place in enumerate(_places(weights, heap, ends, chance))]
    for spread in np.flatnonzero(~given & (heap[:, -1] < cut)).tolist():
        tokens[spread] = _sorted(rows[spread], hows[spread].top_p, heat[spread], least[spread], chances[spread])
    return tokens


def _weights(values: Any, best: Any, heat: Any, least: Any) -> NDArray[np.float64]:
    import numpy as np

    weights: NDArray[np.float64] = np.exp((values.astype(np.float64) - best) / heat[:, None])
    weights[weights < least[:, None]] = 0.0
    return weights


def _places(weights: Any, heap: Any, ends: Any, chance: Any) -> Any:
    """Where in each row of sorted weights the chance falls. `ends`: the last place that may be taken."""
    import numpy as np

    last = heap[np.arange(len(heap)), ends]
    places = np.minimum((heap <= (chance * last)[:, None]).sum(axis=1), ends)
    for row in range(len(places)):
        while weights[row, places[row]] == 0.0:  # chance × sum was rounded up to the sum
            places[row] -= 1
    return places


def _sorted(row: NDArray[np.float32], share: float, heat: float, least: float, chance: float) -> int:
    """With top-p over a row whose mass is spread over many tokens."""
    import numpy as np

    order = np.lexsort((np.arange(len(row)), -row))
    weights = _weights(row[None, order], row.max(), np.array([heat]), np.array([least]))
    heap = weights.cumsum(axis=1)
    end = min(int(np.searchsorted(heap[0], share * heap[0, -1])), len(row) - 1)
    return int(order[_places(weights, heap, np.array([end]), np.array([chance]))[0]])


def _from_all(rows: NDArray[np.float32], best: Any, heat: Any, least: Any, chance: Any) -> list[int]:
    import numpy as np

    count, vocabulary = rows.shape
    blocks = -(-vocabulary // BLOCK)
    weights = np.zeros((count, blocks * BLOCK), np.float32)
    part = weights[:, :vocabulary]
    np.subtract(rows, best[:, None], out=part)
    part /= heat.astype(np.float32)[:, None]
    np.exp(part, out=part)
    if least.any():
        part[part < least[:, None]] = 0.0
    parts = weights.reshape(count, blocks, BLOCK)
    heap = parts.sum(axis=2).astype(np.float64).cumsum(axis=1)
    aim = chance * heap[:, -1]
    block = np.minimum((heap <= aim[:, None]).sum(axis=1), blocks - 1)
    every = np.arange(count)
    aim -= np.where(block > 0, heap[every, block - 1], 0.0)
    inner = parts[every, block].astype(np.float64).cumsum(axis=1)
    places = block * BLOCK + np.minimum((inner <= aim[:, None]).sum(axis=1), BLOCK - 1)
    for row in range(count):
        while weights[row, places[row]] == 0.0:  # sums were rounded
            places[row] -= 1
    return [int(place) for place in places]


def top(rows: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The most likely tokens of each row and their logits, most likely first, the lower id on ties: at least `count`.

    Rows that have fewer than others end with −inf.
    """
    import numpy as np

    vocabulary = rows.shape[1]
    each = next((each for each in (64, 16, 4) if vocabulary // each >= 4 * count), 0)
    if each:
        parts = vocabulary // each
        maxima = rows[:, : parts * each].reshape(len(rows), each, parts).max(axis=1)
        least = np.partition(maxima, parts - count, axis=1)[:, parts - count]
    else:
        least = np.full(len(rows), -np.inf, np.float32)
    where, ids = np.nonzero(rows >= least[:, None])
    values = rows[where, ids]
    order = np.lexsort((ids, -values, where))
    lengths = np.bincount(where, minlength=len(rows))
    column = np.arange(len(where)) - np.repeat(lengths.cumsum() - lengths, lengths)
    shape = (len(rows), int(lengths.max()))
    found, best = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
    found[where, column], best[where, column] = ids[order], values[order]
    return found, best


def told(logits: Sequence[NDArray[np.float32]], tokens: Sequence[int], count: int) -> list[tuple[float, Likely]]:
    """Of each row the log probability of its token and the `count` most likely ones, most likely first, the lower id on ties."""
    import numpy as np

    rows = np.stack(logits)
    wide = rows.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    values = [float(wide[row, token]) for row, token in enumerate(tokens)]
    if not count:
        return [(value, ()) for value in values]
    count = min(count, rows.shape[1])
    ids, _ = top(rows, count)
    best = np.take_along_axis(wide, ids[:, :count], axis=1)
    return [
        (value, tuple(zip(some.tolist(), them.tolist(), strict=True)))
        for value, some, them in zip(values, ids[:, :count], best, strict=True)
    ]
