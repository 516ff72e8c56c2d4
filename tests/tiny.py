"""A whole project that runs in well under a minute: for tests that need the real chain."""

from __future__ import annotations

import json
import random
from pathlib import Path

SPEC = """\
name: tiny
task: {type: classification}
data: {path: rows.jsonl, teacher_share: 0.5, gold: {per_label: 5}}
teacher:
  model: {layers: 2, hidden: 64, heads: 2, ffn: 128, context: 64}
  tokenizer: {vocabulary: 400}
  train: {epochs: 8, batch_size: 32, learning_rate: 3e-3}
  max_new_tokens: 12
student:
  model: {layers: 1, hidden: 32, heads: 2, ffn: 64, context: 64}
train: {method: logits, epochs: 8, batch_size: 32, learning_rate: 5e-3}
convert: {precision: int4, fidelity_prompts: 8}
evaluate:
  gates: [{metric: accuracy, at_least: 0.05}]
  resamples: 200
  max_new_tokens: 12
  measure: {prompts: 8, rounds: 1}
"""

SUBJECTS = {
    "refund": ["money back", "a refund", "my payment returned", "reimbursement"],
    "delivery": ["my parcel", "the delivery", "my shipment", "the courier"],
    "password": ["my password", "a login reset", "my account access", "the sign-in"],
    "greeting": ["hello", "good morning", "hi there", "hey"],
}
OPENINGS = ["please help with", "i need", "question about", "can you look at", "what about", "again", "it is about"]
TAILS = ["", "today", "thanks", "asap", "for order {n}", "since week {n}", "number {n}"]


def rows(count: int = 360, seed: int = 0) -> list[dict[str, object]]:
    """Messages with one of four labels."""
    rng = random.Random(seed)
    made: dict[str, str] = {}
    while len(made) < count:
        label = rng.choice(sorted(SUBJECTS))
        words = [rng.choice(OPENINGS), rng.choice(SUBJECTS[label]), rng.choice(TAILS).format(n=rng.randrange(1000))]
        made[" ".join(word for word in words if word)] = label
        if len(made) % 50 == 0 and rng.random() < 0.01:
            break
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]}
        for text, label in made.items()
    ]


def write_project(folder: Path, spec: str = SPEC) -> Path:
    """Write slmops.yaml and rows.jsonl; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slmops.yaml").write_text(spec)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder
