"""Modelfiles, templates in Go's form, options, and definitions on disk."""

from __future__ import annotations

import asyncio
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.errors import ModelError, ResourceError
from slmops.serve import definitions, modelfile
from slmops.serve.definitions import Definition, Definitions
from slmops.serve.dialects.ollama_calls import Calls
from slmops.serve.dialects.ollama_options import lines, normal, options_of
from slmops.serve.dialects.ollama_shapes import seconds_of
from slmops.serve.go_template import GoTemplate, is_go
from slmops.serve.modelfile import Modelfile
from slmops.serve.prompts import rendered
from slmops.serve.saying import Saying
from slmops.serve.scheduler import RequestError
from slmops.serve.tools import HERMES

TEXT = st.text(st.sampled_from('ab"# \n{}:'), max_size=12).filter(lambda text: '"""' not in text)
WORD = st.text(st.sampled_from(string.ascii_lowercase + "_"), min_size=1, max_size=6)
SOME = TEXT.filter(bool)
CHATML = (
    "{{ if .System }}<|system|>{{ .System }}<|end|>{{ end }}{{ if .Prompt }}<|user|>{{ .Prompt }}<|end|>{{ end }}"
    "<|assistant|>{{ .Response }}<|end|>"
)


@given(
    st.builds(
        Modelfile,
        base=SOME.filter(lambda text: text.strip() != ""),
        parameters=st.lists(st.tuples(WORD, SOME), max_size=3).map(tuple),
        template=TEXT,
        system=TEXT,
        adapters=st.lists(SOME, max_size=2).map(tuple),
        licenses=st.lists(SOME, max_size=2).map(tuple),
        messages=st.lists(st.tuples(st.sampled_from(modelfile.ROLES), TEXT), max_size=3).map(tuple),
    )
)
def test_a_modelfile_that_is_written_reads_back_as_the_same(file: Modelfile) -> None:
    assert modelfile.parse(modelfile.write(file)) == file


def test_a_modelfile_as_people_write_it() -> None:
    text = '''# for the desk
from desk
PARAMETER temperature 0.2
parameter stop "###"
PARAMETER stop <|end|>
SYSTEM """
You are brief.
# this is no comment
"""

TEMPLATE "{{ .Prompt }}"
MESSAGE user is it "open"?
Message assistant yes
'''
    assert modelfile.parse(text) == Modelfile(
        "desk",
        (("temperature", "0.2"), ("stop", "###"), ("stop", "<|end|>")),
        "{{ .Prompt }}",
        "\nYou are brief.\n# this is no comment\n",
        messages=(("user", 'is it "open"?'), ("assistant", "yes")),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("SYSTEM hi\n", "no FROM"),
        ("FROM a\nPARAMETR x 1\n", "line 2 of the Modelfile: PARAMETR"),
        ("FROM a\n\nPARAMETER temperature\n", "line 3 .* has no value"),
        ('FROM a\nSYSTEM """never\nends\n', "line 2 .* has no end"),
        ('FROM a\nSYSTEM """x""" y\n', "line 2 .* y stands after"),
        ("FROM a\nFROM b\n", "stands twice"),
        ("FROM a\nMESSAGE tool x\n", "tool is no role"),
        ('FROM a\nSYSTEM """x\ny\n"""\n# no\n\nPARAMETR x 1', "line 7 of"),
        ("FROM a\n" * 100_000, "more than 262144"),
    ],
)
def test_a_modelfile_that_is_wrong_is_refused_by_line(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        modelfile.parse(text)


def test_a_go_template_writes_turns_and_ends_where_the_answer_begins() -> None:
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    template = GoTemplate(CHATML)
    assert template.prompt(turns) == (
        "<|system|>S<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    )
    begun = [*turns, {"role": "assistant", "content": "d"}]
    assert template.prompt(begun).endswith("<|user|>c<|end|><|assistant|>d")
    assert GoTemplate("Q: {{ .Prompt }}\nA: ").prompt(turns[1:2]) == "Q: a\nA: "
    trimmed = GoTemplate("{{- if .System -}}\n {{ .System }}\n{{- else -}} none {{- end }}\n{{ .Prompt }}{{/* end */}}")
    assert trimmed.prompt(turns[1:2]) == "none\na" and trimmed.prompt(turns[:2]) == "S\na"
    chosen = GoTemplate("{{ if .System }}1{{ else if .Prompt }}2{{ else }}3{{ end }}{{ .Prompt }}{{ .System }}")
    assert chosen.prompt(turns[1:2]) == "2a"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ range .Messages }}{{ .Content }}{{ end }}", "{{ range .Messages }}"),
        ("{{ if and .System .Prompt }}{{ end }}", "if and .System .Prompt"),
        ("{{ .Suffix }}{{ .Prompt }}", ".Suffix"),
        ("{{ if .System }}{{ .Prompt }}", "without its {{ end }}"),
        ("{{ .Prompt }}{{ end }}", "without its if"),
        ("{{ .System }}", "no {{ .Prompt }}"),
        ("{{ .Prompt }}{{ .Response", "without its }}"),
        ("{{ .Prompt }}{{" + " " * 60_000, "without its }}"),
        ("{{ if .System }}" * 2000 + "{{ .Prompt }}" + "{{ end }}" * 2000, "more than 100 if"),
        ("{{ if .System }}" + "{{ else if .System }}" * 2000 + "{{ end }}{{ .Prompt }}", "more than 100 if"),
    ],
)
def test_what_a_go_template_cannot_have_is_refused_by_name(template: str, says: str) -> None:
    assert is_go(template)
    with pytest.raises(RequestError) as failure:
        GoTemplate(template)
    assert says in failure.value.message


