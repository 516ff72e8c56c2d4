"""A tiny desk of made-up messages, prepared folders and a tokenizer: shared by the tests of this room."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from slmops.core.example import Example, Message
from slmops.core.method import Context
from slmops.core.spec import Architecture, Training

LABELS = {
    "card_arrival": ["my card has not come", "where is my new card", "when will the card arrive"],
    "lost_password": ["i forgot my password", "cannot log in, password gone", "reset my pass word please"],
    "opening_hours": ["when do you open", "are you open on sunday", "opening times please"],
}
TINY = {
    "llama": Architecture(type="llama", layers=2, hidden=32, heads=4, kv_heads=2, context=64),
    "qwen3": Architecture(type="qwen3", layers=2, hidden=32, heads=4, context=64),
}
FAST = Training(epochs=6, batch_size=16, learning_rate=1e-2, evaluations=4)


def examples(count: int, seed: int = 0, origin: str = "gold") -> list[Example]:
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = rng.choice(sorted(LABELS))
        text = f"{rng.choice(['hi', 'hello', 'please', 'hey'])} {rng.choice(LABELS[label])} {'thanks ' * rng.randint(0, 4)}{i}"
        rows.append(Example((Message("user", text),), label, origin))  # type: ignore[arg-type]
    return rows


def write_rows(path: Path, rows: list[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in rows), "utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "teacher.jsonl", examples(120))
    write_rows(folder / "gold.jsonl", examples(20, 1))
    write_rows(folder / "pool.jsonl", [e.unanswered() for e in examples(40, 2)])
    write_rows(folder / "validation.jsonl", examples(24, 3))
    write_rows(folder / "test.jsonl", examples(24, 4))
    return folder


@pytest.fixture(scope="session")
def tokenizer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from slmops.train import tokenizer as method

    out = tmp_path_factory.mktemp("tokenizer")
    method.run(method.Params(vocabulary=340), {"data": data}, out, Context(0, out / "s", out / "s"))
    return out


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    (tmp_path / "scratch").mkdir()
    return Context(seed=3, scratch=tmp_path / "scratch", shared=tmp_path)
