"""The distillation shelf: each loss against a plain computation. What all methods promise is in test_contract.py."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmops.core.method import Context, SilentProgress
from slmops.core.spec import OnPolicy, Train, Transfer
from slmops.errors import TrainingError
from slmops.train import (
    cache_aligned,
    cache_logits,
    cross_tokenizer,
    hidden_states,
    network,
    on_policy,
)
from slmops.train import tokenizer as tokenizers
from slmops.train.batches import collate
from slmops.train.encode import Row, encode, load_tokenizer
from slmops.train.sample import sample
from tests.train import bases
from tests.train.conftest import examples, write_rows

FAST = {"epochs": 4, "batch_size": 16, "learning_rate": 1e-2, "evaluations": 3}
FILES = ("data/teacher.jsonl",)


@pytest.fixture(scope="session")
def folders(tokenizer: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Teachers (wider, deeper) and students of each architecture, and a student with a tokenizer of its own."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, role: str) -> Path:
        if (kind, role) not in made:
            out = tmp_path_factory.mktemp(f"{kind}-{role}")
            words = tokenizer
            if role == "foreign":
                words = out / "words"
                words.mkdir()
                tokenizers.run(tokenizers.Params(vocabulary=300), {"data": data}, words, Context(0, out, out))
            size = (
                {"hidden": 96, "layers": 3, "seed": 1} if role == "teacher" else {"hidden": 48, "layers": 2, "seed": 2}
            )
            made[kind, role] = bases.save(kind, words, out / "model", **size)
        return made[kind, role]

    return get


def ctx(folder: Path, progress: SilentProgress | None = None) -> Context:
    return Context(3, folder, folder, 1, progress or SilentProgress())


def encoded(folder: Path, count: int = 12) -> Any:
    return encode([Row(e, "f", i) for i, e in enumerate(examples(count))], load_tokenizer(folder), 128)


def run(
    method: str, kind: str, folders: Callable[[str, str], Path], data: Path, out: Path, scratch: Path, **training: Any
) -> dict:
    module = {"on_policy": on_policy, "hidden_states": hidden_states, "cross_tokenizer": cross_tokenizer}[method]
    out.mkdir(exist_ok=True)
    teacher = folders(kind, "teacher")
    inputs = {"data": data, "base": folders(kind, "foreign" if method == "cross_tokenizer" else "student")}
    if method == "cross_tokenizer":
        aligned = scratch.parent / "aligned"
        if not aligned.exists():
            aligned.mkdir()
            cache = cache_aligned.Params(files=FILES)
            cache_aligned.run(cache, inputs | {"teacher": teacher}, aligned, ctx(scratch))
        inputs["aligned"] = aligned
    else:
        inputs["teacher"] = teacher
    t = Train.model_validate(FAST | {"method": method, "on_policy": OnPolicy(max_new_tokens=6)} | training)
    params = module.Params(training=t, files=FILES, validation="data/validation.jsonl")
    return module.run(params, inputs, out, ctx(scratch))


@pytest.mark.parametrize("method", ["on_policy", "hidden_states"])
def test_a_teacher_with_another_tokenizer_is_refused(
    method: str, folders: Callable[[str, str], Path], data: Path, tmp_path: Path
) -> None:
    def other(kind: str, role: str) -> Path:
        return folders(kind, "foreign" if role == "student" else role)

    with pytest.raises(TrainingError, match="different tokenizers") as caught:
        run(method, "qwen3", other, data, tmp_path / "o", tmp_path / "s")
    assert "cross_tokenizer" in caught.value.hint


@pytest.mark.parametrize("method", ["on_policy", "hidden_states", "cross_tokenizer"])
def test_copies_that_the_teacher_cannot_see_whole_are_not_learned(
    method: str, folders: Callable[[str, str], Path], data: Path, tmp_path: Path
) -> None:
    """The student could: its context is longer. Cache and training agree on the rows."""
    teacher = tmp_path / "teacher"
    shutil.copytree(folders("qwen3", "teacher"), teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    first = examples(120)[0]
    copies = [
        replace(first.with_text(f"{first.text} {word}"), source="swap", parent=first.id) for word in ("yes", "k7" * 40)
    ]
    write_rows(tmp_path / "augmented/train.jsonl", copies)
    files, progress = (*FILES, "augmented/train.jsonl"), SilentProgress()
    inputs = {"data": data, "augmented": tmp_path / "augmented", "teacher": teacher}
    inputs["base"] = folders("qwen3", "foreign" if method == "cross_tokenizer" else "student")
    module = {"on_policy": on_policy, "hidden_states": hidden_states, "cross_tokenizer": cross_tokenizer}[method]
    (tmp_path / "out").mkdir()
    if method == "cross_tokenizer":
        (tmp_path / "aligned").mkdir()
        facts = cache_aligned.run(cache_aligned.Params(files=files), inputs, tmp_path / "aligned", ctx(tmp_path / "s"))
        assert (facts["examples"], facts["copies_left_out"]) == (121, 1)
        inputs["aligned"] = tmp_path / "aligned"
        del inputs["teacher"]
    t = Train.model_validate(FAST | {"method": method, "on_policy": OnPolicy(max_new_tokens=6), "max_steps": 2})
    params = module.Params(training=t, files=files, validation="data/validation.jsonl")
    facts = module.run(params, inputs, tmp_path / "out", ctx(tmp_path / "t", progress))
    assert (facts["examples"], facts["copies_left_out"]) == (121, 1)
    assert any(line.startswith("1 augmented copies") for line in progress.lines)


# ------------------------------------------------------------------------------------------------------- on-policy


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_is_the_definition(beta: float) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(7, 11).double().log_softmax(-1) for _ in range(2))
    p, q = teacher.exp(), student.exp()
    m = beta * p + (1 - beta) * q
    if beta in (0.0, 1.0):
        wanted = (p * (p / q).log()).sum(-1) if beta == 0 else (q * (q / p).log()).sum(-1)
    else:
        wanted = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(on_policy.jsd(student, teacher, beta), wanted)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_student_writes_what_transformers_would(kind: str, folders: Callable[[str, str], Path]) -> None:
    net = network.Network(network.load(folders(kind, "teacher")))
    assert net.path == "fast"
    data = encoded(folders(kind, "teacher"))
    prompts = [ids[: int(start)].tolist() for ids, start in zip(data.ids, data.answer_from, strict=True)]
    assert len({len(p) for p in prompts}) > 2
    got = sample(net, net.weights, prompts, 12, 4, 0.0, 0)
    for prompt, answer in zip(prompts, got, strict=True):
        with torch.no_grad():
            wanted = net.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=4)
        assert answer == wanted[0, len(prompt) :].tolist()
    ends = [answer[3] for answer in got]  # an end token that cuts rows at different places
    cut = sample(net, net.weights, prompts, 12, ends[0], 0.0, 0)
    for whole, part in zip(got, cut, strict=True):
        assert part == (whole[: whole.index(ends[0]) + 1] if ends[0] in whole else whole)


def test_sampling_follows_the_distribution_and_the_seed(folders: Callable[[str, str], Path]) -> None:
    net = network.Network(network.load(folders("llama", "teacher")))
    prompt = encoded(folders("llama", "teacher")).ids[0][:9].tolist()
    drawn = [row[0] for row in sample(net, net.weights, [prompt] * 4000, 1, 4, 0.7, 5)]
    with torch.no_grad():
        p = torch.softmax(net.model(torch.tensor([prompt])).logits[0, -1] / 0.7, -1)
    found = torch.bincount(torch.tensor(drawn), minlength=len(p)) / 4000
    top = p.topk(5).indices
    torch.testing.assert_close(found[top], p[top], atol=0.03, rtol=0.0)
    again, other = (sample(net, net.weights, [prompt] * 9, 5, 4, 1.0, seed) for seed in (5, 6))
    assert again == sample(net, net.weights, [prompt] * 9, 5, 4, 1.0, 5) != other


# --------------------------------------------------------------------------------------------------- hidden states


@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_inside_losses_are_their_definitions(kind: str, folders: Callable[[str, str], Path]) -> None:
    student, teacher = (network.Network(network.load(folders(kind, role))) for role in ("student", "teacher"))
    part = collate(encoded(folders(kind, "student")), range(6), 0.0, "bucket")
    heads = hidden_states.relation_heads(student.model.config, teacher.model.config, None)
    assert heads == 4
    insides = []
    for net in (student, teacher):
        with torch.no_grad(), hidden_states.watching(net) as inside:
            net.hidden(net.weights, part)
        insides.append(inside)
        states = net.model(input_ids=part.ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(inside.states[0], states[1], atol=1e-5, rtol=1e-4)
    ours, theirs = insides
    maps = hidden_states.make_maps(student, teacher, 0)
    rows, columns = part.where // part.ids.shape[1], part.where % part.ids.shape[1]
    far, apart = [], []
    for b, t in zip(rows.tolist(), columns.tolist(), strict=True):
        layers = []
        for layer, target in ((0, 1), (1, 2)):  # two layers look at the second and third of three
            want = theirs.states[target][b, t]
            error = maps[f"transfer.map.{layer}"] @ ours.states[layer][b, t] - want
            layers.append(error.pow(2).mean() / want.pow(2).mean())
        far.append(torch.stack(layers).mean())
        kinds = []
        for name in "qkv":
            log = []
            for inside in (ours, theirs):
                x = inside.relations[name][b, : t + 1]
                cut = x.view(t + 1, heads, -1)
                scores = torch.stack([cut[:, h] @ cut[t, h] / math.sqrt(cut.shape[-1]) for h in range(heads)])
                log.append(scores.log_softmax(-1))
            kinds.append((log[1].exp() * (log[1] - log[0])).sum(-1).mean())
        apart.append(torch.stack(kinds).mean())
    torch.testing.assert_close(hidden_states.distance(ours, theirs, maps, part.where), torch.stack(far))
    torch.testing.assert_close(
        hidden_states.divergence(ours, theirs, heads, part), torch.stack(apart), atol=1e-5, rtol=1e-4
    )


def test_relation_heads_that_do_not_fit_are_refused(
    folders: Callable[[str, str], Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="cannot be cut") as caught:
        run(
            "hidden_states", "llama", folders, data, tmp_path / "o", tmp_path / "s", transfer=Transfer(relation_heads=7)
        )
    assert "a divisor of" in caught.value.hint


# ------------------------------------------------------------------------------------------------- cross tokenizer


def test_cuts_are_found_at_characters_that_both_end() -> None:
    assert cache_aligned.cuts([(0, 3), (3, 4), (4, 5), (4, 5), (5, 9)]) == [3, 4, None, 5, 9]
    assert cache_aligned.common([3, 4, None, 5, 9], [1, 3, 5, 9]) == [(0, 1), (3, 2), (4, 3)]


def test_places_hold_what_the_teacher_thinks(folders: Callable[[str, str], Path], data: Path, tmp_path: Path) -> None:
    """Likelihoods and ranks of each chunk, from the teacher's own logits of the whole text."""
    from safetensors.torch import load_file

    teacher, student = folders("qwen3", "teacher"), folders("qwen3", "foreign")
    (tmp_path / "out").mkdir()
    params = cache_aligned.Params(files=FILES, ranks=340)
    facts = cache_aligned.run(
        params, {"data": data, "teacher": teacher, "base": student}, tmp_path / "out", ctx(tmp_path)
    )
    assert facts["examples"] < facts["places"] <= facts["student_tokens"]
    tensors = load_file(tmp_path / "out" / "aligned.safetensors")
    theirs, ours = load_tokenizer(teacher), load_tokenizer(student)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    at = 0
    for row, count in list(zip(examples(120), tensors["counts"].tolist(), strict=True))[:20]:
        prompt = theirs.apply_chat_template(row.prompt_messages(), add_generation_prompt=True)["input_ids"]
        answer = theirs(row.answer + "<|end|>", add_special_tokens=False)["input_ids"]
        own = ours(row.answer + "<|end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        begin, text = 0, ""
        for place in range(at, at + count):
            stop = int(tensors["ends"][place])
            text = ours.decode(own[: stop + 1])
            end = next(n for n in range(len(answer) + 1) if theirs.decode(answer[:n]) == text)
            positions = range(len(prompt) + begin, len(prompt) + end)
            wanted = sum(float(logp[p - 1, (prompt + answer)[p]]) for p in positions)
            assert float(tensors["likelihood"][place]) == pytest.approx(wanted, abs=1e-3)
            ranks = logp[len(prompt) + begin - 1].exp().sort(descending=True).values
            torch.testing.assert_close(
                tensors["ranks"][place], ranks[: tensors["ranks"].shape[1]], atol=1e-5, rtol=1e-3
            )
            begin = end
        assert text == row.answer + "<|end|>"
        at += count


def test_rank_distance_with_every_rank_is_uld() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(5, n).softmax(-1) for n in (9, 6))
    padded = torch.nn.functional.pad(q, (0, 3))
    wanted = (p.sort(descending=True).values - padded.sort(descending=True).values).abs().sum(-1)
    got = cross_tokenizer.rank_distance(p.sort(descending=True).values, padded.sort(descending=True).values)
    torch.testing.assert_close(got, wanted)
    some = cross_tokenizer.rank_distance(p.topk(3).values, padded.topk(3).values)
    assert (some <= wanted + 1e-6).all()


