"""Numbers against references: the written-out forward pass, packing, splitting, rounding, estimates."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.convert.rounding import round_matrix
from slmops.core.spec import Architecture, Training
from slmops.errors import TrainingError
from slmops.train import dropout, network
from slmops.train.batches import collate, epoch_plan, pack_rows
from slmops.train.encode import Row, encode, load_tokenizer
from slmops.train.estimate import estimate, parameters
from slmops.train.loop import Schedule
from slmops.train.objective import cross_entropy, part_loss
from slmops.train.quantization_aware import fake_int4, int4_blocks
from tests.train import bases
from tests.train.conftest import FAST, TINY, examples


@pytest.fixture(scope="module")
def tok(tokenizer: Path) -> Any:
    return load_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def encoded(tok: Any) -> Any:
    return encode([Row(e, "f", i) for i, e in enumerate(examples(40))], tok, 64)


def gradients(net: network.Network, parts: list[Any], total: float) -> dict[str, torch.Tensor]:
    net.model.zero_grad()
    for part in parts:
        (part_loss(net, net.weights, part, cross_entropy(FAST)) / total).backward()
    return {n: w.grad.clone() for n, w in net.weights.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
def test_loss_and_gradient_equal_the_plain_model(kind: str, prompt_weight: float, tok: Any, encoded: Any) -> None:
    """Padded rows, hidden states only where needed: the same as every logit of every example run alone."""
    net = network.Network(network.build(TINY[kind], tok, 1))
    assert net.path == "fast"
    chosen = list(range(12))
    part = collate(encoded, chosen, prompt_weight, "bucket")
    total = float(part.weights.sum())
    got = gradients(net, [part], total)
    net.model.zero_grad()
    wanted, weight = torch.zeros(()), 0.0
    for i in chosen:
        ids = torch.from_numpy(encoded.ids[i])[None]
        logp = net.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nll = -logp[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        w = torch.full_like(nll, prompt_weight)
        w[encoded.answer_from[i] - 1 :] = 1
        wanted, weight = wanted + (w * nll).sum(), weight + float(w.sum())
    assert weight == pytest.approx(total)
    (wanted / weight).backward()
    for name, p in net.weights.items():
        torch.testing.assert_close(got[name], p.grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_splitting_and_packing_change_nothing(kind: str, tok: Any, encoded: Any) -> None:
    net = network.Network(network.build(TINY[kind], tok, 1))
    chosen = np.arange(20)
    whole = [collate(encoded, chosen, 0.1, "bucket")]
    total = float(whole[0].weights.sum())
    wanted = gradients(net, whole, total)
    split = [collate(encoded, c, 0.1, "bucket") for c in np.array_split(chosen, 3)]
    packed = [collate(encoded, chosen, 0.1, "pack", 64)]
    assert packed[0].ids.shape[0] < 20
    assert packed[0].tokens == whole[0].tokens
    for other in (split, packed):
        for name, value in gradients(net, other, total).items():
            torch.testing.assert_close(value, wanted[name], atol=2e-5, rtol=1e-3)


def test_another_architecture_goes_through_its_own_code(tok: Any, encoded: Any) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Phi3Config, Phi3ForCausalLM

    common = {
        "vocab_size": len(tok), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 4,
    }  # fmt: skip
    part = collate(encoded, range(6), 0.0, "bucket")
    packed = collate(encoded, range(6), 0.0, "pack")
    for model, path in (
        (Phi3ForCausalLM(Phi3Config(**common)), "head"),
        (Gemma3ForCausalLM(Gemma3TextConfig(**common, head_dim=16, final_logit_softcapping=2.0)), "whole"),
    ):
        net = network.Network(model.eval())
        assert net.path == path
        with torch.no_grad():
            logits = net.logits(net.weights, part)
            wanted = model(input_ids=part.ids).logits.flatten(0, 1)[part.where]
            torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
            if path == "head":
                a = part_loss(net, net.weights, part, cross_entropy(FAST))
                torch.testing.assert_close(
                    a, part_loss(net, net.weights, packed, cross_entropy(FAST)), atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Gemma3Text", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("Phi3", {}),
        ("Mistral", {}),
    ],
)
def test_packing_keeps_the_windows_of_attention(kind: str, settings: dict, tok: Any, encoded: Any) -> None:
    import transformers

    common = {
        "vocab_size": len(tok), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "initializer_range": 0.3, "max_position_embeddings": 64,
    }  # fmt: skip
    losses = []
    for window in (4, 60):
        config = getattr(transformers, f"{kind}Config")(**common, sliding_window=window, **settings)
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
        net = network.Network(model.eval())
        for mode in ("bucket", "pack"):
            part = collate(encoded, range(6), 0.0, mode)
            with torch.no_grad():
                losses.append(float(part_loss(net, net.weights, part, cross_entropy(FAST))))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[3] == pytest.approx(losses[2], rel=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-3 * losses[0], "the window matters"


def test_dropout_has_the_same_places_in_a_models_own_code(
    tok: Any, encoded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the same features are dropped each time, both ways give the same loss and gradients."""
    part = collate(encoded, range(6), 0.0, "bucket")
    found = []

    def every_third(x: torch.Tensor, p: float = 0.5, training: bool = True) -> torch.Tensor:
        return x * (torch.arange(x.shape[-1]) % 3 != 0) if p and training else x

    monkeypatch.setattr(torch.nn.functional, "dropout", every_third)
    for path in ("fast", "head"):
        net = network.Network(network.build(TINY["qwen3"], tok, 1))
        net.path = path
        net.learn(True)
        loss = part_loss(net, net.weights, part, cross_entropy(FAST), 0.3)
        loss.backward()
        found.append({"loss": loss.detach()} | {name: weight.grad for name, weight in net.weights.items()})
        net.learn(False)
        found[-1]["plain"] = part_loss(net, net.weights, part, cross_entropy(FAST)).detach()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)
    assert abs(float(found[0]["loss"] - found[0]["plain"])) > 0.1


