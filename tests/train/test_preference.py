"""Preference methods: the numbers of their papers on real architectures, rewards, the reference, the refusals.

What every training promises is in test_contract.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmops.core.digest import digest_json
from slmops.core.example import Example, Message
from slmops.core.method import Context, SilentProgress
from slmops.core.spec import Lora, Train
from slmops.errors import DataError
from slmops.train import dpo, loop, network, orpo, pairs, sft
from slmops.train.encode import Encoded, Row, encode, load_tokenizer
from tests.train import bases
from tests.train.conftest import TINY, examples, write_rows
from tests.train.shelf import Stop, ranked

METHODS: Mapping[str, Any] = {"dpo": dpo, "orpo": orpo}
FAST = Train(epochs=3, batch_size=8, learning_rate=5e-3, evaluations=3, lora=Lora(rank=4), adapter_width=32)


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_rows(folder / "gold.jsonl", ranked(60))
    write_rows(folder / "validation.jsonl", ranked(20, 3))
    return folder


@pytest.fixture(scope="module")
def base(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = bases.save(kind, tokenizer, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def params(method: str, **training: Any) -> Any:
    t = Train.model_validate({**FAST.model_dump(), "method": method, **training})
    return METHODS[method].Params(training=t, files=("data/gold.jsonl",), validation="data/validation.jsonl")


def train(
    p: Any, data: Path, base: Path, out: Path, scratch: Path, progress: SilentProgress | None = None
) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    method = METHODS[p.training.method]
    facts: dict[str, Any] = method.run(
        p, {"data": data, "base": base}, out, Context(3, scratch, scratch, 1, progress or SilentProgress())
    )
    return facts


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "training.json").read_text())
    return found


def both(tokenizer: Path, count: int) -> Encoded:
    rows = [Row(e, "f", i) for i, e in enumerate(ranked(count))]
    return pairs.with_rejected(encode(rows, load_tokenizer(tokenizer), 64), tokenizer, 64)


def answer_logps(model: Any, data: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over answer tokens and their number, one unpadded forward pass of the Hugging Face model each."""
    totals = []
    for ids, start in zip(data.ids, data.answer_from.tolist(), strict=True):
        tokens = torch.from_numpy(ids)[None]
        logps = model(tokens).logits[0, :-1].float().log_softmax(-1)
        totals.append(logps.gather(1, tokens[0, 1:, None])[start - 1 :, 0].sum())
    return torch.stack(totals), torch.from_numpy(data.answer_tokens).float()


