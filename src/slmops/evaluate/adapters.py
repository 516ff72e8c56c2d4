"""Method `evaluate.adapters`: scores of several adapters over one base, each on the test data of its own task.

Writes `adapters.json`: adapter to metric to value, interval and number of examples, the metric that counts most first.
Metrics are the task's defaults; there are no gates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Task

DECLARATION = Declaration(
    name="evaluate.adapters",
    version="1",
    makes="report",
    takes={"predictions*": "predictions", "data*": "dataset"},
    extra="evaluate",
    packages=("numpy", "scipy", "rouge-score"),
)


class Params(BaseParams):
    """Adapter to task; how sure intervals are, and from how many bootstrap resamples."""

    tasks: dict[str, Task]
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Annotated[int, Field(ge=1)] = 2000


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Score `predictions.NAME` for every task.

    Raises:
        DataError: predictions are missing or broken.
    """
    from slmops.evaluate import statistics as s
    from slmops.evaluate.assess import score_of
    from slmops.evaluate.inputs import read_predictions
    from slmops.evaluate.metrics import metrics_for
    from slmops.evaluate.words import interval, shown, title
    from slmops.store.files import read_json

    scores: dict[str, dict[str, Any]] = {}
    for name, task in params.tasks.items():
        rows = read_predictions(inputs[f"predictions.{name}"])
        info = read_json(inputs[f"data.{name}"] / "info.json") or {}
        labels = task.labels or info.get("labels") or sorted({row.gold.strip() for row in rows})
        bootstrap = s.Bootstrap(len(rows), params.resamples, ctx.seed)
        scores[name] = {}
        for metric in metrics_for(task):
            score = score_of(rows, metric, task, labels)
            found = s.score_interval(score, bootstrap, params.confidence)
            n = int((score.below > 0).sum()) if isinstance(score, s.RatioScore) else len(rows)
            if n:
                scores[name][metric] = {"value": found.value, "low": found.low, "high": found.high, "n": n}
        first, value = next(iter(scores[name].items()))
        ctx.progress.log(
            f"{name}: {title(first)} {shown(first, value['value'])} ({interval(first, value)}, {value['n']} test examples)"
        )
    (out / "adapters.json").write_text(json.dumps(scores, indent=1) + "\n", "utf-8")
    return {"scores": scores}
