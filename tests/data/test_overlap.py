"""Leaks and duplicates are found exactly, in one order, whatever the case and punctuation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.data.overlap import (
    Overlap,
    drop_near_duplicates,
    find_overlaps,
    near_duplicate_groups,
    normalise,
    shingles,
    similarity,
    words,
)

TEXTS = st.lists(
    st.lists(st.sampled_from(["red", "blue", "green", "tall", "small"]), max_size=8).map(" ".join), max_size=12
)
THRESHOLDS = st.sampled_from([0.2, 0.5, 0.7, 0.9, 1.0])


@given(st.text())
def test_normal_form_is_stable(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)
    assert bool(normalise(text)) == bool(text.split())


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What's my balance?", "whats my  balance"),
        ("What’s my balance", "what's my balance!"),
        ("ﬁnd the CAFÉ", "find the cafe\u0301"),
        ("STRASSE", "straße"),
        ("card-arrival, please", "card arrival please"),
    ],
)
def test_spelling_of_the_same_text_does_not_matter(left: str, right: str) -> None:
    assert normalise(left) == normalise(right)


def test_texts_that_differ_stay_apart() -> None:
    assert normalise("?") != normalise("!")
    assert normalise("pay $5") != normalise("pay 5")
    assert words("天気予報") == list("天気予報")
    assert words("हिन्दी में") == ["हिन्दी", "में"]


def test_shingles_of_short_texts() -> None:
    assert shingles("") == frozenset()
    assert shingles("Hi") == {"hi"}
    assert shingles("hello my friend") == {"hello my friend"}
    assert shingles("hello my old friend") == {"hello my old", "my old friend"}


def naive(candidates: list[str], references: list[str], threshold: float, ngram: int) -> list[Overlap]:
    """The definition, written down plainly."""
    out = []
    for index, text in enumerate(candidates):
        hits = []
        for other, reference in enumerate(references):
            left, right = normalise(text), normalise(reference)
            if not left or not right:
                continue
            like = similarity(left, right)
            runs = [f" {' '.join(left.split()[i : i + ngram])} " for i in range(len(left.split()) - ngram + 1) if ngram]
            if left == right:
                hits.append((0, -1.0, other, 1.0, "exact"))
            elif threshold < 1 and like >= threshold:
                hits.append((1, -like, other, like, "near"))
            elif any(run in f" {right} " for run in runs):
                hits.append((2, 0.0, other, like, "ngram"))
        if hits:
            _, _, other, like, kind = min(hits)
            out.append(Overlap(index, other, like, kind))
    return out


@given(TEXTS, TEXTS, THRESHOLDS, st.sampled_from([0, 2, 4]))
def test_find_overlaps_is_its_definition(candidates: list[str], references: list[str], t: float, ngram: int) -> None:
    assert find_overlaps(candidates, references, t, ngram) == naive(candidates, references, t, ngram)


@given(TEXTS, THRESHOLDS)
def test_dropping_keeps_the_first_of_each_kind(texts: list[str], threshold: float) -> None:
    kept, dropped = drop_near_duplicates(texts, threshold)
    assert sorted(kept + [o.candidate_index for o in dropped]) == list(range(len(texts)))
    full = [i for i in kept if texts[i]]
    for place, index in enumerate(full):
        for other in full[:place]:
            assert normalise(texts[index]) != normalise(texts[other])
            assert threshold == 1 or similarity(texts[index], texts[other]) < threshold
    for overlap in dropped:
        assert overlap.reference_index in kept
        assert overlap.reference_index < overlap.candidate_index
        assert overlap.similarity >= threshold
        assert overlap.similarity == pytest.approx(
            similarity(texts[overlap.candidate_index], texts[overlap.reference_index])
        )
    assert drop_near_duplicates([texts[i] for i in kept], threshold)[1] == []


@given(TEXTS, THRESHOLDS)
def test_groups_are_the_dropped_ones_with_their_kept_one(texts: list[str], threshold: float) -> None:
    groups = near_duplicate_groups(texts, threshold)
    kept, dropped = drop_near_duplicates(texts, threshold)
    assert all(group[0] in kept and len(group) > 1 for group in groups)
    assert sorted(i for group in groups for i in group[1:]) == [o.candidate_index for o in dropped]


def test_minhash_finds_what_the_exact_join_finds_on_long_texts() -> None:
    documents = [" ".join(f"w{(n * 7919 + i * i) % 5003}" for i in range(300)) for n in range(30)]
    copies = [text.replace(f"w{(n * 7919) % 5003} ", "changed ", 1) for n, text in enumerate(documents)]
    exact = find_overlaps(copies, documents, 0.9, search="exact")
    assert len(exact) == 30
    assert {o.kind for o in exact} <= {"near", "exact"}
    assert find_overlaps(copies, documents, 0.9, search="minhash") == exact
    assert drop_near_duplicates(documents + copies, 0.9, search="minhash")[0] == list(range(30))


def test_thresholds_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        find_overlaps(["a"], ["b"], 0.0)
    with pytest.raises(ValueError, match="ngram"):
        find_overlaps(["a"], ["b"], 0.5, -1)
