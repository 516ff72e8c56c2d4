from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.serve import drawing
from slmops.serve.sampling import Picker, Picking, pick

VOCABULARY = 3000


def logits(seed: int, size: int = VOCABULARY) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def reference(row: np.ndarray, how: Picking) -> np.ndarray:
    """Probabilities by the definition, with everything sorted, float64 (vocabulary,)."""
    scaled = row.astype(np.float64) / how.temperature
    chances = np.exp(scaled - scaled.max())
    chances[chances < how.min_p] = 0
    order = np.argsort(-chances, kind="stable")
    if how.top_k:
        chances[order[how.top_k :]] = 0
    chances /= chances.sum()
    heap = chances[order].cumsum()
    keep = int(np.searchsorted(heap, how.top_p)) + 1 if how.top_p < 1 else len(order)
    chances[order[keep:]] = 0
    return chances / chances.sum()


def draw(row: np.ndarray, how: Picking, chance: float) -> int:
    return drawing.draw(row[None], [how], [chance], drawing.first(how, len(row)))[0]


@pytest.mark.parametrize(
    "how",
    [
        Picking(temperature=1.0),
        Picking(temperature=0.7, top_k=40),
        Picking(temperature=1.3, top_p=0.8),
        Picking(temperature=5.0, top_p=0.99),  # more tokens than are sorted at first
        Picking(temperature=0.9, top_k=2000, top_p=0.95),
        Picking(temperature=1.0, min_p=0.1),
        Picking(temperature=1.0, min_p=0.001, top_p=0.9, top_k=500),
    ],
)
def test_tokens_come_with_their_probability(how: Picking) -> None:
    row = logits(1)
    wanted = reference(row, how)
    grid = (
        np.arange(4_000) + 0.5
    ) / 4_000  # evenly spread chances give each token its share, to within one step at each end
    drawn: list[int] = []
    for chances in grid.reshape(-1, 500):
        rows = np.broadcast_to(row, (len(chances), VOCABULARY))
        drawn += drawing.draw(rows, [how] * len(chances), chances.tolist(), drawing.first(how, VOCABULARY))
    found = np.bincount(drawn, minlength=VOCABULARY) / len(grid)
    assert np.abs(found - wanted).max() < 5.01e-4
    assert not found[wanted == 0].any()


def any_picking(random_: random.Random) -> Picking:
    return Picking(
        temperature=random_.choice((0.0, 0.0, 0.5, 1.0, 6.0)),
        top_k=random_.choice((0, 0, 1, 40, 64, 700)),
        top_p=random_.choice((1.0, 0.3, 0.9, 0.999)),
        min_p=random_.choice((0.0, 0.0, 0.05)),
        repetition_penalty=random_.choice((1.0, 1.0, 1.3)),
        frequency_penalty=random_.choice((0.0, 0.0, 0.4)),
        presence_penalty=random_.choice((0.0, 0.0, 0.2)),
        logit_bias=random_.choice(({}, {}, {3: 4.0, 9: -100.0})),
        seed=random_.randrange(1000),
        logprobs=random_.choice((None, 0, 5)),
    )


@pytest.mark.parametrize("seed", range(12))
def test_a_token_is_bit_for_bit_the_same_beside_others_as_alone(seed: int) -> None:
    random_ = random.Random(seed)
    size = random_.choice((200, 3000, 8200, 40_000))
    hows = [any_picking(random_) for _ in range(random_.choice((2, 7, 13)))]
    prompts = [[random_.randrange(size) for _ in range(random_.randrange(30))] for _ in hows]
    together = [Picker(how, prompt, 0) for how, prompt in zip(hows, prompts, strict=True)]
    alone = [Picker(how, prompt, 0) for how, prompt in zip(hows, prompts, strict=True)]
    for step in range(6):
        rows = [np.round(logits(100 * seed + 20 * step + n, size), random_.choice((1, 6))) for n in range(len(hows))]
        masks = [
            np.random.default_rng(n).random(size) < 0.5 if random_.random() < 0.3 else None for n in range(len(hows))
        ]
        some = [n for n in range(len(hows)) if random_.random() < 0.8] or [0]
        found = pick([together[n] for n in some], [rows[n] for n in some], [masks[n] for n in some])
        assert found == [alone[n].pick(rows[n], masks[n]) for n in some]


def test_a_mask_may_be_bits_and_end_before_the_vocabulary() -> None:
    row = logits(4, 100)
    row[[3, 50, 90]] = (9.0, 8.0, 10.0)
    bits = np.zeros(64, bool)
    bits[[50, 51]] = True
    assert Picker(Picking(), (), 0).pick(row, np.packbits(bits, bitorder="little").view(np.int32)).token == 50
    assert Picker(Picking(temperature=0.1, seed=1), (), 0).pick(row, bits).token == 50


@pytest.mark.parametrize("count", [1, 5, 64, 300, 2999])
def test_the_most_likely_tokens_are_those_of_a_whole_sort(count: int) -> None:
    rows = np.stack([np.round(logits(5), 1), logits(6), np.full(VOCABULARY, -2.0, np.float32)])  # with many equal ones
    ids, values = drawing.top(rows, count)
    for row, some, value in zip(rows, ids, values, strict=True):
        order = np.argsort(-row, kind="stable")[:count]
        assert (some[:count] == order).all() and (value[:count] == row[order]).all()


