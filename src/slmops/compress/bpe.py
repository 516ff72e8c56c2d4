"""A byte-pair tokenizer with fewer tokens: what of `tokenizer.json` a set of tokens needs, and the file without the rest. Pure.

A token is made by merging two smaller ones, those by merging others. `needed` runs these merges and adds every token that comes up on
the way; `trimmed` keeps the merges between kept tokens, in their order.

Laws: a text whose tokens are all kept is cut as before, since at each step the first merge that applies is still there, and
none is new. Any other text still encodes, into more tokens, and decodes to itself: `alphabet` is always kept.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from slmops.errors import CompressionError

Json = Mapping[str, Any]

HINT = "leave the vocabulary whole"
ASCII = frozenset(map(chr, range(0x80))) | {"▁"}
"""Characters that a vocabulary of characters, with bytes for the rarer ones, keeps in any case. Gemma's has a tab for its byte."""


def check(tokenizer: Json) -> None:
    """Refuse what cannot be trimmed.

    Raises:
        CompressionError: another kind of tokenizer, or one with a part whose token ids are not known.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise CompressionError(f"a tokenizer of the kind {model.get('type')} cannot be trimmed: only BPE can", HINT)
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise CompressionError(f"a tokenizer with {name} cannot be trimmed", HINT)
    for part in _processors(tokenizer):
        if part["type"] not in ("TemplateProcessing", "ByteLevel"):
            raise CompressionError(f"a tokenizer with the post-processor {part['type']} cannot be trimmed", HINT)


def alphabet(tokenizer: Json) -> set[str]:
    """The tokens that every text can be written with.

    All of one character in a byte-level vocabulary (256); the 256 bytes and ASCII where there are tokens for bytes
    (`byte_fallback`); else all of one character.
    """
    vocabulary = tokenizer["model"]["vocab"]
    single = {token for token in vocabulary if len(token) == 1}
    if not tokenizer["model"].get("byte_fallback"):
        return single
    return {f"<0x{byte:02X}>" for byte in range(256)} & set(vocabulary) | single & ASCII


def needed(tokenizer: Json, tokens: Iterable[str]) -> set[str]:
    """The tokens of the vocabulary among `tokens`, with all that their merges go through."""
    vocabulary = tokenizer["model"]["vocab"]
    ranks = {pair: rank for rank, pair in enumerate(_pairs(tokenizer))}
    kept: set[str] = set()
    for token in tokens:
        if token in vocabulary and token not in kept:
            kept.add(token)
            kept |= _way(token, ranks) & vocabulary.keys()
    return kept


def _way(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """All pieces that come up while the characters of a token are merged."""
    parts = list(token)
    seen = set(parts)
    while len(parts) > 1:
        found = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not found:
            break  # a word that the vocabulary holds whole (`ignore_merges`)
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        seen.add(parts[i])
    return seen


def filled(tokenizer: Json, kept: set[str], count: int) -> set[str]:
    """`kept`, and what the earliest merges make until there are `count` tokens; they are those that came up most often."""
    more = set(kept)
    for left, right in _pairs(tokenizer):
        if len(more) >= count:
            break
        if left + right not in more:
            more |= {left, right, left + right}
    return more


def trimmed(tokenizer: Json, kept: set[str], added: set[int]) -> tuple[dict[str, Any], list[int]]:
    """The file with the tokens `kept` and the added tokens (control marks) with the ids `added`, and nothing else.

    Returns:
        The new tokenizer.json, and the old id of each new id: those of the vocabulary first, either in their old order.
    """
    model = tokenizer["model"]
    marks = [mark for mark in tokenizer["added_tokens"] if mark["id"] in added]
    stay = kept | {mark["content"] for mark in marks if mark["content"] in model["vocab"]}
    words = sorted((id, token) for token, id in model["vocab"].items() if token in stay)
    beside = sorted(mark["id"] for mark in marks if mark["content"] not in model["vocab"])
    order = [id for id, _ in words] + beside
    new = {old: place for place, old in enumerate(order)}
    out: dict[str, Any] = copy.deepcopy({key: value for key, value in tokenizer.items() if key != "model"})
    out["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    out["model"]["vocab"] = {token: new[id] for id, token in words}
    out["model"]["merges"] = [
        merge for merge, (left, right) in zip(model["merges"], _pairs(tokenizer), strict=True)
        if left in stay and right in stay and left + right in stay
    ]  # fmt: skip
    out["added_tokens"] = [{**mark, "id": new[mark["id"]]} for mark in sorted(marks, key=lambda mark: new[mark["id"]])]
    for part in _processors(out):
        for piece in part.get("special_tokens", {}).values():
            piece["ids"] = [new[id] for id in piece["ids"]]
    if isinstance(out.get("padding"), dict) and "pad_id" in out["padding"]:
        out["padding"]["pad_id"] = new[out["padding"]["pad_id"]]
    return out, order


def named(tokenizer: Json) -> set[int]:
    """Ids that the file itself names: of its post-processor, of padding, and its unknown token."""
    found = {
        id
        for part in _processors(tokenizer)
        for piece in part.get("special_tokens", {}).values()
        for id in piece["ids"]
    }
    if isinstance(tokenizer.get("padding"), dict):
        found |= {tokenizer["padding"].get("pad_id")} - {None}
    unknown = tokenizer["model"].get("unk_token")
    return found | ({tokenizer["model"]["vocab"][unknown]} if unknown in tokenizer["model"]["vocab"] else set())


def _pairs(tokenizer: Json) -> list[tuple[str, str]]:
    """The merges in order; the file writes them as pairs, older ones as one string with a space."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _processors(tokenizer: Json) -> list[Any]:
    """The parts of the post-processor, none if there is none."""
    whole = tokenizer.get("post_processor")
    if not whole:
        return []
    parts: list[Any] = whole["processors"] if whole["type"] == "Sequence" else [whole]
    return parts
