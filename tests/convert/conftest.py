"""Tiny random models of real architectures, with a byte-level tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.engines.minimal import END, VOCABULARY, _write_tokenizer
from tests.train import bases

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    import torch
    from transformers import AutoModelForCausalLM

    def make(architecture: str = "Llama", **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        _write_tokenizer(folder)
        settings = {"intermediate_size": 96, "max_position_embeddings": 64, "eos_token_id": END} | changes
        config = bases.config(architecture, VOCABULARY, **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config).eval()
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model's folder: by architecture, then changed in its config.json; norms and biases are random too."""
    words = tmp_path_factory.mktemp("tokenizer")
    _write_tokenizer(words)

    def get(kind: str, **changes: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = bases.save(kind, words, tmp_path_factory.mktemp(kind))
        settings = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(settings))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def llama(make_model: MakeModel) -> Path:
    return make_model("Llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("validation", "test"):
        rows = []
        for i in range(12):
            user = {"role": "user", "content": f"{split} {i}: where is it?"}
            rows.append({"messages": [user, {"role": "assistant", "content": "here"}]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder
