"""Small random models as folders of each engine, with a tokenizer of single bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from slmops.engines.minimal import _write_tokenizer
from tests.train import bases

Converted = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A folder by architecture and precision: `source` for Hugging Face, `gguf-…` for GGUF, else for ONNX Runtime GenAI. Weights are
    large, so that answers vary."""
    words = tmp_path_factory.mktemp("tokenizer")
    _write_tokenizer(words)

    @cache
    def model(kind: str) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        folder = bases.save(kind, words, tmp_path_factory.mktemp(kind))
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for parameter in loaded.parameters():
                if parameter.dim() == 2:
                    torch.nn.init.normal_(parameter, std=0.3)
        loaded.save_pretrained(folder)
        return folder

    @cache
    def get(kind: str, precision: str) -> Path:
        from slmops.convert import gguf, onnx_genai
        from slmops.core.method import Context

        source = model(kind)
        if precision == "source":
            return source
        if precision.startswith("gguf-"):
            out = tmp_path_factory.mktemp(f"{kind}-{precision}")
            params = gguf.Params.model_validate({"precision": precision.removeprefix("gguf-")})
            gguf.run(params, {"model": source}, out, Context(0, out, out))
            return out
        graph, out = tmp_path_factory.mktemp("graph"), tmp_path_factory.mktemp(f"{kind}-{precision}")
        onnx_genai.build(source, graph)
        onnx_genai.write(source, graph, out, onnx_genai.Params.model_validate({"precision": precision}))
        return out

    return get
