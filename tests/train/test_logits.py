"""Distillation from cached distributions: the estimates, the file, the refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slmops.core.method import Context, SilentProgress
from slmops.core.spec import Train
from slmops.errors import DataError, TrainingError
from slmops.train import cache_logits, logits, pass_memory, sft
from slmops.train import tokenizer as bpe
from tests.train.conftest import FAST, TINY, examples, write_rows

FILES = ("data/teacher.jsonl",)


def context(folder: Path) -> Context:
    return Context(seed=3, scratch=folder, shared=folder)


def fresh(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.fixture(scope="module")
def teacher(data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    p = sft.Params(training=FAST.model_copy(update={"epochs": 12}), architecture=TINY["llama"], files=FILES)
    sft.run(p, {"data": data, "tokenizer": tokenizer}, out, context(tmp_path_factory.mktemp("s")))
    return out


@pytest.fixture(scope="module", params=["sampled", "top_k"])
def cached(request: pytest.FixtureRequest, data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache")
    p = cache_logits.Params(files=FILES, selection=request.param)
    cache_logits.run(p, {"data": data, "teacher": teacher}, out, context(tmp_path_factory.mktemp("s")))
    return out


def test_a_pass_in_bf16_says_nearly_the_same(data: Path, teacher: Path, tmp_path: Path) -> None:
    """Its distributions differ by far less than a draw of 12 tokens does; a small teacher has fp32 unless told."""
    from safetensors.torch import load_file

    kept = {}
    for precision in ("auto", "fp32", "bf16"):
        p = cache_logits.Params(files=FILES, selection="top_k", precision=precision)  # type: ignore[arg-type]
        facts = cache_logits.run(
            p, {"data": data, "teacher": teacher}, fresh(tmp_path / precision), context(tmp_path / f"{precision}.work")
        )
        kept[precision] = load_file(tmp_path / precision / "distributions.safetensors")
        assert facts["precision"] == ("bf16" if precision == "bf16" else "fp32")
    for name, tensor in kept["fp32"].items():
        assert torch.equal(tensor, kept["auto"][name])
    # (P, 12) probabilities, most likely first
    exact, rough = (kept[name]["weights"].float().reshape(-1, 12) for name in ("fp32", "bf16"))
    assert not torch.equal(exact, rough)
    assert (exact - rough).abs().max() < 0.02


def cache_of(z: torch.Tensor, samples: int, selection: str, temperature: float) -> logits.Cache:
    counts, ids, weights, entropy = cache_logits.draw(
        z, samples, selection, temperature, torch.Generator().manual_seed(5)
    )
    if selection == "sampled":
        weights = weights / samples
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return logits.Cache(offsets, ids, weights, entropy, {}, {}, selection, samples, temperature, "", z.shape[1])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_divergence_and_gradient_are_unbiased(temperature: float) -> None:
    """Over many draws of 6 tokens the mean is the full KL and its gradient, within four standard errors."""
    torch.manual_seed(0)
    z, student = torch.randn(40) * 2, torch.randn(40)
    many = 20_000
    cache = cache_of(z.expand(many, 40), 6, "sampled", temperature)
    own = student.clone().requires_grad_()
    each = logits.divergence(own.expand(many, 40), cache, torch.arange(many))
    each.mean().backward()
    full = student.clone().requires_grad_()
    p = (z / temperature).softmax(-1)
    wanted = (p * (p.log() - (full / temperature).log_softmax(-1))).sum()
    wanted.backward()
    assert each.mean().item() == pytest.approx(wanted.item(), abs=4 * each.std().item() / many**0.5)
    spread = (p / 6 / many).sqrt() / temperature
    assert bool(((own.grad - full.grad).abs() < 4.5 * spread + 1e-6).all())


def test_top_k_with_tail_is_the_exact_coarse_divergence() -> None:
    torch.manual_seed(0)
    z, student = torch.randn(9, 50) * 2, torch.randn(9, 50)
    got = logits.divergence(student, cache_of(z, 5, "top_k", 1.5), torch.arange(9))
    p, q = (z / 1.5).softmax(-1).double(), (student / 1.5).softmax(-1).double()
    for i in range(9):
        values, ids = p[i].topk(5)
        values = values.half().double()
        pp, qq = torch.cat([values, 1 - values.sum()[None]]), torch.cat([q[i, ids], 1 - q[i, ids].sum()[None]])
        assert float(got[i]) == pytest.approx(float((pp * (pp / qq).log()).sum()), abs=1e-5)


def test_all_tokens_listed_is_the_full_divergence() -> None:
    torch.manual_seed(0)
    z, student = torch.randn(4, 20), torch.randn(4, 20)
    got = logits.divergence(student, cache_of(z, 20, "top_k", 1.0), torch.arange(4))
    p = z.softmax(-1)
    wanted = (p * (p.log() - student.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(got, wanted, atol=3e-3, rtol=1e-2)  # probabilities are kept in float16


def test_file_agrees_with_the_teacher(cached: Path, teacher: Path, data: Path) -> None:
    """Entropy and draws of the first example, against the teacher run alone by transformers."""
    from transformers import AutoModelForCausalLM

    from slmops.train.encode import encode, load_tokenizer, read

    cache = logits.Cache.load(cached)
    encoded = encode(read({"data": data}, FILES)[:3], load_tokenizer(teacher), 64)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    at = 0
    for i in range(3):
        with torch.no_grad():
            z = model(torch.from_numpy(encoded.ids[i])[None]).logits[0, int(encoded.answer_from[i]) - 1 : -1]
        p = z.softmax(-1)
        for row in p:
            a, b = int(cache.offsets[at]), int(cache.offsets[at + 1])
            ids, weights = cache.ids[a:b], cache.weights[a:b]
            if cache.selection == "top_k":
                torch.testing.assert_close(weights, row.topk(12).values, atol=1e-3, rtol=1e-3)
            else:
                assert float(weights.sum()) == pytest.approx(1)
                assert float(cache.entropy[at]) == pytest.approx(float(-(row * row.log()).sum()), abs=1e-4)
                assert bool((row[ids] > 1e-7).all())
            at += 1
    check = json.loads((cached / "self_check.json").read_text())
    assert check["positions"] == len(cache.entropy)
    assert check["vocabulary_overlap"] == 1.0
    assert 0 < check["gold_answer_likelihood"] <= 1
    assert check["answer_cross_entropy"] < 0.5 * check["untrained_cross_entropy"]


def student(cached: Path, **changes: object) -> logits.Params:
    selection = json.loads((cached / "index.json").read_text())["selection"]
    train = Train(**(FAST.model_dump() | {"method": "logits", "logit_selection": selection, "epochs": 4.0} | changes))
    return logits.Params(training=train, architecture=TINY["qwen3"], files=FILES, validation="data/validation.jsonl")


def test_student_learns_from_distributions_alone(cached: Path, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    facts = logits.run(
        student(cached, logit_weight=1.0, epochs=10.0),
        {"data": data, "tokenizer": tokenizer, "logits": cached},
        fresh(tmp_path / "m"),
        context(tmp_path / "s"),
    )
    points = json.loads((tmp_path / "m/training.json").read_text())["points"]
    first = next(p["validation_loss"] for p in points if p["validation_loss"] is not None)
    assert facts["best_validation_loss"] < 0.5 * first


def test_no_weight_on_distributions_is_plain_training(
    cached: Path, data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    inputs = {"data": data, "tokenizer": tokenizer}
    p = student(cached, logit_weight=0.0, epochs=1.0)
    logits.run(p, inputs | {"logits": cached}, fresh(tmp_path / "a"), context(tmp_path / "s"))
    plain = FAST.model_copy(update={"epochs": 1.0})
    q = sft.Params(training=plain, architecture=p.architecture, files=p.files, validation=p.validation)
    sft.run(q, inputs, fresh(tmp_path / "b"), context(tmp_path / "t"))
    a, b = (json.loads((tmp_path / n / "training.json").read_text())["points"] for n in "ab")
    assert [x["train_loss"] for x in a] == pytest.approx([x["train_loss"] for x in b], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"temperature": 2.0}, "temperature"), ({"logit_samples": 5}, "logit_samples"), ({}, "not among the cached")],
)
def test_misaligned_caches_are_refused(
    changes: dict[str, object], message: str, cached: Path, data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    folder = data
    if not changes:
        folder = tmp_path / "data"
        write_rows(folder / "teacher.jsonl", examples(30, 11))
        write_rows(folder / "validation.jsonl", examples(5, 12))
    with pytest.raises(TrainingError, match=message) as error:
        logits.run(
            student(cached, **changes),
            {"data": folder, "tokenizer": tokenizer, "logits": cached},
            fresh(tmp_path / "m"),
            context(tmp_path / "s"),
        )
    assert error.value.hint


def test_another_tokenizer_is_refused(cached: Path, data: Path, teacher: Path, tmp_path: Path) -> None:
    other = fresh(tmp_path / "tokenizer")
    bpe.run(bpe.Params(vocabulary=300), {"data": data}, other, context(tmp_path / "s"))
    with pytest.raises(TrainingError, match="another tokenizer"):
        logits.run(
            student(cached),
            {"data": data, "tokenizer": other, "logits": cached},
            fresh(tmp_path / "m"),
            context(tmp_path / "s"),
        )
    with pytest.raises(TrainingError, match=r"different tokenizers \(\d+\.\d% of the vocabulary"):
        cache_logits.run(
            cache_logits.Params(files=FILES),
            {"data": data, "teacher": teacher, "tokenizer": other},
            fresh(tmp_path / "c"),
            context(tmp_path / "s"),
        )


def with_long_copies(folder: Path, data: Path, tokens: int) -> Path:
    """Gold messages, a copy of the first that fits and two of it that have more than `tokens` tokens."""
    first = examples(120)[0]
    copies = [replace(first.with_text(f"{first.text} {word}"), source="swap", parent=first.id)
              for word in ("please", "k7" * tokens, "x9" * tokens)]  # fmt: skip
    write_rows(folder / "augmented/train.jsonl", copies)
    shutil.copytree(data, folder / "data")
    return folder


@pytest.mark.parametrize("context_of_student", [64, 2048])
def test_copies_that_are_too_long_are_left_out_by_cache_and_training_alike(
    context_of_student: int, data: Path, teacher: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """Also where they would fit the student: its training sees the rows that its teacher saw."""
    folder = with_long_copies(tmp_path, data, 64)
    inputs = {"data": folder / "data", "augmented": folder / "augmented"}
    files, heard = (*FILES, "augmented/train.jsonl"), SilentProgress()
    p = cache_logits.Params(files=files)
    out, work = fresh(tmp_path / "cache"), context(tmp_path / "s")
    facts = cache_logits.run(p, inputs | {"teacher": teacher}, out, replace(work, progress=heard))
    assert (facts["examples"], facts["copies_left_out"]) == (121, 2)
    assert any("2 augmented copies are longer than the context" in line for line in heard.lines)
    architecture = TINY["qwen3"].model_copy(update={"context": context_of_student})
    q = student(out, epochs=0.2).model_copy(update={"files": files, "architecture": architecture})
    heard = SilentProgress()
    inputs |= {"tokenizer": tokenizer, "logits": out}
    facts = logits.run(q, inputs, fresh(tmp_path / "m"), replace(work, scratch=tmp_path / "t", progress=heard))
    assert (facts["examples"], facts["copies_left_out"]) == (121, 2)
    assert any("2 augmented copies are longer than the context" in line for line in heard.lines)


def test_an_example_that_is_too_long_and_no_copy_stays_an_error(data: Path, teacher: Path, tmp_path: Path) -> None:
    folder = with_long_copies(tmp_path, data, 64)
    rows = [json.loads(line) for line in (folder / "augmented/train.jsonl").read_text().splitlines()]
    (folder / "augmented/train.jsonl").write_text("".join(json.dumps(r | {"parent": ""}) + "\n" for r in rows))
    inputs = {"data": data, "augmented": folder / "augmented", "teacher": teacher}
    p = cache_logits.Params(files=(*FILES, "augmented/train.jsonl"))
    with pytest.raises(DataError, match=r"longer than the model's context.*1 more examples"):
        cache_logits.run(p, inputs, fresh(tmp_path / "cache"), context(tmp_path / "s"))


def test_pieces_change_nothing(data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the draws nor their order, wherever a batch is cut."""
    p, inputs = cache_logits.Params(files=FILES), {"data": data, "teacher": teacher}
    cache_logits.run(p, inputs, fresh(tmp_path / "a"), context(tmp_path / "s"))
    monkeypatch.setattr(pass_memory, "ROWS", 7)
    monkeypatch.setattr(pass_memory, "PIECE", 1)
    cache_logits.run(p, inputs, fresh(tmp_path / "b"), context(tmp_path / "t"))
    whole, cut = (load_file(tmp_path / name / "distributions.safetensors") for name in "ab")
    assert len(whole["ids"]) == len(cut["ids"])
    for name in ("offsets", "ids", "weights"):
        assert torch.equal(whole[name], cut[name])
    torch.testing.assert_close(whole["entropy"], cut["entropy"])


def test_cache_is_the_same_after_a_kill(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_logits, "SHARD", 1)
    p, inputs = cache_logits.Params(files=FILES, batch_size=16), {"data": data, "teacher": teacher}
    cache_logits.run(p, inputs, fresh(tmp_path / "a"), context(tmp_path / "s"))

    class Dies(SilentProgress):
        done = 0

        def advance(self, done: int = 1, note: str = "") -> None:
            self.done += 1
            if self.done == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_logits.run(p, inputs, fresh(tmp_path / "x"), Context(3, tmp_path / "t", tmp_path, 1, Dies()))
    kept = len(list((tmp_path / "t").glob("logits-*.pt")))
    assert kept == 3
    cache_logits.run(p, inputs, fresh(tmp_path / "b"), context(tmp_path / "t"))
    for name in ("distributions.safetensors", "index.json", "self_check.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
