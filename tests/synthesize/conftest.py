from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from slmops.core.example import Example, Message
from slmops.core.method import Context
from slmops.core.spec import Endpoint


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Context(seed=7, scratch=scratch, shared=tmp_path / "shared")


@pytest.fixture
def endpoint() -> Callable[..., Endpoint]:
    def make(**values: Any) -> Endpoint:
        return Endpoint.model_validate(
            {"url": "http://desk.test/v1", "model": "big", "retries": 3, "timeout_s": 5.0} | values
        )

    return make


@pytest.fixture
def example() -> Callable[..., Example]:
    def make(text: str, answer: str | None = None, origin: str = "gold", system: str = "") -> Example:
        prompt = ((Message("system", system),) if system else ()) + (Message("user", text),)
        return Example(prompt, answer, origin if answer is not None else "none")  # type: ignore[arg-type]

    return make


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Path]:
    """A folder as data.prepare leaves it."""

    def make(info: Mapping[str, Any] | None = None, **files: Iterable[Example]) -> Path:
        folder = tmp_path / f"data{len(list(tmp_path.glob('data*')))}"
        folder.mkdir()
        for name in ("teacher", "gold", "pool", "oracle", "validation", "test"):
            rows = [json.dumps(e.to_json()) + "\n" for e in files.get(name, ())]
            (folder / f"{name}.jsonl").write_text("".join(rows))
        (folder / "info.json").write_text(json.dumps(info or {"labels": []}))
        return folder

    return make


@pytest.fixture
def out(tmp_path: Path) -> Callable[[], Path]:
    """A fresh empty output folder per call."""

    def make() -> Path:
        folder = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        folder.mkdir()
        return folder

    return make
