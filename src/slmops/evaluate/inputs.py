"""Reads what other steps wrote (predictions, measurements, training facts, …) into frozen values, and checks it.

Predictions and measurements must be whole: anything wrong with them is a `DataError`. Side facts (training curves,
synthesis, fidelity) are read as far as they are there, since a report is worth more than its margins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.core.method import named_inputs
from slmops.core.report import Hop
from slmops.errors import DataError

NOT_SHIPPED = ("fidelity.json", "training.json")
MODEL_FILES = (
    ".onnx",
    ".onnx.data",
    ".gguf",
    ".safetensors",
    "openvino_model.xml",
    "openvino_model.bin",
    ".tflite",
    ".pte",
)


@dataclass(frozen=True)
class Prediction:
    """One answer to one test example; `tokens` is None where nobody counted."""

    id: str
    prompt: str
    gold: str
    answer: str
    finished: bool = True
    tokens: int | None = None


@dataclass(frozen=True)
class Measured:
    """Timings and memory of one variant: seconds as (rounds, prompts), bytes per round."""

    first_token_s: tuple[tuple[float, ...], ...] = ()
    total_s: tuple[tuple[float, ...], ...] = ()
    tokens: tuple[float, ...] = ()
    peak_bytes: tuple[float, ...] = ()
    baseline_bytes: tuple[float, ...] = ()

    @property
    def over_baseline(self) -> tuple[float, ...]:
        """Peak minus baseline per round, bytes."""
        return tuple(peak - base for peak, base in zip(self.peak_bytes, self.baseline_bytes, strict=True))


@dataclass(frozen=True)
class Measurement:
    """What `evaluate.measure` wrote: variants by name, and the machine."""

    variants: Mapping[str, Measured] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    prompt_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Converted:
    """Sizes of a converted model. `weight_bytes` leaves out the graph where weights have a file of their own."""

    file_bytes: int
    weight_bytes: int
    folder_bytes: int
    fidelity: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Material:
    """Everything that a report is made of."""

    predictions: Mapping[str, tuple[Prediction, ...]]
    info: Mapping[str, Any] = field(default_factory=dict)
    measurement: Measurement | None = None
    training: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    converted: Mapping[str, Converted] = field(default_factory=dict)
    synthesis: Mapping[str, Any] | None = None
    self_check: Mapping[str, Any] | None = None
    hops: tuple[Hop, ...] = ()


def read_material(inputs: Mapping[str, Path]) -> Material:
    """All inputs of `evaluate.report`.

    Raises:
        DataError: predictions or a measurement are broken, or variants answered different examples.
    """
    predictions = {name: read_predictions(path) for name, path in named_inputs(inputs, "predictions").items()}
    if not predictions:
        raise DataError("there are no predictions to report on", "run `slmops run`, which makes them")
    first = next(iter(predictions))
    for name, rows in predictions.items():
        same_examples(first, predictions[first], name, rows)
    return Material(
        predictions=predictions,
        info=_side(inputs.get("data"), "info.json") or {},
        measurement=read_measurement(inputs["measurement"]) if "measurement" in inputs else None,
        training={
            name: facts
            for name, path in named_inputs(inputs, "training").items()
            if (facts := _side(path, "training.json")) is not None
        },
        converted={name: _converted(path) for name, path in named_inputs(inputs, "converted").items()},
        synthesis=_side(inputs.get("synthetic"), "stats.json"),
        self_check=_side(inputs.get("logits"), "self_check.json"),
        hops=read_hops(inputs["fidelity"]) if "fidelity" in inputs else (),
    )


def read_hops(folder: Path) -> tuple[Hop, ...]:
    """What `evaluate.fidelity` wrote into a folder.

    Raises:
        DataError: it is not there, or no list of hops.
    """
    from pydantic import ValidationError

    file = folder / "fidelity.json"
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        return tuple(Hop.model_validate(hop, strict=False) for hop in whole["hops"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"no comparison of hops: {error}", "compare again with `slmops run`", file=str(file)) from error


def _side(folder: Path | None, name: str) -> dict[str, Any] | None:
    if folder is None or not (folder / name).is_file():
        return None
    value = json.loads((folder / name).read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else None


def read_predictions(path: Path) -> tuple[Prediction, ...]:
    """The rows of a predictions file, or of `predictions.jsonl` in a folder.

    Raises:
        DataError: the file is missing, empty or has a row that is no prediction.
    """
    file = path / "predictions.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise DataError("there are no predictions", "give a folder or file that evaluate.predict wrote", file=str(file))
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_prediction(line, str(file), number))
    if not rows:
        raise DataError("no predictions in it", "the test split may be empty; see data.splits", file=str(file))
    return tuple(rows)


def _prediction(line: str, file: str, number: int) -> Prediction:
    try:
        row = json.loads(line)
        id_, prompt, gold, answer = (row[key] for key in ("id", "prompt", "gold", "answer"))
        if not all(isinstance(text, str) for text in (id_, prompt, gold, answer)):
            raise TypeError("id, prompt, gold and answer are texts")
        return Prediction(id_, prompt, gold, answer, bool(row.get("finished", True)), row.get("tokens"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "each line is a JSON object with id, prompt, gold and answer"
        raise DataError(f"not a prediction: {error}", hint, file=file, line=number) from error


def same_examples(first: str, left: tuple[Prediction, ...], second: str, right: tuple[Prediction, ...]) -> None:
    """Refuse to compare answers to different questions.

    Raises:
        DataError: the two do not hold the same examples, with the same gold answers, in the same order.
    """
    if [(row.id, row.gold) for row in left] == [(row.id, row.gold) for row in right]:
        return
    ids = {row.id for row in left}, {row.id for row in right}
    shared = len(ids[0] & ids[1])
    if ids[0] == ids[1]:
        what = "hold the same examples in another order or with other gold answers"
    else:
        what = f"share {shared:,} examples of {len(ids[0]):,} and {len(ids[1]):,}"
    hint = "answer the same test file with both: run `slmops run` in projects with the same data and splits"
    raise DataError(f"{first} and {second} cannot be compared: they {what}", hint)


def _sizes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def model_bytes(folder: Path) -> int:
    """Bytes of the model files of a converted model: graph and weights."""
    return sum(size for name, size in _sizes(folder).items() if name.endswith(MODEL_FILES))


def _converted(folder: Path) -> Converted:
    files = _sizes(folder)
    model = {name: size for name, size in files.items() if name.endswith(MODEL_FILES)}
    weights = sum(size for name, size in model.items() if not name.endswith((".onnx", ".xml")))
    total = sum(model.values())
    rest = {name: size for name, size in files.items() if name not in NOT_SHIPPED}
    return Converted(total, weights or total, sum(rest.values()), _side(folder, "fidelity.json"))


def read_measurement(path: Path) -> Measurement:
    """What is in `measurement.json` of a folder, or in the file itself.

    Raises:
        DataError: it is missing, or its tables are not rounds by prompts.
    """
    file = path / "measurement.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError("there is no measurement", "give a folder or file that evaluate.measure wrote", file=str(file))
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        variants = {name: _measured(value) for name, value in whole["variants"].items()}
        return Measurement(variants, whole.get("environment", {}), whole.get("threads"), tuple(whole["prompt_ids"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a measurement: {error}", "measure again with `slmops run`", file=str(file)) from error


def _measured(value: Mapping[str, Any]) -> Measured:
    rounds = value["rounds"]
    return Measured(
        tuple(tuple(map(float, r["first_token_s"])) for r in rounds),
        tuple(tuple(map(float, r["total_s"])) for r in rounds),
        tuple(map(float, rounds[0].get("tokens", ()))) if rounds else (),
        tuple(float(r["peak_bytes"]) for r in rounds),
        tuple(float(r["baseline_bytes"]) for r in rounds),
    )
