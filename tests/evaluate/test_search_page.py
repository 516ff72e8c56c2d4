"""The page of a search: everything of it is there, escaped, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest

from slmops.evaluate.search_page import number, render_search

VOID = {"meta", "br", "link", "img"}


def found(objectives: int = 1, count: int = 14) -> dict[str, Any]:
    """What `slmops search --json` prints, made up."""
    names = [("accuracy", "maximize"), ("file_mb", "minimize"), ("parameters", "minimize")][:objectives]
    trials = []
    for i in range(count):
        state = "failed" if i == 3 else "pruned" if i == 5 else "complete"
        values = [0.5 + i / 40, 1.0 + i / 7, 1000.0 + i][:objectives] if state == "complete" else None
        trials.append({
            "number": i, "state": state, "values": values, "curve": [2.0, 1.0], "why": "<b>broke</b>" if i == 3 else "",
            "parameters": {"train.learning_rate": 10 ** (-1 - i / 5), "train.tuning": ("full", "<lora>")[i % 2]},
        })  # fmt: skip
    best = [trials[-1]["number"]] if objectives == 1 else [0, 1, count - 1]
    return {
        "name": "made-up", "study": "made-up-1", "trials": trials, "front": best, "no_pruning": "",
        "objectives": [{"metric": metric, "direction": way} for metric, way in names],
        "parameters": {
            "train.learning_rate": {"log": True, "numbers": True, "choices": None},
            "train.tuning": {"log": False, "numbers": False, "choices": ["full", "<lora>"]},
        },
        "best": best[0] if objectives == 1 else None,
        "set": {str(n): [f"train.learning_rate={10 ** (-1 - n / 5)}", "train.tuning=<lora>"] for n in best},
        "importance": {"train.learning_rate": 0.8, "train.tuning": 0.2},
    }  # fmt: skip


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_page_is_whole(objectives: int) -> None:
    page = render_search(found(objectives))
    reader = Balanced()
    reader.feed(page)
    assert not reader.open
    text = " ".join(" ".join(reader.words).split())
    assert "14 trials: 12 complete, 1 given up early, 1 failed" in text
    assert "<b>broke</b>" in text and "<lora>" in text, "shown as text"
    assert "<lora>" not in page and "src=" not in page and "http" not in page.replace("http-equiv", "")
    drawings = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]
    charts = [d for d in drawings if d.get("class") == "scatter"]
    assert len(charts) == objectives + (objectives - 1) + 2, "history, fronts, one a parameter"
    for chart in charts:
        circles = chart.findall("circle")
        assert len(circles) == 12 and chart.get("aria-label")
        for circle in circles:
            for place in ("cx", "cy"):
                assert 0 <= float(str(circle.get(place)).rstrip("%")) <= 100


def test_the_best_so_far_never_gets_worse() -> None:
    page = render_search(found())
    history = page[page.index('id="history"') :]
    heights = [float(y) for pair in re.findall(r'class="trend".*?y1="([\d.]+)%" y2="([\d.]+)%"', history) for y in pair]
    assert heights and heights == sorted(heights, reverse=True), "accuracy goes up, y goes down"


def test_a_search_without_a_complete_trial_has_a_page_too() -> None:
    lost = found()
    lost["trials"] = [t for t in lost["trials"] if t["state"] != "complete"]
    lost |= {"front": [], "best": None, "set": {}, "importance": {}}
    page = render_search(lost)
    assert "No trial is complete" in page and "scatter" not in page[page.index("<body>") :]


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.8043, "accuracy", "80.4 %"),
        (54464.0, "parameters", "54,464"),
        (0.36512, "validation_loss", "0.3651"),
        (None, "x", "–"),
    ],
)
def test_numbers(value: float | None, metric: str, text: str) -> None:
    assert number(value, metric) == text
