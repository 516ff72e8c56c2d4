"""The engines beside ONNX Runtime, and what all of them do alike: hidden states, adapters, threads."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.core.engine import Sampling
from slmops.engines import minimal, open_engine
from slmops.engines.gguf_tokenizer import GgufTokenizer, tokenizer_of
from slmops.engines.minimal import write_minimal
from slmops.engines.plain_tokenizer import PlainTokenizer
from slmops.errors import MissingExtraError, ModelError, UsageError
from slmops.serve.adapters import find_adapters
from slmops.serve.engines import Rows, kind_of, load, open_rows
from slmops.serve.model import Ask, Model, Settings
from slmops.serve.pool import Pool
from slmops.serve.sampling import Picking
from slmops.serve.saying import saying
from slmops.serve.scheduler import Request, RequestError, Scheduler
from slmops.serve.tools import Tool
from tests.serve.conftest import Converted
from tests.serve.live import live
from tests.serve.test_scheduler import CHUNK, answers, requests
from tests.train import bases

QUANTISED = [("llama", "gguf-q8_0"), ("qwen3", "gguf-q4_0"), ("phi3", "gguf-q8_0"), ("gemma3", "gguf-q8_0")]
WHOLE = [
    ("llama", "gguf-fp32"),
    ("gemma3", "gguf-fp32"),
    ("llama", "source"),
    ("gemma3", "source"),
    ("qwen3", "source"),
]


def named(cases: Sequence[tuple[str, str]]) -> Any:
    return pytest.mark.parametrize("kind", cases, ids="-".join)


@pytest.mark.slow
@named([*QUANTISED, ("llama", "source"), ("gemma3", "source")])
def test_an_answer_is_bit_for_bit_what_it_is_alone(converted: Converted, kind: tuple[str, str]) -> None:
    folder = converted(*kind)
    rows, alone = (open_rows(folder, rows=n, context=64) for n in (5, 1))
    for seed in range(3):
        random_ = random.Random(seed)
        wanted = requests(random_, 16, rows.vocabulary, rows.context_length)
        together = answers(Scheduler(rows, chunk=CHUNK), wanted, random_)
        for request in wanted:
            if request.id in together:
                assert answers(Scheduler(alone, chunk=CHUNK), [request])[request.id] == together[request.id], request
        assert {r.id for r in wanted if r.id > 0} <= set(together)
    rows.close()
    alone.close()


@pytest.mark.slow
@named([*QUANTISED, *WHOLE])
def test_greedy_answers_are_those_of_the_runtime_alone(converted: Converted, kind: tuple[str, str]) -> None:
    folder = converted(*kind)
    random_ = random.Random(1)
    rows, engine = open_rows(folder, rows=5, context=64), open_engine(folder)
    wanted = [
        replace(r, id=abs(r.id), how=Picking(), ignore_end=False, most=20)
        for r in requests(random_, 12, rows.vocabulary, 60)
    ]
    found = answers(Scheduler(rows), wanted, random_)
    for request in wanted:
        room = min(request.most, rows.context_length - len(request.prompt))
        (expected,) = engine.generate([request.prompt], Sampling(max_new_tokens=room))
        assert tuple(p.token for p in found[request.id][0]) == expected.tokens
        assert (found[request.id][1] == "stop") == expected.finished
    rows.close()
    engine.close()


@pytest.mark.slow
def test_rows_of_llama_cpp_grow_with_what_they_hold(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers before, over and after it are those of rows that had the room from the start."""
    from slmops.convert import gguf
    from slmops.core.method import Context
    from slmops.serve.engines import llama_cpp

    base = bases.save("llama", converted("llama", "source"), tmp_path / "base", context=1024)
    out = tmp_path / "out"
    out.mkdir()
    gguf.run(gguf.Params(precision="q8_0"), {"model": base}, out, Context(0, out, out))
    random_ = random.Random(0)
    lengths = (20, 300, 240, 700, 5)
    wanted = [
        Request(n, tuple(random_.randrange(5, 200) for _ in range(length)), 40, Picking(logprobs=0), ignore_end=True)
        for n, length in enumerate(lengths, 1)
    ]
    found = []
    for room in (256, 1024):
        monkeypatch.setattr(llama_cpp, "SMALLEST", room)
        rows = llama_cpp.LlamaCppRows(out, rows=3)
        assert rows._room == room
        found.append(answers(Scheduler(rows), wanted))
        assert rows._room >= 768
        rows.close()
    assert found[0] == found[1] and len(found[0]) == len(wanted)
    alone = llama_cpp.LlamaCppRows(out, rows=1)
    assert {r.id: answers(Scheduler(alone), [r])[r.id] for r in wanted} == found[0]
    alone.close()


