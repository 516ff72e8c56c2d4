"""Which texts say the same: normal form, word shingles, near-duplicates, shared n-grams.

Pure functions over lists of texts; nothing is read or written. Splitting, leak removal and the synthesis filters all
use this one definition. Two texts are

- `exact` copies if their normal forms are equal (case, punctuation, apostrophes and white space do not count),
- `near` copies if the Jaccard similarity of their sets of word 3-shingles is at or above the threshold,
- `ngram` copies if they share a run of n words.

Near copies are found by a prefix-filtered join (Bayardo et al., WWW 2007, https://doi.org/10.1145/1242572.1242591),
which misses none. Collections with very many shingles (long documents) get their candidates from MinHash LSH (Broder
1997) instead, which needs little memory and may miss a pair close to the threshold. Either way each pair is verified by
its true similarity, so nothing is reported that is below the threshold. Results do not depend on a seed.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from slmops.errors import MissingExtraError

SHINGLE = 3
EXACT_LIMIT = 4_000_000
"""Shingles (counted with repeats, over both sides) up to which the exact join is used by `auto`."""
PERMUTATIONS = 128

Kind = Literal["exact", "near", "ngram"]
Search = Literal["auto", "exact", "minhash"]

_APOSTROPHES = "'\u2019\u2018\u02bc`\u00b4"
_SINGLE = ((0x0E00, 0x0E7F), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3134F))


@dataclass(frozen=True)
class Overlap:
    """A candidate that says the same as a reference.

    Attributes:
        candidate_index: position in the candidates.
        reference_index: position in the references.
        similarity: Jaccard similarity of their shingles, 0 to 1 (1 for exact copies).
        kind: how they were found: `exact`, `near` or `ngram`.
    """

    candidate_index: int
    reference_index: int
    similarity: float
    kind: Kind


class _Table(dict[int, str | None]):
    """What each character becomes in the normal form; filled as characters are met."""

    def __missing__(self, code: int) -> str | None:
        char = chr(code)
        value: str | None
        if char in _APOSTROPHES or unicodedata.category(char) == "Cf":
            value = None
        elif any(low <= code <= high for low, high in _SINGLE) and unicodedata.category(char)[0] in "LN":
            value = f" {char} "  # scripts without spaces: each character is a word
        elif unicodedata.category(char)[0] in "PZC":
            value = " "
        elif unicodedata.category(char)[0] == "S":
            value = f" {char} "
        else:
            value = char
        self[code] = value
        return value


_TABLE = _Table()


def words(text: str) -> list[str]:
    """The words of a text in normal form: NFKC, case folded, without punctuation; symbols are words of their own.

    A text of punctuation alone is one word, itself, so that `?` and `!` differ.
    """
    if text.isascii():
        return text.casefold().translate(_TABLE).split() or _bare(text)
    form = text
    for _ in range(8):  # a removed character can let its neighbours compose: go on until nothing changes
        before, form = form, _fold(form)
        if form == before:
            break
    return form.split(" ") if form else []


def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_TABLE).split() or _bare(folded))


def _bare(text: str) -> list[str]:
    squeezed = "".join(text.split())
    return [squeezed] if squeezed else []


def normalise(text: str) -> str:
    """The normal form of a text: its words with single spaces between. `normalise(normalise(t)) == normalise(t)`."""
    return " ".join(words(text))


def shingles(text: str, size: int = SHINGLE) -> frozenset[str]:
    """The runs of `size` words of a text. A shorter text that is not empty has one: all of its words."""
    return _shingles(words(text), size)


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Shared members over all members, 0 to 1. Two empty sets are alike (1)."""
    shared = len(left & right)
    union = len(left) + len(right) - shared
    return shared / union if union else 1.0


def similarity(left: str, right: str) -> float:
    """Jaccard similarity of the word 3-shingles of two texts, 0 to 1."""
    return jaccard(shingles(left), shingles(right))