@pytest.mark.parametrize("kind", ["phi3", "gemma3"])
def test_dropout_reaches_models_that_are_not_written_out(kind: str, encoded: Any) -> None:
    net = network.Network(bases.build(kind, 400))
    part = collate(encoded, range(6), 0.0, "bucket")

    def loss(dropout: float, seed: int) -> float:
        torch.manual_seed(seed)
        with torch.no_grad():
            return float(part_loss(net, net.weights, part, cross_entropy(FAST), dropout))

    before = loss(0.0, 0)
    net.learn(True)
    assert loss(0.2, 1) == loss(0.2, 1) != loss(0.2, 2)
    assert before not in (loss(0.2, 1), loss(0.2, 2))
    drops = net.dropout
    assert drops is not None and drops.share == 0.2
    net.learn(False)
    assert drops.share == 0.0, "a model that writes an answer through its own code drops nothing"
    assert loss(0.0, 3) == before


def test_dropout_without_a_place_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(TrainingError, match="dropout has no place in a model of type mamba") as caught:
        dropout.Dropout(model)
    assert caught.value.hint


def test_large_vocabularies_are_projected_in_pieces(tok: Any, encoded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from slmops.train import objective

    net = network.Network(network.build(TINY["llama"], tok, 1))
    part = collate(encoded, range(16), 0.0, "bucket")
    wanted = gradients(net, [part], 1.0)
    monkeypatch.setattr(objective, "HEAD_ELEMENTS", net.vocabulary * 7)
    for name, value in gradients(net, [part], 1.0).items():
        torch.testing.assert_close(value, wanted[name], atol=1e-4, rtol=1e-4)


def test_bf16_stays_close(tok: Any, encoded: Any) -> None:
    model = network.build(TINY["qwen3"], tok, 1)
    part = collate(encoded, range(8), 0.0, "bucket")
    with torch.no_grad():
        exact = network.Network(model).logits(dict(model.named_parameters()), part)
        rough = network.Network(model, bf16=True).logits(dict(model.named_parameters()), part)
    assert 0 < float((exact - rough).abs().max()) < 0.05 * float(exact.abs().max())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=200),
    st.integers(1, 70),
    st.integers(0, 5),
    st.sampled_from(["bucket", "pack"]),
)
def test_every_example_once_per_epoch(lengths: list[int], size: int, epoch: int, mode: Any) -> None:
    plan = epoch_plan(np.array(lengths), size, 7, epoch, mode)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    assert len(plan) == -(-len(lengths) // size)
    again = epoch_plan(np.array(lengths), size, 7, epoch, mode)
    assert all((a == b).all() for a, b in zip(plan, again, strict=True))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_packed_rows_hold_all_and_never_overflow(lengths: list[int]) -> None:
    rows = pack_rows(np.array(lengths), 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)


def test_buckets_waste_little(tok: Any) -> None:
    data = encode([Row(e, "f", i) for i, e in enumerate(examples(2000))], tok, 64)
    real = laid = 0
    for batch in epoch_plan(data.lengths, 32, 0, 0, "bucket"):
        part = collate(data, batch, 0.0, "bucket")
        real, laid = real + part.tokens, laid + part.ids.numel()
    assert laid / real < 1.05


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("shape", [(48, 128), (33, 96), (17, 100), (640, 352)])
def test_rounding_is_the_converters(block: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(block + shape[0])
    w = rng.normal(size=shape).astype(np.float32)
    w[0], w[1, :16], w[2, 0] = np.round(w[0] * 4) / 4, 0, -w[2, 1]  # ties, zeros, two largest of opposite sign
    w[3], w[4], w[5], w[6] = np.abs(w[3]), -np.abs(w[4]), 0, 1e-30
    w[7] = np.tile([1.0, -1.0], shape[1] // 2)
    wanted = round_matrix(w, 4, block)
    got, scale = int4_blocks(torch.from_numpy(w), block)
    np.testing.assert_array_equal(scale[..., 0].numpy(), wanted.scales.astype(np.float32))
    np.testing.assert_array_equal(got.numpy() + 8, wanted.codes.astype(np.float32))
    np.testing.assert_array_equal(fake_int4(torch.from_numpy(w), block).numpy(), wanted.values())


def test_rounding_twice_changes_nothing() -> None:
    w = fake_int4(torch.randn(20, 96), 32)
    torch.testing.assert_close(fake_int4(w, 32), w, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shape", [(2, 32, 4, 2, None), (3, 96, 6, None, 200)])
def test_parameter_count_is_exact(kind: Any, tie: bool, shape: tuple[Any, ...], tok: Any) -> None:
    layers, hidden, heads, kv, ffn = shape
    architecture = Architecture(
        type=kind, layers=layers, hidden=hidden, heads=heads, kv_heads=kv, ffn=ffn, tie_embeddings=tie
    )
    net = network.Network(network.build(architecture, tok, 0))
    assert parameters(architecture, len(tok)) == net.parameters
    guess = estimate(architecture, len(tok), Training(epochs=2, batch_size=10), 95)
    assert guess.steps == 20
    assert guess.seconds > 0
    assert guess.model_bytes == 4 * net.parameters


def test_learning_rate_rises_then_falls() -> None:
    s = Schedule.of(Training(epochs=10, batch_size=10, warmup=0.1, learning_rate=1.0, final_learning_rate=0.1), 100)
    rates = [s.learning_rate(i) for i in range(s.total)]
    assert s.total == 100
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@given(st.integers(1, 400), st.integers(1, 60))
def test_validation_is_looked_at_as_often_as_asked(total: int, looks: int) -> None:
    s = Schedule(total, 1, Training(evaluations=looks))
    times = [i for i in range(1, total + 1) if s.looks(i)]
    assert len(times) == min(total, looks)
    assert times[-1] == total
