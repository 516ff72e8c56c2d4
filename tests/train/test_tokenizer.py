"""The tokenizer: lossless, deterministic, blind to evaluation data, and the same in the runtime."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.core.example import Example, Message
from slmops.core.method import Context
from slmops.errors import DataError
from slmops.train import tokenizer as method
from slmops.train.encode import encode, load_tokenizer
from tests.train.conftest import examples, write_rows


def make(data: Path, out: Path, **params: int) -> Any:
    out.mkdir(parents=True, exist_ok=True)
    method.run(method.Params(**params), {"data": data}, out, Context(0, out, out))
    return load_tokenizer(out)


@pytest.fixture(scope="module")
def tok(tokenizer: Path) -> Any:
    return load_tokenizer(tokenizer)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_every_text_comes_back(tok: Any, text: str) -> None:
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert tok.decode(ids, clean_up_tokenization_spaces=False) == text or "<|" in text


def test_chat_form(tok: Any) -> None:
    messages = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant", "tool")]
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|><|user|>t<|end|><|assistant|>"
    assert [tok.convert_tokens_to_ids(t) for t in method.SPECIAL] == [0, 1, 2, 3, 4]
    assert (tok.pad_token, tok.eos_token) == ("<|pad|>", "<|end|>")


def test_training_sees_the_prompt_as_the_engine_does(tok: Any) -> None:
    from slmops.train.encode import Row

    example = examples(1)[0]
    data = encode([Row(example, "f", 1)], tok, 64)
    prompt = tok.apply_chat_template(example.prompt_messages(), add_generation_prompt=True)["input_ids"]
    assert data.ids[0][: data.answer_from[0]].tolist() == prompt
    assert tok.decode(data.ids[0][data.answer_from[0] :]) == f"{example.answer}<|end|>"


def test_answers_become_few_tokens(data: Path, tmp_path: Path) -> None:
    tok = make(data, tmp_path / "t", vocabulary=340, answer_weight=8)
    for label in ("card_arrival", "lost_password", "opening_hours"):
        assert len(tok(label)["input_ids"]) <= 3


def test_evaluation_text_is_not_read(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "data"
    for name in ("teacher", "gold", "pool"):
        write_rows(other / f"{name}.jsonl", [Example((Message("user", "a b c"),), "x", "gold")] * 3)
    first = make(other, tmp_path / "a")
    for name in ("validation", "test", "oracle"):
        write_rows(other / f"{name}.jsonl", examples(50))
    make(other, tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert len(first) >= 261


def test_same_bytes_in_every_process(data: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slmops.core.method import Context; from slmops.train import tokenizer as t;"
        "o=Path(sys.argv[2]); o.mkdir(); t.run(t.Params(vocabulary=400), {'data': Path(sys.argv[1])}, o, Context(0, o, o))"
    )
    for i in range(3):
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONHASHSEED": str(i),
            "RAYON_NUM_THREADS": str(1 + i % 2),
        }
        subprocess.run([sys.executable, "-c", code, str(data), str(tmp_path / str(i))], check=True, env=env)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({(tmp_path / str(i) / name).read_bytes() for i in range(3)}) == 1


def test_bad_input_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too small"):
        make(data, tmp_path / "a", vocabulary=100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text"):
        make(tmp_path / "empty", tmp_path / "b")


@pytest.mark.slow
def test_runtime_gives_the_same_ids(data: Path, tmp_path: Path) -> None:
    """Thousands of odd texts through the ONNX Runtime GenAI tokenizer of a converted model."""
    og = pytest.importorskip("onnxruntime_genai", reason="needs the extra [convert]")
    from slmops.core.spec import Architecture
    from slmops.train import network

    rng = random.Random(0)
    pieces = [
        "it's", "I'LL", "don't", "DON'T", "card_arrival", "  ", "   ", "\n", "\n\n", "\r\n",
        "\t", " \n ", "123", "4,567.89", "ü", "e\u0301",
        "日本語", "👍🏽", "👨‍👩‍👧", "\u00a0", "\u2003", "ß", "Ⅻ", "²", "!?", "...",
        '{"a": [1, 2]}', "_x_", " world", "«q»", "\u200b", "Дом",
        "'S", "’s", "a'b", "عربى", "हिन्दी", "<b>", "<|", "\x7f", "\ufeff", "\u2028", "\x0b", "\x0c", "ſ",
    ]  # fmt: skip
    odd = ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 8))) for _ in range(3000)]
    folder = tmp_path / "data"
    write_rows(folder / "teacher.jsonl", [Example((Message("user", t),), "x", "gold") for t in odd[:2000]])
    tok = make(folder, tmp_path / "model", vocabulary=2000)
    architecture = Architecture(layers=1, hidden=64, heads=2, context=64)
    network.build(architecture, tok, 0).save_pretrained(tmp_path / "model")
    subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(tmp_path / "model"), "-o", str(tmp_path / "onnx"),
         "-p", "fp32", "-e", "cpu", "-c", str(tmp_path / "cache")],
        check=True, capture_output=True,
    )  # fmt: skip
    runtime = og.Tokenizer(og.Model(str(tmp_path / "onnx")))
    for text in odd:
        whole = f"<|user|>{text}<|end|><|assistant|>"
        assert runtime.encode(whole).tolist() == tok(whole, add_special_tokens=False)["input_ids"], repr(text)
