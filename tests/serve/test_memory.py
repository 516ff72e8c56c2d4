"""What a model will take is known before it is loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from slmops.errors import ModelError
from slmops.serve import gguf_facts, graph_facts, memory
from slmops.serve.adapters import adapter_sizes
from slmops.serve.dialects.ollama_models import facts
from slmops.serve.engines.llama_cpp import EMBED
from slmops.serve.engines.onnx import OnnxRows
from slmops.serve.model import Ask, Model, Settings
from slmops.serve.sampling import Picking
from tests.serve.conftest import Converted

KINDS = [("qwen3", "fp32"), ("qwen3", "int4"), ("llama", "int8"), ("gemma3", "int4"), ("phi3", "fp32")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), KINDS)
def test_a_reservation_counts_what_the_graph_has(converted: Converted, kind: str, precision: str) -> None:
    import onnx

    folder = converted(kind, precision)
    graph = graph_facts.read(folder / "model.onnx")
    expected = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert [(one.name, one.shape) for one in graph.weights] == [(t.name, tuple(t.dims)) for t in expected.initializer]
    sizes = [onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in expected.initializer]
    assert [one.item for one in graph.weights] == sizes
    for found, wanted in ((graph.inputs, expected.input), (graph.outputs, expected.output)):
        shapes = [(v.name, tuple(d.dim_value for d in v.type.tensor_type.shape.dim)) for v in wanted]
        assert [(one.name, one.shape) for one in found] == shapes
    for rows, context in ((1, None), (3, 40)):
        engine = OnnxRows(folder, rows=rows, context=context)
        reserved = memory.reservation(Settings(folder, "m", rows=rows, context=context))
        assert reserved.cache == engine.cache_bytes
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), KINDS[:2])
def test_a_full_model_has_taken_no_more_than_its_reservation(converted: Converted, kind: str, precision: str) -> None:
    settings = Settings(converted(kind, precision), "m", rows=4, context=100)

    async def main() -> int:
        model = Model(settings)
        try:
            how = Picking(temperature=1.0, seed=1, repetition_penalty=1.1, logprobs=20, logit_bias={4: -100.0})
            asks = [Ask([7 + n] * (20 * n + 5), None, how) for n in range(4)]
            await asyncio.gather(*(_whole(model, ask) for ask in asks))
            return memory.peak(model.pid)
        finally:
            await model.stop()

    peak = asyncio.run(asyncio.wait_for(main(), 120))
    assert 0 < peak <= memory.reservation(settings).total


async def _whole(model: Model, ask: Ask) -> None:
    pieces = [piece async for piece in model.answer(ask)]
    assert pieces[-1].finish == "length"


@pytest.mark.slow
def test_a_gguf_file_tells_what_its_cache_takes(tmp_path: Path) -> None:
    from gguf import GGUFReader

    from slmops.engines.minimal import CONTEXT, VOCABULARY, write_minimal

    write_minimal(tmp_path, "llama_cpp")
    (file,) = tmp_path.glob("*.gguf")
    about = gguf_facts.read(file)
    for field in GGUFReader(file).fields.values():
        content = field.contents()
        if field.name.startswith("GGUF."):
            continue
        if isinstance(content, list):
            assert about[f"{field.name}#"] == len(content)
        else:
            assert about[field.name] == content
    one, two = (memory.reservation(Settings(file, "m", rows=rows)) for rows in (1, 2))
    assert two.cache == 2 * one.cache and one.cache == 256 * 2 * 32 * 2, (
        "keys and values of one layer, 32 wide, in 16 bits"
    )
    assert one == memory.reservation(Settings(tmp_path, "m", rows=1)) and CONTEXT <= 256 and VOCABULARY
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        memory.reservation(Settings(file, "m"))


def test_the_gguf_file_that_is_served_is_counted_with_all_its_parts(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra `llamacpp`")
    from slmops.engines.minimal import write_minimal

    def reserved(place: Path) -> memory.Reservation:
        return memory.reservation(Settings(place, "m", rows=2))

    write_minimal(tmp_path, "llama_cpp")
    alone, known = reserved(tmp_path), facts(tmp_path)
    for name in ("a-mmproj-f16.gguf", "mmproj-f16.gguf"):
        (tmp_path / name).write_bytes(b"of pictures")
    assert alone == reserved(tmp_path) == reserved(tmp_path / "model.gguf")
    assert facts(tmp_path / "model.gguf").size == known.size
    assert facts(tmp_path).settings == facts(tmp_path / "model.gguf").settings == known.settings != {}
    (tmp_path / "a-mmproj-f16.gguf").unlink()
    first, second = (tmp_path / f"x-0000{n}-of-00002.gguf" for n in (1, 2))
    (tmp_path / "model.gguf").rename(first)
    second.write_bytes(b"G" * 10**6)
    assert reserved(tmp_path) == reserved(first) == reserved(second)
    assert reserved(first).weights >= alone.weights + 10**6 and reserved(first).cache == alone.cache
    assert facts(second).size == facts(first).size == known.size + 10**6
    assert facts(second).settings == known.settings


def test_adapters_count_in_the_form_in_which_they_are_held(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra `llamacpp`")
    from slmops.engines.minimal import write_minimal

    write_minimal(tmp_path, "llama_cpp")
    model, file, folder = tmp_path / "model.gguf", tmp_path / "own.bin", tmp_path / "torch" / "adapter"
    given = tmp_path / "tone.gguf"
    folder.mkdir(parents=True)
    alone = memory.reservation(Settings(model, "m"))
    given.write_bytes(b"a" * 1000)
    file.write_bytes(b"b" * 500)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"c" * 70)
    assert memory.reservation(Settings(model, "m", adapters={"tone": given})).weights == alone.weights + 1000
    (tmp_path / "adapters.json").write_text('{"adapters": {"own": {"file": "own.bin", "digest": ""}}}')
    both = memory.reservation(Settings(tmp_path, "m", adapters={"tone": given}))
    assert both.weights == alone.weights + 1500
    assert adapter_sizes(tmp_path, "torch", {"a": folder.parent, "b": folder}) == [70, 70]
    graph, tone = tmp_path / "graph", tmp_path / "tone.onnx_adapter"
    graph.mkdir()
    write_minimal(graph, "onnx_genai")
    tone.write_bytes(b"d" * 1000)
    plain = memory.reservation(Settings(graph, "m", rows=2))
    worn = memory.reservation(Settings(graph, "m", rows=1, adapters={"tone": tone}))
    assert worn.cache == plain.cache and worn.weights == plain.weights + 1000
    with pytest.raises(ModelError, match="is no adapter"):
        memory.reservation(Settings(model, "m", adapters={"tone": file}))


def test_what_embeddings_take_counts_for_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra `llamacpp`")
    from slmops.engines.minimal import VOCABULARY, write_minimal

    write_minimal(tmp_path, "llama_cpp")
    one = memory.reservation(Settings(tmp_path, "m", rows=1))
    assert one.work >= 4 * VOCABULARY * (1 + memory.CHUNK) + one.cache + 4 * EMBED * VOCABULARY
    assert memory.LLAMA_EMBED == EMBED


@pytest.mark.slow
def test_a_hugging_face_folder_is_counted_in_float32(tmp_path: Path) -> None:
    from slmops.engines.minimal import write_minimal

    write_minimal(tmp_path, "torch")
    one, two = (memory.reservation(Settings(tmp_path, "m", rows=rows, context=32)) for rows in (1, 2))
    assert two.cache == 2 * one.cache > 0 and one.weights > 0


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model"):
        memory.reservation(Settings(tmp_path, "m"))
    (tmp_path / "genai_config.json").write_text('{"model": {}}')
    with pytest.raises(ModelError, match="cannot be used"):
        memory.reservation(Settings(tmp_path, "m"))
    for content in (b"x", b"\x3a\xff\x01", b"\x3a\x00", bytes(range(256))):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(ModelError):
            graph_facts.read(tmp_path / "model.onnx")