def test_the_first_and_the_last_chance_give_a_token_that_may_come() -> None:
    row = logits(2)
    for how in (Picking(temperature=0.01), Picking(temperature=1.0, min_p=0.5), Picking(temperature=0.5, top_k=1)):
        allowed = set(np.flatnonzero(reference(row, how) > 0))
        assert {draw(row, how, 0.0), draw(row, how, float(np.nextafter(1.0, 0.0)))} <= allowed


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(
    hows=st.lists(
        st.builds(
            Picking,
            temperature=st.floats(0, allow_infinity=False) | st.sampled_from((5e-324, 1e-46, 1e-40, 1e-7, 1e300)),
            top_k=st.sampled_from((0, 1, 7, 5000)),
            top_p=st.floats(0, 1) | st.just(1.0),
            min_p=st.floats(0, 1) | st.just(0.0),
            repetition_penalty=st.floats(0, exclude_min=True, allow_infinity=False) | st.sampled_from((1.0, 1e-300)),
            frequency_penalty=FINITE | st.just(0.0),
            presence_penalty=FINITE | st.just(0.0),
            logit_bias=st.dictionaries(st.integers(0, 299), FINITE, max_size=3),
            seed=st.integers(0, 9),
        ),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 9),
    scale=st.sampled_from((0.0, 1.0, 1e30)),
    masked=st.booleans(),
)
def test_a_token_is_of_the_vocabulary_and_may_come_whatever_is_asked(
    hows: list[Picking], seed: int, scale: float, masked: bool
) -> None:
    rows = [logits(seed + n, 300) * np.float32(scale) for n in range(len(hows))]
    pickers = [Picker(how, range(300), 0) for how in hows]
    mask = np.arange(300) % 7 == 3
    for _ in range(3):
        for picked in pick(pickers, rows, [mask if masked else None] * len(rows)):
            assert 0 <= picked.token < 300 and (not masked or mask[picked.token])


def test_a_temperature_next_to_nothing_is_greedy_and_odd_logits_give_a_token() -> None:
    row = logits(2)
    for cold in (5e-324, 1e-46, 9e-7):
        assert Picker(Picking(temperature=cold, seed=1), (), 0).pick(row).token == row.argmax()
    for how in (
        Picking(temperature=1.0, seed=1),
        Picking(temperature=1.0, seed=1, top_k=9),
        Picking(temperature=1.0, top_p=0.5),
    ):
        alone = Picker(how, (), 0).pick(row).token
        for odd in (np.nan, np.inf):
            broken = row.copy()
            broken[77] = odd
            first, second = Picker(how, (), 0), Picker(how, (), 0)
            assert [one.token for one in pick([first, second], [broken, row])] == [77, alone]


def test_penalties_and_biases_are_those_of_the_api() -> None:
    row = np.zeros(20, np.float32)
    row[[3, 4, 5]] = (2.0, 1.9, -1.0)
    picker = Picker(Picking(frequency_penalty=0.3, presence_penalty=0.1, logprobs=0), (), 0)
    # 2.0; then 3 has 1.6 and 4 has 1.9; then 3 has 1.6 and 4 has 1.5; then 3 has 1.3
    assert [picker.pick(row).token for _ in range(4)] == [3, 4, 3, 4]
    repeated = Picker(Picking(repetition_penalty=2.0), (3, 5), 0)  # 3 has 1.0, 5 has −2
    assert repeated.pick(row).token == 4 and repeated.pick(row).token == 3
    assert Picker(Picking(logit_bias={9: 5.0, 3: -100.0}), (), 0).pick(row).token == 9
    allowed = np.zeros(20, bool)
    allowed[[5, 7]] = True
    assert Picker(Picking(), (), 0).pick(row, allowed).token == 7
    assert row[3] == 2.0 and row[9] == 0.0


def test_log_probabilities_are_those_of_the_model() -> None:
    row = logits(3, 50)
    picked = Picker(Picking(temperature=0.1, top_k=1, logit_bias={7: 100.0}, logprobs=3), (), 0).pick(row)
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    assert picked.token == 7 and picked.logprob == pytest.approx(exact[7], abs=1e-9)
    assert [id for id, _ in picked.likely] == list(np.argsort(-row)[:3])
    assert [value for _, value in picked.likely] == pytest.approx(sorted(exact)[::-1][:3], abs=1e-9)


def test_a_seed_repeats_an_answer_and_no_seed_does_not() -> None:
    rows = [logits(seed) for seed in range(8)]

    def answer(how: Picking, chance: int) -> list[int]:
        picker = Picker(how, (), chance)
        return [picker.pick(row).token for row in rows]

    seeded = Picking(temperature=1.0, seed=5)
    assert answer(seeded, 1) == answer(seeded, 2) != answer(Picking(temperature=1.0, seed=6), 1)
    assert answer(Picking(temperature=1.0), 1) != answer(Picking(temperature=1.0), 2)
