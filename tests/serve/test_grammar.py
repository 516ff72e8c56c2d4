"""Answers that are held to a grammar: valid, the same in any company, and refused before they begin where that cannot be."""

from __future__ import annotations

import json
import queue
import random
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_grammar import validity
from slmops.engines import minimal
from slmops.engines.gguf_tokenizer import tokenizer_of
from slmops.engines.plain_tokenizer import PlainTokenizer
from slmops.serve import grammar
from slmops.serve.engines.onnx import OnnxRows
from slmops.serve.grammar import Grammars, Reading, of_schema
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import GrammarError, Request, Scheduler
from slmops.serve.tools import HERMES, LLAMA, MISTRAL, PLAIN, Format, Reader, Tool, called
from tests.serve.test_scheduler import answers

POINT = {
    "type": "object", "required": ["x", "name"], "additionalProperties": False,
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 99}, "name": {"type": "string", "maxLength": 4}},
}  # fmt: skip
SAY = {
    "type": "object", "required": ["t"], "additionalProperties": False, "properties": {"t": {"$ref": "#/$defs/t"}},
    "$defs": {"t": {"enum": ["a", 1]}},
}  # fmt: skip
TOOLS = [Tool("add", parameters=POINT, strict=True), Tool("say", parameters=SAY)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimal, "CONTEXT", 1024)
        minimal.write_minimal(folder, "onnx_genai")
    return folder


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    """With a special token for calls."""
    folder = tmp_path_factory.mktemp("tokens")
    minimal._write_tokenizer(folder)
    told = json.loads((folder / "tokenizer.json").read_text())
    told["added_tokens"].append({**told["added_tokens"][0], "id": minimal.VOCABULARY, "content": "[TOOL_CALLS]"})
    (folder / "tokenizer.json").write_text(json.dumps(told))
    return Grammars(folder, minimal.VOCABULARY + 1, {minimal.END})


def test_a_gguf_file_is_held_to_grammars_with_its_own_tokens_and_with_those_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra `llamacpp`")
    minimal.write_minimal(tmp_path, "llama_cpp")
    model, grammar_ = tmp_path / "model.gguf", of_schema(SAY)
    found = []
    for place in (model, tmp_path, model):
        if len(found) == 2:
            minimal._write_tokenizer(tmp_path)
        limit = Grammars(place, minimal.VOCABULARY, {minimal.END}).limit(grammar_)
        masks = [limit.mask().copy()]
        for token in ids('{"t": 1}'):
            limit.take(token)
            masks.append(limit.mask().copy())
        assert not limit.why and masks[-1].nonzero()[0].tolist() == [minimal.END]
        found.append(np.array(masks))
    assert (found[0] == found[2]).all() and (found[1] == found[2]).all()
    shown = Grammars(model, minimal.VOCABULARY, {minimal.END}).limit("start: <[3]>")
    assert shown.mask().nonzero()[0].tolist() == [3]
    (tmp_path / "other.gguf").write_bytes(model.read_bytes())
    (tmp_path / "tokenizer.json").write_text("of model.gguf")
    assert tokenizer_of(tmp_path / "other.gguf", "serve").size == minimal.VOCABULARY


def ids(text: str) -> list[int]:
    """Of single bytes, and of the special token."""
    parts = text.split("[TOOL_CALLS]")
    alphabet = [len(minimal.SPECIAL) + byte for byte in range(256)]
    found = [alphabet[byte] for byte in parts[0].encode()]
    for part in parts[1:]:
        found += [minimal.VOCABULARY, *(alphabet[byte] for byte in part.encode())]
    return found


def says(grammars: Grammars, text: str, sentence: str) -> bool:
    """Whether a grammar lets an answer be this sentence."""
    limit = grammars.limit(text)
    for token in ids(sentence):
        if not limit.mask()[token]:
            return False
        limit.take(token)
    return bool(limit.ended or limit.mask()[minimal.END])


