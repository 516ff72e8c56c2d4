"""A byte-level BPE tokenizer.json as llama.cpp reads it: tokens, types, merges and the name of the rule that cuts words.

llama.cpp has no field for a tokenizer's own pattern, only names of patterns that it knows. What slmops trains cuts as
Qwen2 does but for runs of white space with line breaks in them. Both give the same ids unless some token joins a line
break with other white space; `Vocabulary.differs` says so if one does. Otherwise the ids are equal, but for letters newer
than the Unicode table of either: tests compare them.

llama.cpp ends an answer at the model's end tokens and also at any token with a name that it knows as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.engines import read_json
from slmops.engines.minimal import byte_alphabet
from slmops.errors import ConversionError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's types of tokens."""
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
OWN = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{SIGNS}|\s+(?!\S)|\s+"
"""The pattern of `train.tokenizer`."""
PATTERNS = {
    OWN: "qwen2",
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{SIGNS}|{SPACES}": "qwen2",
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{SIGNS}|{SPACES}": "llama-bpe",
}
WHOLE_WORDS = ("llama-bpe",)
"""Rules under which llama.cpp takes a word that is a token without looking at merges (`ignore_merges`)."""
WHITE = frozenset(b"".join(chr(c).encode() for c in (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B),
                                                     0x2028, 0x2029, 0x202F, 0x205F, 0x3000)))  # fmt: skip
"""Bytes of which white space is made in UTF-8."""
ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "</s>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
))  # fmt: skip
"""Tokens at which llama.cpp ends an answer, whatever the model says."""
BYTES = {letter: byte for byte, letter in enumerate(byte_alphabet())}
"""A letter of a byte-level token to its byte."""


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer.

    Attributes:
        tokens, types: one for each id up to the model's vocabulary.
        merges: `a b`, best first.
        pre: llama.cpp's name of the rule that cuts words.
        starts: whether a text begins with the token `bos`.
        special: `bos`, `eos`, `pad`, `unk`, `eot` and `eom` to id, those that there are.
        template: the chat template, or "".
        differs: what llama.cpp reads or ends otherwise, in words; empty if nothing is known.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    pre: str
    starts: bool
    special: Mapping[str, int]
    template: str
    differs: tuple[str, ...]


def read(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a Hugging Face folder, for a model with `size` rows of embeddings.

    Raises:
        ConversionError: it is no byte-level BPE, or has a part that llama.cpp has no counterpart for.
    """
    whole, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    model, added = whole["model"], whole.get("added_tokens") or []
    differs = []
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _refused("is no byte-level BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"has {key}")
    normalizer = whole.get("normalizer")
    if normalizer and normalizer.get("type") == "NFC":
        differs.append("token ids of text that is not in the Unicode form NFC")
    elif normalizer:
        raise _refused(f"normalises text ({normalizer.get('type')})")
    pre = rule(whole.get("pre_tokenizer"))
    if bool(model.get("ignore_merges")) != (pre in WHOLE_WORDS):
        raise _refused(f"has ignore_merges {bool(model.get('ignore_merges'))}, llama.cpp's rule {pre} the contrary")
    ids: dict[str, int] = dict(model["vocab"])
    if pattern(whole.get("pre_tokenizer")) == OWN and any(map(joins_lines, ids)):
        differs.append("token ids of line breaks beside other white space")
    types = dict.fromkeys(ids.values(), NORMAL)
    for token in added:
        ids[token["content"]] = token["id"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            differs.append(f"token ids of white space beside {token['content']}")
    if max(types) >= size:
        raise ConversionError(
            f"the tokenizer has the id {max(types)}, the model {size} embeddings", "give the tokenizer of the model"
        )
    texts = {i: text for text, i in ids.items()}
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    special = marks(settings, ids)
    stops = ends(folder, special.get("eos"))
    special |= dict(zip(("eos", "eot", "eom"), stops, strict=False))
    known = {texts.get(i, "") for i in stops[:3]}
    for text in sorted({texts.get(i, "") for i in stops} - known - ENDS):
        differs.append(f"answers with {text}, which go on")
    for text in sorted(ENDS.intersection(ids) - known - {texts.get(i, "") for i in stops}):
        differs.append(f"answers with {text}, which end there")
    return Vocabulary(
        tuple(texts.get(i, f"[PAD{i}]") for i in range(size)), tuple(types.get(i, UNUSED) for i in range(size)),
        merges, pre, starts(whole.get("post_processor"), special.get("bos"), ids), special, template(folder, settings),
        tuple(dict.fromkeys(differs)),
    )  # fmt: skip


def _refused(what: str) -> ConversionError:
    return ConversionError(
        f"the tokenizer {what}, so it cannot be written as GGUF", "give a model with a byte-level BPE tokenizer"
    )


def pattern(step: Mapping[str, Any] | None) -> str | None:
    """The pattern by which a `pre_tokenizer` cuts before bytes are written as letters; "" is that of GPT-2.

    Raises:
        ConversionError: it does not end in bytes.
    """
    steps = step["pretokenizers"] if step and step.get("type") == "Sequence" else [step or {}]
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise _refused("does not cut text into words of bytes")
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return ""
    split = steps[0]
    if len(steps) != 2 or steps[1].get("use_regex", True) or split.get("type") != "Split":
        return None
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    found = split["pattern"].get("Regex")
    return found if found else None


def rule(step: Mapping[str, Any] | None) -> str:
    """llama.cpp's name of the rule that cuts as `pre_tokenizer` does.

    Raises:
        ConversionError: none does.
    """
    found = pattern(step)
    name = "gpt-2" if found == "" else PATTERNS.get(found or "")
    if name is None:
        raise _refused("cuts words by a rule that llama.cpp has no name for")
    return name


def joins_lines(token: str) -> bool:
    """Whether a token of a byte-level vocabulary joins a line break with other white space."""
    found = bytes(BYTES.get(letter, 0) for letter in token)
    return len(found) > 1 and bool({10, 13} & set(found)) and WHITE.issuperset(found)


def marks(settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """Ids of the tokenizer's own marks: `bos`, `eos`, `pad`, `unk`, those that it has."""
    found = {}
    for name in ("bos", "eos", "pad", "unk"):
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str) and text in ids:
            found[name] = ids[text]
    return found


def ends(folder: Path, own: int | None) -> list[int]:
    """Ids that end an answer, the tokenizer's own first: of generation_config.json, else config.json, else that one.

    Raises:
        ConversionError: there is none.
    """
    found: Any = None
    for file in ("generation_config.json", "config.json"):
        if found is None and (folder / file).is_file():
            found = read_json(folder / file).get("eos_token_id")
    found = own if found is None else found
    if found is None or found == []:
        raise ConversionError("the model names no end token", "set eos_token_id in generation_config.json")
    found = found if isinstance(found, list) else [found]
    return sorted(found, key=lambda i: i != own)


def starts(processor: Mapping[str, Any] | None, bos: int | None, ids: Mapping[str, int]) -> bool:
    """Whether the tokenizer itself puts `bos` before a text."""
    steps = processor.get("processors", [processor]) if processor else []
    for step in steps:
        first = (step.get("single") or [{}])[0] if step.get("type") == "TemplateProcessing" else {}
        if bos is not None and ids.get(str((first.get("SpecialToken") or {}).get("id"))) == bos:
            return True
    return False


def template(folder: Path, settings: Mapping[str, Any]) -> str:
    """The chat template, "" if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    found = settings.get("chat_template") or ""
    if isinstance(found, list):
        found = next((one["template"] for one in found if one.get("name") == "default"), "")
    return str(found)