def test_chunk_loss_is_least_where_likelihoods_agree() -> None:
    p = torch.tensor([0.9, 0.2, 1e-9]).log()
    assert torch.allclose(cross_tokenizer.two_valued(p, p), torch.zeros(3))
    q = torch.tensor([0.6, 0.7, 0.5])
    wanted = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    assert float(cross_tokenizer.two_valued(p, q.log())[0]) == pytest.approx(wanted, rel=1e-5)


def test_an_alignment_for_another_student_is_refused(
    folders: Callable[[str, str], Path], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "aligned").mkdir()
    inputs = {"data": data, "teacher": folders("qwen3", "teacher"), "base": folders("qwen3", "student")}
    cache_aligned.run(cache_aligned.Params(files=FILES), inputs, tmp_path / "aligned", ctx(tmp_path))
    with pytest.raises(TrainingError, match="another student's tokenizer"):
        run("cross_tokenizer", "qwen3", folders, data, tmp_path / "o", tmp_path / "scratch")


# ------------------------------------------------------------------------------------------------ several teachers


def test_several_teachers_are_the_mean_of_their_distributions(
    folders: Callable[[str, str], Path], data: Path, tmp_path: Path
) -> None:
    """All tokens kept: what is cached is the weighted mean."""
    from safetensors.torch import load_file

    (tmp_path / "out").mkdir()
    inputs = {"data": data, "teacher": folders("qwen3", "teacher"), "teacher.b": folders("llama", "teacher")}
    params = cache_logits.Params(files=FILES, samples=400, selection="top_k", weights={"b": 3.0}, temperature=2.0)
    cache_logits.run(params, inputs, tmp_path / "out", ctx(tmp_path))
    kept = load_file(tmp_path / "out" / "distributions.safetensors")
    data_ = encoded(folders("qwen3", "teacher"), 1)
    ids, start = torch.from_numpy(data_.ids[0])[None], int(data_.answer_from[0])
    p = sum(
        share * (AutoModelForCausalLM.from_pretrained(inputs[name])(ids).logits[0, start - 1] / 2).softmax(-1)
        for name, share in (("teacher", 0.25), ("teacher.b", 0.75))
    )
    got = torch.zeros(len(p))
    got[kept["ids"][: kept["offsets"][1]].long()] = kept["weights"][: kept["offsets"][1]].float()
    torch.testing.assert_close(got, p.detach(), atol=1e-4, rtol=1e-2)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    with pytest.raises(TrainingError, match="another tokenizer than the first"):
        bad = inputs | {"teacher.b": folders("qwen3", "foreign")}
        cache_logits.run(params, bad, tmp_path / "out", ctx(tmp_path))
    assert index["teacher"] != cache_logits.folder_digest(inputs["teacher"])
