"""Whether an engine computes what torch does: the same greedy tokens, and the same logits along them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slmops.core.engine import Sampling
from slmops.engines.torch_engine import TorchEngine

PROMPTS = ("where is my parcel?", "Größe 42, bitte — 3 × 7", "cancel  it\n\nnow!")
TOKENS = 64


def with_adapter(base: Path, adapter: Path | None) -> TorchEngine:
    """torch with a base, and PEFT's own layers over it."""
    from peft import PeftModel

    engine = TorchEngine(base)
    if adapter is not None:
        engine.model = PeftModel.from_pretrained(engine.model, str(adapter / "adapter")).eval()
    return engine


def check(engine: Any, reference: Any, tolerance: float) -> float:
    """Assert it for `TOKENS` tokens after each prompt; returns the largest difference of logits.

    Both go on after an end token, so that all answers are as long.
    """
    assert engine.end_ids == reference.end_ids
    engine.end_ids = reference.end_ids = frozenset()
    largest = 0.0
    for prompt in PROMPTS:
        ids = reference.encode([{"role": "user", "content": prompt}])
        assert engine.encode([{"role": "user", "content": prompt}]) == ids
        wanted = reference.generate([ids], Sampling(max_new_tokens=TOKENS))[0]
        assert len(wanted.tokens) == TOKENS
        whole = [*ids, *wanted.tokens]
        theirs, own = reference.logits(whole), engine.logits(whole)
        np.testing.assert_allclose(own, theirs, rtol=0, atol=tolerance)
        largest = max(largest, float(np.abs(own - theirs).max()))
        found = engine.generate([ids], Sampling(max_new_tokens=TOKENS))[0]
        assert found.tokens == wanted.tokens
        assert found.text == wanted.text
    return largest
