"""What `benchmarks/serving.py` counts is what the server sent: the clients of the benchmark, on the server as it is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from serving_foundry import copy
from serving_load import load
from slmops.engines import minimal
from tests.serve.test_openai import folder
from tests.serve.test_server import served

__all__ = ["folder"]
LETTER = str(len(minimal.SPECIAL) + ord("a"))


@pytest.mark.slow
def test_clients_count_tokens_and_texts(folder: Path) -> None:
    with served(folder, "--tell", "0") as (client, _):
        body: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0.0, "logit_bias": {LETTER: 100}}
        streamed = body | {"stream_options": {"include_usage": True}}
        port, prompts = client.base_url.port or 0, ["one", "twenty", "three hundred"]
        for path in ("/v1/completions", "/v1/chat/completions"):
            _, whole = asyncio.run(load(port, prompts, 2, body, False, path))
            _, parts = asyncio.run(load(port, prompts, 2, streamed, True, path))
            assert [one.tokens for one in whole + parts] == [6] * 6
            assert sorted(one.read for one in whole) == sorted(one.read for one in parts) and whole[0].read >= 3
            assert not any(one.texts for one in whole)
            for one in parts:
                assert 1 <= len(one.texts) <= 6 and one.asked < one.texts[0] <= one.texts[-1] <= one.ended


def test_foundry_gets_a_copy_that_rules_out_the_end(tmp_path: Path) -> None:
    source, out = tmp_path / "onnx", tmp_path / "copy"
    source.mkdir()
    given = {
        "model": {"decoder": {"filename": "model.onnx"}, "eos_token_id": 4},
        "search": {"max_length": 64, "min_length": 0},
    }
    (source / "genai_config.json").write_text(json.dumps(given))
    (source / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    (source / "model.onnx").write_bytes(b"weights")
    copy(source, out, 2)
    found = json.loads((out / "genai_config.json").read_text())
    assert found["search"]["min_length"] > 64 and found["search"]["max_length"] == 64
    assert found["model"] == {
        "decoder": {"filename": "model.onnx", "session_options": {"intra_op_num_threads": 2}},
        "eos_token_id": 4,
    }
    assert "role" not in (out / "chat_template.jinja").read_text() and (out / "model.onnx").is_symlink()
    assert (out / "model.onnx").read_bytes() == b"weights" and json.loads(
        (source / "genai_config.json").read_text()
    ) == given
