"""Calls of tools in the forms that models write, whatever the pieces, and grammars that leave no other way than to call."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.serve.scheduler import RequestError
from slmops.serve.tools import HERMES, LLAMA, MISTRAL, PLAIN, Format, Reader, called, format_of, turns

NAMES = ("weather", "add")
ARGUMENTS = {"city": 'Paris "}]"', "n": [1, {"a": "<tool_call>{"}]}
WEATHER, ADD = json.dumps({"name": "weather", "arguments": ARGUMENTS}), '{"name":"add","arguments":{}}'
TEXTS: list[tuple[Format, str, str, list[tuple[str, Any]]]] = [
    (HERMES, f"<tool_call>\n{WEATHER}\n</tool_call>", "", [("weather", ARGUMENTS)]),
    (HERMES, f"Let me see.\n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>{ADD}</tool_call>\n", "Let me see.",
     [("weather", ARGUMENTS), ("add", {})]),
    (HERMES, '<tool_call>\n{"arguments": {"x": 1}, "name": "add"}\n</tool_call>', "", [("add", {"x": 1})]),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("add", {"x": 1})]),
    (HERMES, f"<tool_call>{ADD}</tool_call>\nDone.", "\nDone.", [("add", {})]),
    (MISTRAL, f"[TOOL_CALLS] [{WEATHER}, {ADD}]", "", [("weather", ARGUMENTS), ("add", {})]),
    (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"x": 1}, "id": "abcdefghi"}]', "", [("add", {"x": 1})]),
    (LLAMA, '{"name": "add", "parameters": {"x": 1}}', "", [("add", {"x": 1})]),
    (LLAMA, '<|python_tag|>{"name": "add", "parameters": {"x": 1}}', "", [("add", {"x": 1})]),
    (PLAIN, f"[{WEATHER}, {ADD}]", "", [("weather", ARGUMENTS), ("add", {})]),
    (PLAIN, f"{WEATHER}; {ADD}", "", [("weather", ARGUMENTS), ("add", {})]),
]  # fmt: skip
PROSE = [
    (HERMES, "a < b, <tool_cal and so on"), (HERMES, "<tool_call>no JSON</tool_call> x"),
    (HERMES, '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>'), (HERMES, '<tool_call>{"name": ["add"]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "argum'), (HERMES, '<tool_call>{"name": "\\x", "arguments": {}} x'),
    (HERMES, "  spaces stay \n"), (HERMES, "<tool_call>" + '{"a":' * 200),
    (MISTRAL, "[TOOL_CALLS] none"), (LLAMA, '{"answer": 42} is it'), (LLAMA, "text {"), (LLAMA, "<|python"), (PLAIN, "[1, 2]"),
    (PLAIN, '{"name": "rm", "arguments": {}} {"name": "add", "arguments": {}}'), (PLAIN, ""), (PLAIN, "{"),
    (PLAIN, '{"name": "a\\u12", "arguments": {}}'),
]  # fmt: skip


def read(form: Format, text: str, cuts: list[int], most: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    reader = Reader(form, NAMES, most)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    found = [delta for a, b in itertools.pairwise(places) for delta in reader.add(text[a:b])]
    found += reader.rest()
    return "".join(delta.text for delta in found), called(found)


@given(st.sampled_from(TEXTS), st.lists(st.integers(1, 200)))
def test_calls_are_found_whatever_the_pieces(case: tuple[Any, str, str, Any], cuts: list[int]) -> None:
    form, text, prose, calls = case
    said, found = read(form, text, cuts)
    assert (said, [(name, json.loads(arguments)) for name, arguments in found]) == (prose, calls)


@given(st.sampled_from(PROSE), st.lists(st.integers(1, 200)))
def test_what_is_no_call_of_a_tool_comes_through_as_it_is(case: tuple[Format, str], cuts: list[int]) -> None:
    form, text = case
    assert read(form, text, cuts) == (text, [])


@given(
    st.sampled_from((HERMES, MISTRAL, LLAMA, PLAIN)),
    st.text(alphabet='{}[]<>",:\\ antmeswhr_clou/TOLCS|py', max_size=60), st.lists(st.integers(1, 60)),
)  # fmt: skip
def test_no_text_breaks_it_and_pieces_do_not_matter(form: Format, text: str, cuts: list[int]) -> None:
    assert read(form, text, cuts) == read(form, text, [])


def test_arguments_are_told_as_they_come() -> None:
    reader = Reader(HERMES, NAMES)
    told = [
        reader.add(text)
        for text in ("<tool_call>", '{"name": "add", "arg', 'uments": {"x"', ": 1}", "}", "</tool_call>")
    ]
    assert [bool(found) for found in told] == [False, False, True, True, False, False]
    assert (told[2][0].name, told[2][1].arguments, told[3][0].arguments) == ("add", '{"x"', ": 1}")


def test_of_calls_that_may_not_come_together_the_first_one_stays() -> None:
    assert read(HERMES, f"<tool_call>{ADD}</tool_call><tool_call>{WEATHER}</tool_call> x", [3, 50], most=1) == (
        "",
        [("add", "{}")],
    )
    assert read(PLAIN, f"[{ADD}, {WEATHER}]", [], most=1) == ("", [("add", "{}")])


def test_the_form_is_that_of_the_chat_template() -> None:
    assert format_of("{% if tools %}<tool_call>") is HERMES
    assert format_of("{% if tools %}[TOOL_CALLS]") is MISTRAL
    assert format_of('{{ tools }} ipython "parameters"') is LLAMA
    assert format_of("{{ tools }}") is PLAIN
    for template in ("{{ messages }}", "{{ tools }}<tool_call><function=", "{{ tools }}[TOOL_CALLS][ARGS]"):
        with pytest.raises(RequestError):
            format_of(template)


def test_templates_get_arguments_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    (turn,) = turns([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert turn["tool_calls"][0]["function"]["arguments"] == {"x": 1} and call["function"]["arguments"] == '{"x": 1}'
    for wrong in ("[1]", "{", "[" * 100000):
        with pytest.raises(RequestError):
            turns([{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": wrong}}]}])