@pytest.mark.slow
@named([(arch, form) for arch in ("llama", "gemma3") for form in ("fp32", "gguf-fp32", "source")] + [("qwen3", "fp32")])
def test_embeddings_are_the_mean_of_transformers_hidden_states(converted: Converted, kind: tuple[str, str]) -> None:
    """Also when a text is read in parts, and answers go on as if none had been asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted(kind[0], "source"), dtype=torch.float32)
    random_ = random.Random(4)
    rows, other = (open_rows(converted(*kind), rows=2) for _ in range(2))
    for engine in (rows, other):
        engine.feed(0, [7, 8, 9])
    for length in (1, 20, 128):
        ids = [random_.randrange(5, 200) for _ in range(length)]
        with torch.inference_mode():
            mean = model.base_model(torch.tensor([ids])).last_hidden_state[0].double().mean(0).numpy()
        vector = list(rows.embed(ids))[-1]
        assert vector is not None
        assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-4)
    for token in (9, 10):
        assert np.array_equal(rows.decode({0: token})[0], other.decode({0: token})[0])
    rows.close()
    other.close()


def test_a_graph_without_a_last_normalisation_has_no_hidden_states_but_still_answers(tmp_path: Path) -> None:
    import onnx

    write_minimal(tmp_path, "onnx_genai")
    graph = onnx.load(tmp_path / "model.onnx")
    head = graph.graph.node[-1]
    graph.graph.node.insert(
        len(graph.graph.node) - 1, onnx.helper.make_node("Mul", ["two", head.input[0]], ["doubled"])
    )
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.full(1, 2, np.float32), "two"))
    graph.graph.node[-1].input[0] = "doubled"
    onnx.save(graph, tmp_path / "model.onnx")
    rows = open_rows(tmp_path, rows=1)
    with pytest.raises(RequestError, match="hidden states"):
        next(rows.embed([7, 8]))
    assert rows.feed(0, [7, 8]).shape == (rows.vocabulary,)


Forms = Callable[[str], tuple[Path, dict[str, Path], dict[str, Path]]]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """By engine: a model, places of two adapters, and folders with each merged in (and of the base)."""
    from slmops.convert import gguf_lora, onnx_adapters
    from slmops.core.method import Context
    from slmops.engines.minimal import _write_tokenizer

    work = tmp_path_factory.mktemp("adapted")
    (work / "words").mkdir()
    _write_tokenizer(work / "words")
    base = bases.save("qwen3", work / "words", work / "base")
    merged = {
        "cards": bases.adapter(base, work / "cards", rank=4, seed=1),
        "mail": bases.adapter(base, work / "mail", rank=7, seed=2, targets=("q_proj", "v_proj", "down_proj")),
    }
    inputs = {"base": base} | {f"adapter.{name}": folder for name, folder in merged.items()}
    data = work / "data"
    data.mkdir()
    row = '{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}\n'
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text(row * 4, "utf-8")

    def get(engine: str) -> tuple[Path, dict[str, Path], dict[str, Path]]:
        whole = {"": base, **merged}
        if engine == "torch":
            return base, merged, whole
        out = work / engine
        if not out.exists():
            out.mkdir()
            context = Context(0, out, out)
            if engine == "onnx":
                given = inputs | {f"data.{name}": data for name in merged}
                onnx_adapters.run(onnx_adapters.Params(precision="fp32", fidelity_prompts=2), given, out, context)
            else:
                gguf_lora.run(gguf_lora.Params(base=engine.removeprefix("gguf-")), inputs, out, context)  # type: ignore[arg-type]
        return out, {}, whole

    return get


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "gguf-fp32", "gguf-q8_0", "torch"])
def test_an_adapter_s_answer_is_its_own_beside_those_of_others(adapted: Forms, engine: str) -> None:
    """Bit for bit as alone (less llama.cpp in float32: token for token); in float32 the tokens of the merged model."""
    model, given, merged = adapted(engine)
    random_ = random.Random(3)
    rows, alone = (
        open_rows(model, rows=n, context=64, adapters=find_adapters(model, kind_of(model), given)) for n in (5, 1)
    )
    assert rows.adapters == {"cards", "mail"}
    wanted = [
        replace(r, adapter=random_.choice((None, "cards", "mail")))
        for r in requests(random_, 24, rows.vocabulary, rows.context_length)
    ]
    together = answers(Scheduler(rows, chunk=CHUNK), wanted, random_)
    for request in wanted:
        if request.id in together:
            found = answers(Scheduler(alone, chunk=CHUNK), [request])[request.id]
            assert tokens(found) == tokens(together[request.id])
            assert engine == "gguf-fp32" or found == together[request.id]
    if engine != "gguf-q8_0":
        torch = {name: open_engine(folder) for name, folder in merged.items()}
        greedy = [Request(n, r.prompt[:40], 12, adapter=r.adapter) for n, r in enumerate(wanted)]
        found_all = answers(Scheduler(rows), greedy, random_)
        kinds = set()
        for request in greedy:
            (expected,) = torch[request.adapter or ""].generate([request.prompt], Sampling(max_new_tokens=12))
            assert tuple(p.token for p in found_all[request.id][0]) == expected.tokens
            kinds.add((request.adapter, expected.tokens))
        assert len({kind for kind, _ in kinds}) == 3
    embedded = [list(rows.embed([7, 8, 9], name))[-1] for name in (None, "cards", "mail", None)]
    assert np.array_equal(embedded[0], embedded[3]) and not np.allclose(embedded[0], embedded[1], atol=1e-3)  # type: ignore[arg-type]
    rows.close()
    alone.close()


def tokens(answer: Any) -> list[int]:
    return [picked.token for picked in answer[0]]


@pytest.mark.slow
def test_what_one_adapter_read_is_not_used_for_another(adapted: Forms) -> None:
    model, given, _ = adapted("torch")
    rows = open_rows(model, rows=1, adapters=find_adapters(model, "torch", given))
    scheduler, prompt = Scheduler(rows, chunk=8), tuple(range(5, 35))
    cached = []
    for id, adapter in enumerate(("cards", "cards", None, "mail", "mail")):
        scheduler.submit(Request(id, prompt, 1, adapter=adapter))
        while scheduler.busy or scheduler.waiting:
            cached += [progress.cached for progress in scheduler.step()]
    assert cached == [0, 24, 0, 0, 24]
    with pytest.raises(RequestError, match="no adapter main") as caught:
        scheduler.submit(Request(9, prompt, 1, adapter="main"))
    assert "cards, mail" in str(caught.value.hint)


@pytest.mark.slow
def test_a_model_with_an_adapter_has_a_name_of_its_own(adapted: Forms) -> None:
    """Beside others at the same time, in the model's process; embeddings too."""
    model, _, merged = adapted("gguf-fp32")
    prompt = list(range(5, 30))

    async def main() -> None:
        pool = Pool([Settings(model, "desk", rows=3)])
        assert pool.names == ["desk", "desk+cards", "desk+mail"] and pool.find("desk+none") is None
        models = {name: pool.find(name) for name in pool.names}
        try:
            answered = await asyncio.gather(*(written(model) for model in models.values()))
            told = [(await model.embed([prompt, [9]]))[0] for model in models.values() if model]
        finally:
            await pool.stop()
        for name, found in zip(models, answered, strict=True):
            (expected,) = open_engine(merged[name[5:]]).generate([prompt], Sampling(max_new_tokens=12))
            assert tuple(found) == expected.tokens
        assert models["desk+mail"] is not None and models["desk+mail"].settings.name == "desk+mail"
        direct = open_rows(model, rows=1, adapters=find_adapters(model, "llama_cpp", {}))
        for name, vector in zip((None, "cards", "mail"), told, strict=True):
            assert vector == pytest.approx(list(direct.embed(prompt, name))[-1], abs=1e-6)

    async def written(model: Model | None) -> list[int]:
        assert model is not None
        return [piece.token async for piece in model.answer(Ask(prompt, 12))]

    asyncio.run(asyncio.wait_for(main(), 120))


