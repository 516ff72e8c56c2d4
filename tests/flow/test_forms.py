"""Forms of a student beside the one that ships: what is planned for each, and what is refused before work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from slmops.catalog import fetch
from slmops.core import forms
from slmops.core.method import Context
from slmops.core.step import Step
from slmops.errors import ConversionError, SpecError
from slmops.flow import methods
from slmops.flow.planner import plan
from slmops.flow.project import load

SPEC = """\
name: demo
task: {type: classification}
data: {path: rows.csv, columns: {prompt: text, answer: label}}
student: {base: model}
"""


def steps(tmp_path: Path, *overrides: str) -> dict[str, Step]:
    (tmp_path / "slmops.yaml").write_text(SPEC)
    return {step.id: step for step in plan(load(tmp_path / "slmops.yaml", overrides).spec)}


def test_every_form_has_methods_that_take_its_parameters(tmp_path: Path) -> None:
    every = get_args(forms.Form)
    assert len(every) == len(set(every)) == 31
    every = tuple(form for form in every if not form.startswith("gguf-tq"))  # for ternary students: test_project
    found = steps(tmp_path, f"convert.also=[{','.join(every)}]")
    for form in every:
        format = forms.of(form)
        made, judged = found[f"student-{form}"], found[f"predict-student-{form}"]
        assert format is not None and (made.method, judged.method) == (format.method, "evaluate.predict")
        for step in (made, judged):
            method = methods.get(step.method)
            method.Params.model_validate(step.params, strict=False)
            assert set(step.inputs) <= {name.rstrip("?") for name in method.DECLARATION.takes}
        assert methods.get(format.method).DECLARATION.extra == format.extra
        assert judged.params["runtime"] == format.runtime
        assert (f"model.student-{form}" in found["measure"].inputs) == format.measured
        assert f"converted.student-{form}" in found["report"].inputs


def test_a_base_is_asked_about_each_format_once(tmp_path: Path) -> None:
    before = {"model": "model", "runtime": "onnx_genai"}
    assert steps(tmp_path)["student-base"].params == before
    assert steps(tmp_path, "convert.also=[gguf-fp16]")["student-base"].params == before | {"gguf": True}
    both = steps(tmp_path, "convert.also=[mlx-int4,mlx-fp16,safetensors-bf16]")["student-base"].params
    assert both == before | {"formats": ["mlx", "safetensors"]}


def test_a_base_that_a_runtime_cannot_take_is_refused_when_it_comes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
        "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 300, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
        "attention_bias": True,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(b"")
    (model / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    for names, says in ((("openvino", "mlx"), "mlx-lm does not compute"), (("openvino",), "")):
        out.mkdir(exist_ok=True)
        params = fetch.Params(model="model", runtime="onnx_genai", formats=names)
        if says:
            with pytest.raises(ConversionError, match=says):
                fetch.run(params, {"model": model}, out, Context(0, out, out))
        else:
            fetch.run(params, {"model": model}, out, Context(0, out, out))


@pytest.mark.parametrize(("overrides", "says"), [
    (("convert.block_size=16", "convert.also=[openvino-int4,mlx-int4]"), "convert.block_size: does not suit mlx-int4"),
    (("convert.block_size=16", "convert.also=[litert-int4]"), "convert.block_size: does not suit litert-int4"),
    (("convert.block_size=16", "convert.also=[executorch-int4]"), "convert.block_size: does not suit executorch-int4"),
    (("convert.also=[mlx-int3]",), "mlx-int4"),
    (("convert.also=[gguf-fp16,mlx-int4]", "adapters={topic: {data: {path: other.csv}}}", "train.tuning=lora"), "mlx-int4"),
])  # fmt: skip
def test_refused_before_work(overrides: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        steps(tmp_path, *overrides)
    assert caught.value.message.count(says) == 1
    assert "convert.block_size" not in " ".join(overrides) or "32, 64, 128" in str(caught.value)


def test_blocks_of_16_are_no_matter_to_other_forms(tmp_path: Path) -> None:
    found = steps(
        tmp_path, "convert.block_size=16", "convert.also=[openvino-int4,mlx-fp16,litert-int8,executorch-int8]"
    )
    assert found["student-openvino-int4"].params["block_size"] == 16
    assert "block_size" not in found["student-mlx-fp16"].params
    assert "block_size" not in found["student-litert-int8"].params
    assert "block_size" not in found["student-executorch-int8"].params


def test_executorch_takes_what_is_rounded_already(tmp_path: Path) -> None:
    """Its grid is not that of `compress.gptq`, but most codes stay; int8 and fp32 are of the weights before."""
    found = steps(tmp_path, "compress.quantization=gptq", "convert.also=[executorch-int4,executorch-int8]")
    assert found["student-executorch-int4"].inputs["model"] == "student-rounded"
    assert (
        found["student-executorch-int8"].inputs["model"] == found["student-fp32"].inputs["model"] != "student-rounded"
    )
