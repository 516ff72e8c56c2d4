"""Malformed bodies: an error in the dialect's shape each, and the server stays. The command for 10,000 is `benchmarks/serve_fuzz.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_fuzz import fuzz
from tests.serve.test_openai import folder
from tests.serve.test_server import served

__all__ = ["folder"]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dialect", ["openai", "ollama"])
def test_no_body_makes_the_server_fail(folder: Path, dialect: str, tmp_path: Path) -> None:
    with served(folder, "--definitions", str(tmp_path)) as (client, process):
        codes, faults = fuzz(client, "tiny", 300, seed=1, dialect=dialect)
        assert faults == [] and codes[200] and codes[400] > 100
        assert client.get("/readyz").status_code == 200 and process.poll() is None
