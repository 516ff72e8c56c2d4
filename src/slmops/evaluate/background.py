"""The parts of a report that stand beside the judgement: data, synthesis, training curves, confusions. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from slmops.core import report as r
from slmops.evaluate.inputs import Prediction

CONFUSIONS_SHOWN = 12
DROPS_SHOWN = 3


def data_summary(info: Mapping[str, Any]) -> r.DataSummary:
    """From info.json of a prepared data set."""
    files, removed = _mapping(info.get("files")), _mapping(info.get("removed"))
    return r.DataSummary(
        counts={name: facts["examples"] for name, facts in files.items()},
        labels=len(info.get("labels") or ()) or None,
        removed={kind: facts["count"] for kind, facts in removed.items() if facts["count"]},
    )


def synthesis(stats: Mapping[str, Any] | None) -> r.Synthesis | None:
    """From stats.json of `data.filter`."""
    if stats is None:
        return None
    dropped = [
        r.Drop(
            filter=name,
            count=facts.get("dropped", 0),
            examples=tuple(_drop(example) for example in facts.get("examples", ())[:DROPS_SHOWN]),
        )
        for name, facts in _mapping(stats.get("filters")).items()
    ]
    return r.Synthesis(seen=stats.get("seen"), kept=stats.get("kept"), dropped=tuple(dropped))


def training(records: Mapping[str, Mapping[str, Any]]) -> tuple[r.Training, ...]:
    """From training.json of each trained model, by name."""
    order = {"teacher": 0, "student": 1, "few": 2, "all": 3}
    return tuple(
        r.Training(
            name=name,
            train=_curve(facts, "train_loss"),
            validation=_curve(facts, "validation_loss"),
            best_step=facts.get("best_step"),
            facts={k: v for k, v in facts.items() if isinstance(v, str | int | float | bool)},
        )
        for name, facts in sorted(records.items(), key=lambda item: order.get(item[0], 9))
    )


def confusions(rows: Sequence[Prediction], teacher: Sequence[Prediction] | None) -> tuple[r.Confusion, ...]:
    """The labels that a model gets wrong most often, and what it takes them for; `teacher` answered the same examples."""
    totals: Counter[str] = Counter(row.gold.strip() for row in rows)
    missed: dict[str, Counter[str]] = {label: Counter() for label in totals}
    teacher_hits: Counter[str] = Counter()
    for i, row in enumerate(rows):
        gold, answer = row.gold.strip(), row.answer.strip()
        if answer != gold:
            missed[gold][answer] += 1
        if teacher is not None and teacher[i].answer.strip() == gold:
            teacher_hits[gold] += 1
    found = []
    for label, wrong in missed.items():
        if wrong:
            answer, times = min(wrong.items(), key=lambda item: (-item[1], item[0]))
            n = totals[label]
            found.append(
                r.Confusion(
                    label=label, n=n, recall=1 - wrong.total() / n,
                    teacher_recall=teacher_hits[label] / n if teacher is not None else None,
                    taken_for=shortened(answer, 80), taken_count=times,
                )
            )  # fmt: skip
    return tuple(sorted(found, key=lambda c: (c.recall, c.label))[:CONFUSIONS_SHOWN])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters; an ellipsis stands for the rest."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _drop(example: Mapping[str, Any]) -> str:
    why = ": ".join(str(example[key]) for key in ("reason", "detail") if example.get(key))
    text = f"{shortened(str(example.get('prompt', '')), 160)} → {shortened(str(example.get('answer', '')), 100)}"
    return f"{text} ({shortened(why, 160)})" if why else text


def _curve(facts: Mapping[str, Any], key: str) -> tuple[r.Point, ...]:
    points_ = [(p["step"], p.get(key)) for p in facts.get("points", ())]
    return tuple(r.Point(step=step, loss=loss) for step, loss in points_ if loss is not None and math.isfinite(loss))
