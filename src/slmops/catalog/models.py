"""Which small language models there are: facts from one data file, and what follows from them.

The file (`models.json`) holds facts alone: names, licence, languages, context and the numbers of the architecture. Counts, classes
and memory are computed from those numbers, never written down. `published` is an exact count that its makers or the hub state; it
is there for a test to compare with. What is not known is null. JSON, since reading it takes a millisecond.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from slmops.core import cache
from slmops.core.parameters import KINDS, Weights, count, kind_of
from slmops.errors import ModelError, UsageError

FILE = Path(__file__).parent / "models.json"
Class = Literal["micro", "small", "medium"]
CLASSES: tuple[Class, ...] = get_args(Class)
BOUNDS: dict[Class, tuple[float, float]] = {"micro": (0.1, 1.4), "small": (1.5, 13.9), "medium": (14.0, 30.0)}
"""10^9 weights, both ends included, after rounding to a tenth: so nothing falls between two classes."""


@dataclass(frozen=True)
class Model:
    """A model of the catalogue.

    Attributes:
        name: the hub's name without its owner, in small letters; `hub`: the whole of it.
        licence: the hub's word for it, or the licence's own name where the hub says `other`.
        gated: the hub wants a login and consent; None: not known.
        languages: ISO 639-1 codes that its makers name, `code`, or `multi` where they claim many; None: they name none.
        context: tokens that its makers state.
        azure: its name in Azure AI Foundry; `ollama`: its tag in Ollama's library; None: not known, or not there.
        published: the exact number of weights that is published, tied ones once; None: not known.
        config: the part of config.json that decides what the model is made of.
    """

    name: str
    hub: str
    family: str
    licence: str
    gated: bool | None
    languages: tuple[str, ...] | None
    context: int
    azure: str | None
    ollama: str | None
    published: int | None
    note: str | None
    config: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """`model_type` of the configuration."""
        return kind_of(self.config)

    @functools.cached_property
    def weights(self) -> Weights:
        """How many weights it has."""
        return count(self.config)

    @property
    def size_class(self) -> Class | None:
        """Its class; None below micro and above medium."""
        return class_of(self.weights.total)

    def facts(self) -> dict[str, Any]:
        """Everything as JSON values: what the file says and what follows."""
        weights = self.weights
        return {
            "name": self.name, "hub": self.hub, "family": self.family, "class": self.size_class,
            "parameters": weights.total, "active_parameters": weights.active, "architecture": self.architecture,
            "context": self.context, "languages": None if self.languages is None else list(self.languages),
            "licence": self.licence, "gated": self.gated, "azure": self.azure, "ollama": self.ollama,
            "published_parameters": self.published, "cache_numbers_per_token": cache.per_token(self.config),
            "config": dict(self.config), "note": self.note,
        }  # fmt: skip


def class_of(parameters: int) -> Class | None:
    """The class of a model with so many weights; None below micro and above medium."""
    billions = round(parameters / 1e9, 1)
    return next((name for name, (low, high) in BOUNDS.items() if low <= billions <= high), None)


def load(file: Path = FILE) -> dict[str, Model]:
    """The models of a data file, by name.

    Raises:
        UsageError: the file is not there, or is no catalogue.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{file}: {error.strerror}", "give the path of a catalogue, such as a copy of slmops' own"
        ) from None
    except ValueError as error:
        raise UsageError(f"{file}: not JSON: {error}", "mend the file, or take slmops' own") from None
    if not isinstance(rows, dict):
        raise UsageError(f"{file}: not a catalogue", "it holds one JSON object: names and their facts")
    return {name: _model(file, name, row) for name, row in rows.items()}


def _model(file: Path, name: str, row: Any) -> Model:
    wanted = {field.name for field in fields(Model)} - {"name"}
    given = set(row) if isinstance(row, dict) else set()
    if given != wanted:
        wrong = [f"no {key}" for key in sorted(wanted - given)] + [f"unknown {key}" for key in sorted(given - wanted)]
        raise UsageError(f"{file}: {name}: {', '.join(wrong)}", f"each model has {', '.join(sorted(wanted))}")
    try:
        languages = None if row["languages"] is None else tuple(row["languages"])
        model = Model(**{**row, "name": name, "languages": languages})
        if model.architecture in KINDS:
            _ = model.weights
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        says = f"{type(error).__name__}: {error}"
        raise UsageError(f"{file}: {name}: {says}", "give its facts in the form of slmops' own catalogue") from None
    if model.architecture not in KINDS:
        raise UsageError(
            f"{file}: {name}: architecture {model.architecture!r} is not known", f"known: {', '.join(KINDS)}"
        )
    return model


def dump(models: Iterable[Model]) -> str:
    """The text of a data file: one fact a line, so that changes read well. `load` gives the models back."""
    parts = []
    for model in models:
        rows = [(field.name, getattr(model, field.name)) for field in fields(Model) if field.name != "name"]
        lines = [f"    {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in rows]
        parts.append(f"  {json.dumps(model.name)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def find(models: Mapping[str, Model], name: str) -> Model:
    """A model by its name, its name on the hub, or its Ollama tag.

    Raises:
        ModelError: there is none of that name.
    """
    wanted = name.lower().removeprefix("hf:")
    for model in models.values():
        if wanted in (model.name, model.hub.lower(), model.ollama):
            return model
    known = [*models, *(model.ollama for model in models.values() if model.ollama)]
    close = difflib.get_close_matches(wanted, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`slmops catalog` lists them"
    raise ModelError(f"there is no model {name} in the catalogue", hint)


def select(
    models: Mapping[str, Model], text: Sequence[str] = (), size_class: Class | None = None, licences: Sequence[str] = (),
    architectures: Sequence[str] = (),
) -> list[Model]:  # fmt: skip
    """Those that match all that is asked, the smallest first.

    Args:
        text: pieces of name, hub name or family, each of which must be there.

    Raises:
        UsageError: no model has such a licence or architecture.
    """
    _known("licence", licences, {model.licence for model in models.values()})
    _known("architecture", architectures, {model.architecture for model in models.values()})
    found = [
        model for model in models.values()
        if all(piece.lower() in f"{model.hub} {model.family}".lower() for piece in text)
        and (size_class is None or model.size_class == size_class)
        and (not licences or model.licence in licences)
        and (not architectures or model.architecture in architectures)
    ]  # fmt: skip
    return sorted(found, key=lambda model: (model.weights.total, model.name))


def _known(what: str, asked: Sequence[str], there: set[str]) -> None:
    for name in asked:
        if name not in there:
            close = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"no model has the {what} {name}", f"{hint}there are: {', '.join(sorted(there))}")
