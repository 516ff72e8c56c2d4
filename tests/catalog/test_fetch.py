"""Models come from a folder or from a hub that speaks the real HTTP API: whole, safe to load, or with a clear refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slmops.catalog import fetch
from slmops.core.method import Context
from slmops.engines.minimal import write_minimal
from slmops.errors import ConversionError, ModelError
from tests.hub_stand_in import COMMIT, Hub, client, tensors

CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": {"a": PARTS[0], "b": PARTS[1]}}).encode()
SPLIT = {
    "config.json": CONFIG, "tokenizer.json": b"{}", "model.safetensors.index.json": INDEX,
    PARTS[0]: tensors(b"0", 3000, "a"), PARTS[1]: tensors(b"1", 3000, "b"),
}  # fmt: skip
EXTRA = {
    "README.md": b"# hi",
    "pytorch_model.bin": b"pickle",
    "modeling_mine.py": b"raise SystemExit",
    "onnx/a.json": b"{}",
}


def take(source: Path, out: Path, tmp_path: Path) -> dict[str, Any]:
    out.mkdir()
    context = Context(seed=0, scratch=tmp_path / "scratch", shared=tmp_path / "shared")
    return fetch.run(fetch.Params(model=source.name), {"model": source}, out, context)


CONVERTIBLE = {
    "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, "hidden_size": 32, "num_attention_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 192}, "hidden_size 192"),
        ({"intermediate_size": 700}, "intermediate_size 700"),
        ({"head_dim": 48}, "num_attention_heads × head_dim 192"),
    ],
)
def test_a_base_that_cannot_be_trained_ternary_is_refused_here(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    wide = CONVERTIBLE | {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "head_dim": 64}
    for name, config in (("good", wide), ("bad", wide | change)):
        source = fill(tmp_path / name, SPLIT | {"config.json": json.dumps(config).encode()})
        (tmp_path / f"out-{name}").mkdir()
        context = Context(seed=0, scratch=tmp_path / "scratch", shared=tmp_path / "shared")
        params = fetch.Params(model=name, runtime="onnx_genai", ternary=True)
        if name == "good":
            assert fetch.run(params, {"model": source}, tmp_path / f"out-{name}", context)["files"] > 2
        else:
            with pytest.raises(ConversionError, match=says):
                fetch.run(params, {"model": source}, tmp_path / f"out-{name}", context)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel", "GPT2ForCausalLM"]}, "architecture GPT2LMHeadModel cannot be converted"),
        ({"quantization_config": {"bits": 4}}, "quantised already"),
        ({"max_position_embeddings": None}, "no max_position_embeddings"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": 80}, "heads of size 40 do not run"),
        ({"head_dim": 24}, "heads of size 24 do not run"),
    ],
)
def test_what_the_runtime_cannot_take_is_refused_here(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    """Not after the training that follows."""
    for name, config in (("good", CONVERTIBLE), ("bad", CONVERTIBLE | change)):
        source = fill(tmp_path / name, SPLIT | {"config.json": json.dumps(config).encode()})
        (tmp_path / f"out-{name}").mkdir()
        context = Context(seed=0, scratch=tmp_path / "scratch", shared=tmp_path / "shared")
        params = fetch.Params(model=name, runtime="onnx_genai")
        if name == "good":
            fetch.run(params, {"model": source}, tmp_path / "out-good", context)
        else:
            with pytest.raises(ConversionError, match=says):
                fetch.run(params, {"model": source}, tmp_path / "out-bad", context)
            fetch.run(fetch.Params(model=name), {"model": source}, tmp_path / "out-bad", context)


PHI = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "max_position_embeddings": 64, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 99,
    "rms_norm_eps": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("prune", "gguf", "says"),
    [
        ({"layers": 2}, False, "2 blocks cannot be taken out of 2"),
        ({"ffn": 0.9}, False, "ffn 0.9 leaves none of 128"),
        ({"heads": 0.5}, False, ""),
        ({"heads": 0.5}, True, "2 heads of size 16 are not as wide as the model"),
        ({"layers": 1, "ffn": 0.5}, True, ""),
        ({"sparsity": "2:4"}, True, ""),
    ],
)
def test_what_cannot_be_pruned_is_refused_here(prune: dict[str, Any], gguf: bool, says: str, tmp_path: Path) -> None:
    """Neither what the shape does not give, nor what a runtime cannot take afterwards."""
    source = fill(tmp_path / "phi", SPLIT | {"config.json": json.dumps(PHI).encode()})
    (tmp_path / "out").mkdir()
    context = Context(seed=0, scratch=tmp_path / "scratch", shared=tmp_path / "shared")
    params = fetch.Params.model_validate({"model": "phi", "runtime": "onnx_genai", "gguf": gguf, "prune": prune})
    if not says:
        fetch.run(params, {"model": source}, tmp_path / "out", context)
        return
    with pytest.raises(ConversionError, match=says) as caught:
        fetch.run(params, {"model": source}, tmp_path / "out", context)
    assert caught.value.hint


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------------------- folders


def test_weights_and_tokenizer_are_taken_and_no_code_or_pickle(tmp_path: Path) -> None:
    source = fill(tmp_path / "mine", SPLIT | EXTRA | {"LICENSE": b"free"})
    facts = take(source, tmp_path / "out", tmp_path)
    assert names(tmp_path / "out") == {*SPLIT, "LICENSE"}
    assert facts["files"] == 6 and facts["bytes"] == sum(map(len, SPLIT.values())) + 4


def test_links_become_files(tmp_path: Path) -> None:
    """A folder of a hub cache holds links; what is stored must not depend on them."""
    blobs = fill(tmp_path / "blobs", SPLIT)
    source = tmp_path / "mine"
    source.mkdir()
    for name in SPLIT:
        (source / name).symlink_to(blobs / name)
    take(source, tmp_path / "out", tmp_path)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert names(tmp_path / "out") == set(SPLIT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({PARTS[1]: None}, f"{PARTS[1]} of its weights missing"),
        ({"model.safetensors.index.json": b"[]"}, "does not name its files"),
        ({PARTS[0]: None, PARTS[1]: None, "pytorch_model.bin": b"x"}, "no safetensors weights"),
        ({"tokenizer.json": None}, "no tokenizer.json"),
        ({"config.json": b'{"architectures": null}'}, "does not write text"),
    ],
    ids=["part", "index", "pickle", "tokenizer", "architecture"],
)
def test_incomplete_folders(change: dict[str, bytes | None], says: str, tmp_path: Path) -> None:
    files = {name: content for name, content in (SPLIT | change).items() if content is not None}
    with pytest.raises(ModelError, match=says) as caught:
        take(fill(tmp_path / "mine", files), tmp_path / "out", tmp_path)
    assert caught.value.hint and "mine" in caught.value.message
    assert not names(tmp_path / "out")


def test_what_is_taken_loads(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write_minimal(tmp_path / "mine", "torch")
    take(tmp_path / "mine", tmp_path / "out", tmp_path)
    assert names(tmp_path / "out") == names(tmp_path / "mine")


# -------------------------------------------------------------------------------------------------------------- the hub

CODE = """
import json, sys
from pathlib import Path
from slmops.catalog.fetch import Params, run
from slmops.core.method import Context
from slmops.errors import SlmopsError
base = Path(sys.argv[1])
out = []
for number, model in enumerate(sys.argv[2:]):
    folder = base / f"out{number}"
    folder.mkdir()
    scratch = base / model.replace("/", "-").partition("@")[0]
    try:
        run(Params(model=model), {}, folder, Context(seed=0, scratch=scratch, shared=base))
        out.append(sorted(path.name for path in folder.iterdir()))
    except SlmopsError as error:
        out.append([type(error).__name__, str(error), error.hint, sorted(path.name for path in folder.iterdir())])
