"""How a token is chosen while a student writes."""

from __future__ import annotations

import torch

from slmops.train.sample import choose

LOGITS = torch.tensor([[2.0, -torch.inf, 0.0, 1.0, -torch.inf], [0.0, 0.0, -torch.inf, 3.0, -1.0]])


def test_tokens_come_as_often_as_their_chances_say() -> None:
    count, temperature = 40_000, 1.3
    drawn = choose(LOGITS.repeat(count, 1), temperature, torch.Generator().manual_seed(0)).view(count, 2)
    chances = torch.softmax(LOGITS / temperature, -1)
    for row in range(2):
        often = torch.bincount(drawn[:, row], minlength=5) / count
        spread = (chances[row] * (1 - chances[row]) / count).sqrt()
        assert ((often - chances[row]).abs() <= 4.5 * spread).all()
        assert (often[chances[row] == 0] == 0).all()


def test_the_same_seed_draws_the_same_and_no_temperature_draws_nothing() -> None:
    first, second = (choose(LOGITS.repeat(50, 1), 1.0, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.equal(second)
    assert choose(LOGITS, 0.0, torch.Generator()).tolist() == [0, 3]
