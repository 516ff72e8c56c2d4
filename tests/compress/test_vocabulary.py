"""Trimmed vocabularies: the laws of the tokenizer, the model's numbers, what is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from slmops.compress import bpe, vocabulary
from slmops.core.example import Example, Message
from slmops.core.method import Context, SilentProgress
from slmops.engines.tokenizer import load_tokenizer, rendered
from slmops.errors import CompressionError, DataError
from slmops.train import network
from slmops.train import tokenizer as byte_level
from tests.train import bases
from tests.train.conftest import examples, write_rows

CORPUS = [e.text for e in examples(300)] + ["überraschung, naïve café", "数据 données", "a-b_c: 12.50 €!"] * 3
FILES = ("data/gold.jsonl", "data/pool.jsonl")
MARKS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def of_bytes(count: int = 420) -> Tokenizer:
    """As slmops trains them."""
    return byte_level.build(CORPUS, count)


def of_characters() -> Tokenizer:
    """As Gemma's and Llama 2's: characters, with bytes for the rare ones, words joined by ▁."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    marks = [*MARKS, "<unk>", *(f"<0x{byte:02X}>" if byte != 9 else "\t" for byte in range(256))]  # as Gemma has it
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=marks, show_progress=False))
    written = json.loads(trained.to_str())
    written["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    written["added_tokens"] = [m for m in written["added_tokens"] if not m["content"].startswith(("<0x", "\t"))]
    out = Tokenizer.from_str(json.dumps(written))
    out.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return out


def with_words_whole() -> Tokenizer:
    """As Llama 3's: a word that is in the vocabulary is taken without its merges."""
    written = json.loads(of_bytes().to_str())
    written["model"]["ignore_merges"] = True
    made = {"".join(m) for m in written["model"]["merges"][60:]}
    lost = {token for token in made if len(token) > 3}
    written["model"]["merges"] = [m for m in written["model"]["merges"] if "".join(m) not in lost]
    return Tokenizer.from_str(json.dumps(written))


def with_marks_behind() -> Tokenizer:
    """As Qwen's: control marks, and tokens that are none, lie behind the vocabulary."""
    out = of_bytes()
    out.add_special_tokens([AddedToken("<|never|>", special=True)])
    out.add_tokens([AddedToken("<unused0>", special=False), AddedToken("<tool>", special=False)])
    return out


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": of_bytes, "characters": of_characters, "whole words": with_words_whole, "marks behind": with_marks_behind,
}  # fmt: skip
MADE = {name: make() for name, make in KINDS.items()}
WHOLE = MADE["bytes"].get_vocab_size()


def trim(tokenizer: Tokenizer, texts: list[str], at_least: int = 0) -> tuple[Tokenizer, list[int]]:
    written = json.loads(tokenizer.to_str())
    bpe.check(written)
    seen = {token for text in texts for token in tokenizer.encode(text).tokens}
    seen |= {mark["content"] for mark in written["added_tokens"]}
    kept = bpe.filled(written, bpe.needed(written, seen) | bpe.alphabet(written), at_least)
    out, order = bpe.trimmed(written, kept, {mark["id"] for mark in written["added_tokens"]})
    return Tokenizer.from_str(json.dumps(out)), order


@pytest.mark.parametrize("kind", list(KINDS))
@given(texts=st.lists(st.sampled_from(CORPUS), min_size=1, max_size=6), other=st.text(max_size=30) | st.just("a\tb\n"))
@settings(deadline=None, max_examples=40)
def test_known_texts_keep_their_tokens_and_others_their_words(kind: str, texts: list[str], other: str) -> None:
    whole = MADE[kind]
    small, order = trim(whole, texts)
    assert small.get_vocab_size() == len(order) <= whole.get_vocab_size()
    for text in texts:
        assert [order[i] for i in small.encode(text).ids] == whole.encode(text).ids
    for text in [other, *CORPUS]:
        assert small.decode(small.encode(text).ids) == whole.decode(whole.encode(text).ids)
    for new, old in enumerate(order):
        assert small.id_to_token(new) == whole.id_to_token(old)


def test_the_earliest_merges_fill_up_to_a_size() -> None:
    whole = of_bytes()
    few, _ = trim(whole, ["hi"])
    small, order = trim(whole, ["hi"], few.get_vocab_size() + 40)
    assert small.get_vocab_size() == few.get_vocab_size() + 40
    whole_again, order = trim(whole, ["hi"], 10_000)
    assert order == list(range(whole.get_vocab_size()))
    assert whole_again.to_str() == whole.to_str()


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=MARKS[0], eos_token=MARKS[-1])
    fast.chat_template = byte_level.CHAT_TEMPLATE + "{# <tool> #}"
    fast.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "gold.jsonl", examples(12, 1))
    write_rows(folder / "pool.jsonl", [e.unanswered() for e in examples(12, 2)])
    write_rows(folder / "validation.jsonl", examples(12, 3))
    return folder


