"""Write docs/reference/report.md, the schema of report.json, from `slmops.core.report`: `python docs/report_schema.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from slmops.core.model import Value
from slmops.core.report import Report

PAGE = Path(__file__).parent / "reference" / "report.md"
INTRODUCTION = """\
# report.json

<!-- Made by `python docs/report_schema.py`; a test compares it with the code. -->

Every run writes `report.json` and, from it, `report.html`. This page is the whole schema, from the top down.

Numbers are plain: scores, ratios and reductions are shares (0.92, not 92), times are milliseconds, sizes are bytes. A
number that was not measured is `null`, never left out. `schema` is 1 and changes only when an old reader would misread
the file; new fields may come without a change. In Python, `slmops.core.report.Report` reads and checks the file:

```python
from pathlib import Path

from slmops.core.report import Report


def headline(path: Path) -> dict[str, float | None]:
    report = Report.model_validate_json(path.read_text())
    return {name: figure["value"] for name, figure in report.headline.model_dump().items()}
```
"""


def page() -> str:
    """The text of the page: one table per value, each value after the one that first uses it."""
    models: list[type[Value]] = [Report]
    for model in models:
        for field in model.model_fields.values():
            models += [m for m in _models(field.annotation) if m not in models]
    return "\n".join([INTRODUCTION, *(_table(model) for model in models)])


def _models(annotation: Any) -> list[type[Value]]:
    if isinstance(annotation, type) and issubclass(annotation, Value):
        return [annotation] if annotation.__module__ == Report.__module__ else []
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _table(model: type[Value]) -> str:
    lines = [f"## {model.__name__}", "", " ".join((model.__doc__ or "").split()), ""]
    lines += ["| field | type | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{field.alias or name}` | {_type(field.annotation)} | {meaning} |")
    return "\n".join([*lines, ""])


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if _models(annotation) == [annotation]:
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    origin, arguments = getattr(annotation, "__origin__", None), [a for a in get_args(annotation) if a is not Ellipsis]
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"object of {_type(arguments[1])}"
    if arguments:
        return " or ".join(_type(inner) for inner in arguments)
    plain = {str: "string", int: "integer", float: "number", bool: "true or false", Any: "any JSON value"}
    return plain.get(annotation, "object")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
