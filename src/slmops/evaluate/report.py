"""`evaluate.report`: everything that was judged and measured, as report.json and one self-contained report.html.

The schema of report.json is `slmops.core.report.Report`, documented in docs/reference/report.md. A part whose input is
absent leaves its section out; a number that was not measured is null and its basis says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Evaluate, Task
from slmops.evaluate.text import render_text

__all__ = ["DECLARATION", "Params", "render_text", "run"]

DECLARATION = Declaration(
    name="evaluate.report",
    version="1",
    makes="report",
    takes={
        "data": "dataset",
        "predictions*": "predictions",
        "measurement?": "measurement",
        "fidelity?": "fidelity",
        "synthetic?": "dataset",
        "logits?": "logits",
        "training*": "model",
        "converted*": "model",
    },
    extra="evaluate",
    packages=("numpy", "scipy", "rouge-score", "jinja2"),
)


class Params(BaseParams):
    """What the report is about and how it is judged; `shipped` is the variant that gates look at."""

    name: str
    version: str
    task: Task
    evaluate: Evaluate
    shipped: str


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write report.json and report.html; the facts hold the verdict and the headline.

    Raises:
        DataError: predictions are missing, broken, or of different examples.
        UsageError: a metric does not fit the task.
    """
    from slmops.evaluate.assess import assess
    from slmops.evaluate.html import render_html
    from slmops.evaluate.inputs import read_material

    material = read_material(inputs)
    report = assess(params.name, params.version, params.task, params.evaluate, params.shipped, material, ctx.seed)
    (out / "report.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    plain = report.model_dump(mode="json")
    (out / "report.html").write_text(render_html(plain), encoding="utf-8")
    return {
        "verdict": report.verdict,
        "says": report.says,
        "metric": report.metric,
        "n_test": report.n_test,
        "headline": plain["headline"],
        "scores": {v.name: v.scores[report.metric].value for v in report.variants},
    }
