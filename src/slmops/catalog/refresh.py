"""Bring the facts of the catalogue up to date from the Hugging Face hub, and say what differs.

Asks for each model's configuration and page; touches the architecture's numbers, licence, languages and whether it is gated. Names
in Azure AI Foundry and Ollama, and the context that the makers state, are not on the hub in a form that can be read, and stay. The
hub is the one that HF_ENDPOINT names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.catalog.hub import Again, wrapped
from slmops.catalog.models import Model
from slmops.core.parameters import count, kind_of, language
from slmops.errors import MissingExtraError, ModelError

SILENT = ("other", "unknown")
"""What the hub says where it does not name a licence."""


@dataclass(frozen=True)
class Change:
    """A fact that differs: `config.hidden_size`, `licence`; from what the catalogue says to what the hub says."""

    key: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Answer:
    """What the hub says of one model.

    Attributes:
        model: with what changed; the old one where the hub could not be asked.
        problem: why it could not; `note`: what does not fit and is left to a person.
        reached: the hub showed its page.
    """

    model: Model
    changes: tuple[Change, ...] = field(default=())
    problem: str = ""
    note: str = ""
    reached: bool = True


def ask(model: Model, folder: Path) -> Answer:
    """What the hub says of a model.

    Args:
        folder: where files are fetched to.

    Raises:
        MissingExtraError: the hub's client is not installed.
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    try:
        info = hub.HfApi().model_info(model.hub)
    except Exception as error:
        return Answer(model, problem=_said(error, model.hub), reached=False)
    config: dict[str, Any] = {}
    problem = ""
    try:
        path = hub.hf_hub_download(model.hub, "config.json", revision=info.sha, local_dir=folder / model.name)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except Exception as error:
        problem = _said(error, model.hub) if not isinstance(error, ValueError) else "its config.json is not JSON"
    try:
        answer = compare(model, _page(info), config)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        return Answer(model, problem=f"what the hub says cannot be read: {type(error).__name__}: {error}")
    return dataclasses.replace(answer, problem=problem)


def _said(error: Exception, name: str) -> str:
    found = wrapped(error, name)
    if isinstance(found, Again):
        return found.reason
    return f"{found.message} ({found.hint})" if found.hint else found.message


def _page(info: Any) -> dict[str, Any]:
    """What a model's page on the hub says, as far as it says it."""
    card = info.card_data.to_dict() if getattr(info, "card_data", None) else {}
    gated = getattr(info, "gated", None)
    weights = getattr(info, "safetensors", None)
    return {
        "licence": card.get("license_name") if card.get("license") in SILENT else card.get("license"),
        "languages": [card["language"]] if isinstance(card.get("language"), str) else card.get("language"),
        "gated": None if gated is None else bool(gated),
        "weights": getattr(weights, "total", None),
    }


def compare(model: Model, page: Mapping[str, Any], config: Mapping[str, Any]) -> Answer:
    """The model with what page and configuration say. Of the configuration only keys that the catalogue holds are looked at; a kind of
    model that differs is not taken over, since the other keys would not go with it."""
    changes = []
    inner = language(config)
    own = dict(model.config)
    if inner and kind_of(config) and kind_of(config) != model.architecture:
        return Answer(model, note=f"its architecture is {kind_of(config)} on the hub, {model.architecture} here")
    for key, old in model.config.items():
        said = inner.get(key, config.get(key, old)) if config else old
        if said != old:
            changes.append(Change(f"config.{key}", old, said))
            own[key] = said
    facts: dict[str, Any] = {"config": own}
    for key in ("licence", "languages", "gated"):
        old, said = getattr(model, key), page.get(key)
        said = tuple(said) if key == "languages" and said else said
        same = sorted(said) == sorted(old or ()) if key == "languages" and said else said == old
        if said is not None and not same and not (key == "languages" and old == ("multi",)):
            changes.append(
                Change(
                    key, list(old) if isinstance(old, tuple) else old, list(said) if isinstance(said, tuple) else said
                )
            )
            facts[key] = said
    new = dataclasses.replace(model, **facts)
    return Answer(new, tuple(changes), note=_count_note(new, page.get("weights")))


def _count_note(model: Model, stated: int | None) -> str:
    """Says so where the hub counts other than the formula. Files may hold a tied matrix twice."""
    weights = count(model.config)
    if not stated or stated in (weights.total, weights.total + weights.embedding):
        return ""
    return (
        f"its files hold {stated:,} numbers, its configuration makes {weights.total:,} weights: other parts, or packed"
    )


def failed(answers: list[Answer]) -> None:
    """Refuse to go on when the hub said nothing at all.

    Raises:
        ModelError: with the first reason.
    """
    if answers and not any(answer.reached for answer in answers):
        raise ModelError(answers[0].problem, "the catalogue itself works offline")
