"""`slmops needs` as users meet it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Slmops
from tests.cli.test_commands import HEAVY, WEB, loaded_by


def test_every_runtime_and_form_without_heavy_imports() -> None:
    modules, text = loaded_by("needs", "qwen3:0.6b", "--json")
    found = json.loads(text)
    assert found["model"] == "qwen3-0.6b" and found["context"] == 4096
    assert {row["runtime"] for row in found["needs"]} == {"onnx_genai", "llama_cpp", "openvino", "torch"}
    for row in found["needs"]:
        parts = row["weights_bytes"] + row["cache_bytes"] + row["activations_bytes"] + row["program_bytes"]
        assert row["total_bytes"] == parts > row["weights_bytes"]
    assert not modules & (HEAVY | WEB)


def test_one_form_of_one_runtime(slmops: Slmops) -> None:
    outcome = slmops(
        "needs", "qwen3-0.6b", "--runtime", "llama_cpp", "--quant", "q4_0", "--context", "8192", "--batch", "2"
    )
    assert len(outcome.out.splitlines()) == 2 and "2 × 8,192 tokens" in outcome.err
    assert max(len(line) for line in (outcome.out + outcome.err).splitlines()) <= 80


def test_trainings_stand_below_answers_or_alone(slmops: Slmops) -> None:
    both = slmops("needs", "smollm2-135m-instruct")
    assert "llama_cpp" in both.out and "qlora" in both.out and "8 × 512 tokens a step" in " ".join(both.err.split())
    assert max(len(line) for line in (both.out + both.err).splitlines()) <= 80
    alone = slmops("needs", "smollm2-135m-instruct", "--train", "lora", "dpo+lora", "--batch", "2", "--context", "128")
    assert [line.split()[0] for line in alone.out.splitlines()] == ["training", "lora", "dpo+lora"]
    words = (
        "needs",
        "smollm2-135m-instruct",
        "--train",
        "on_policy",
        "lora",
        "--teacher",
        "smollm2-360m-instruct",
        "--json",
    )
    found = json.loads(slmops(*words).out)
    assert "needs" not in found and [row["training"] for row in found["training"]] == ["on_policy", "lora"]
    first, second = found["training"]
    assert (first["teacher"], second["teacher"]) == ("smollm2-360m-instruct", None)
    assert first["context"] == 512 and first["batch"] == 8 and first["answer"] == 256
    for row in found["training"]:
        parts = ("weights_bytes", "optimizer_bytes", "working_bytes", "program_bytes")
        assert row["total_bytes"] == sum(row[part] for part in parts)
    assert first["weights_bytes"] - second["weights_bytes"] > 4 * 350e6


def test_a_training_that_cannot_be_foreseen_is_said_and_refused_where_it_is_asked_for(slmops: Slmops) -> None:
    outcome = slmops("needs", "granite-3.3-2b-instruct")
    assert outcome.code == 0 and "is not known: its architecture is granite" in " ".join(outcome.err.split())
    assert json.loads(slmops("needs", "granite-3.3-2b-instruct", "--json").out)["training"] is None
    slmops("needs", "granite-3.3-2b-instruct", "--train", "all").refused(1, "its architecture is granite")
    slmops("needs", "smollm2-135m-instruct", "--train", "lorra").refused(2, "did you mean lora?")
    slmops("needs", "smollm2-135m-instruct", "--train", "lora", "--quant", "q4_0").refused(2, "does not go with")
    slmops("needs", "smollm2-135m-instruct", "--train", "lora", "--answer", "512").refused(2, "leaves none")
    slmops("needs", "smollm2-135m-instruct", "--train", "lora", "--accumulate", "9").refused(2, "8 examples")
    slmops("needs", "smollm2-135m-instruct", "--train", "lora", "--teacher", "qwen3-0.6b").refused(2, "asks a teacher")
    slmops("needs", "smollm2-135m-instruct", "--runtime", "torch", "--checkpointing").refused(
        2, "--checkpointing does not"
    )


def test_a_folder_is_read_where_it_lies(slmops: Slmops, tmp_path: Path) -> None:
    own = {"model_type": "qwen3", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(own))
    found = json.loads(slmops("needs", str(tmp_path), "--json").out)
    assert found["context"] == 256 and found["parameters"] < 200_000
    slmops("needs", str(tmp_path), "--context", "257").refused(2, "holds 256 tokens, 257 are asked for")
    (tmp_path / "config.json").write_text(json.dumps(own | {"model_type": "rwkv"}))
    slmops("needs", str(tmp_path)).refused(1, "'rwkv' is not known")
    (tmp_path / "config.json").write_text("{")
    slmops("needs", str(tmp_path)).refused(1, "no config.json that can be read")
    for odd in ({"model_type": "qwen3", "hidden_size": 64}, {"model_type": "qwen3", "hidden_size": "x"}):
        (tmp_path / "config.json").write_text(json.dumps(odd))
        slmops("needs", str(tmp_path)).refused(1, "does not say how large it is")


def test_what_is_not_there_is_refused(slmops: Slmops) -> None:
    slmops("needs", "qwen9").refused(1, "no model qwen9")
    slmops("needs", "qwen3-0.6b", "--quant", "q3").refused(2, "there is no form q3")
    slmops("needs", "qwen3-0.6b", "--quant", "q4_0", "--runtime", "torch").refused(2, "no form q4_0 in torch")
