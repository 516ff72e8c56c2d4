"""A byte-level BPE tokenizer from the training data, with the chat template that every model from scratch uses.

It promises: the same data gives the same bytes; no validation or test text is read; every text (any UTF-8) encodes and
decodes without loss; the ONNX Runtime GenAI tokenizer gives the same ids as the Hugging Face one, except around U+0000
(that runtime stops there), U+0085 (white space for one, not for the other) and letters newer than its Unicode table.

The chat form is `<|role|>content<|end|>` for each message and `<|assistant|>` where an answer is wanted. A tool's
message is shown as the user's. `<|end|>` is the end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as Base
from slmops.core.spec import Positive
from slmops.errors import DataError
from slmops.store.rows import read_examples

SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ 'user' if m['role'] == 'tool' else m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Words as Qwen2 cuts them (a word takes one sign before it along: `card_arrival` is two), but without its alternative for
# line breaks: there the ONNX Runtime GenAI tokenizer does not follow the pattern.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
PROMPTS = ("teacher.jsonl", "gold.jsonl", "pool.jsonl")
ANSWERS = ("teacher.jsonl", "gold.jsonl")

DECLARATION = Declaration(
    name="train.tokenizer",
    version="1",
    makes="tokenizer",
    takes={"data": "dataset"},
    extra="train",
    packages=("tokenizers", "transformers"),
)


class Params(Base):
    """How large the vocabulary is and how much answers count."""

    vocabulary: Positive = 2048
    answer_weight: Positive = 4


def texts(folder: Path, answer_weight: int) -> Iterator[str]:
    """Prompt texts once each, answers `answer_weight` times, in file order."""
    for name in PROMPTS:
        for example in read_examples(folder / name):
            for message in example.prompt:
                yield message.content
    for name in ANSWERS:
        for example in read_examples(folder / name):
            if example.answer is not None:
                for _ in range(answer_weight):
                    yield example.answer


def build(corpus: list[str], vocabulary: int) -> Any:
    """A `tokenizers.Tokenizer` of at most `vocabulary` entries (fewer where the text has no more pairs to merge)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def save(tokenizer: Any, out: Path) -> None:
    """Write the folder that `transformers.AutoTokenizer` loads: ids, settings, chat template."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[-1], clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Train on prompts of teacher, gold and pool and on answers of teacher and gold; never on validation or test."""
    smallest = 256 + len(SPECIAL)
    if params.vocabulary < smallest:
        raise DataError(
            f"a vocabulary of {params.vocabulary} is too small", f"give at least {smallest}: all bytes and marks"
        )
    corpus = list(texts(inputs["data"], params.answer_weight))
    if not any(corpus):
        raise DataError("there is no text to train a tokenizer on", f"one of {', '.join(PROMPTS)} must have examples")
    ctx.progress.start("tokenizer", None)
    tokenizer = build(corpus, params.vocabulary)
    save(tokenizer, out)
    ctx.progress.stop()
    sizes = [len(e.ids) for e in tokenizer.encode_batch(corpus[:2000], add_special_tokens=False)]
    characters = sum(map(len, corpus[:2000]))
    return {
        "vocabulary": tokenizer.get_vocab_size(),
        "characters_per_token": round(characters / max(1, sum(sizes)), 3),
    }
