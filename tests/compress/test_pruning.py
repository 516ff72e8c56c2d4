"""Blocks, heads and neurons that are taken out: which ones, what is left, and that every runtime takes it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slmops.compress import calibrate, depth, width
from slmops.core import pruning, runtimes
from slmops.core.engine import Sampling
from slmops.core.method import Context, SilentProgress
from slmops.engines.tokenizer import load_tokenizer
from slmops.engines.torch_engine import TorchEngine
from slmops.errors import CompressionError, DataError
from slmops.train import network
from tests.train import bases

FILES = ("data/gold.jsonl", "data/pool.jsonl")
IDS = torch.arange(40)[None] * 7 % 290


def context(folder: Path) -> Context:
    return Context(0, folder, folder, progress=SilentProgress())


def shorten(model: Path, data: Path, out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    return depth.run(depth.Params(files=FILES, **params), {"model": model, "data": data}, out, context(out))


def narrow(model: Path, data: Path, out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    return width.run(width.Params(files=FILES, **params), {"model": model, "data": data}, out, context(out))


def saved(
    kind: str, tokenizer: Path, out: Path, change: Callable[[Any], None] = lambda model: None, **settings: Any
) -> Path:
    model = bases.build(kind, len(load_tokenizer(tokenizer)), **settings)
    with torch.no_grad():
        change(model)
    network.save(model, tokenizer, out)
    return out


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = loaded(folder)(IDS).logits
    return out


def silent(block: Any) -> None:
    """Make a block the identity: both of its parts add nothing."""
    last = [layer for name, layer in block.named_modules() if name.endswith(("o_proj", "down_proj"))]
    assert len(last) == 2
    for layer in last:
        layer.weight.zero_()


def batches_of(folder: Path, data: Path) -> list[torch.Tensor]:
    with calibrate.opened({"model": folder, "data": data}, FILES, 256, Context(0, folder, folder)) as it:
        return it.batches


@pytest.mark.parametrize("kind", (*bases.ARCHITECTURES, "mistral", "qwen2"))
def test_a_block_that_does_nothing_goes_first_and_nothing_changes(
    kind: str, tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    whole = saved(kind, tokenizer, tmp_path / "whole", lambda m: silent(m.model.layers[1]), layers=4)
    facts = shorten(whole, data, tmp_path / "small")
    assert facts["removed"] == [1]
    assert facts["influence"][1] == pytest.approx(0, abs=1e-6) and min(facts["influence"][::2]) > 1e-3
    torch.testing.assert_close(logits(tmp_path / "small"), logits(whole), atol=1e-5, rtol=1e-4)
    small = loaded(tmp_path / "small")
    assert small.config.num_hidden_layers == 3 and small.num_parameters() == facts["parameters"]
    if kind == "gemma3":
        assert small.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def streams(model: Any, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """What goes into each block, and last what comes out of them all: float64 (tokens, 64) each."""
    parts = [*model.model.layers, model.model.norm]
    seen: dict[int, list[torch.Tensor]] = {n: [] for n in range(len(parts))}
    for n, part in enumerate(parts):
        part.register_forward_pre_hook(lambda _part, args, n=n: seen[n].append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return [torch.cat(seen[n]).double() for n in range(len(parts))]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_influence_is_one_minus_the_mean_cosine_and_is_measured_again(
    kind: str, tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    whole = saved(kind, tokenizer, tmp_path / "whole", layers=4)
    facts = shorten(whole, data, tmp_path / "small", layers=2)
    left, batches = [0, 1, 2, 3], batches_of(whole, data)
    for round_ in range(2):
        model = loaded(whole)
        model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in left])
        model.config.num_hidden_layers = len(left)
        model.config.layer_types = [model.config.layer_types[i] for i in left]
        wanted = []
        for before, after in itertools.pairwise(streams(model, batches)):
            cosine = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
            wanted.append(float(1 - cosine.mean()))
        if round_ == 0:
            assert facts["influence"] == pytest.approx(wanted, abs=1e-5)
        assert facts["removed"][round_] == left.pop(wanted.index(min(wanted)))
    own, theirs = loaded(tmp_path / "small").model.layers[1].mlp, loaded(whole).model.layers[left[1]].mlp
    torch.testing.assert_close(own.down_proj.weight, theirs.down_proj.weight, rtol=0, atol=0)


def test_several_files_and_low_precision_stay_so(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    whole = saved("llama", tokenizer, tmp_path / "whole", layers=4)
    loaded(whole).to(torch.bfloat16).save_pretrained(whole, max_shard_size="100KB")
    (whole / "model.safetensors").unlink()
    assert len(list(whole.glob("*.safetensors"))) > 2
    for made, out in ((shorten, tmp_path / "short"), (narrow, tmp_path / "narrow")):
        facts = made(whole, data, out, **({} if made is shorten else {"ffn": 0.5}))
        small = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert small.dtype == torch.bfloat16 and small.num_parameters() == facts["parameters"]
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 2 * facts["parameters"]
        assert {(out / name).is_file() for name in index["weight_map"].values()} == {True}


def useless(model: Any) -> None:
    """Neurons 64 and on of each block add nothing, and neither do heads 0 and 1, which share a key and a value."""
    for block in model.model.layers:
        block.mlp.down_proj.weight[:, 64:] = 0
        block.self_attn.o_proj.weight[:, :32] = 0


@pytest.mark.parametrize("kind", (*bases.ARCHITECTURES, "mistral", "qwen2"))
def test_heads_and_neurons_that_add_nothing_go_and_nothing_changes(
    kind: str, tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    whole = saved(kind, tokenizer, tmp_path / "whole", useless)
    facts = narrow(whole, data, tmp_path / "small", ffn=0.5, heads=0.5)
    assert (facts["ffn"], facts["heads"], facts["kv_heads"], facts["lost"]) == (64, 2, 1, 0.0)
    torch.testing.assert_close(logits(tmp_path / "small"), logits(whole), atol=1e-5, rtol=1e-4)
    small = loaded(tmp_path / "small")
    numbers = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    written = json.loads((tmp_path / "small" / "config.json").read_text())
    assert [written[name] for name in numbers] == [64, 2, 1, 16]
    assert small.num_parameters() == facts["parameters"] < facts["parameters_before"]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_what_stays_is_the_most_important_fitted_by_least_squares(
    kind: str, tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    whole = saved(kind, tokenizer, tmp_path / "whole")
    narrow(whole, data, tmp_path / "small", ffn=0.5, heads=0.5, damping=1e-6)
    model, small = loaded(whole), loaded(tmp_path / "small")
    for block in range(2):
        for part, name, size, count in (("self_attn", "o_proj", 32, 1), ("mlp", "down_proj", 1, 64)):
            layer = getattr(getattr(model.model.layers[block], part), name)
            seen: list[torch.Tensor] = []
            handle = layer.register_forward_pre_hook(
                lambda _l, args, seen=seen: seen.append(args[0].flatten(0, 1).double())
            )
            with torch.no_grad():
                for batch in batches_of(whole, data):
                    model(batch)
            handle.remove()
            inputs, weight = torch.cat(seen), layer.weight.detach().double()
            units = [range(start, start + size) for start in range(0, weight.shape[1], size)]
            adds = [float((inputs[:, list(u)] @ weight[:, list(u)].T).square().sum()) for u in units]
            best = sorted(sorted(range(len(units)), key=lambda u: -adds[u])[:count])
            stay = [column for u in best for column in units[u]]
            fitted = torch.linalg.lstsq(inputs[:, stay], inputs @ weight.T).solution.T
            own = getattr(getattr(small.model.layers[block], part), name).weight
            torch.testing.assert_close(own.double(), fitted, atol=2e-3, rtol=2e-3)
            narrowed = torch.zeros_like(weight)
            narrowed[:, stay] = fitted
            with torch.no_grad():
                layer.weight.copy_(narrowed)  # the layers behind it see what the narrower one gives


def runs(folder: Path, data: Path, out: Path) -> None:
    """The same tokens in ONNX Runtime GenAI and in llama.cpp as in torch; a runtime that cannot take a model says so before."""
    from slmops.convert import gguf, onnx_genai
    from slmops.engines import open_engine

    config = json.loads((folder / "config.json").read_text())
    for method, refused in ((onnx_genai, runtimes.onnx_genai(config)), (gguf, runtimes.llama_cpp(config))):
        if refused:
            assert (method, config["model_type"]) == (gguf, "phi3") and "as wide as the model" in refused.message
            continue
        made = out / method.__name__
        made.mkdir(parents=True)
        method.run(method.Params(precision="fp32"), {"model": folder, "data": data}, made, context(made))
        engine, reference = open_engine(made), TorchEngine(folder)
        engine.end_ids = reference.end_ids = frozenset()
        ids = reference.encode([{"role": "user", "content": "where is my new card?"}])
        assert engine.encode([{"role": "user", "content": "where is my new card?"}]) == ids
        wanted = reference.generate([ids], Sampling(max_new_tokens=48))[0].tokens
        assert engine.generate([ids], Sampling(max_new_tokens=48))[0].tokens == wanted and len(wanted) == 48
        whole = [*ids, *wanted]
        np.testing.assert_allclose(engine.logits(whole), reference.logits(whole), rtol=0, atol=2e-3)


CASES = [(kind, way) for kind in bases.ARCHITECTURES for way in ("depth", "width")] + [("phi3", "ffn")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "way"), CASES)
def test_it_runs_in_every_runtime(kind: str, way: str, tokenizer: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra [llamacpp]")
    whole = saved(kind, tokenizer, tmp_path / "whole", layers=4)
    if way == "depth":
        shorten(whole, data, tmp_path / "small", layers=1)
    else:
        narrow(whole, data, tmp_path / "small", ffn=0.25, heads=0.5 if way == "width" else 0.0)
    runs(tmp_path / "small", data, tmp_path / "made")


def test_test_data_is_not_read_and_the_order_of_rows_does_not_count(
    tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    whole = bases.save("llama", tokenizer, tmp_path / "whole")
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "test.jsonl").write_text("no JSON")
    (other / "gold.jsonl").write_text("".join(reversed((data / "gold.jsonl").read_text().splitlines(keepends=True))))
    for made, asked in ((shorten, {}), (narrow, {"ffn": 0.5})):
        outs = [tmp_path / f"{made.__name__}-{name}" for name in "ab"]
        made(whole, data, outs[0], examples=20, **asked)
        made(whole, other, outs[1], examples=20, **asked)
        for file in outs[0].iterdir():
            assert file.read_bytes() == (outs[1] / file.name).read_bytes()


def test_what_cannot_be_pruned_is_refused_with_a_hint(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    whole = bases.save("llama", tokenizer, tmp_path / "whole")
    for n, (made, asked, says) in enumerate((
        (shorten, {"layers": 2}, "2 blocks cannot be taken out of 2"),
        (narrow, {"ffn": 0.95}, "ffn 0.95 leaves none of 128 neurons"),
        (narrow, {"ffn": 0.05}, "ffn 0.05 leaves all of 128 neurons"),
        (narrow, {"heads": 0.1}, "heads 0.1 leaves all of 2 key/value heads"),
    )):  # fmt: skip
        with pytest.raises(CompressionError, match=says) as caught:
            made(whole, data, tmp_path / f"{n}", **asked)
        assert caught.value.hint
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"model_type": "olmoe"}))
    with pytest.raises(CompressionError, match="type olmoe cannot be pruned"):
        shorten(whole, data, tmp_path / "odd")
    (whole / "config.json").write_text(json.dumps(config | {"intermediate_size": [128, 64]}))
    with pytest.raises(CompressionError, match="one number as intermediate_size"):
        narrow(whole, data, tmp_path / "lists", ffn=0.5)
    (whole / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no example"):
        shorten(whole, tmp_path / "empty", tmp_path / "none")


@pytest.mark.parametrize(
    ("ffn", "share", "left"), [(512, 0.5, 256), (512, 0.3, 352), (3072, 0.25, 2304), (3072, 0.3, 2176), (8192, 0.3, 5632), (96, 0.5, 64)]
)  # fmt: skip
def test_widths_divide_into_blocks(ffn: int, share: float, left: int) -> None:
    """Into those of int4; where sixteen steps or more are left, into larger ones."""
    assert pruning.ffn_left(ffn, share) == left
    assert left % (256 if ffn == 8192 else 128 if ffn == 3072 else 32) == 0


def test_windows_that_a_pattern_gives_are_named_for_each_block() -> None:
    config = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "sliding_window_pattern": 2,
        "eos_token_id": [1, 2, 3],
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert pruning.shorter(config, [0, 2], kinds) == {
        "model_type": "gemma3_text", "num_hidden_layers": 2, "eos_token_id": [1, 2, 3], "layer_types": [kinds[0], kinds[2]],
    }  # fmt: skip
