from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from slmops.engines.minimal import _write_tokenizer
from slmops.engines.plain_tokenizer import PlainTokenizer
from slmops.serve.text import Stop, Stream

TEXTS = (
    "plain words",
    "Grüße, naïve façade",
    "日本語のテキスト",
    "🎉 mixed 🧑‍🚀 text\n\twith tabs",
    "  leading and trailing  ",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PlainTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    _write_tokenizer(folder)
    return PlainTokenizer(folder, "serve")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_characters_come_whole(tokenizer: PlainTokenizer, text: str) -> None:
    """Every byte is a token here."""
    stream = Stream(tokenizer)
    pieces = [stream.add(id) for id in tokenizer.ids(text)]
    assert "".join(pieces) == text and stream.rest() == ""
    assert all("\ufffd" not in piece for piece in pieces)


def test_characters_of_single_bytes_are_never_cut_in_two(tmp_path: Path) -> None:
    """Tokenizers that fall back to bytes make a whole run of them unreadable if it begins within a character."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "▁": 257}
    step = {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                                             {"type": "Fuse"}]}  # fmt: skip
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": True, "unk_token": None}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "decoder": step, "model": model})
    )
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = PlainTokenizer(tmp_path, "serve")
    random_ = random.Random(0)
    for _ in range(300):
        text = "".join(random_.choice("aé東京안녕🎉") for _ in range(random_.randrange(1, 12)))
        stream = Stream(tokenizer)
        pieces = [stream.add(id) for id in tokenizer.ids(text)]
        assert "".join(pieces) + stream.rest() == text
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_broken_character_shows_as_its_replacement_at_the_end(tokenizer: PlainTokenizer) -> None:
    stream = Stream(tokenizer)
    ids = tokenizer.ids("ab🎉")[:-1]
    assert "".join(stream.add(id) for id in ids) == "ab"
    assert stream.rest() == "\ufffd"


@pytest.mark.parametrize("seed", range(50))
def test_text_ends_before_the_first_stop_string(seed: int) -> None:
    random_ = random.Random(seed)
    text = "".join(random_.choice("ab.") for _ in range(60))
    stops = [
        "".join(random_.choice("ab.") for _ in range(random_.randrange(1, 5))) for _ in range(random_.randrange(1, 4))
    ]
    stop, told, at = Stop(stops), "", 0
    while at < len(text) and not stop.found:
        size = random_.randrange(0, 4)
        told += stop.add(text[at : at + size])
        at += size
        places = [text.find(s) for s in stops if s in text]
        assert text.startswith(told) and len(told) <= min(places, default=len(text))
    if not stop.found:
        told += stop.rest()
    places = [text.find(s) for s in stops if s in text]
    assert stop.found == bool(places)
    assert told == text[: min(places, default=len(text))]


def test_the_longest_beginning_of_a_stop_string_is_held_back() -> None:
    stop = Stop(["aab", "a" * 200 + "c"])
    assert stop.add("x" + "a" * 100) == "x" and stop.add("a" * 150) == "a" * 50
    assert stop.add("c") == "" and stop.found


def test_half_a_character_is_cut_into_tokens_as_its_replacement(tokenizer: PlainTokenizer) -> None:
    assert tokenizer.ids("a\ud83db") == tokenizer.ids("a\ufffdb")
    half, other = ([{"role": "user", "content": text}] for text in ("\ude00", "\ufffd"))
    assert tokenizer.encode(half) == tokenizer.encode(other)
