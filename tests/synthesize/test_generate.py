"""data.generate: distinct prompts, as many as asked for, the same for the same seed."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slmops.engines
from slmops.core.engine import Generation
from slmops.core.prompting import read_list, read_verdict
from slmops.core.spec import Endpoint, Generate, Task
from slmops.data import generate, join_prompts
from slmops.data.teacher import EngineTeacher
from slmops.engines.memory_engine import END, MemoryEngine
from slmops.engines.stand_in import StandIn
from slmops.errors import DataError, UsageError
from slmops.store.rows import read_rows

TASK = Task(type="classification")
WORDS = [f"word{n}" for n in range(40)]


class Sampler(MemoryEngine):
    """Writes user turns as a trained teacher would: three words, the end of the turn, and an answer that nobody wants."""

    def __init__(self, words=WORDS, tail="\nassistant: label"):
        super().__init__(lambda *_: "")
        self.words, self.tail, self.prefixes = words, tail, set()

    def generate(self, prompts, sampling, on_done=None):
        rng = random.Random(sampling.seed)
        done = []
        for prompt in prompts:
            self.prefixes.add(bytes(prompt).decode())
            tokens = (*(" ".join(rng.choice(self.words) for _ in range(3)) + self.tail).encode(), END)
            tokens = tokens[: sampling.max_new_tokens]
            done.append(Generation(self.decode(tokens), tokens, tokens[-1] == END))
        return done


def run(ctx, out, data, *, task=TASK, endpoint=None, teacher=None, **values):
    folder = out()
    params = generate.Params(generate=Generate.model_validate(values, strict=False), task=task, endpoint=endpoint)
    inputs = {"data": data} | ({"teacher": teacher} if teacher else {})
    facts = generate.run(params, inputs, folder, ctx)
    rows = read_rows(folder / "prompts.jsonl")
    return (
        [row["messages"][-1]["content"] for row in rows],
        json.loads((folder / "stats.json").read_text()),
        facts,
        folder,
    )


@pytest.fixture
def local(monkeypatch):
    def use(engine):
        monkeypatch.setattr(slmops.engines, "open_engine", lambda folder, threads: engine)
        return engine

    return use


def test_a_local_teacher_writes_user_turns_from_nothing(ctx, out, dataset, example, local, tmp_path):
    engine = local(Sampler())
    data = dataset(pool=[example("word1 word2 word3")], test=[example("TEST", "x")])
    texts, stats, _, folder = run(ctx, out, data, teacher=tmp_path, method="sample", count=700)
    assert len(texts) == len(set(texts)) == 700 and not stats["stalled"]
    assert engine.prefixes == {"user: "} and all(len(text.split()) == 3 for text in texts)
    assert read_rows(folder / "prompts.jsonl")[0] == {
        "messages": [{"role": "user", "content": texts[0]}],
        "source": "sample",
    }
    assert run(ctx, out, data, teacher=tmp_path, method="sample", count=700)[0] == texts
    ctx.seed += 1
    assert run(ctx, out, data, teacher=tmp_path, method="sample", count=700)[0] != texts


@pytest.mark.parametrize("instruction", ["", "Pick one."])
def test_parts_differ_and_are_joined_without_what_they_share(instruction, ctx, out, dataset, example, local, tmp_path):
    local(Sampler())
    task = Task(type="classification", instruction=instruction)
    wanted = Generate.model_validate({"method": "sample", "count": 300}, strict=False)
    data = dataset(pool=[example("word1 word2 word3")])
    inputs, texts = {"data": data}, []
    for part in range(3):
        folder = out()
        params = generate.Params(generate=wanted, task=task, part=part, parts=3)
        generate.run(params, {"data": data, "teacher": tmp_path}, folder, ctx)
        inputs[f"prompts.{part + 1}"] = folder
        texts.append([row["messages"][-1]["content"] for row in read_rows(folder / "prompts.jsonl")])
        assert len(texts[-1]) == 115
    assert len(set(texts[0]) & set(texts[1])) < 30, "each has a seed of its own"
    (inputs["prompts.2"] / "prompts.jsonl").open("a").write((inputs["prompts.1"] / "prompts.jsonl").read_text())
    folder = out()
    facts = join_prompts.run(join_prompts.Params(generate=wanted, task=task), inputs, folder, ctx)
    rows = read_rows(folder / "prompts.jsonl")
    joined = [row["messages"][-1]["content"] for row in rows]
    assert len(joined) == len(set(joined)) == 300 == facts["kept"] and facts["parts"] == 3
    assert joined[:2] == [texts[0][0], texts[1][0]] and set(joined) <= {text for part in texts for text in part}
    assert all(len(row["messages"]) == 1 + bool(instruction) and row["source"] == "sample" for row in rows)
    few = join_prompts.run(
        join_prompts.Params(generate=wanted.model_copy(update={"count": 900}), task=task), inputs, out(), ctx
    )
    assert few["stalled"] and any("no more that differ" in line for line in ctx.progress.lines)


def test_the_instruction_stands_before_a_sampled_turn(ctx, out, dataset, local, tmp_path):
    engine = local(Sampler())
    task = Task(type="classification", instruction="Pick one.")
    *_, folder = run(ctx, out, dataset(), task=task, teacher=tmp_path, method="sample", count=5)
    assert engine.prefixes == {"system: Pick one.\nuser: "}
    assert read_rows(folder / "prompts.jsonl")[0]["messages"][0] == {"role": "system", "content": "Pick one."}


def test_turns_without_an_end_are_left_out(ctx, out, dataset, local, tmp_path):
    local(Sampler(tail=" and so on" * 30))
    with pytest.raises(DataError, match="unfinished") as caught:
        run(ctx, out, dataset(), teacher=tmp_path, method="sample", count=10)
    assert "prompt_weight" in caught.value.hint


def test_a_dry_source_ends_with_fewer(ctx, out, dataset, example, local, tmp_path):
    local(Sampler(words=["a", "b"]))
    data = dataset(pool=[example("A a, a!")])
    texts, stats, facts, _ = run(ctx, out, data, teacher=tmp_path, method="sample", count=50)
    assert len(texts) == 7 and "a a a" not in texts and stats["stalled"] and facts["kept"] == 7
    assert stats["dropped"]["in_data"] > 0 and stats["dropped"]["repeated"] > 0
    assert any("ran dry" in line for line in ctx.progress.lines)


def test_where_the_users_words_begin(ctx):
    class Template(MemoryEngine):
        """A template in which the space before the words belongs to them, as some tokenizers have it."""

        def encode(self, messages):
            ids = []
            for message in messages:
                ids += [300, 301] if message["role"] == "system" else [302]
                ids += [hash(" " + word) % 10**6 + 1000 for word in message["content"].split()] + [303]
            return [*ids, 304]

    teacher = EngineTeacher(Template(lambda *_: ""), ctx)
    assert generate.user_turn(teacher, "") == ([302], 303)
    assert generate.user_turn(teacher, "be kind")[0][:2] == [300, 301]
    assert generate.user_turn(EngineTeacher(MemoryEngine(lambda *_: ""), ctx), "") == (list(b"user: "), ord("\n"))


def writer(count=5):
    """An instruct model that numbers its messages on and on."""
    made = iter(range(10**6))
    return lambda messages: json.dumps([f"new message {next(made)}" for _ in range(count)])


@pytest.mark.parametrize("method", ["paraphrase", "evolve", "seed"])
def test_an_endpoint_writes_prompts_and_a_second_run_pays_nothing(ctx, out, dataset, example, method):
    data = dataset(
        gold=[example(f"gold {n}", "ab"[n % 2], system="Be kind.") for n in range(8)],
        pool=[example(f"pool {n}", system="Be kind.") for n in range(8)],
        test=[example("SECRET TEST", "a")],
    )
    desk = StandIn(writer())
    task = Task(type="classification", instruction="Be kind.")
    with desk.serve() as url:
        endpoint = Endpoint(url=url, model="big")
        texts, stats, _, folder = run(ctx, out, data, task=task, endpoint=endpoint, method=method, count=40)
        assert len(set(texts)) == 40 and not stats["stalled"]
        paid = len(desk.requests)
        assert run(ctx, out, data, task=task, endpoint=endpoint, method=method, count=40)[0] == texts
        assert len(desk.requests) == paid <= 12
    assert not any("SECRET" in json.dumps(request.body) for request in desk.requests)
    row = read_rows(folder / "prompts.jsonl")[0]
    assert row["source"] == method and [m["role"] for m in row["messages"]] == ["system", "user"]


def test_a_rewrite_keeps_the_rest_of_the_conversation(ctx, out, dataset):
    from slmops.core.example import Example, Message

    talk = Example((Message("user", "hi"), Message("assistant", "hello"), Message("user", "and my parcel?")))
    with StandIn(writer()).serve() as url:
        *_, folder = run(
            ctx, out, dataset(pool=[talk]), endpoint=Endpoint(url=url, model="m"), method="paraphrase", count=3
        )
    row = read_rows(folder / "prompts.jsonl")[0]
    assert [m["content"] for m in row["messages"][:2]] == ["hi", "hello"] and row["messages"][2]["content"].startswith(
        "new"
    )


def test_a_writer_that_repeats_itself_stalls(ctx, out, dataset, example):
    with StandIn(lambda _messages: '["always the same"]').serve() as url:
        texts, stats, _, _ = run(
            ctx, out, dataset(gold=[example("g", "a")]), endpoint=Endpoint(url=url, model="m"), method="seed", count=30
        )
    assert texts == ["always the same"] and stats["stalled"]


def test_what_cannot_work_is_refused_before_anything_is_asked(ctx, out, dataset, example):
    desk = StandIn(writer())
    with desk.serve() as url:
        with pytest.raises(UsageError, match="from nothing"):
            run(ctx, out, dataset(), endpoint=Endpoint(url=url, model="m"), method="sample")
        with pytest.raises(DataError, match="prompts to start from"):
            run(ctx, out, dataset(), endpoint=Endpoint(url=url, model="m"), method="evolve")
    assert not desk.requests
    with pytest.raises(UsageError, match="needs a teacher"):
        run(ctx, out, dataset(gold=[example("g", "a")]), method="seed")


SLOTS = {
    "item": ["parcel", "letter", "box"],
    "day": ["today", "on monday"],
    "hello": ["hi", "hello", "hey", "dear all"],
}


def test_templates_fill_every_slot_without_repeating(ctx, out, dataset):
    templates = ["{hello}, where is my {item}?", "my {item} should be here {day}"]
    texts, stats, _, _ = run(ctx, out, dataset(), method="template", templates=templates, slots=SLOTS, count=100)
    assert len(texts) == len(set(texts)) == 12 + 6 and stats["stalled"]
    some = run(ctx, out, dataset(), method="template", templates=templates, slots=SLOTS, count=7)[0]
    assert some == texts[:7] and {text.startswith("my") for text in some} == {True, False}


@pytest.mark.parametrize(
    ("templates", "slots", "words"),
    [
        ([], {}, "needs templates"),
        (["{thing}"], {}, "{thing}"),
        (["{item}"], {"item": []}, "{item}"),
        (["{item}"], SLOTS, "no template"),
        (["{item"], SLOTS, "cannot be read"),
        (["{}"], SLOTS, "without a name"),
        (["{item.upper}"], SLOTS, "without a name"),
    ],
)
def test_templates_that_do_not_fit_their_slots(ctx, out, dataset, templates, slots, words):
    with pytest.raises(UsageError, match=words):
        run(ctx, out, dataset(), method="template", templates=templates, slots=slots)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers())
def test_a_template_gives_all_its_fillings(sizes, seed):
    slots = {f"s{n}": [f"v{n}x{k}" for k in range(size)] for n, size in enumerate(sizes)}
    values = {"method": "template", "templates": [" ".join(f"{{{name}}}" for name in slots)], "slots": slots}
    filled = list(generate._fill(Generate.model_validate(values, strict=False), seed))
    product = 1
    for size in sizes:
        product *= size
    assert len(filled) == len(set(filled)) == product


@pytest.mark.parametrize(
    "reply",
    [
        '["where is it", "is it \\"lost\\""]',
        'Sure!\n```json\n["where is it", "is it \\"lost\\""]\n```',
        '1. where is it\n2) is it "lost"',
        '- where is it\n- is it "lost"\n',
        'Here they are:\n"where is it",\n"is it "lost"",',
        '<think>[1]</think>["where is it", "is it \\"lost\\""]',
    ],
)
def test_lists_are_read_however_they_are_written(reply):
    assert read_list(reply) == ["where is it", 'is it "lost"']


@pytest.mark.parametrize(
    ("reply", "verdict"), [("yes", True), ("**No**, because", False), (" Yes.", True), ("nobody", None), ("", None)]
)
def test_verdicts(reply, verdict):
    assert read_verdict(reply) is verdict


@pytest.mark.slow
def test_a_real_tokenizer_and_template(ctx, out, dataset, example, tmp_path):
    """A random Llama with slmops' own tokenizer: messages are sampled after `<|user|>` and end with `<|end|>`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from slmops.train import tokenizer

    words = [example(f"where is my {thing} {n}", "parcel") for n, thing in enumerate(["box", "letter", "parcel"] * 9)]
    model = tmp_path / "model"
    model.mkdir()
    tokenizer.run(tokenizer.Params(vocabulary=300), {"data": dataset(gold=words)}, model, ctx)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(model)
    loaded = AutoTokenizer.from_pretrained(model)
    engine = slmops.engines.open_engine(model, threads=1)
    expected = [loaded.convert_tokens_to_ids("<|user|>")], loaded.convert_tokens_to_ids("<|end|>")
    assert generate.user_turn(EngineTeacher(engine, ctx), "") == expected
    prefix, end = generate.user_turn(EngineTeacher(engine, ctx), "Be kind.")
    assert loaded.decode(prefix) == "<|system|>Be kind.<|end|><|user|>" and end == expected[1]
    engine.close()
    values = {"teacher": model, "method": "sample", "count": 20, "max_new_tokens": 60, "temperature": 1.0}
    texts, stats, _, _ = run(ctx, out, dataset(), **values)
    assert len(texts) == 20 and not any("<|" in text for text in texts)
    assert stats["dropped"]["unfinished"] > 0
    assert run(ctx, out, dataset(), **values)[0] == texts
