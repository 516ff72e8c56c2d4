"""What of a machine goes into a step's key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops.errors import MissingExtraError
from slmops.evaluate import fidelity, measure, predict
from slmops.flow import methods
from slmops.train import sft


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    methods.gpus.cache_clear()
    yield
    methods.gpus.cache_clear()


def test_a_training_depends_on_the_gpu_that_it_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(methods, "GPUS", tmp_path)
    plain = methods.environment(sft.DECLARATION, 2)
    assert "gpu" not in plain
    for place, name in (("0000:01:00.0", "NVIDIA A2"), ("0000:02:00.0", "NVIDIA L4")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 31\n")
    methods.gpus.cache_clear()
    assert methods.environment(sft.DECLARATION, 2) == plain | {"gpu": "NVIDIA A2, NVIDIA L4"}
    methods.gpus.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert methods.environment(sft.DECLARATION, 2) == plain


def test_what_runs_models_depends_on_the_runtimes_that_it_runs_them_in(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = methods.environment(predict.DECLARATION, 1)
    assert methods.environment(predict.DECLARATION, 1, {"runtime": "onnx_genai"}) == plain
    assert set(methods.environment(predict.DECLARATION, 1, {"runtime": "llama_cpp"})) - set(plain) == {
        "llama-cpp-python",
        "gguf",
    }
    both = {"variants": {"a": "mlx", "b": "torch", "c": "openvino"}}
    assert {"mlx", "mlx-lm", "openvino"} <= set(methods.environment(measure.DECLARATION, 1, both))
    links = {"links": [{"name": "student", "runtime": "torch"}, {"name": "student-gguf-fp16", "runtime": "llama_cpp"}]}
    found = methods.environment(fidelity.DECLARATION, 1, links)
    assert "llama-cpp-python" in found and "mlx" not in found
    monkeypatch.setattr(methods, "version_of", lambda name: None if name == "openvino" else "1.0")
    methods.require(measure.DECLARATION, {"variants": {"b": "torch"}})
    with pytest.raises(MissingExtraError, match=r"openvino \(for evaluate.measure\)") as error:
        methods.require(measure.DECLARATION, both)
    assert "slmops[openvino]" in str(error.value.hint)