def find_overlaps(
    candidates: Sequence[str],
    references: Sequence[str],
    threshold: float,
    ngram: int = 0,
    search: Search = "auto",
) -> list[Overlap]:
    """Which candidates say the same as some reference. At most one overlap per candidate, in the candidates' order.

    An exact copy wins over a near one, a near one over a shared n-gram; among near ones the most similar, then the
    first. Empty texts are like nothing.

    Args:
        threshold: Jaccard similarity, above 0; at 1 and above only exact copies count.
        ngram: length in words of a shared run that counts as an overlap; 0: not looked at.
        search: `exact` join, `minhash` LSH, or `auto` by the number of shingles.

    Raises:
        ValueError: threshold is 0 or below, or ngram is below 0.
        MissingExtraError: MinHash is wanted and datasketch is not installed.
    """
    _check(threshold, ngram)
    candidate_forms = [normalise(text) for text in candidates]
    reference_forms = [normalise(text) for text in references]
    first: dict[str, int] = {}
    for index, form in enumerate(reference_forms):
        if form:
            first.setdefault(form, index)
    open_forms = list(dict.fromkeys(form for form in candidate_forms if form and form not in first))
    best: dict[str, tuple[int, float, Kind]] = {}
    if threshold < 1 and open_forms and first:
        finder = _finder(open_forms, list(first), threshold, search)
        for form, index in first.items():
            finder.add(index, form)
        for form in open_forms:
            if hit := finder.find(form):
                best[form] = (hit[0], hit[1], "near")
    if ngram:
        runs: dict[str, int] = {}
        for form, index in first.items():
            for run in _runs(form, ngram):
                runs.setdefault(run, index)
        for form in open_forms:
            if form in best:
                continue
            hits = [runs[run] for run in _runs(form, ngram) if run in runs]
            if hits:
                best[form] = (min(hits), _form_similarity(form, reference_forms[min(hits)]), "ngram")
    out = []
    for index, form in enumerate(candidate_forms):
        if form in first:
            out.append(Overlap(index, first[form], 1.0, "exact"))
        elif form in best:
            out.append(Overlap(index, *best[form]))
    return out


def drop_near_duplicates(
    texts: Sequence[str], threshold: float, search: Search = "auto"
) -> tuple[list[int], list[Overlap]]:
    """Keep the first of all that say the same.

    Returns:
        The positions kept, in order, and for each text dropped the kept one that it is like (both index `texts`). No
        two kept texts are exact copies or, with the exact search, at or above the threshold. Empty texts are kept.

    Raises:
        ValueError: threshold is 0 or below.
        MissingExtraError: as `find_overlaps`.
    """
    _check(threshold, 0)
    forms = [normalise(text) for text in texts]
    finder = None
    if threshold < 1:
        unique = list(dict.fromkeys(form for form in forms if form))
        finder = _finder(unique, (), threshold, search)
    kept: list[int] = []
    dropped: list[Overlap] = []
    seen: dict[str, Overlap | int] = {}
    for index, form in enumerate(forms):
        if not form:
            kept.append(index)
            continue
        earlier = seen.get(form)
        if isinstance(earlier, Overlap):
            dropped.append(Overlap(index, earlier.reference_index, earlier.similarity, earlier.kind))
        elif earlier is not None:
            dropped.append(Overlap(index, earlier, 1.0, "exact"))
        elif finder is not None and (hit := finder.find(form)):
            seen[form] = Overlap(index, hit[0], hit[1], "near")
            dropped.append(Overlap(index, hit[0], hit[1], "near"))
        else:
            seen[form] = index
            kept.append(index)
            if finder is not None:
                finder.add(index, form)
    return kept, dropped


def near_duplicate_groups(texts: Sequence[str], threshold: float, search: Search = "auto") -> list[list[int]]:
    """Groups of two and more positions that say the same; the first of a group is the one that would be kept."""
    groups: dict[int, list[int]] = {}
    for overlap in drop_near_duplicates(texts, threshold, search)[1]:
        groups.setdefault(overlap.reference_index, [overlap.reference_index]).append(overlap.candidate_index)
    return [groups[index] for index in sorted(groups)]


class _Finder(Protocol):
    """Finds the most similar text added so far at or above a threshold. Texts are normal forms, not empty."""

    def add(self, index: int, form: str) -> None: ...

    def find(self, form: str) -> tuple[int, float] | None: ...


