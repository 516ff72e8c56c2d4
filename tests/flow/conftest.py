"""Small methods for flow tests: they count how often they run."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from slmops.core import method
from slmops.core.method import Context, Declaration, Facts
from slmops.flow import methods


class _Params(method.Params):
    text: str = ""
    fail: bool = False
    quiet: int = 0


def make(name: str, version: str = "1") -> types.SimpleNamespace:
    """A method that writes its text and the text of its inputs."""

    def run(params: _Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
        if params.fail:
            raise ZeroDivisionError("on purpose")
        parts = [params.text]
        for _name, path in sorted(inputs.items()):
            parts.append((path / "out.txt").read_text() if path.is_dir() else path.read_text())
        (out / "out.txt").write_text("|".join(parts))
        return {"length": len(parts)}

    declaration = Declaration(name=name, version=version, makes="dataset", neutral=("quiet",))
    return types.SimpleNamespace(DECLARATION=declaration, Params=_Params, run=run)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, types.SimpleNamespace]]:
    """Methods a, b, c, by name; a test may replace one."""
    table = {name: make(name) for name in ("a", "b", "c")}
    monkeypatch.setattr(methods, "get", lambda name: table[name])
    yield table