def test_an_adapter_in_another_form_is_refused_and_says_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "tone.bin").touch()
    for kind, wanted in (("onnx", "onnx_adapter"), ("llama_cpp", "GGUF"), ("torch", "PEFT")):
        with pytest.raises(ModelError, match="is no adapter") as caught:
            find_adapters(tmp_path, kind, {"tone": tmp_path / "tone.bin"})  # type: ignore[arg-type]
        assert wanted in str(caught.value.hint)
    with pytest.raises(ModelError, match="no adapter can be called"):
        find_adapters(tmp_path, "torch", {"a+b": tmp_path})


def test_the_command_names_adapters_by_model() -> None:
    from slmops.cli.serve import adapters_of

    found = adapters_of(["desk+tone=a/b", "desk+formal=c", "x+y+tone=d=e"], ["desk", "x+y"])
    assert found == {"desk": {"tone": Path("a/b"), "formal": Path("c")}, "x+y": {"tone": Path("d=e")}}
    for text, said in (("tone=a", "NAME+ADAPTER"), ("dask+tone=a", "no model dask"), ("desk+tone", "NAME")):
        with pytest.raises(UsageError) as caught:
            adapters_of([text], ["desk"])
        assert said in f"{caught.value.message} {caught.value.hint}"
    with pytest.raises(UsageError, match="there already"):
        adapters_of(["desk+tone=a", "desk+tone=b"], ["desk"])