def test_dashes_trim_as_in_go() -> None:
    def written(template: str) -> str:
        return GoTemplate(template).prompt([{"role": "user", "content": "a"}])

    assert written("1 {{- .Prompt }} 2") == "1a 2"
    assert written("1 {{ .Prompt -}} 2") == "1 a2" and written("1 {{- .Prompt -}} 2") == "1a2"
    assert written("1{{/* - */}} {{- /* x */ -}} {{.Prompt}}") == "1a"
    with pytest.raises(RequestError, match=r"{{ -\.Prompt }}"):
        written("{{-.Prompt}}")


def test_a_go_template_writes_only_so_much() -> None:
    many = GoTemplate("{{ .Prompt }}" * 2000)
    assert many.prompt([{"role": "user", "content": "a"}]) == "a" * 2000
    with pytest.raises(RequestError, match="writes more than"):
        many.prompt([{"role": "user", "content": "a" * 10_000}])
    with pytest.raises(RequestError, match="writes more than"):
        GoTemplate("{{ if .System }}{{ end }}" * 2000 + "{{ .Prompt }}").prompt(
            [{"role": "user", "content": "a"}] * 1000
        )


@pytest.mark.parametrize("template", ["{{ .Prompt }}", "{{ messages[0].content }}"])
def test_a_template_has_a_bound(template: str) -> None:
    with pytest.raises(RequestError, match="more than 65536"):
        asyncio.run(rendered(template + "x" * 65_536, [{"role": "user", "content": "a"}], {}))


def test_a_text_that_a_template_has_no_place_for_is_not_lost() -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    with pytest.raises(RequestError, match="System"):
        GoTemplate("{{ .Prompt }}").prompt(turns)
    assert not is_go("{% for m in messages %}{{ m.content }}{% endfor %}") and not is_go("{{ messages[0].content }}")


def test_options_are_followed_accepted_or_refused() -> None:
    options = options_of({"temperature": 0, "stop": ["a"]}, {"num_thread": 4, "top_k": 5.0, "stop": "b", "seed": -1})
    how = options.picking(None)
    assert (how.temperature, how.top_k, how.top_p, how.seed, options.stop) == (0, 5, 0.9, None, ["b"])
    assert options_of().picking(None).temperature == 0.8
    assert options_of({"repeat_penalty": 1.2, "repeat_last_n": 0}).picking(None).repetition_penalty == 1
    assert 0 < options_of({"top_p": 0}).picking(None).top_p < 1e-6
    plain = options_of({"mirostat": 0, "typical_p": 1.0, "mirostat_tau": 3, "use_mmap": True})
    assert plain.picking(None) == options_of().picking(None)
    for given_, says in (
        ({"temprature": 1}, "did you mean temperature"),
        ({"mirostat": 2}, "the option mirostat is not served"),
        ({"typical_p": 0.7}, "typical_p is not served"),
        ({"repeat_penalty": 1.1, "repeat_last_n": 64}, "repeat_last_n"),
        ({"repeat_penalty": 1e-300}, "repeat_penalty"),
        ({"stop": ["x"] * 17}, "at most 16"),
        ({"stop": "x" * 257}, "at most 256"),
        ({"repeat_penalty": 1e300}, "repeat_penalty"),
        ({"temperature": "warm"}, "the option temperature"),
        ({"temperature": float("nan")}, "the option temperature"),
        ({"num_predict": -3}, "num_predict"),
    ):
        with pytest.raises(RequestError) as failure:
            options_of(given_)
        assert says in f"{failure.value.message} {failure.value.hint}"


def test_the_context_of_a_request_bounds_prompt_and_answer() -> None:
    assert options_of({"num_ctx": 10}).most([1] * 4) == 6
    assert options_of({"num_ctx": 10, "num_predict": 3}).most([1] * 4) == 3
    assert options_of({"num_predict": -1}).most([1]) is None
    with pytest.raises(RequestError, match="holds 4"):
        options_of({"num_ctx": 4}).most([1] * 4)


def test_options_of_a_modelfile_are_kept_as_values() -> None:
    kept = normal({"temperature": "0.5", "stop": ["x", "y"], "num_predict": "3", "num_gpu": "1"})
    assert kept == {"temperature": 0.5, "stop": ["x", "y"], "num_predict": 3}
    assert lines(kept) == [("num_predict", "3"), ("stop", "x"), ("stop", "y"), ("temperature", "0.5")]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        (10, 10),
        ("10", 10),
        (0, 0),
        ("-1m", None),
        (-1, None),
    ],
)
def test_times_that_a_model_is_kept(text: str | float, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "5 m", "m", "1d", "nan", "0" * 40 + "5m", "1" * 20_000 + "x"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="keep_alive"):
        seconds_of(text)