class _PrefixFinder:
    """Misses nothing: two sets of similarity t share one of their rarest members, so only those are indexed."""

    def __init__(self, counts: Counter[str], threshold: float) -> None:
        ordered = sorted(counts, key=lambda shingle: (counts[shingle], shingle))
        self.rank = {shingle: rank for rank, shingle in enumerate(ordered)}
        self.threshold = threshold
        self.sets: dict[int, frozenset[int]] = {}
        self.postings: dict[int, list[int]] = {}

    def _prefix(self, form: str) -> tuple[frozenset[int], list[int]]:
        ranks = sorted(self.rank[shingle] for shingle in _shingles(form.split(" ")))
        return frozenset(ranks), ranks[: len(ranks) - math.ceil(self.threshold * len(ranks) - 1e-9) + 1]

    def add(self, index: int, form: str) -> None:
        self.sets[index], prefix = self._prefix(form)
        for rank in prefix:
            self.postings.setdefault(rank, []).append(index)

    def find(self, form: str) -> tuple[int, float] | None:
        own, prefix = self._prefix(form)
        size, best, tried = len(own), None, set()
        for rank in prefix:
            for index in self.postings.get(rank, ()):
                if index in tried:
                    continue
                tried.add(index)
                other = self.sets[index]
                if min(size, len(other)) < self.threshold * max(size, len(other)) - 1e-9:
                    continue
                shared = len(own & other)
                best = _better(best, index, shared / (size + len(other) - shared), self.threshold)
        return best


class _MinHashFinder:
    """Candidates from MinHash LSH, tuned to miss little at the threshold; each is verified by its true similarity."""

    def __init__(self, threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise MissingExtraError("datasketch", "data") from error
        self.threshold = threshold
        self.forms: dict[int, str] = {}
        self.lsh: Any = MinHashLSH(threshold=max(0.05, threshold - 0.1), num_perm=PERMUTATIONS, weights=(0.2, 0.8))
        self.empty: Any = MinHash(num_perm=PERMUTATIONS, seed=1)

    def _sketch(self, form: str) -> Any:
        sketch = self.empty.copy()
        sketch.update_batch([s.encode("utf-8", "surrogatepass") for s in sorted(_shingles(form.split(" ")))])
        return sketch

    def add(self, index: int, form: str) -> None:
        self.forms[index] = form
        self.lsh.insert(index, self._sketch(form))

    def find(self, form: str) -> tuple[int, float] | None:
        best = None
        for index in sorted(self.lsh.query(self._sketch(form))):
            best = _better(best, index, _form_similarity(form, self.forms[index]), self.threshold)
        return best


def _better(best: tuple[int, float] | None, index: int, value: float, threshold: float) -> tuple[int, float] | None:
    """The more similar of the best so far and a new one at or above the threshold; on a tie the first position."""
    if value < threshold - 1e-9 or (best is not None and (-best[1], best[0]) <= (-value, index)):
        return best
    return index, value


def _finder(left: Sequence[str], right: Sequence[str], threshold: float, search: Search) -> _Finder:
    if search == "auto":
        total = sum(max(1, form.count(" ") - 1) for side in (left, right) for form in side)
        search = "exact" if total <= EXACT_LIMIT else "minhash"
    if search == "minhash":
        return _MinHashFinder(threshold)
    counts: Counter[str] = Counter()
    for side in (left, right):
        for form in side:
            counts.update(_shingles(form.split(" ")))
    return _PrefixFinder(counts, threshold)


def _shingles(tokens: Sequence[str], size: int = SHINGLE) -> frozenset[str]:
    if len(tokens) <= size:
        return frozenset([" ".join(tokens)] if tokens else [])
    return frozenset(_windows(tokens, size))


def _windows(tokens: Sequence[str], size: int) -> Iterator[str]:
    for window in zip(*(tokens[offset:] for offset in range(size)), strict=False):
        yield " ".join(window)


def _runs(form: str, size: int) -> Iterable[str]:
    tokens = form.split(" ")
    return _windows(tokens, size) if len(tokens) >= size else ()


def _form_similarity(left: str, right: str) -> float:
    return jaccard(_shingles(left.split(" ")), _shingles(right.split(" ")))


def _check(threshold: float, ngram: int) -> None:
    if not threshold > 0:
        raise ValueError(f"the near-duplicate threshold must be above 0, not {threshold}")
    if ngram < 0:
        raise ValueError(f"ngram must not be below 0, not {ngram}")