@pytest.mark.slow
def test_a_gguf_file_brings_its_own_tokenizer(converted: Converted, tmp_path: Path) -> None:
    source, folder = converted("qwen3", "source"), converted("qwen3", "gguf-q8_0")
    file = tmp_path / "some-Q8_0.gguf"
    file.write_bytes((folder / "model.gguf").read_bytes())
    (tmp_path / "other-Q8_0.gguf").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("of the other one", "utf-8")
    own, known = tokenizer_of(file, "serve"), PlainTokenizer(source, "serve")
    assert isinstance(own, GgufTokenizer) and own.size == known.size
    messages = [{"role": "user", "content": "where is my parcel? ü 日本 <|end|>"}]
    assert own.encode(messages) == known.encode(messages)
    ids = own.ids("a ü 日本<|end|>b")
    assert ids == known.ids("a ü 日本<|end|>b")
    assert own.decode(ids) == known.decode(ids) == "a ü 日本b"
    end = own.id_of("<|end|>")
    assert end == known.id_of("<|end|>") and end is not None and own.token(end) == known.token(end) == "<|end|>"
    assert own.id_of("no such token") is None
    assert kind_of(file) == "llama_cpp"


def test_a_gguf_file_by_itself_can_be_told_of_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra `llamacpp`")
    monkeypatch.setattr(minimal, "SPECIAL", (*minimal.SPECIAL[:3], "[TOOL_CALLS]", "<|end|>"))
    monkeypatch.setattr(minimal, "TEMPLATE", minimal.TEMPLATE + "{% if tools %}[TOOL_CALLS] [{{ tools }}]{% endif %}")
    minimal.write_minimal(tmp_path, "llama_cpp")
    (tmp_path / "plain").mkdir()
    minimal._write_tokenizer(tmp_path / "plain")
    own, known = tokenizer_of(tmp_path / "model.gguf", "serve"), PlainTokenizer(tmp_path / "plain", "serve")
    assert own.template == known.template and "TOOL_CALLS" in own.template
    assert [own.special(id) for id in range(-1, own.size + 1)] == [known.special(id) for id in range(-1, own.size + 1)]
    said = saying(own, [Tool("add")], must=True)
    assert said == saying(known, [Tool("add")], must=True) and said.shown == {3}


def test_a_gguf_file_by_itself_is_shown_and_answers_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra `llamacpp`")
    monkeypatch.setattr(minimal, "CONTEXT", 256)
    minimal.write_minimal(tmp_path, "llama_cpp")
    with live(tmp_path / "model.gguf", rows=1) as server:
        shown = server.client.post("/api/show", json={"model": "tiny"})
        assert shown.status_code == 200 and shown.json()["template"] == minimal.TEMPLATE
        form = {"type": "json_schema", "json_schema": {"name": "one", "schema": {"enum": [["a", 1]]}}}
        said = server.chat(response_format=form, max_tokens=20)
        assert said.status_code == 200, said.text
        assert json.loads(said.json()["choices"][0]["message"]["content"]) == ["a", 1]