def run(model: Path, data: Path, out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    ctx = Context(0, out, out, progress=SilentProgress())
    return vocabulary.run(vocabulary.Params(files=FILES, **params), {"model": model, "data": data}, out, ctx)


@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
@pytest.mark.parametrize("tokenizer", ["bytes", "characters", "marks behind"])
def test_logits_of_kept_tokens_are_those_of_before(kind: str, tokenizer: str, data: Path, tmp_path: Path) -> None:
    folder = save_tokenizer(MADE[tokenizer], tmp_path / "tokenizer")
    model = bases.build(kind, MADE[tokenizer].get_vocab_size() + 13)  # as bases have, rows for no token
    network.save(model, folder, tmp_path / "whole")
    (tmp_path / "whole" / "training.json").write_text(json.dumps({"method": "sft", "parameters": 1}))
    facts = run(tmp_path / "whole", data, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    old, new = load_tokenizer(tmp_path / "whole"), load_tokenizer(tmp_path / "small")
    assert small.config.vocab_size == facts["vocabulary"] == len(new) < len(old)
    assert small.num_parameters() == facts["parameters"]
    assert model.num_parameters() == facts["parameters_before"]
    assert json.loads((tmp_path / "small" / "training.json").read_text()) == {
        "method": "sft",
        "parameters": facts["parameters"],
    }
    for name in ("eos_token_id", "pad_token_id"):
        assert getattr(small.config, name) == new.convert_tokens_to_ids(
            old.convert_ids_to_tokens(getattr(model.config, name))
        )
    rows = old.convert_tokens_to_ids(new.convert_ids_to_tokens(list(range(len(new)))))
    for example in examples(4, 1):
        text = "".join(rendered(old, example))
        assert text == "".join(rendered(new, example))
        before, after = (t(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for t in (old, new))
        with torch.no_grad():
            wanted, got = model.eval()(before).logits[0][:, rows], small(after).logits[0]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert ("<unused0>" in new.get_vocab(), "<tool>" in new.get_vocab()) == (False, tokenizer == "marks behind")


def test_tables_apart_low_precision_and_several_files(data: Path, tmp_path: Path) -> None:
    folder = save_tokenizer(MADE["bytes"], tmp_path / "tokenizer")
    configured = bases.config("llama", MADE["bytes"].get_vocab_size(), tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(configured, dtype=torch.bfloat16)
    network.save(model, folder, tmp_path / "whole")
    model.save_pretrained(tmp_path / "whole", max_shard_size="60KB")
    (tmp_path / "whole" / "model.safetensors").unlink()
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    facts = run(tmp_path / "whole", data, tmp_path / "small")
    assert facts["parameters_before"] - facts["parameters"] == 2 * 64 * (
        facts["vocabulary_before"] - facts["vocabulary"]
    )
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert small.dtype == torch.bfloat16 and small.lm_head.weight.shape[0] == facts["vocabulary"]
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * facts["parameters"]


def test_the_test_split_is_not_read_and_the_validation_split_keeps_nothing(data: Path, tmp_path: Path) -> None:
    network.save(bases.build("llama", WHOLE), save_tokenizer(MADE["bytes"], tmp_path / "t"), tmp_path / "whole")
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "test.jsonl").write_text("no JSON")
    write_rows(other / "validation.jsonl", [Example((Message("user", "überraschung €"),), "naïve")])
    first = run(tmp_path / "whole", data, tmp_path / "a")
    second = run(tmp_path / "whole", other, tmp_path / "b")
    assert first["more_validation_tokens"] < 0.2 < second["more_validation_tokens"]
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_size_is_kept_and_never_less_than_the_texts_need(data: Path, tmp_path: Path) -> None:
    network.save(bases.build("llama", WHOLE), save_tokenizer(MADE["bytes"], tmp_path / "t"), tmp_path / "whole")
    least = run(tmp_path / "whole", data, tmp_path / "least")["vocabulary"]
    middle = (least + WHOLE) // 2
    assert least < middle < WHOLE
    assert run(tmp_path / "whole", data, tmp_path / "a", at_least=least - 50)["vocabulary"] == least
    assert run(tmp_path / "whole", data, tmp_path / "b", at_least=middle)["vocabulary"] == middle
    assert run(tmp_path / "whole", data, tmp_path / "c", at_least=9000)["vocabulary"] == WHOLE


def broken(change: Callable[[Path], None], data: Path, tmp_path: Path) -> None:
    network.save(bases.build("llama", WHOLE), save_tokenizer(MADE["bytes"], tmp_path / "t"), tmp_path / "whole")
    change(tmp_path / "whole")
    run(tmp_path / "whole", data, tmp_path / "small")


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def unigram(folder: Path) -> None:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=100, special_tokens=[*MARKS], show_progress=False)
    )
    trained.save(str(folder / "tokenizer.json"))


def another_table(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"model.layers.0.embed_more.weight": torch.zeros(3, 4)},
        folder / "model.safetensors",
        {"format": "pt"},
    )


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "unigram": (unigram, "Unigram cannot be trimmed"),
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    "dropout": (edit("tokenizer.json", lambda t: t["model"].update(dropout=0.1)), "dropout"),
    "suppressed tokens": (edit("generation_config.json", lambda c: c.update(suppress_tokens=[7])), "suppress_tokens"),
    "another table": (another_table, "embed_more"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_trimmed_is_refused_with_a_hint(case: str, data: Path, tmp_path: Path) -> None:
    change, says = REFUSED[case]
    with pytest.raises(CompressionError, match=says) as caught:
        broken(change, data, tmp_path)
    assert caught.value.hint


def test_without_texts_there_is_nothing_to_keep(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text"):
        broken(lambda folder: None, tmp_path / "empty", tmp_path)


def test_the_same_model_and_texts_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    network.save(bases.build("qwen3", WHOLE), save_tokenizer(MADE["bytes"], tmp_path / "t"), tmp_path / "whole")
    shuffled = tmp_path / "shuffled"
    shutil.copytree(data, shuffled)
    rows = (data / "gold.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    (shuffled / "gold.jsonl").write_text("".join(rows))
    run(tmp_path / "whole", data, tmp_path / "a")
    run(tmp_path / "whole", shuffled, tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert AutoTokenizer.from_pretrained(tmp_path / "a").eos_token == "<|end|>"
