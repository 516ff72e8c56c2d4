"""Hops from one form of a model to the next, and which of them broke it. Pure.

A hop leads from a model to the one that was made from it. What it may change depends on how it was made:

    exact    nothing but float error: a merge, a conversion in full precision, a trimmed vocabulary
    rounded  tokens of about the same probability may change places: quantisation, and every conversion that rounds
    learned  everything: the student of a teacher, pruning, training; such hops are shown and never judged

Each hop is judged against its own start, so that only the hop that broke something is named, and not those after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from slmops.core.model import Value
from slmops.core.report import Hop, Meeting
from slmops.core.runtimes import Named
from slmops.core.words import Expect

FAR = 0.5
"""Relative distance of two matrices from which one is no rounding of the other. Int4 is at about 0.1, another matrix at 1.4."""


class Link(Value):
    """A model of the chain.

    Attributes:
        parent: the one that it was made from.
        adapter: it is a base with an adapter that is not merged.
        guided: it has prompts of its own, which tell it the task in words.
        near: each of its weights is about what it was in `parent`.
    """

    name: str
    parent: str | None = None
    expects: Expect = "learned"
    runtime: Named = "torch"
    adapter: bool = False
    guided: bool = False
    near: bool = False


def ordered(links: Sequence[Link]) -> list[Link]:
    """The links with each parent right before its children, depth first, so that few are in use at a time.

    Raises:
        ValueError: a parent is not there, or links go round in a circle.
    """
    names = {link.name for link in links}
    lost = next((link for link in links if link.parent is not None and link.parent not in names), None)
    if lost is not None:
        raise ValueError(f"{lost.name} comes from {lost.parent}, which is not there")
    children: dict[str | None, list[Link]] = {}
    for link in links:
        children.setdefault(link.parent, []).append(link)
    found: list[Link] = []
    rest = list(reversed(children.get(None, [])))
    while rest:
        link = rest.pop()
        found.append(link)
        rest += reversed(children.get(link.name, []))
    if len(found) < len(links):
        raise ValueError("the links go round in a circle")
    return found


def anchor(links: Sequence[Link]) -> Link:
    """The link whose greedy answers all are compared along: the last one that learned, since what follows must equal it."""
    order = ordered(links)
    learned = [link for link in order if link.expects == "learned" and not link.guided]
    return learned[-1] if learned else order[0]


def judge(link: Link, met: Meeting, exact: float, rounded: float) -> Hop:
    """What a hop may change against what it did.

    Args:
        met: what was measured between the link and its parent.
        exact: share of equal next tokens that such a hop must reach.
        rounded: share of the probability of its choices that such a hop must keep.
    """
    least = {"exact": exact, "rounded": rounded, "learned": None}[link.expects]
    reached = met.kept if link.expects == "rounded" else met.token_agreement
    broke: Literal["", "template", "weights", "nothing compared"] = ""
    if least is not None:
        if met.template_equal is not None and met.template_equal < 1:
            broke = "template"
        elif reached is None:
            broke = "nothing compared"
        elif reached < least or (met.furthest_weight is not None and met.furthest_weight["distance"] > FAR):
            broke = "weights"
    assert link.parent is not None
    return Hop(
        parent=link.parent, name=link.name, expects=link.expects, at_least=least, broke=broke,
        says=_says(link, met, least, broke), **met.model_dump(),
    )  # fmt: skip


def _says(link: Link, met: Meeting, least: float | None, broke: str) -> str:
    where = f"{link.parent} → {link.name}"
    if broke == "template":
        first = met.first_template_difference or {}
        return (
            f"{where}: the same messages become other tokens, first for prompt {first.get('id')}: "
            f"{_shown(first.get('child'))} instead of {_shown(first.get('parent'))}"
        )
    if broke == "nothing compared":
        return f"{where}: no prompt could be compared"
    if met.token_agreement is None:
        return f"{where}: their tokens cannot be compared"
    text = f"{where}: {100 * met.token_agreement:.1f} % of next tokens are the same"
    far = met.furthest_weight
    if broke and far is not None and far["distance"] > FAR:
        text += f", and {far['name']} is not the matrix that it was (distance {far['distance']:.2f} of its size)"
    elif broke and link.expects == "rounded":
        text += f", and its choices keep {100 * (met.kept or 0):.1f} % of the probability, less than {100 * (least or 0):g} %"
    elif broke:
        text += f", less than the {100 * (least or 0):g} % that a step must keep which changes nothing"
    first_token = met.first_divergence
    if broke and first_token:
        text += (
            f"; first at prompt {first_token['id']}, token {first_token['step']}: "
            f"{first_token['child']!r} instead of {first_token['parent']!r}"
        )
    return text


def _shown(tokens: Any) -> str:
    return " ".join(map(repr, (tokens or [])[:12])) + (" …" if len(tokens or []) > 12 else "")


def verdict(hops: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for a chain, whose hops are given as they stand in reports."""
    broken = [hop for hop in hops if hop["broke"]]
    if not broken:
        return "no hop broke the model"
    names = ", ".join(f"{hop['parent']} → {hop['name']}" for hop in broken)
    return f"{names}: this hop broke the model" if len(broken) == 1 else f"{names}: these hops broke the model"
