"""Method `compress.vocabulary`: a model without the tokens that its task has no use for.

Kept are the tokens of the texts that the model was trained on, as the chat template writes them, with all that a BPE goes through to
make them (`compress.bpe`), all bytes, all control marks, and if asked for the earliest merges up to a size. The rows of
the embedding and of the output matrix go with the others. This is exact: for a text whose tokens are kept, the model's
logits of kept tokens are those of before. Other texts still work, cut into smaller pieces, which the model knows less well.

Of a multilingual base that was tuned for one task this is most of its embedding (vocabulary trimming, arXiv 2305.15020).
Texts of the validation split are only counted, to say how many more tokens new texts take; those of the test split are not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.compress import bpe, folder
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import NonNegative
from slmops.errors import CompressionError, DataError, ModelError
from slmops.store.files import read_json

DECLARATION = Declaration(
    name="compress.vocabulary",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset", "synthetic?": "dataset", "augmented?": "dataset"},
    extra="train",
    packages=("torch", "transformers", "tokenizers", "safetensors"),
)

TABLES = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
TOLD = ("chat_template.jinja", "special_tokens_map.json")
LISTS = ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "bad_words_ids", "sequence_bias")


class Params(BaseParams):
    """Which texts count, as `input/file`, and how many tokens are kept at least."""

    files: tuple[str, ...]
    at_least: NonNegative = 0


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the smaller model folder.

    Raises:
        CompressionError: the tokenizer or the model is of a kind that cannot be trimmed.
        DataError: there is no text.
    """
    from slmops.engines.tokenizer import load_tokenizer

    source = inputs["model"]
    before = _object(source / "tokenizer.json")
    bpe.check(before)
    config = _object(source / "config.json")
    tokenizer = load_tokenizer(source)
    ctx.progress.start("reading the texts")
    ids = _encoded(tokenizer, _texts(tokenizer, inputs, params.files))
    ctx.progress.stop()
    seen = {id for text in ids for id in text}
    if not seen:
        raise DataError("there is no text whose tokens could be kept", f"the files are: {', '.join(params.files)}")
    seen |= bpe.named(before) | _named(tokenizer, source)
    marks = {
        mark["id"]: mark["content"]
        for mark in before["added_tokens"]
        if _stays(mark, seen, str(tokenizer.chat_template))
    }
    known = before["model"]["vocab"]
    words = {token for token, id in known.items() if id in seen} | (set(marks.values()) & known.keys())
    kept = bpe.needed(before, words) | bpe.alphabet(before)
    used = len(kept)
    kept = bpe.filled(before, kept, params.at_least - len(set(marks.values()) - known.keys()))
    after, order = bpe.trimmed(before, kept, set(marks))
    new = {old: place for place, old in enumerate(order)}
    (out / "tokenizer.json").write_text(json.dumps(after, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    _settings(source, out, new, {mark["content"] for mark in after["added_tokens"]})
    sizes = _weights(source, out, order, config["vocab_size"])
    fresh = load_tokenizer(out)
    _check(fresh, _texts(fresh, inputs, params.files), ids, new)
    told = _growth(tokenizer, fresh, inputs["data"])
    folder.record(source, out, sizes[1])
    ctx.progress.log(
        f"{len(order):,} of {config['vocab_size']:,} tokens kept ({used:,} for the training texts, all bytes and control marks): "
        f"{sizes[1] / 1e6:.2f} M parameters instead of {sizes[0] / 1e6:.2f} M"
        + (f"; validation texts take {told:.1%} more tokens" if told is not None else "")
    )
    return {
        "vocabulary": len(order), "vocabulary_before": config["vocab_size"], "parameters": sizes[1],
        "parameters_before": sizes[0], "more_validation_tokens": told,
    }  # fmt: skip


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if isinstance(found, dict):
        return found
    if path.name == "tokenizer.json":
        raise CompressionError("the model has no tokenizer.json, so its vocabulary cannot be trimmed", bpe.HINT)
    raise ModelError(f"{path} cannot be read", "the model folder is damaged; make it again")


def _texts(tokenizer: Any, inputs: Mapping[str, Path], files: Sequence[str]) -> list[str]:
    """Each example as prompt and as answer, rendered; an example without an answer as prompt alone."""
    from slmops.engines.tokenizer import examples_of, rendered

    found: list[str] = []
    for example in examples_of(inputs, files):
        found += rendered(tokenizer, example)[: 1 if example.answer is None else 2]
    return found


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of every text."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return ids


def _named(tokenizer: Any, source: Path) -> set[int]:
    """Ids of the tokens that the tokenizer calls special and that settings name."""
    found = set(tokenizer.all_special_ids)
    for name in ("config.json", "generation_config.json"):
        for value in _token_ids(read_json(source / name) or {}).values():
            found |= set(value if isinstance(value, list) else [value])
    return found


def _stays(mark: Mapping[str, Any], seen: set[int], template: str) -> bool:
    """Whether an added token is kept: a control mark, or one that a text, a setting or the chat template names."""
    return bool(mark["special"]) or mark["id"] in seen or mark["content"] in template


def _token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that hold token ids."""
    return {k: v for k, v in config.items() if k.endswith(("_token_id", "_token_ids")) and v is not None}


def _settings(source: Path, out: Path, new: Mapping[int, int], marks: set[str]) -> None:
    """Write the JSON files with the new ids, and copy what has none.

    Raises:
        CompressionError: a setting holds ids in a form that is not known.
    """
    import shutil

    for name in ("config.json", "generation_config.json"):
        settings = read_json(source / name)
        if not isinstance(settings, dict):
            continue
        odd = next((key for key in LISTS if settings.get(key)), None)
        if odd is not None:
            raise CompressionError(
                f"{name} has {odd}, whose token ids cannot be followed", "take it out of the model's folder"
            )
        for key, value in _token_ids(settings).items():
            settings[key] = [new[v] for v in value if v in new] if isinstance(value, list) else new.get(value)
        if "vocab_size" in settings:
            settings["vocab_size"] = len(new)
        (out / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    settings = read_json(source / "tokenizer_config.json")
    if isinstance(settings, dict):
        known = settings.get("added_tokens_decoder")
        if known:
            settings["added_tokens_decoder"] = {
                str(new[int(id)]): mark for id, mark in known.items() if int(id) in new and mark["content"] in marks
            }
        (out / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    for name in TOLD:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _weights(source: Path, out: Path, order: Sequence[int], rows: int) -> tuple[int, int]:
    """Copy the weights file by file, the tables with the rows `order` alone.

    Returns:
        Weights before and after.

    Raises:
        CompressionError: a tensor holds one row a token in a place that is not known.
        ModelError: there are no weights.
    """
    import torch

    chosen = torch.tensor(order)

    def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if name in TABLES:
            return name, tensor[chosen]
        if "embed" in name or "lm_head" in name or (tensor.dim() == 2 and tensor.shape[0] == rows):
            raise CompressionError(f"the tensor {name} may hold a row for each token, which is not known", bpe.HINT)
        return name, tensor

    return folder.rewrite(source, out, change)


def _check(fresh: Any, texts: list[str], ids: list[list[int]], new: Mapping[int, int]) -> None:
    """Hold the written tokenizer to the law.

    Raises:
        CompressionError: a text is cut otherwise than before.
    """
    for old, now, text in zip(ids, _encoded(fresh, texts), texts, strict=True):
        if [new.get(id) for id in old] != now:
            raise CompressionError(
                f"with fewer tokens the tokenizer cuts a text otherwise: {text[:60]!r}",
                "please report it; leave the vocabulary whole",
            )


def _growth(before: Any, after: Any, data: Path) -> float | None:
    """How many more tokens the prompts of the validation split take, as a share; None if there is none."""
    split = {"data": data}, ("data/validation.jsonl",)
    counts = [sum(map(len, _encoded(tokenizer, _texts(tokenizer, *split)))) for tokenizer in (before, after)]
    return round(counts[1] / counts[0] - 1, 6) if counts[0] else None
