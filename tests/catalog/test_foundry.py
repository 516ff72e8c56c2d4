"""Models of Azure AI Foundry: the SDK as it is, over a stand-in of the service."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.core", reason="needs the extra `azure`")

from slmops.catalog.foundry import Foundry as Origin
from slmops.catalog.foundry import arranged, said
from slmops.catalog.hub import Again, File
from slmops.catalog.pull import Plan, Wish, get, plan
from slmops.catalog.source import parse
from slmops.catalog.transfer import Pace
from slmops.errors import IntegrityError, ModelError, RefusedError, SlmopsError, UnreachableError
from tests.azure_stand_in import STORE, Carrier, Foundry, Somebody
from tests.catalog.models import LARGE, PARTS, contents
from tests.catalog.test_pull_faults import Faults
from tests.hub_stand_in import Fault

pytestmark = pytest.mark.slow

SEED = 20_263
PACE = Pace(jobs=3, segment=16 << 10, sleep=lambda seconds: None)
FILES = {
    ("data/tokenizer/" if name == "tokenizer.json" else "data/model/") + name: body for name, body in LARGE.items()
}
Stand = tuple[Foundry, str]


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    foundry = Foundry({**FILES, "MLmodel": b"flavors: {}"}, unsummed={f"data/model/{PARTS[0]}"})
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the SDK waits a second before it asks again
    with foundry.serve() as url:
        yield foundry, url


def ask(url: str, target: Path, text: str = "azure:Desk-1", timeout: float = 5) -> Plan:
    return plan(parse(text), Wish(run=False), target, Origin(Somebody(), Carrier(url), timeout), PACE)


def pull(url: str, target: Path, text: str = "azure:Desk-1") -> int:
    """Bytes that were fetched."""
    return int(get(ask(url, target, text), pace=PACE)["fetched"])


def test_a_model_of_foundry(stand: Stand, tmp_path: Path) -> None:
    foundry, url = stand
    planned = ask(url, tmp_path / "out")
    assert planned.listing.licence == "mit" and planned.listing.about == "version 2, Acme, chat-completion"
    assert planned.choice.form == "safetensors" and planned.choice.size == sum(map(len, LARGE.values()))
    assert ("MLmodel", "not part of the model") in planned.choice.left_out and not foundry.spans
    get(planned, pace=PACE)
    assert contents(tmp_path / "out") == LARGE, "the folders of weights and tokenizer are one"
    record = json.loads((tmp_path / "out" / ".slmops-pull.json").read_text())
    assert {entry["kind"] for entry in record["files"]} == {"sha256"}
    before = len(foundry.spans)
    assert pull(url, tmp_path / "out") == 0 and len(foundry.spans) == before
    (tmp_path / "out" / PARTS[0]).write_bytes(b"damaged")
    assert pull(url, tmp_path / "out") == len(LARGE[PARTS[0]]), (
        "only what is damaged comes again, also where no MD5 is stated"
    )
    assert contents(tmp_path / "out") == LARGE
    assert {name for name, own in foundry.opened if own} and not any(
        own for host, own in foundry.opened if host == STORE
    ), "the store is opened by its signature, and never sees the login"
    pull(url, tmp_path / "first", "azure:Desk-1:1")
    assert any(path.endswith("/datarefs/Desk-1/versions/1") for path in foundry.asked)


def test_a_new_version_of_the_files_is_fetched(stand: Stand, tmp_path: Path) -> None:
    foundry, url = stand
    pull(url, tmp_path / "out")
    foundry.files, foundry.etag = {**foundry.files, "data/model/LICENSE": b"new"}, "0x2"
    assert pull(url, tmp_path / "out") == 3 + len(LARGE[PARTS[0]]), (
        "what has an MD5 is known by it, what has none by its version"
    )
    planned = ask(url, tmp_path / "other")
    foundry.etag = "0x3"
    with pytest.raises(ModelError, match="changed on the way"):
        get(planned, pace=PACE)


@pytest.mark.parametrize("kind", ["cut", "status", "stall", "other", "signature"])
def test_faults_on_the_way(kind: str, stand: Stand, tmp_path: Path) -> None:
    foundry, url = stand
    rng, faults = random.Random(SEED), Faults()
    foundry.fault = faults
    for number in range(2 if kind == "stall" else 4):
        target = tmp_path / f"{kind}{number}"
        if kind == "signature":
            planned = ask(url, target)
            foundry.signature = "ended"
            get(planned, pace=PACE)
            assert contents(target) == LARGE
            continue
        for _ in range(1 if kind == "stall" else 4):
            name = rng.choice(["", *FILES] if kind == "status" else list(FILES))
            code = rng.choice([429, 500, 503, 408])
            faults.left.append((name, Fault(kind, code if kind == "status" else rng.randrange(3))))  # type: ignore[arg-type]
        for _ in range(8):
            try:
                get(ask(url, target, timeout=0.5 if kind == "stall" else 5), pace=PACE)
                break
            except SlmopsError as error:
                assert error.hint and "azure:Desk-1" in error.message and not target.exists()
        assert contents(target) == LARGE and not list(tmp_path.glob(f".{target.name}*"))
        foundry.freed.set()
    assert kind == "signature" or faults.fired[kind] >= 2


@pytest.mark.parametrize("name", [f"data/model/{PARTS[0]}", f"data/model/{PARTS[1]}"])
def test_wrong_bytes_are_never_taken(name: str, stand: Stand, tmp_path: Path) -> None:
    """By the MD5 of each piece, or by that of the whole file."""
    foundry, url = stand
    faults = Faults()
    foundry.fault = faults
    faults.left = [(name, Fault("wrong"))]
    pull(url, tmp_path / "out")
    assert contents(tmp_path / "out") == LARGE and faults.fired["wrong"] == 1
    faults.left = [(name, Fault("wrong"))] * 100
    with pytest.raises((IntegrityError, ModelError), match=r"not those that Azure states|wrong bytes came"):
        pull(url, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    faults.left.clear()
    pull(url, tmp_path / "never")
    assert contents(tmp_path / "never") == LARGE


def test_a_piece_without_its_checksum_is_not_taken(stand: Stand, tmp_path: Path) -> None:
    """Where the store states no MD5 of the whole, nothing else would find wrong bytes."""
    foundry, url = stand
    foundry.bare = {f"data/model/{PARTS[1]}"}
    pull(url, tmp_path / "out")
    foundry.bare = {f"data/model/{PARTS[0]}"}
    with pytest.raises(ModelError, match="a piece came without its MD5"):
        pull(url, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_what_was_written_is_not_fetched_again(stand: Stand, tmp_path: Path) -> None:
    foundry, url = stand
    total = sum(len(body) for body in {*LARGE.values()})
    seen = 0

    def moved(count: int, name: str) -> None:
        nonlocal seen
        seen += count
        if seen > 40_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(ask(url, tmp_path / "out"), moved, pace=PACE)
    planned = ask(url, tmp_path / "out")
    assert planned.here >= 40_000
    fetched = get(planned, pace=PACE)["fetched"]
    assert fetched + planned.here >= total and fetched <= total - planned.here + 4, (
        "LICENSE and NOTICE share their bytes"
    )
    spans = sorted((name, start) for name, start, _sent, _right in foundry.spans)
    assert len(spans) == len(set(spans)) and contents(tmp_path / "out") == LARGE


@pytest.mark.parametrize(
    ("change", "text", "says"),
    [
        ({}, "azure:Nothing", "no such model or version"), ({}, "azure:Desk-1:9", "no such model or version"),
        ({"files": {"../../x.safetensors": b"x"}}, "azure:Desk-1", r"`\.\.` in a name"),
        ({"files": {"model.pkl": b"x"}}, "azure:Desk-1", "pickles: model.pkl"),
        ({"files": {}}, "azure:Desk-1", "has no files of it"),
    ],
)  # fmt: skip
def test_what_is_refused(change: dict[str, Any], text: str, says: str, stand: Stand, tmp_path: Path) -> None:
    foundry, url = stand
    for key, value in change.items():
        setattr(foundry, key, value)
    with pytest.raises(ModelError, match=says) as caught:
        pull(url, tmp_path / "out", text)
    assert caught.value.hint and not (tmp_path / "out").exists()
    assert isinstance(caught.value, RefusedError) == ("in a name" in says)


def test_who_is_not_let_in(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foundry, url = stand
    for code, says in ((401, "does not accept the login"), (403, r"refuses access \(403\)")):
        foundry.fault = lambda name, start, code=code: Fault("status", code)  # type: ignore[misc]
        with pytest.raises(ModelError, match=says):
            pull(url, tmp_path / "out")

    class Nobody:
        def get_token(self, *scopes: str, **options: Any) -> Any:
            from azure.identity import CredentialUnavailableError

            raise CredentialUnavailableError("many\nlines")

    with pytest.raises(ModelError, match="nobody is logged in to Azure") as caught:
        plan(parse("azure:Desk-1"), Wish(), tmp_path / "out", Origin(Nobody(), Carrier(url)), PACE)
    assert "az login" in caught.value.hint
    with pytest.raises(UnreachableError, match="Azure cannot be reached"):
        plan(parse("azure:Desk-1"), Wish(), tmp_path / "out", Origin(Somebody(), Carrier("http://127.0.0.1:9")), PACE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE is set"):
        pull(url, tmp_path / "out")


def test_folders_of_mlflow() -> None:
    def names(*given: str) -> list[str]:
        return [file.name for file in arranged([File(name, 1, "sha256", "") for name in given])]

    assert names("m/model/a.safetensors", "m/model/config.json", "m/components/tokenizer/tokenizer.json") == [
        "a.safetensors", "config.json", "tokenizer.json",
    ]  # fmt: skip
    assert names("a.safetensors", "tokenizer/tokenizer.json", "tokenizer.json") == [
        "a.safetensors", "tokenizer/tokenizer.json", "tokenizer.json",
    ], "no file takes another's place"  # fmt: skip
    assert names("cpu/model.onnx", "cpu/genai_config.json") == ["cpu/model.onnx", "cpu/genai_config.json"]
    assert isinstance(said(OSError("reset"), "it"), Again)