def test_a_model_with_an_adapter_is_listed(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_minimal(tmp_path / "m", "onnx_genai")
    tone = tmp_path / "tone.onnx_adapter"
    tone.touch()
    with live(tmp_path / "m", load="demand", adapters={"tone": tone}) as server:
        cards = server.client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["tiny", "tiny+tone"]
        assert server.client.get("/v1/models/tiny+tone").json() == cards[1]
        assert [one["name"] for one in server.client.get("/api/tags").json()["models"]] == [
            "tiny:latest",
            "tiny+tone:latest",
        ]


def test_the_folder_says_which_engine_and_another_is_refused(tmp_path: Path) -> None:
    for runtime, kind in (("onnx_genai", "onnx"), ("torch", "torch"), ("llama_cpp", "llama_cpp")):
        folder = tmp_path / runtime
        folder.mkdir()
        write_minimal(folder, runtime)  # type: ignore[arg-type]
        assert kind_of(folder) == kind_of(folder, kind) == kind
    with pytest.raises(ModelError, match="is a model for torch, not for onnx"):
        kind_of(tmp_path / "torch", "onnx")
    (tmp_path / "pte").mkdir()
    (tmp_path / "pte" / "model.pte").touch()
    with pytest.raises(ModelError, match="does not run"):
        kind_of(tmp_path / "pte")


@pytest.mark.parametrize(
    ("runtime", "module", "extra"),
    [
        ("llama_cpp", "llama_cpp", "llamacpp"),
        ("torch", "transformers", "train"),
        ("onnx_genai", "onnxruntime", "runtime"),
    ],
)
def test_a_runtime_that_is_missing_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, module: str, extra: str
) -> None:
    write_minimal(tmp_path, runtime)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        open_rows(tmp_path, rows=1)
    assert f"slmops[{extra}]" in str(caught.value.hint)


def test_threads_are_measured_once_for_a_model_on_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_minimal(tmp_path, "onnx_genai")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "cores", lambda: 3)
    timed: list[int] = []

    def steps(engine: Rows, threads: int, best: float) -> float:
        timed.append(threads)
        engine.use_threads(threads)
        return {1: 1.0, 2: 0.6, 3: 0.59}[threads]

    monkeypatch.setattr(load, "_steps", steps)
    job = {"folder": str(tmp_path), "rows": 2, "context": None, "threads": 0, "engine": "onnx"}
    for _ in range(2):
        engine, threads = load.load(job)
        assert threads == 2 and engine.feed(0, [7]).shape == (engine.vocabulary,)
        assert timed == [1, 2, 3]
    assert load.load({**job, "threads": 3})[1] == 3
    assert load.load({**job, "rows": 3})[1] == 2 and timed == [1, 2, 3] * 2
    (tmp_path / "cache" / "slmops" / "threads.json").write_text("[]", "utf-8")
    assert load.load(job)[1] == 2 and load.load(job)[1] == 2 and timed == [1, 2, 3] * 3


def test_more_threads_only_where_they_are_worth_it() -> None:
    assert load.fastest({1: 1.0, 2: 0.97, 3: 0.8, 4: 0.79}) == 3
    assert load.fastest({1: 1.0, 2: 1.4}) == 1
    assert (
        load.candidates(1) == [1] and load.candidates(2) == [1, 2] and load.candidates(16) == [1, 2, 3, 4, 6, 9, 13, 16]
    )


def test_timing_gives_up_what_is_far_slower_and_leaves_the_rows_empty(tmp_path: Path) -> None:
    write_minimal(tmp_path, "onnx_genai")
    rows = open_rows(tmp_path, rows=3)
    asked: list[int] = []
    decode = rows.decode
    rows.decode = lambda tokens: asked.append(len(tokens)) or decode(tokens)  # type: ignore[method-assign, func-returns-value]
    assert load._steps(rows, 2) > 0 and len(asked) == load.TIMES * (load.STEPS + 1)
    assert load._steps(rows, 1, best=1e-9) > 0 and len(asked) == load.TIMES * (load.STEPS + 1) + 2, "given up at once"
    assert [rows.length(n) for n in range(3)] == [0, 0, 0]
