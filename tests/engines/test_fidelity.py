"""The comparison of a converted model with its original, where the two differ in what they can hold."""

from __future__ import annotations

from pathlib import Path

from slmops.core.example import Example, Message
from slmops.engines import fidelity, open_engine


def test_prompts_that_only_the_original_has_room_for_are_left_out(minimal_torch: Path) -> None:
    reference, converted = open_engine(minimal_torch), open_engine(minimal_torch)
    converted.context_length = 50
    texts = ("hello", "x" * 30, "y" * 57)  # the last fits the original alone, the second only without its answer
    examples = [Example((Message("user", text),), "a", "gold") for text in texts]
    found = fidelity.compare(reference, converted, examples)
    assert found["skipped"] == 2 and found["prompts"] == 3
    assert found["token_agreement"] == 1.0 and found["positions"] > 0