def test_a_definition_outlives_the_server_under_all_its_names(tmp_path: Path) -> None:
    kept = Definitions(tmp_path / "new")
    assert kept.get("helper") is None and list(kept) == []
    made = Definition(
        "team/Helper:v1", "desk", "desk", "Be brief.", parameters={"stop": ["a"]}, messages=(("user", "x"),)
    )
    kept.put(made)
    again = Definitions(tmp_path / "new")
    found = again.get("team/helper:V1")
    assert found is not None and found.modified > 0
    assert found == Definition(**{**made.__dict__, "modified": found.modified})
    assert again.get("team/helper") is None
    again.put(Definition("a:latest", "desk"))
    assert again.get("a") == again.get("a:latest") is not None
    assert [one.name for one in kept] == ["a:latest", "team/Helper:v1"]
    assert again.delete("A") and not again.delete("A") and kept.get("a") is None


@pytest.mark.parametrize(
    "name", ["../up", "a/../b", "/etc/x", "", "a b", ".hidden", "a:b:c", "a/b/c/d", "x" * 90, "a\n", "..", "a//b"]
)
def test_a_name_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no name of a model"):
        definitions.full(name)
    kept = Definitions(tmp_path / "own")
    assert kept.get(name) is None and not kept.delete(name)
    with pytest.raises(RequestError):
        kept.put(Definition(name, "desk"))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_definition_is_told_and_hides_no_other(tmp_path: Path) -> None:
    kept = Definitions(tmp_path)
    kept.put(Definition("good:latest", "desk"))
    (tmp_path / "bad%3Alatest.json").write_text("{")
    assert [one.name for one in kept] == ["good:latest"]
    with pytest.raises(ModelError, match="bad"):
        kept.get("bad")
    assert kept.delete("bad") and kept.get("bad") is None


def test_clients_cannot_fill_the_disk_with_definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definitions, "MOST", 2)
    kept = Definitions(tmp_path)
    for name in ("a", "b", "a"):
        kept.put(Definition(name, "desk"))
    with pytest.raises(ResourceError, match="2 definitions"):
        kept.put(Definition("c", "desk"))


def test_a_definition_is_bounded_and_so_are_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Definitions(tmp_path)
    with pytest.raises(RequestError, match="at most 262144 bytes"):
        kept.put(Definition("a", "desk", system="x" * (256 << 10)))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(definitions, "LARGEST_ALL", 3000)
    for name in ("a", "b", "a"):
        kept.put(Definition(name, "desk", system="x" * 1000))
    with pytest.raises(ResourceError, match="3000 bytes"):
        kept.put(Definition("c", "desk", system="x" * 1000))


def test_a_definition_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(file: Path, *, real: Any = definitions._read) -> Definition:
        read.append(file.name)
        found: Definition = real(file)
        return found

    monkeypatch.setattr(definitions, "_read", reading)
    kept, other = Definitions(tmp_path), Definitions(tmp_path)
    for name in ("a", "b"):
        kept.put(Definition(name, "desk"))
    for _ in range(3):
        assert [one.name for one in kept] == ["a", "b"] and kept.get("a") is not None
    assert len(read) == 2
    other.put(Definition("a", "desk", system="S"))
    found = kept.get("a")
    assert found is not None and found.system == "S" and len(read) == 3
    assert other.delete("a") and kept.get("a") is None and [one.name for one in kept] == ["b"]


def test_what_a_definition_puts_before_a_conversation() -> None:
    made = Definition("a", "desk", system="S", messages=(("user", "x"), ("assistant", "y")))
    user = {"role": "user", "content": "u"}
    own = {"role": "system", "content": "T"}
    begin = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert made.opened([user]) == [{"role": "system", "content": "S"}, *begin, user]
    assert made.opened([own, user]) == [own, *begin, user]


def test_calls_of_tools_are_told_whole() -> None:
    said = Saying(format=HERMES, names=frozenset(["weather"]))
    form = '<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>'
    text = f"Well. {form.format(json.dumps({'city': 'Ulm'}))}\n{form.format('{}')}"
    for size in (1, 3, len(text)):
        calls, told, made = Calls(said), "", []
        for part in [*(calls.add(text[at : at + size]) for at in range(0, len(text), size)), calls.rest()]:
            told, made = told + part[0], made + part[1]
        assert told.strip() == "Well."
        assert [call["function"] for call in made] == [
            {"index": 0, "name": "weather", "arguments": {"city": "Ulm"}},
            {"index": 1, "name": "weather", "arguments": {}},
        ]
    cut = Calls(said)
    begun, rest = cut.add('<tool_call>\n{"name": "weather", "arguments": {"ci'), cut.rest()
    assert begun[1] == rest[1] == [] and '{"ci' in begun[0] + rest[0]
    assert Calls(Saying()).add(text) == (text, [])
