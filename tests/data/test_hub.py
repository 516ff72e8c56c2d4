"""Datasets come from a hub that speaks the real HTTP API; its refusals are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_stand_in import COMMIT, Hub, client

pytest.importorskip("datasets", reason="needs the extra `hub`")

FILES = {
    "README.md": b"---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: small/train.csv\n"
    b"  - split: test\n    path: small/test.csv\n- config_name: other\n  data_files: other.csv\n---\n",
    "small/train.csv": b"text,label\nwhere is my card,card\nmy pin is gone,pin\n",
    "small/test.csv": b"text,label\nsend a card,card\n",
    "other.csv": b"text,label\nhello,greet\n",
}
REFUSED = {"acme/none": (404, "RepoNotFound"), "acme/gated": (403, "GatedRepo")}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with Hub(FILES, "datasets", REFUSED).serve() as url:
        yield url


CODE = """
import json, sys
from slmops.core.spec import Data
from slmops.data.readers import read
from slmops.errors import SlmopsError
out = []
for path in sys.argv[1:]:
    try:
        reading = read(Data(path=path))
        out.append({s: [[r.example.text, r.example.answer] for r in rows] for s, rows in reading.splits.items()})
    except SlmopsError as error:
        out.append([type(error).__name__, str(error), error.hint])
print(json.dumps(out))
"""


def ask(endpoint: str, home: Path, *paths: str) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *paths],
        capture_output=True, text=True, timeout=120, check=False, env=client(endpoint, home),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


SMALL = {
    "train": [["where is my card", "card"], ["my pin is gone", "pin"]],
    "test": [["send a card", "card"]],
}


@pytest.mark.slow
def test_reading_from_a_hub(endpoint: str, tmp_path: Path) -> None:
    got = ask(
        endpoint, tmp_path,
        "hf:acme/desk:small", f"hf:acme/desk:other@{COMMIT}", "hf:acme/desk", "hf:acme/desk:small@v9", "hf:acme/none",
        "hf:acme/gated", "hf:acme desk",
    )  # fmt: skip
    assert got[0] == SMALL
    assert got[1] == {"train": [["hello", "greet"]]}
    for answer, says, hint in zip(
        got[2:],
        ["Config name is missing", "no such revision", "no such dataset", "gated", "not a dataset id"],
        [":CONFIG", "after the @", "HF_TOKEN", "ask for access", "hf:ORG/NAME"],
        strict=True,
    ):
        assert isinstance(answer, list)
        assert answer[0] == "DataError"
        assert says in answer[1]
        assert hint in answer[2]


@pytest.mark.slow
def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    (answer,) = ask("http://127.0.0.1:9", tmp_path, "hf:acme/desk")
    assert isinstance(answer, list)
    assert "cannot be reached" in answer[1]
    assert "HF_ENDPOINT" in answer[2]
