"""Hops from one form of a model to the next: what an honest chain keeps, and that the hop that broke it is the one named."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slmops.compress import gptq, vocabulary
from slmops.convert import gguf, mlx, onnx_genai, openvino
from slmops.core.fidelity import Link
from slmops.core.method import Context
from slmops.core.report import Hop
from slmops.evaluate import fidelity
from tests.train import bases
from tests.train.conftest import data as data
from tests.train.conftest import tokenizer as tokenizer

Chain = dict[str, Path]
FILES = ("data/gold.jsonl", "data/pool.jsonl", "data/validation.jsonl")
LINKS = (
    Link(name="student-adapter", adapter=True),
    Link(name="student", parent="student-adapter", expects="exact"),
    Link(name="student-trimmed", parent="student", expects="exact"),
    Link(name="student-rounded", parent="student-trimmed", expects="rounded", near=True),
    Link(name="student-int4", parent="student-rounded", expects="rounded", runtime="onnx_genai"),
    Link(name="student-fp32", parent="student-trimmed", expects="exact", runtime="onnx_genai"),
    Link(name="student-gguf-fp32", parent="student-trimmed", expects="exact", runtime="llama_cpp"),
    Link(name="student-gguf-fp16", parent="student-trimmed", expects="exact", runtime="llama_cpp"),
    Link(name="student-gguf-q8_0", parent="student-trimmed", expects="rounded", runtime="llama_cpp"),
    Link(name="student-mlx-fp32", parent="student-trimmed", expects="exact", runtime="mlx"),
    Link(name="student-mlx-fp16", parent="student-trimmed", expects="exact", runtime="mlx"),
    Link(name="student-openvino-fp32", parent="student-trimmed", expects="exact", runtime="openvino"),
)


def made(root: Path, method: Any, inputs: Mapping[str, Path], **params: Any) -> Path:
    root.mkdir(parents=True)
    method.run(method.Params(**params), inputs, root, Context(0, root, root))
    return root


def forms(kind: str, data: Path, tokenizer: Path, root: Path) -> Chain:
    """Every link of a chain with an adapter that is merged, trimmed, rounded and converted."""
    base = bases.save(kind, tokenizer, root / "base")
    student = bases.adapter(base, root / "student")
    given = {"data": data}
    checked = {"fidelity_prompts": 4}
    trimmed = made(root / "trimmed", vocabulary, given | {"model": student}, files=FILES)
    rounded = made(root / "rounded", gptq, given | {"model": trimmed}, files=FILES, examples=64)
    return {
        "base": base, "student-adapter": student, "student": student, "student-trimmed": trimmed, "student-rounded": rounded,
        "student-int4": made(root / "int4", onnx_genai, given | {"model": rounded}, rounding="plain", **checked),
        "student-fp32": made(root / "fp32", onnx_genai, given | {"model": trimmed}, precision="fp32", **checked),
        **{
            f"student-gguf-{p}": made(root / f"gguf-{p}", gguf, given | {"model": trimmed}, precision=p, **checked)
            for p in ("fp32", "fp16", "q8_0")
        },
        **{
            f"student-mlx-{p}": made(root / f"mlx-{p}", mlx, given | {"model": trimmed}, precision=p, **checked)
            for p in ("fp32", "fp16")
        },
        "student-openvino-fp32": made(root / "openvino", openvino, given | {"model": trimmed}, precision="fp32", **checked),
    }  # fmt: skip


def hops(found: Chain, data: Path, out: Path, links: Sequence[Link] = LINKS) -> dict[str, Hop]:
    inputs = {f"model.{link.name}": found[link.name] for link in links} | {"data": data}
    inputs |= {f"base.{link.name}": found["base"] for link in links if link.adapter}
    made(out, fidelity, inputs, links=tuple(links), prompts=16)
    rows = json.loads((out / "fidelity.json").read_text())["hops"]
    return {row["name"]: Hop.model_validate(row, strict=False) for row in rows}


@pytest.fixture(scope="module")
def whole(data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Chain]:
    """The forms of an architecture, made once."""
    return functools.cache(lambda kind: forms(kind, data, tokenizer, tmp_path_factory.mktemp(kind)))


def copied(found: Chain, names: Sequence[str], root: Path) -> Chain:
    """The chain with copies of some of its folders, to be changed."""
    return found | {name: Path(shutil.copytree(found[name], root / name)) for name in names}


def transpose(folder: Path, layer: str) -> None:
    weights = load_file(folder / "model.safetensors")
    matrix = weights[layer]
    assert matrix.shape[0] == matrix.shape[1] and not torch.equal(matrix, matrix.T)
    save_file(weights | {layer: matrix.T.contiguous()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_an_honest_chain_keeps_the_model_at_every_hop(
    kind: str, whole: Callable[[str], Chain], data: Path, tmp_path: Path
) -> None:
    found = hops(whole(kind), data, tmp_path / "out")
    assert list(found) == [link.name for link in LINKS[1:]]
    for hop in found.values():
        assert (
            hop.broke == "" and hop.template_equal == 1.0 and hop.compared == hop.prompts == 16 and hop.positions > 400
        )
        assert hop.token_agreement is not None and hop.kept is not None and hop.mean_kl is not None
        if hop.expects == "exact":
            assert hop.token_agreement >= 0.99 and hop.mean_kl < 1e-5
        else:
            assert hop.kept >= 0.85 and 1e-5 < hop.mean_kl < 0.1
        far = hop.furthest_weight
        assert far is None if hop.name != "student-rounded" else far is not None and 0.05 < far["distance"] < 0.3
    assert found["student-gguf-fp16"].mean_kl > found["student-gguf-fp32"].mean_kl


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [
    *(("llama", name) for name in ("student", "student-trimmed", "student-rounded")), ("gemma3", "student-rounded"),
    ("qwen3", "student-rounded"), ("phi3", "student"),
])  # fmt: skip
def test_a_transposed_weight_is_found_at_its_hop_and_not_after(
    kind: str, name: str, whole: Callable[[str], Chain], data: Path, tmp_path: Path
) -> None:
    """What is made from the broken form is as broken, but its own hop kept what it was given."""
    links = LINKS[: [link.name for link in LINKS].index(name) + 1]
    found = copied(whole(kind), [name], tmp_path)
    layer = "o_proj" if kind == "phi3" else "q_proj"
    transpose(found[name], f"model.layers.1.self_attn.{layer}.weight")
    given = {"data": data, "model": found[name]}
    found["after"] = made(tmp_path / "after", gguf, given, precision="fp32", fidelity_prompts=4)
    after = Link(name="after", parent=name, expects="exact", runtime="llama_cpp")
    met = hops(found, data, tmp_path / "out", (*links, after))
    assert {hop.name: hop.broke for hop in met.values() if hop.broke} == {name: "weights"}
    assert met[name].says.startswith(f"{links[-1].parent} → {name}: ") and (
        "less than" in met[name].says or "layers.1.self_attn.q_proj" in met[name].says
    )
    assert met["after"].token_agreement == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["student", "student-rounded", "student-fp32", "student-gguf-fp32", "student-mlx-fp32"]
)
def test_a_broken_chat_template_is_found_at_its_hop(
    name: str, whole: Callable[[str], Chain], data: Path, tmp_path: Path
) -> None:
    found = copied(whole("llama"), [name], tmp_path)
    broken = (found[name] / "chat_template.jinja").read_text() if name != "student-gguf-fp32" else ""
    if broken:
        (found[name] / "chat_template.jinja").write_text(broken.replace("<|assistant|>", "<|user|>"))
    else:
        gguf_with_template(found[name] / "model.gguf", "<|assistant|>", "<|user|>")
    met = hops(found, data, tmp_path / "out")
    wrong = {hop.name: hop.broke for hop in met.values() if hop.broke}
    assert wrong.pop(name) == "template"
    assert "'<|user|>'" in met[name].says and "'<|assistant|>'" in met[name].says
    # what was made from the form before it was broken has the right template, and so differs from it
    assert set(wrong) == {link.name for link in LINKS if link.parent == name}


def gguf_with_template(file: Path, old: str, new: str) -> None:
    """Put another chat template of the same length into a file."""
    data = file.read_bytes()
    at = data.index(b"tokenizer.chat_template")
    place = data.index(old.encode(), at)
    assert len(old) >= len(new)
    file.write_bytes(data[:place] + new.encode().ljust(len(old)) + data[place + len(old) :])
