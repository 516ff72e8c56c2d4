from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.convert import rounding
from slmops.convert.rounding import Rounded, round_matrix


def matrix(seed: int, rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (rows, columns)).astype(np.float32)


def by_hand(row: list[float], bits: int) -> list[float]:
    """The plain rule for one group, written down again in words of one weight at a time."""
    half = 1 << (bits - 1)
    largest = max(row, key=abs)
    scale = float(np.float16(np.float32(largest) / np.float32(-half)))
    if scale == 0:
        return [0.0] * len(row)
    codes = [min(max(int(np.rint(np.float32(w) / np.float32(scale))) + half, 0), 2 * half - 1) for w in row]
    return [float(np.float32(c - half) * np.float32(scale)) for c in codes]


@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 4, 8]), scale=st.sampled_from([1e-6, 1e-3, 1.0, 50.0]))
@settings(max_examples=50, deadline=None)
def test_plain_rule_is_the_written_one(seed: int, bits: int, scale: float) -> None:
    weights = matrix(seed, 3, 32, scale)
    values = round_matrix(weights, bits, 16).values()
    for row, got in zip(weights.tolist(), values.tolist(), strict=True):
        assert got == by_hand(row[:16], bits) + by_hand(row[16:], bits)


@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 4, 8]), block=st.sampled_from([16, 32, 64, 128]))
@settings(max_examples=50, deadline=None)
def test_rounded_weights_round_to_themselves(seed: int, bits: int, block: int) -> None:
    once = round_matrix(matrix(seed, 5, 88), bits, block).values()
    for search in (False, True):
        assert np.array_equal(round_matrix(once, bits, block, search=search).values(), once)


@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 4, 8]))
@settings(max_examples=50, deadline=None)
def test_search_never_raises_the_error(seed: int, bits: int) -> None:
    weights = matrix(seed, 4, 64)
    plain = np.square(round_matrix(weights, bits, 32).values() - weights).sum()
    searched = np.square(round_matrix(weights, bits, 32, search=True).values() - weights).sum()
    assert searched <= plain


@pytest.mark.parametrize("block", [4, 32, 100])
def test_search_finds_the_scale_of_least_error(block: int) -> None:
    """Of all that are tried, in each group by itself, whatever its length."""
    weights = matrix(7, 6, 2 * block)
    found = round_matrix(weights, 4, block, search=True)
    for row, scales in zip(weights.reshape(6, 2, block), found.scales, strict=True):
        for group, scale in zip(row, scales, strict=True):
            largest = group[np.abs(group).argmax()]
            tried = [np.float16(largest / -8), *(np.float16(largest * np.float32(f) / -8) for f in rounding.CANDIDATES)]
            wide = np.array(tried, np.float32)[:, None]
            errors = np.square(group - np.clip(np.rint(group / wide), -8, 7) * wide).sum(1)
            assert errors[tried.index(scale)] == pytest.approx(errors.min(), rel=1e-5)


def test_search_pays_on_ordinary_weights() -> None:
    weights = matrix(0, 256, 128)
    errors = [np.square(round_matrix(weights, 4, 32, search=s).values() - weights).mean() for s in (False, True)]
    assert errors[1] < 0.92 * errors[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_puts_the_first_code_lowest(bits: int) -> None:
    rounded = round_matrix(matrix(1, 2, 40), bits, 32)
    packed = rounded.packed()
    assert packed.shape == (2, 2, 32 * bits // 8) and packed.dtype == np.uint8
    each, mask = 8 // bits, (1 << bits) - 1
    for place in range(each):
        assert np.array_equal(packed >> bits * place & mask, rounded.codes[..., place::each])


def test_zeros_stay_zero() -> None:
    rounded = round_matrix(np.zeros((2, 40), np.float32), 4, 32, search=True)
    assert isinstance(rounded, Rounded)
    assert not rounded.values().any()


@pytest.mark.parametrize("search", [False, True])
def test_a_matrix_in_parts_is_rounded_as_one(search: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(0).normal(size=(23, 100)).astype(np.float32)
    whole = rounding.round_matrix(weights, 4, 32, search=search)
    for at_once in (1, 300, 128 * 22):
        monkeypatch.setattr(rounding, "AT_ONCE", at_once)
        parts = rounding.round_matrix(weights, 4, 32, search=search)
        assert np.array_equal(parts.codes, whole.codes) and np.array_equal(parts.scales, whole.scales)
