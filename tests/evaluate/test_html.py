"""The page stands alone, escapes what it shows, and holds what the report holds."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slmops.evaluate import plots
from slmops.evaluate.html import render_html
from tests.evaluate import made_up
from tests.evaluate.test_report import make

VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("html")
    gates = [{"metric": "accuracy", "at_least": 0.955}, {"metric": "p95_ms", "at_most": 1.0}]
    return make(made_up.classification(root / "in"), root / "out", gates)


@pytest.fixture(scope="module")
def page(whole: dict[str, Any]) -> str:
    return render_html(whole)


class Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> list[tuple[str, dict[str, str | None]]]:
    tree = Tree()
    tree.feed(page)
    assert tree.open == []
    return tree.tags


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    tags = parse(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [a for _, a in tags if {"src", "href", "onload", "onclick"} & set(a)]
    assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_text_of_users_is_escaped(whole: dict[str, Any]) -> None:
    nasty = "</table><script>alert(1)</script>\"'&{{ 7*7 }}"
    changed = {
        **whole,
        "subject": {**whole["subject"], "name": nasty},
        "wrong": [{"id": "1", "prompt": nasty, "gold": nasty, "answer": nasty, "teacher": nasty}],
        "confusions": [{**whole["confusions"][0], "label": nasty, "taken_for": nasty}],
        "synthesis": {"seen": 1, "kept": 1, "dropped": [{"filter": nasty, "count": 1, "examples": [nasty]}]},
        "environment": {**whole["environment"], nasty: nasty},
        "training": [{**whole["training"][0], "name": nasty}],
        "notes": [nasty],
    }
    page = render_html(changed)
    assert "<script" not in page and "49" not in re.findall(r"alert\(1\).{0,80}", page)[0]
    parse(page)
    assert page.count("&lt;script&gt;") >= 9


def test_drawings_are_sound_and_told_in_words(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) == 6 + 4 + 4 + 3 + 4
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.get("role") == "img" and root.get("aria-label")
        for part in root.iter():
            for name in ("x1", "x2", "cx", "width"):
                number = (part.get(name) or "0").rstrip("%")
                assert 0 <= float(number) <= 100


def test_tables_have_headers_and_headings_are_in_order(page: str) -> None:
    tags = parse(page)
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(a.get("scope") for tag, a in tags if tag == "th")
    assert ("html", {"lang": "en"}) in tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["aria-labelledby"] in ids for _, a in tags if "aria-labelledby" in a)


def test_verdict_numbers_and_sections(page: str, whole: dict[str, Any]) -> None:
    for text in ("Failed", "−88.2 %", "would decide it", "ships", "Training", "How to read", "duplicate", "90 %"):
        assert text in page
    assert "prefers-color-scheme:dark" in page and "width=device-width" in page
    no_gates = render_html({**whole, "gates": [], "verdict": "passed", "says": "No gates are set."})
    assert "No gates" in no_gates and ">Passed<" not in no_gates


def test_absent_parts_leave_no_empty_sections(tmp_path: Path) -> None:
    inputs = made_up.classification(tmp_path / "in", n=40, skill={"student-int4": 1.0})
    made = make({"predictions.student-int4": inputs["predictions.student-int4"]}, tmp_path / "out")
    page = render_html(made)
    parse(page)
    for heading in (
        "Training</h2>",
        "Memory and size",
        "Time per response",
        "What each step",
        "Gates</h2>",
        "Wrong answers",
    ):
        assert heading not in page
    assert page.count("not measured") >= 5


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.5, 0.5], [0.1, 0.9], [1e-9, 3e9], [21_000_000, 141_000]])
def test_axes_hold_their_values(values: list[float]) -> None:
    for zero in (True, False):
        scale = plots.axis(values, zero=zero)
        assert scale.low <= min(values) and max(values) <= scale.high and 1 <= len(scale.ticks) <= 12
        assert all(0 <= scale.at(tick) <= 100 for tick in scale.ticks)