@pytest.mark.slow
def test_answers_to_random_schemas_are_valid(folder: Path) -> None:
    found = validity(folder, 60)
    assert found["invalid"] == [] and found["refused"] == {}
    assert found["ends"]["stop"] > 50, "few are cut for length"


@pytest.mark.slow
def test_an_answer_is_bit_for_bit_what_it_is_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to a grammar, beside others that are not; with masks worked out beside the model, or before each pick."""
    random_ = random.Random(5)
    engine = OnnxRows(folder, rows=4, context=256)
    made = Grammars(folder, engine.vocabulary, engine.end_ids)
    texts = [of_schema(POINT), of_schema({"type": "array", "items": POINT}), None]
    wanted, given = [], {}
    for number in range(1, 19):
        how = Picking(temperature=random_.choice((0.0, 1.0)), top_p=0.9, seed=number, logprobs=0)
        prompt = tuple(random_.randrange(5, 260) for _ in range(random_.randrange(1, 20)))
        given[number] = texts[number % 3]
        wanted.append(Request(number, prompt, 60, how))

    def limited(request: Request) -> Request:
        text = given[request.id]
        return replace(request, limit=made.limit(text)) if text else request

    monkeypatch.setattr(grammar, "SLOW_S", 0.0)
    together = answers(Scheduler(engine, chunk=8), [limited(request) for request in wanted], random_)
    monkeypatch.setattr(grammar, "SLOW_S", 1e9)
    alone = OnnxRows(folder, rows=1, context=256)
    for request in wanted:
        assert answers(Scheduler(alone, chunk=8), [limited(request)]) == {request.id: together[request.id]}
    ended = [number for number, answer in together.items() if answer[1] == "stop" and number % 3 == 0]
    tokenizer = PlainTokenizer(folder, "serve")
    for number in ended:
        assert set(json.loads(tokenizer.decode([picked.token for picked in together[number][0]]))) == {"x", "name"}
    assert ended


def test_json_comes_on_one_line_with_the_spaces_of_json_dumps_or_none(grammars: Grammars) -> None:
    value = {"x": -3, "name": "ü"}
    for sentence in (json.dumps(value, ensure_ascii=False), '{"x":-3,"name":"ü"}'):
        assert says(grammars, of_schema(POINT), sentence)
    for sentence in (
        '{"x": -3}',
        '{"x": 100, "name": "a"}',
        ' {"x":-3,"name":"a"}',
        '{"x":-3,\n"name":"a"}',
        '{"x":-3,"name":"abcde"}',
    ):
        assert not says(grammars, of_schema(POINT), sentence)
    assert says(grammars, of_schema(True), "[1, null]") and not says(grammars, of_schema(grammar.OBJECT), "[1]")


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (
            "date",
            ("2023-02-28", "2024-02-29", "2000-02-29"),
            ("2023-02-29", "1900-02-29", "2023-04-31", "0000-01-01", "2023-13-01"),
        ),
        ("time", ("23:59:59Z", "00:00:00.5+01:30"), ("24:00:00Z", "23:59:60Z", "12:00:00")),
        ("date-time", ("2024-02-29T00:00:00Z",), ("2023-02-29T00:00:00Z", "2024-02-29 00:00:00Z", "2024-02-29")),
    ],
)
def test_dates_and_times_are_in_the_calendar(
    grammars: Grammars, form: str, good: Sequence[str], bad: Sequence[str]
) -> None:
    text = of_schema(
        {"properties": {"format": {"format": form, "type": "string"}}, "type": "object", "required": ["format"]}
    )
    assert all(says(grammars, text, json.dumps({"format": one})) for one in good)
    assert not any(says(grammars, text, json.dumps({"format": one})) for one in bad)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"not": {}}, "not"), (False, "not"), ({"type": "frog"}, "frog"),
        ({"$ref": "#/$defs/none"}, "#?/?.defs/none"), ({"type": "string", "pattern": "("}, "unclosed"),
        ({"type": "string", "format": "moon"}, "moon"), ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum"),
        ({"uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_to_is_refused_by_name(grammars: Grammars, schema: Any, named: str) -> None:
    with pytest.raises(GrammarError, match=named) as refused:
        grammars.limit(of_schema(schema))
    assert "start:" not in refused.value.message


def test_where_the_reader_of_grammars_stops_its_own_words_are_told_to_nobody(grammars: Grammars) -> None:
    text = "start: %json " + json.dumps({"required": "é" * 60})
    with pytest.raises(GrammarError) as refused:
        grammars.limit(text)
    assert "panic" not in refused.value.message and "byte" not in refused.value.message


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "integer", "const": -(2**70)}, "const of the schema is below"), ({"enum": [[{"a": -(2**63)}]]}, "enum"),
        ({"type": "integer", "minimum": -(2**64), "maximum": -(2**63)}, "maximum"),
        ({"properties": {"a": {"items": {"exclusiveMaximum": -1e300}}}}, "exclusiveMaximum of the schema.properties.a.items"),
        ({"required": "é" * 60}, "required of the schema is not a list of texts"), ({"anyOf": [{"type": 5}]}, "anyOf.0"),
        ({"properties": {"required": {"required": ["é" * 60, 1]}}}, "properties.required"), ({"items": ["é" * 60]}, "items.0"),
    ],
)  # fmt: skip
def test_a_schema_that_would_end_who_reads_it_is_refused_before(schema: Any, named: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(named)):
        of_schema(schema)


def test_bounds_of_53_bits_are_held_to(grammars: Grammars) -> None:
    text = of_schema({"type": "integer", "minimum": -(2**53), "maximum": 2**53})
    assert says(grammars, text, "-5") and says(grammars, text, str(2**53)) and not says(grammars, text, str(2**53 + 1))
    assert says(
        grammars, of_schema({"properties": {"maximum": {"type": "integer"}}, "type": "object"}), '{"maximum": 5}'
    )


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA, PLAIN], ids=lambda form: form.name)
@pytest.mark.parametrize("many", [True, False])
def test_who_must_call_can_say_nothing_else(grammars: Grammars, form: Format, many: bool) -> None:
    special = {"[TOOL_CALLS]": minimal.VOCABULARY} if form is MISTRAL else {}
    text = form.grammar(TOOLS, special, many=many)
    draws = np.random.default_rng(1)
    for _ in range(5):
        limit, tokens = grammars.limit(text), []
        while not limit.ended and len(tokens) < 5000:
            allowed = np.flatnonzero(limit.mask())
            token = minimal.END if minimal.END in allowed else int(draws.choice(allowed))
            limit.take(token)
            if token == minimal.END:
                break
            tokens.append(token)
        raw = b"".join(
            b"[TOOL_CALLS]" if t == minimal.VOCABULARY else bytes([t - len(minimal.SPECIAL)]) for t in tokens
        )
        reader = Reader(form, {"add", "say"})
        found = reader.add(raw.decode(errors="replace")) + reader.rest()
        assert not any(delta.text for delta in found)
        calls = called(found)
        assert calls if many else len(calls) == 1
        for name, arguments in calls:
            value = json.loads(arguments)
            assert set(value) == {"x", "name"} if name == "add" else value["t"] in ("a", 1)


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA, PLAIN], ids=lambda form: form.name)
@pytest.mark.parametrize("special", [True, False])
def test_who_may_call_can_also_talk(grammars: Grammars, form: Format, special: bool) -> None:
    marks = {"[TOOL_CALLS]": minimal.VOCABULARY} if form is MISTRAL and special else {}
    tools = [TOOLS[0], Tool("any")]

    def call(name: str, arguments: str) -> str:
        made = f'{{"name": "{name}", "{form.key}": {arguments}}}'
        return f"{form.begin}\n{made}\n{form.end}" if form.end else f"{form.begin}[{made}]" if form.array else made

    good, wrong = call("add", '{"x": 1, "name": "a"}'), call("add", '{"x": "1"}')
    grammars = (
        grammars if marks or form is not MISTRAL else Grammars(grammars._model, minimal.VOCABULARY, {minimal.END})
    )
    split = (
        ids if marks or form is not MISTRAL else lambda text: [len(minimal.SPECIAL) + byte for byte in text.encode()]
    )

    def fits(text: str, sentence: str) -> bool:
        limit = grammars.limit(text)
        for token in split(sentence):
            if not limit.mask()[token]:
                return False
            limit.take(token)
        return bool(limit.ended or limit.mask()[minimal.END])

    free = form.grammar_or_text(tools, marks, many=True, text=None)
    assert fits(free, "hello, you") and fits(free, good) and fits(free, call("any", '{"free": [1]}'))
    assert not fits(free, wrong)
    if form.begin:
        assert fits(free, "I look.\n" + good)
    assert fits(form.grammar_or_text([TOOLS[1]], marks, many=True, text=SAY), '{"t": "a"}'), "references stay whole"
    held = form.grammar_or_text(tools, marks, many=True, text=POINT)
    assert fits(held, '{"x": 1, "name": "a"}') and fits(held, good)
    assert not fits(held, "hello") and not fits(held, '{"x": 1}')


def test_reading_a_grammar_holds_up_nobody_and_a_cancel_stays_behind_its_request() -> None:
    go, through = threading.Event(), queue.SimpleQueue[Any]()

    class Slow:
        def limit(self, text: str) -> Any:
            go.wait(10)
            if text == "bad":
                raise GrammarError("no")
            return text.upper()

    reading = Reading(Slow(), through.put)  # type: ignore[arg-type]
    reading.put({"ask": {"id": 1, "grammar": "g"}})
    reading.put({"ask": {"id": 2}})
    reading.put({"cancel": 1})
    reading.put({"cancel": 2})
    reading.put({"ask": {"id": 3, "grammar": "bad"}})
    assert through.get(timeout=10) == {"ask": {"id": 2}} and through.get(timeout=10) == {"cancel": 2}
    go.set()
    assert through.get(timeout=10)["ask"]["limit"] == "G" and through.get(timeout=10) == {"cancel": 1}
    assert isinstance(through.get(timeout=10)["ask"]["refused"], GrammarError)


def test_what_nobody_foresaw_while_a_grammar_is_read_is_an_error_of_its_request_alone() -> None:
    through = queue.SimpleQueue[Any]()

    class Odd:
        def limit(self, text: str) -> Any:
            raise BaseExceptionGroup("panic", [ValueError()]) if text == "group" else TypeError("panic")

    reading = Reading(Odd(), through.put)  # type: ignore[arg-type]
    for text in ("odd", "group"):
        reading.put({"ask": {"id": 1, "grammar": text}})
        refused = through.get(timeout=10)["ask"]["refused"]
        assert isinstance(refused, GrammarError) and "panic" in refused.message


def test_a_tokenizer_with_more_tokens_than_the_model_has_room_for_its_masks(tmp_path: Path) -> None:
    minimal._write_tokenizer(tmp_path)
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    told["added_tokens"] += [
        {**told["added_tokens"][0], "id": minimal.VOCABULARY + n, "content": f"<|{n}|>"} for n in range(999)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    limit = Grammars(tmp_path, minimal.VOCABULARY, {minimal.END}).limit(of_schema({"const": "a"}))
    assert limit._bits.nbytes * 8 >= minimal.VOCABULARY + 999
    assert limit.mask().shape == (minimal.VOCABULARY,) and np.flatnonzero(limit.mask()).tolist() == ids('"')


def test_a_mask_that_cannot_be_worked_out_is_waited_for_by_nobody() -> None:
    class Broken:
        def unsafe_compute_mask_ptr(self, place: int, size: int) -> None:
            pass

        def is_error(self) -> bool:
            raise RuntimeError("panic")

    work = queue.SimpleQueue[Any]()
    limit = grammar.Limit(Broken(), 8, 8, work)
    limit._slow = True
    limit.begin()
    work.get().run()
    assert limit.mask().shape == (8,) and limit.why == "panic"