print(json.dumps(out))
"""


def ask(endpoint: str, base: Path, *models: str, **environment: str) -> list[Any]:
    """What `run` gives for each of some models, asked one after the other by one process."""
    base.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(base), *models], capture_output=True, text=True, timeout=300, check=False,
        env=client(endpoint, base / "home") | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


REFUSED = {"acme/none": (401, "RepoNotFound"), "acme/gated": (401, "GatedRepo"), "acme/lost": (404, "RepoNotFound")}


@pytest.mark.slow
def test_fetching_from_a_hub(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")
    hub = Hub(SPLIT | EXTRA, "models", REFUSED)
    with hub.serve() as url:
        first, pinned, *refused = ask(
            url, tmp_path / "base", "hf:acme/desk", f"hf:acme/desk@{COMMIT}", "hf:acme/desk@v9", "hf:acme/none",
            "hf:acme/lost", "hf:acme/gated", "hf:acme/desk/more",
        )  # fmt: skip
    assert first == pinned == sorted(SPLIT)
    assert (tmp_path / "base" / "out0" / PARTS[0]).read_bytes() == SPLIT[PARTS[0]]
    assert not set(hub.served) - set(SPLIT), "what is not taken is not downloaded either"
    expected = [
        ("no such revision", "after the @"), ("no such model", "HF_TOKEN"), ("no such model", "check the name"),
        ("gated", "ask for access"), ("not the name of a model", "hf:ORG/NAME"),
    ]  # fmt: skip
    for answer, (says, hint) in zip(refused, expected, strict=True):
        kind, message, given, left = answer
        assert kind == "ModelError" and left == []
        assert says in message and hint in given


@pytest.mark.slow
def test_a_repository_of_pickles_is_refused_before_the_download(tmp_path: Path) -> None:
    hub = Hub({"config.json": CONFIG, "tokenizer.json": b"{}", "pytorch_model.bin": b"x" * 10}, "models")
    with hub.serve() as url:
        ((_, message, hint, _),) = ask(url, tmp_path / "base", "hf:acme/desk")
    assert "no safetensors weights" in message and "a pickle can run code" in hint
    assert hub.served == []


@pytest.mark.slow
def test_a_download_that_is_cut_goes_on(tmp_path: Path) -> None:
    hub = Hub(SPLIT, "models", cut={PARTS[1]: 100})
    with hub.serve() as url:
        ((kind, message, hint, left),) = ask(url, tmp_path / "base", "hf:acme/desk")
        assert (kind, left) == ("ModelError", [])
        assert "download failed" in message or "cannot be reached" in message
        assert hint
        assert hub.served.count(PARTS[0]) == 1
        hub.cut.clear()
        for folder in (tmp_path / "base").glob("out*"):
            folder.rmdir()
        assert ask(url, tmp_path / "base", "hf:acme/desk") == [sorted(SPLIT)]
    assert hub.served.count(PARTS[0]) == 1, "what was finished is not downloaded again"
    assert (tmp_path / "base" / "out0" / PARTS[1]).read_bytes() == SPLIT[PARTS[1]]


@pytest.mark.slow
@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["nobody_listens", "offline"])
def test_half_a_download_does_not_pass_for_a_model_when_the_hub_is_gone(
    offline: dict[str, str], tmp_path: Path
) -> None:
    half = {name: content for name, content in SPLIT.items() if name != PARTS[1]}
    fill(tmp_path / "base" / "hf:acme-desk" / "hub", half)
    ((kind, message, hint, left),) = ask("http://127.0.0.1:9", tmp_path / "base", "hf:acme/desk", **offline)
    assert (kind, left) == ("UnreachableError", [])
    assert "cannot be reached" in message and "give a local folder" in hint
