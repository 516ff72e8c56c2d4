"""How many parameters a model has, against what torch counts, and in how many bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slmops.errors import ModelError
from slmops.serve import gguf_facts
from slmops.serve.engines import kind_of
from slmops.serve.parameters import FILE_TYPES, Size, known, size, words
from tests.serve.conftest import Converted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "phi3", "gemma3"])
def test_every_form_has_the_parameters_that_torch_counts(converted: Converted, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    source = converted(kind, "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    forms = [converted(kind, precision) for precision in ("source", "fp32", "int8", "int4", "gguf-fp16", "gguf-q4_0")]
    bits = ("F32", "F32", "INT8", "INT4", "F16", "Q4_0")
    assert [size(folder, kind_of(folder, None)) for folder in forms] == [Size(numbers, one) for one in bits]


@pytest.mark.slow
def test_what_is_not_known_is_not_told(converted: Converted, tmp_path: Path) -> None:
    """A graph that rounds by an operator that is not known, a folder that says it is rounded, files that are none."""
    import onnx

    folder = tmp_path / "onnx"
    shutil.copytree(converted("qwen3", "int4"), folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == "MatMulNBits":
            node.op_type = "MatMulOfTomorrow"
    onnx.save(graph, folder / "model.onnx")
    assert size(folder, "onnx") == Size()
    (folder / "model.onnx").write_bytes(b"no graph")
    assert size(folder, "onnx") == Size()
    source = tmp_path / "source"
    shutil.copytree(converted("qwen3", "source"), source)
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    assert size(source, "torch") == Size()
    assert known(tmp_path, "torch", "of nothing") == Size()


@pytest.mark.slow
def test_a_gguf_file_that_ends_in_its_tensors_is_refused(converted: Converted, tmp_path: Path) -> None:
    whole = next(converted("qwen3", "gguf-q4_0").glob("*.gguf"))
    data = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: data.index(b"blk.1.") + 3])
    assert gguf_facts.read(cut)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        gguf_facts.counted(cut)
    assert size(cut, "llama_cpp") == Size()


def test_types_of_files_have_the_names_of_llama_cpp() -> None:
    from gguf import LlamaFileType

    named = {one.value: one.name.removeprefix("MOSTLY_").removeprefix("ALL_") for one in LlamaFileType}
    assert {**named, **FILE_TYPES} == named and len(FILE_TYPES) > 20


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (None, ""), (999, "999"), (90_816, "91K"), (2_300_000, "2.30M"), (494_032_768, "494.03M"), (7_000_000, "7M"),
        (1_543_714_304, "1.5B"), (8_000_000_000, "8B"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_ollama_writes_them(parameters: int | None, said: str) -> None:
    assert words(parameters) == said
