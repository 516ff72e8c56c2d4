"""A base as GGUF: what is in the file, what is refused, and that llama.cpp computes with it what torch does."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from slmops.convert import gguf, gguf_names, gguf_vocabulary
from slmops.core.engine import Sampling
from slmops.core.method import Context, SilentProgress
from slmops.engines import open_engine
from slmops.engines.minimal import _write_tokenizer
from slmops.errors import ConversionError, MissingExtraError, ModelError
from slmops.train import tokenizer as trainer
from tests.convert.agreement import check
from tests.train import bases

EXACT = {"llama": 5e-5, "qwen3": 5e-5, "phi3": 5e-5, "gemma3": 5e-3}  # gemma3: llama.cpp's GELU is a float16 table
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    _write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def base(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model's folder: by architecture, then changed in its config.json (before its weights are made)."""

    def get(kind: str, **changes: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = bases.save(kind, words, tmp_path_factory.mktemp(kind))
        if changes:
            settings = json.loads((folder / "config.json").read_text()) | changes
            (folder / "config.json").write_text(json.dumps(settings))
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
            for parameter in model.parameters():  # biases and norms too, so that none of them can be left out
                parameter.data += 0.1 * torch.randn(parameter.shape)
            model.save_pretrained(folder)
        return folder

    return get


def convert(folder: Path, out: Path, precision: str = "fp32") -> dict[str, Any]:
    out.mkdir()
    return gguf.run(gguf.Params(precision=precision), {"model": folder}, out, Context(0, out, out))


def read(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = library.GGUFReader(out / "model.gguf")
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def test_what_is_in_the_file(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base("gemma3")
    facts = convert(folder, tmp_path / "a")
    values, tensors = read(tmp_path / "a")
    assert values["general.architecture"] == facts["architecture"] == "gemma3"
    assert values["gemma3.attention.sliding_window"] == 16
    assert values["gemma3.attention.sliding_window_pattern"] == [True, False]
    assert values["gemma3.rope.freq_base"] == 1e6
    assert values["gemma3.rope.freq_base_swa"] == 1e4
    assert values["tokenizer.ggml.eos_token_id"] == 4
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    assert values["tokenizer.ggml.tokens"][4] == "<|end|>"
    assert values["tokenizer.ggml.token_type"][4:6] == [3, 1]
    assert "output.weight" not in tensors  # shared with the embeddings
    source = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"].data, source["model.layers.1.mlp.up_proj.weight"])
    np.testing.assert_allclose(tensors["output_norm.weight"].data, 1 + source["model.norm.weight"])
    convert(folder, tmp_path / "b")
    assert (tmp_path / "a" / "model.gguf").read_bytes() == (tmp_path / "b" / "model.gguf").read_bytes()


@pytest.mark.parametrize(
    ("precision", "kind", "error"), [("fp16", "F16", 1e-3), ("bf16", "BF16", 8e-3), ("q8_0", "Q8_0", 8e-3)]
)
def test_precision(precision: str, kind: str, error: float, base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base("qwen3")
    convert(folder, tmp_path / "out", precision)
    _, tensors = read(tmp_path / "out")
    source = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    tensor = tensors["blk.0.ffn_down.weight"]
    assert tensor.tensor_type.name == kind
    restored = library.quants.dequantize(tensor.data, tensor.tensor_type)
    assert 0 < np.abs(restored - source).max() < error * np.abs(source).max()
    assert {t.tensor_type.name for name, t in tensors.items() if "norm" in name} == {"F32"}


def test_narrow_matrices_stay_fp16(base: Callable[..., Path], tmp_path: Path) -> None:
    convert(base("llama", intermediate_size=72), tmp_path / "out", "q8_0")
    _, tensors = read(tmp_path / "out")
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_bf16_source_in_parts(base: Callable[..., Path], tmp_path: Path) -> None:
    """Weights of a large model come in several files, and in bfloat16: both read as they are."""
    folder = tmp_path / "parts"
    shutil.copytree(base("llama"), folder)
    weights = {name: t.bfloat16() for name, t in load_torch(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for i, part in enumerate((names[:7], names[7:])):
        save_file({name: weights[name] for name in part}, folder / f"model-{i}.safetensors")
    convert(folder, tmp_path / "out")
    _, tensors = read(tmp_path / "out")
    assert len(tensors) == len(names) - ("lm_head.weight" in names)
    wanted = weights["model.layers.1.mlp.up_proj.weight"].float().numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"].data, wanted)


@pytest.mark.parametrize(("kind", "changes", "says"), [
    ("llama", {"model_type": "mamba"}, "type mamba cannot"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantised already"),
    ("llama", {"rms_norm_eps": None}, "no rms_norm_eps"),
    ("llama", {"head_dim": 15}, "odd size 15"),
    ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "type yarn in a llama"),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "part of each"),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "attend to a window"),
    ("phi3", {"head_dim": 32}, "not as wide"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("llama", {"num_hidden_layers": 1}, r"no place for the tensor model.layers.1"),
    ("llama", {"num_hidden_layers": 3}, r"no tensor model.layers.2"),
    ("llama", {"intermediate_size": 64}, r"down_proj.weight has the shape \(64, 128\)"),
    ("llama", {"tie_word_embeddings": False}, "no tensor lm_head"),
    ("llama", {"vocab_size": 200}, "id 260, the model 200"),
])  # fmt: skip
def test_what_cannot_be_written(
    kind: str, changes: dict[str, Any], says: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base(kind), folder)
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match=says) as caught:
        convert(folder, tmp_path / "out")
    assert caught.value.hint
    assert not list((tmp_path / "out").iterdir())


def test_tokenizers_that_cannot_be_written(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base("llama"), folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cases = [
        ({"model": whole["model"] | {"type": "Unigram"}}, "no byte-level BPE"),
        ({"model": whole["model"] | {"byte_fallback": True}}, "no byte-level BPE"),
        ({"model": whole["model"] | {"ignore_merges": True}}, "ignore_merges"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises text"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "words of bytes"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, step]}}, "no name for"),
    ]
    for i, (changes, says) in enumerate(cases):
        (folder / "tokenizer.json").write_text(json.dumps(whole | changes))
        with pytest.raises(ConversionError, match=says):
            convert(folder, tmp_path / f"out{i}")


def test_end_tokens(base: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp has three places for them, and ends at some names anyway; what does not fit is said."""
    folder = tmp_path / "model"
    shutil.copytree(base("llama"), folder)
    for given, places, says in (
        ([3, 4], {"eos": 4, "eot": 3}, []),
        ([1, 2, 3, 4], {"eos": 4, "eot": 1, "eom": 2}, ["answers with <|assistant|>, which go on"]),
        (2, {"eos": 2}, ["answers with <|end|>, which end there"]),
    ):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        found = gguf_vocabulary.read(folder, 261)
        assert {k: v for k, v in found.special.items() if k.startswith("e")} == places
        assert list(found.differs) == says
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    with pytest.raises(ConversionError, match="no end token"):
        gguf_vocabulary.read(folder, 261)


def test_missing_packages(base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtraError) as caught:
        open_engine(tmp_path)
    assert "slmops[llamacpp]" in caught.value.hint
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError) as caught:
        convert(base("llama"), tmp_path / "out")
    assert "slmops[gguf]" in caught.value.hint


def trained(out: Path, corpus: list[str], pattern: str | None = None, whole: bool = False) -> Path:
    """A tokenizer of `train.tokenizer`, or of the same kind with another pattern."""
    out.mkdir()
    made = trainer.build(corpus, 420)
    settings = json.loads(made.to_str())
    if pattern is not None:
        settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    settings["model"]["ignore_merges"] = whole
    from tokenizers import Tokenizer

    trainer.save(Tokenizer.from_str(json.dumps(settings)), out)
    return out


CORPUS = [
    "please help me with my parcel, it isn't here",
    "don't wait: order 4821 was late  again",
    "ça va, où est-il?",
] * 9
LINES = ["first line\n\n\nsecond line\n\n  third\n\n\n"] * 9
TEXTS = [
    "please help, my parcel isn't here!", "DON'T I'LL we'Ve they'Re", "a  b   c    ", "  leading", "tab\tand\u00a0nbsp",
    "1234567 und 3,14 ½ ²", "über Größe, naïve café, Привет мир", "日本語のテキスト 漢字 한국어 ไทย", "🎉👍🏽 👩‍👩‍👧 e\u0301",
    "<|user|>hi<|end|><|assistant|>", "<|use|> <|end", "x=y+z; if(a){b}//c\\d", "ends with spaces   ", "...!!!???", "a'b''c",
    "https://example.org/a_b?c=1&d=2#e", "\u2028line\u2029par", "mixed\u200bzero\ufeffwidth", "'s 't 'RE", "ﬁ ǅ ß",
    "a\u0085b \u0085 c\u3000d",
]  # fmt: skip
LETTERS = [
    *"abc XYZ 'sStTmM  \t\n\r.,!?-_()123½²äöüßÉçñ日本語한글Привет\u00a0\u0085\u2028\u3000\u200b\ufeff",
    "<|end|>",
    "'ll",
    "🎉",
]
BREAKS = [
    "a\nb",
    "a\n\nb",
    "a \n b",
    "  \n\n  x",
    "\r\n\r\n",
    "end.\n\n",
    "a\n\n\n  b\n",
    "\n",
    "x \r\n\t y",
    "(\n\n)\n",
]


def test_where_the_rule_differs_is_said(tmp_path: Path) -> None:
    plain = gguf_vocabulary.read(trained(tmp_path / "plain", CORPUS), 500)
    assert (plain.pre, plain.differs) == ("qwen2", ())
    assert plain.tokens[499] == "[PAD499]"
    assert plain.types[499] == 5
    lines = gguf_vocabulary.read(trained(tmp_path / "lines", LINES), 500)
    assert lines.differs == ("token ids of line breaks beside other white space",)
    other = gguf_vocabulary.read(trained(tmp_path / "qwen", LINES, SPLIT % ""), 500)
    assert (other.pre, other.differs) == ("qwen2", ())
    whole = gguf_vocabulary.read(trained(tmp_path / "llama3", LINES, SPLIT % "{1,3}", whole=True), 500)
    assert (whole.pre, whole.differs) == ("llama-bpe", ())


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 3.0, 6.0, 9.0],
}  # fmt: skip
SCALED = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
LENGTHS = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}


@pytest.mark.parametrize(("kind", "new", "old"), [
    ("llama", {"rope_parameters": LLAMA3}, {"rope_theta": 1e4, "rope_scaling": LLAMA3}),
    ("phi3", {"rope_parameters": LONG} | LENGTHS,
     {"rope_theta": 1e4, "partial_rotary_factor": 0.5,
      "rope_scaling": {"type": "su", "short_factor": LONG["short_factor"], "long_factor": LONG["long_factor"]}}),
    ("gemma3", {"rope_parameters": SCALED},
     {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": {"type": "linear", "factor": 8.0},
      "layer_types": None, "sliding_window_pattern": 2}),
])  # fmt: skip
def test_older_forms_of_the_configuration(
    kind: str, new: dict[str, Any], old: dict[str, Any], base: Callable[..., Path], tmp_path: Path
) -> None:
    """Most models on the hub have rotary settings in the form before `rope_parameters`."""
    folder = base(kind, **new)
    convert(folder, tmp_path / "new")
    settings = json.loads((folder / "config.json").read_text()) | old | {"rope_parameters": None}
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    convert(folder, tmp_path / "old")
    assert (tmp_path / "old" / "model.gguf").read_bytes() == (tmp_path / "new" / "model.gguf").read_bytes()


# From here on llama.cpp runs.


@pytest.mark.slow
@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_llama_cpp_computes_what_torch_does(kind: str, base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(kind)
    convert(folder, tmp_path / "out")
    engine = open_engine(tmp_path / "out")
    assert engine.name == "llama_cpp"
    print(kind, "largest difference of logits", check(engine, open_engine(folder), EXACT[kind]))
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes"), [
    ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "head_dim": 24}),
    ("llama", {"num_key_value_heads": 4, "intermediate_size": 72, "rms_norm_eps": 1e-3}),
    ("qwen3", {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    ("phi3", {"rope_parameters": LONG} | LENGTHS),
    ("gemma3", {"rope_parameters": SCALED, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 24}),
    ("gemma3", {"layer_types": ["full_attention", "full_attention"]}),
])  # fmt: skip
def test_llama_cpp_computes_variants(
    kind: str, changes: dict[str, Any], base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = base(kind, **changes)
    convert(folder, tmp_path / "out")
    engine = open_engine(tmp_path / "out")
    print(kind, "largest difference of logits", check(engine, open_engine(folder), 2 * EXACT[kind]))
    engine.close()


@pytest.mark.slow
def test_a_window_that_llama_cpp_leaves_out_cuts_the_context(base: Callable[..., Path], tmp_path: Path) -> None:
    facts = convert(base("phi3", sliding_window=100), tmp_path / "out")
    assert facts["context"] == 100
    assert facts["differs"] == ["the context, cut to the attention window of 100"]
    engine = open_engine(tmp_path / "out")
    with pytest.raises(ModelError, match="holds 100"):
        engine.generate([[7] * 100], Sampling())
    engine.close()


def transposed(values: Any, name: str, config: Any) -> Any:
    right = ARRANGE(values, name, config)
    return right.T if name == "model.layers.1.self_attn.o_proj.weight" else right


ARRANGE = gguf.arrange
BROKEN = {
    "rows as in Hugging Face": ("llama", gguf_names, "permute", lambda values, heads: values),
    "a transposed weight": ("qwen3", gguf, "arrange", transposed),
    "norms without their 1": ("gemma3", gguf, "arrange", lambda v, name, c: v if "norm" in name else ARRANGE(v, name, c)),
    "the scale of the head size": ("gemma3", gguf, "arrange", lambda v, n, c: ARRANGE(v, n, c | {"query_pre_attn_scalar": 16})),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_a_wrong_file_is_found(
    fault: str, base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail: each of these files loads and answers."""
    kind, where, name, wrong = BROKEN[fault]
    folder = base(kind)
    monkeypatch.setattr(where, name, wrong)
    convert(folder, tmp_path / "out")
    engine = open_engine(tmp_path / "out")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(engine, open_engine(folder), 0.05)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_rounded_files_stay_close(kind: str, base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(kind)
    reference = open_engine(folder)
    ids = reference.encode([{"role": "user", "content": "where is my parcel?"}])
    exact = reference.logits(ids)
    for precision, share in (("fp16", 0.005), ("bf16", 0.03), ("q8_0", 0.06)):
        convert(folder, tmp_path / precision, precision)
        engine = open_engine(tmp_path / precision)
        off = float(np.abs(engine.logits(ids) - exact).max() / np.abs(exact).max())
        print(kind, precision, "largest difference of logits, as a share of the largest", round(off, 5))
        assert 0 < off < share, precision
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bytes", "own", "own, lines", "qwen2", "llama-bpe"])
def test_token_ids(case: str, words: Path, tmp_path: Path) -> None:
    """llama.cpp gives the ids of Hugging Face for every text, but where `differs` says that it does not."""
    from transformers import AutoTokenizer

    made = {
        "bytes": lambda: words,
        "own": lambda: trained(tmp_path / "t", CORPUS),
        "own, lines": lambda: trained(tmp_path / "t", CORPUS + LINES),
        "qwen2": lambda: trained(tmp_path / "t", CORPUS + LINES, SPLIT % ""),
        "llama-bpe": lambda: trained(tmp_path / "t", CORPUS + LINES, SPLIT % "{1,3}", whole=True),
    }[case]()
    folder = bases.save("llama", made, tmp_path / "base")
    progress = SilentProgress()
    (tmp_path / "out").mkdir()
    context = Context(0, tmp_path, tmp_path, progress=progress)
    facts = gguf.run(gguf.Params(), {"model": folder}, tmp_path / "out", context)
    engine: Any = open_engine(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(made)
    for text in TEXTS if case == "own, lines" else TEXTS + BREAKS:
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert engine.tokenize(text) == wanted, text
        assert engine.decode(wanted) == theirs.decode(wanted, skip_special_tokens=True), text
    random = Random(7)
    for _ in range(400):
        text = "".join(random.choice(LETTERS) for _ in range(random.randrange(1, 30)))
        if case != "own, lines" or not {"\r", "\n"} & set(text):
            assert engine.tokenize(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    other = [t for t in BREAKS if engine.tokenize(t) != theirs(t, add_special_tokens=False)["input_ids"]]
    if case == "own, lines":
        assert facts["differs"] == ["token ids of line breaks beside other white space"]
        assert progress.lines
        assert other
        assert engine.decode(engine.tokenize(other[0])) == other[0]
    else:
        assert not facts["differs"]
        assert not other
    engine.close()


@pytest.mark.slow
def test_the_engine(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base("llama", max_position_embeddings=2048)
    convert(folder, tmp_path / "out")
    engine, reference = open_engine(tmp_path / "out"), open_engine(folder)
    long = [(7 * i) % 250 + 5 for i in range(700)]  # more than goes through at once, more than the first context
    short = long[:9]
    answers = engine.generate([short, long, short], Sampling(max_new_tokens=16))
    assert answers[0].tokens == answers[2].tokens
    assert [a.tokens for a in answers[:2]] == [
        a.tokens for a in reference.generate([short, long], Sampling(max_new_tokens=16))
    ]
    np.testing.assert_allclose(engine.logits(long), reference.logits(long), atol=1e-3)
    one, two, other = (engine.generate([short], Sampling(16, temperature=1.0, seed=s))[0].tokens for s in (5, 5, 6))
    assert one == two != other
    narrow = engine.generate([short], Sampling(16, temperature=1.0, top_k=1))[0].tokens
    assert narrow == answers[0].tokens == engine.generate([short], Sampling(16, temperature=1.0, top_p=1e-9))[0].tokens
    starts = [[i] for i in range(5, 261)]
    ended = next(i for i, a in enumerate(reference.generate(starts, Sampling(24))) if a.finished)
    answer = engine.generate([starts[ended]], Sampling(24))[0]
    assert answer.finished
    assert answer.tokens[-1] == 4
    assert "<|end|>" not in answer.text
    engine.close()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    convert(folder, tmp_path / "ends")
    several: Any = open_engine(tmp_path / "ends")
    assert several.end_ids == {3, 4}
    several.close()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.gguf").write_bytes((tmp_path / "out" / "model.gguf").read_bytes()[:20000])
    with pytest.raises(ModelError, match=r"cannot be loaded: .*model"):
        open_engine(tmp_path / "broken")