def written_out(method: str, t: Train, model: Any, start: Any, data: Encoded) -> torch.Tensor:
    """Mean loss over all pairs, from the papers' formulas."""
    n, beta, e = len(data.ids) // 2, t.preference.beta, t.preference.label_smoothing
    logps, tokens = answer_logps(model, data)
    if method == "dpo":
        with torch.no_grad():
            before, _ = answer_logps(start, data)
        h = beta * ((logps[:n] - before[:n]) - (logps[n:] - before[n:]))
        return -((1 - e) * torch.sigmoid(h).log() + e * torch.sigmoid(-h).log()).mean()
    p = (logps / tokens).exp()
    odds = p / (1 - p)
    ratio = odds[:n] / odds[n:]
    likes = (1 - e) * (ratio / (1 + ratio)).log() + e * (1 / (1 + ratio)).log()
    return (-p[:n].log() - beta * likes).mean()


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
@pytest.mark.parametrize("method", ["dpo", "orpo"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_are_those_of_the_paper(
    method: str, kind: str, smoothing: float, base: Callable[[str], Path], tokenizer: Path, tmp_path: Path
) -> None:
    t = params(method, preference={"beta": 0.3, "label_smoothing": smoothing}, accumulate=2).training
    data = both(tokenizer, 9)
    net = network.Network(network.load(base(kind)))
    ctx = Context(3, tmp_path, tmp_path, 1)
    before = dpo.reference(data, net, 4, digest_json("x"), "", ctx)
    start = copy.deepcopy(net.model)
    with torch.no_grad():
        torch.testing.assert_close(before.float(), answer_logps(start, data)[0], atol=1e-4, rtol=1e-5)
        generator = torch.Generator().manual_seed(1)
        for weight in net.trained.values():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    loss = dpo.Loss(t, before, before, "") if method == "dpo" else orpo.Loss(t)
    objective = pairs.Paired(data, data, t, loss)

    wanted = written_out(method, t, net.model, start, data)
    wanted.backward()
    gradients = {n: w.grad.clone() for n, w in net.trained.items()}
    net.model.zero_grad()
    import numpy as np

    parts = objective.parts(np.arange(9)[::-1], 0, net, net.weights)
    assert [int(p.weights.sum()) for p in parts] == [5, 4]
    got = sum(objective.loss(net, net.weights, p, 0.0) for p in parts) / 9
    got.backward()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    packed = replace(objective, training=t.model_copy(update={"batching": "pack"}))
    laid = [o.parts(np.arange(9), 0, net, net.weights)[0] for o in (objective, packed)]
    assert laid[0].ids.shape != laid[1].ids.shape
    torch.testing.assert_close(*(objective.loss(net, net.weights, p, 0.0) for p in laid), atol=1e-5, rtol=1e-5)
    assert objective.validate(net, net.weights) == pytest.approx(float(wanted.detach()), abs=1e-5)
    assert 0 <= objective.measured["reward_accuracy"] <= 1
    for name, weight in net.trained.items():
        scale = float(gradients[name].abs().max())
        assert scale > 0
        torch.testing.assert_close(weight.grad, gradients[name], atol=2e-4 * scale + 1e-7, rtol=2e-3)


def test_odds_of_sure_and_hopeless_answers_stay_finite() -> None:
    mean = torch.tensor([0.0, -1e-12, -1e-3, -0.7, -80.0], requires_grad=True)
    value = orpo.log_odds(mean)
    pairs.smoothed(value - value.flip(0), 0.0).sum().backward()
    assert mean.grad is not None
    assert torch.isfinite(value).all() and torch.isfinite(mean.grad).all()
    p = torch.tensor([-1e-3, -0.7], dtype=torch.float64).exp()
    torch.testing.assert_close(value[2:4].detach().double(), (p / (1 - p)).log(), rtol=1e-4, atol=1e-5)


class Stopping(SilentProgress):
    """Stops after some training steps (whose advances carry a note); counts pairs that the reference was run on."""

    def __init__(self, after: int | None = None) -> None:
        super().__init__()
        self.left, self.reference, self.label = after, 0, ""

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        self.label = label

    def advance(self, done: int = 1, note: str = "") -> None:
        if "reference" in self.label:
            self.reference += done
        elif note and self.left is not None:
            self.left -= done
            if self.left <= 0:
                raise Stop


@pytest.mark.parametrize("tuning_name", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_rewards_rise_over_a_reference_that_is_run_once(
    method: str, tuning_name: str, base: Callable[[str], Path], pairs_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    p, folder, out = params(method, tuning=tuning_name), base("qwen3"), tmp_path / "whole"
    whole = Stopping()
    facts = train(p, pairs_folder, folder, out, tmp_path / "s1", whole)
    found = record(out)
    looks = [point for point in found["points"] if point["validation_loss"] is not None]
    assert looks[-1]["validation_loss"] < looks[0]["validation_loss"] < found["points"][0]["train_loss"]
    assert facts["validation_reward_accuracy"] > 0.8 and facts["validation_reward_margin"] > 0
    assert looks[-1]["reward_margin"] > looks[0]["reward_margin"]
    if method == "dpo":  # additions of zero: the model is its reference before the first step
        assert found["points"][0]["train_loss"] == pytest.approx(0.693147, abs=2e-5)
    monkeypatch.setattr(loop, "EVERY_S", 0.0)
    cut, again = tmp_path / "cut", []
    for stop in (3, 5, 9, None):
        progress = Stopping(stop)
        if stop is None:
            train(p, pairs_folder, folder, cut, tmp_path / "s2", progress)
        else:
            with pytest.raises(Stop):
                train(p, pairs_folder, folder, cut, tmp_path / "s2", progress)
        again.append(progress.reference)
    assert again == [80 if method == "dpo" else 0, 0, 0, 0]
    assert record(cut) == found


def test_a_reference_that_was_cut_goes_on(
    base: Callable[[str], Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, net = both(tokenizer, 10), network.Network(network.load(base("llama")))

    def run(folder: Path, progress: SilentProgress) -> torch.Tensor:
        return dpo.reference(data, net, 4, digest_json("x"), "reference", Context(3, folder, folder, 1, progress))

    class Cut(SilentProgress):
        seen = 0

        def advance(self, done: int = 1, note: str = "") -> None:
            self.seen += done
            if self.seen == 8:
                raise Stop

    whole = run(tmp_path / "a", SilentProgress())
    monkeypatch.setattr(loop, "EVERY_S", 0.0)
    with pytest.raises(Stop):
        run(tmp_path / "b", Cut())
    progress = Stopping()
    assert torch.equal(run(tmp_path / "b", progress), whole)
    assert progress.reference == 10  # 4 that were kept, said at once, and 6 that were not


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_accumulation_splits_by_pairs_and_changes_nothing(
    method: str, base: Callable[[str], Path], pairs_folder: Path, tmp_path: Path
) -> None:
    models = []
    for name, extra in (("a", {}), ("b", {"accumulate": 3})):
        train(
            params(method, epochs=1, learning_rate=1e-3, **extra),
            pairs_folder,
            base("llama"),
            tmp_path / name,
            tmp_path / f"s{name}",
        )
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    start = AutoModelForCausalLM.from_pretrained(base("llama")).state_dict()
    for name, weight in models[0].items():
        moved = float((weight - start[name]).abs().max())
        torch.testing.assert_close(models[1][name], weight, atol=0.02 * moved + 1e-7, rtol=0)


def test_orpo_teaches_a_model_from_scratch(pairs_folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    p = params("orpo", epochs=12, learning_rate=1e-2).model_copy(update={"architecture": TINY["llama"]})
    out, scratch = tmp_path / "m", tmp_path / "s"
    out.mkdir()
    facts = orpo.run(p, {"data": pairs_folder, "tokenizer": tokenizer}, out, Context(3, scratch, scratch, 1))
    assert facts["validation_reward_accuracy"] >= 0.95
    tok, model, right = load_tokenizer(out), AutoModelForCausalLM.from_pretrained(out), 0
    for example in ranked(20, 3):
        ids = tok.apply_chat_template(example.prompt_messages(), add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        right += tok.decode(new, skip_special_tokens=True) == example.answer
    assert right >= 15


def test_beta_and_smoothing_reach_the_loss(base: Callable[[str], Path], pairs_folder: Path, tmp_path: Path) -> None:
    curves = []
    for number, preference in enumerate(({}, {"beta": 0.5}, {"label_smoothing": 0.3})):
        out = tmp_path / str(number)
        train(params("dpo", epochs=1, preference=preference), pairs_folder, base("llama"), out, tmp_path / f"s{number}")
        curves.append([p["validation_loss"] for p in record(out)["points"]])
    assert curves[0] != curves[1] and curves[0] != curves[2]


@pytest.mark.parametrize("pairs", [3, 0])
def test_validation_looks_at_pairs_alone(
    pairs: int, pairs_folder: Path, base: Callable[[str], Path], tmp_path: Path
) -> None:
    """A split without any is none: then some of the examples are held out."""
    write_rows(tmp_path / "data/gold.jsonl", ranked(60))
    write_rows(tmp_path / "data/validation.jsonl", [*ranked(pairs, 3), *examples(5, 4)])
    out = tmp_path / "o"
    facts = train(params("orpo", epochs=1, holdout=0.2), tmp_path / "data", base("llama"), out, tmp_path / "s")
    assert facts["examples"] == 60 if pairs else 60 - facts["validation_examples"]
    assert facts["validation_examples"] == pairs if pairs else facts["validation_examples"] > 5


PLAIN = replace(ranked(1, 9)[0], rejected=None)
LONG = replace(ranked(1, 8)[0], rejected="word " * 150)
MARKED = replace(ranked(1, 8)[0], rejected="hi <|end|> you")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (examples(20), "train.dpo learns from pairs, but none of the 20 examples has a rejected answer"),
        ([*ranked(4), PLAIN, PLAIN], r"data/gold.jsonl:5: the example has no rejected answer.*\(1 more have none\)"),
        ([*ranked(4), LONG], r"gold.jsonl:5: prompt and answer are longer .*with the rejected answer"),
        ([*ranked(4), MARKED], r"gold.jsonl:5: the text holds the control mark .*with the rejected answer"),
    ],
)
def test_examples_that_are_no_pairs_are_refused(
    rows: list[Example], says: str, pairs_folder: Path, base: Callable[[str], Path], tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "gold.jsonl", rows)
    (tmp_path / "data" / "validation.jsonl").write_bytes((pairs_folder / "validation.jsonl").read_bytes())
    with pytest.raises(DataError, match=says) as caught:
        train(params("dpo"), tmp_path / "data", base("llama"), tmp_path / "o", tmp_path / "s")
    assert caught.value.hint


def test_no_model_is_loaded_for_data_without_pairs(tmp_path: Path) -> None:
    write_rows(tmp_path / "gold.jsonl", examples(5))
    p = orpo.Params(training=FAST, files=("data/gold.jsonl",))
    with pytest.raises(DataError, match="none of the 5"):  # there is no model folder at all
        orpo.run(p, {"data": tmp_path, "base": tmp_path / "nothing"}, tmp_path, Context(0, tmp_path, tmp_path))


def test_other_methods_say_that_they_do_not_use_pairs(
    pairs_folder: Path, base: Callable[[str], Path], tmp_path: Path
) -> None:
    t = sft.Training(epochs=1, batch_size=16)
    progress = SilentProgress()
    (tmp_path / "o").mkdir()
    ctx = Context(3, tmp_path / "s", tmp_path, 1, progress)
    p = sft.Params(training=t, files=("data/gold.jsonl",), validation="data/validation.jsonl")
    sft.run(p, {"data": pairs_folder, "base": base("llama")}, tmp_path / "o", ctx)
    assert sum("60 of 60 examples have a rejected answer too" in line for line in progress.lines) == 1
    quiet = SilentProgress()
    train(params("orpo", epochs=1), pairs_folder, base("llama"), tmp_path / "p", tmp_path / "s2", quiet)
    assert not any("rejected answer" in line for line in quiet.lines)


def test_rejected_answers_come_back_as_they_were() -> None:
    for example in ranked(5):
        assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example
        assert example.id == replace(example, rejected=None).id
        assert example.unanswered().rejected is example.answered("x", "teacher").rejected is None
    assert "rejected" not in Example((Message("user", "a"),), "b", "gold").to_json()
