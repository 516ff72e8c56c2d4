"""Who goes where: splits, teacher share, gold labels. Decided by the content of the prompt, never by a row number.

Everything here is a pure function of the examples as a set: their order does not matter, and the same prompt is always
sent to the same side. `place` depends on the text alone; `ranked` orders examples by a digest of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Literal

from slmops.core.example import Example
from slmops.data.overlap import normalise

Use = Literal["split", "teacher", "gold", "limit"]
"""Each choice has its own digest, so that one does not bias the next."""


def compared_texts(examples: Iterable[Example]) -> list[str]:
    """The text of each example by which two prompts count as the same.

    It is the conversation without its system message. Where the examples have several system messages, each is stood in
    for by one word, so that the same question about another document is another text, and a long system message that
    many share does not make all prompts alike.
    """
    examples = list(examples)
    systems = {m.content for e in examples for m in e.prompt if m.role == "system"}
    out = []
    for example in examples:
        parts = [m.content for m in example.prompt if m.role != "system"]
        if len(systems) > 1:
            system = "\n".join(m.content for m in example.prompt if m.role == "system")
            parts.insert(0, "system" + sha256(system.encode()).hexdigest()[:16])
        out.append("\n".join(parts))
    return out


def draw(text: str, use: Use) -> float:
    """A number in [0, 1) that depends on the normal form of a text and on what it is drawn for."""
    digest = sha256(f"{use}\0{normalise(text)}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / (1 << 48)


def place(text: str, validation: float, test: float) -> Literal["train", "validation", "test"]:
    """The split of a prompt, for shares of the whole."""
    at = draw(text, "split")
    if at < test:
        return "test"
    return "validation" if at < test + validation else "train"


def ranked(examples: Sequence[Example], texts: Sequence[str], use: Use) -> list[int]:
    """Positions of the examples in the order of their draw; equal texts stand together."""
    keys = [
        (draw(text, use), example.id, example.answer or "", example.rejected or "")
        for example, text in zip(examples, texts, strict=True)
    ]
    return sorted(range(len(keys)), key=keys.__getitem__)


def take_share(ranking: Sequence[int], strata: Sequence[str], share: float) -> set[int]:
    """The first `share` of each stratum (rounded to the nearest, at least one where the share is above 0).

    Args:
        ranking: positions, best first.
        strata: the stratum of each position (a label; the same text for all: no strata).
    """
    by_stratum: dict[str, list[int]] = {}
    for index in ranking:
        by_stratum.setdefault(strata[index], []).append(index)
    taken: set[int] = set()
    for members in by_stratum.values():
        count = int(share * len(members) + 0.5)
        taken.update(members[: max(count, 1) if share > 0 else 0])
    return taken


def take_per_stratum(ranking: Sequence[int], strata: Sequence[str], count: int) -> set[int]:
    """The first `count` of each stratum, or all of it where it has fewer."""
    seen: dict[str, int] = {}
    taken: set[int] = set()
    for index in ranking:
        if seen.get(strata[index], 0) < count:
            seen[strata[index]] = seen.get(strata[index], 0) + 1
            taken.add(index)
    return taken
