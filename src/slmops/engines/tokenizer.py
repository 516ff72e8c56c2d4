"""The tokenizer of a model folder, and examples as its chat template writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.core.example import Example
from slmops.errors import DataError, ModelError
from slmops.store.rows import read_examples

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, with a chat template and an end token.

    Raises:
        ModelError: it cannot be loaded, or lacks one of the two.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded: {error}", "the folder needs a tokenizer.json"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: the tokenizer names no end token", "set eos_token in tokenizer_config.json")
    if not tokenizer.chat_template:
        raise ModelError(f"{folder}: the tokenizer has no chat template", "use an instruction-tuned model as base")
    return tokenizer


def rendered(tokenizer: Any, example: Example) -> tuple[str, str]:
    """Prompt text (generation prompt included) and answer text with its end mark, as the chat template writes them."""
    prompt: str = tokenizer.apply_chat_template(example.prompt_messages(), tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template(example.messages(), tokenize=False)
    end: str = tokenizer.eos_token
    answer = example.answer or ""
    if whole.startswith(prompt):
        rest = whole[len(prompt) :]
        if rest.rstrip().endswith(end) and answer.strip() in rest:
            return prompt, rest.rstrip()
    return prompt, answer + end


def examples_of(inputs: Mapping[str, Path], files: Sequence[str]) -> Iterator[Example]:
    """The examples of files named `input/file`, in their order; a file that is not there has none."""
    for entry in files:
        name, _, file = entry.partition("/")
        yield from read_examples(inputs[name] / file)


def calibration(
    tokenizer: Any, inputs: Mapping[str, Path], files: Sequence[str], count: int, longest: int
) -> list[list[int]]:
    """Token ids of the texts that a quantiser looks at; see `calibration_texts`."""
    return [ids for ids, _start in calibration_texts(tokenizer, inputs, files, count, longest)]


def calibration_texts(
    tokenizer: Any, inputs: Mapping[str, Path], files: Sequence[str], count: int, longest: int
) -> list[tuple[list[int], int]]:
    """Token ids of the texts that a quantiser looks at: prompts with their answers, as a model reads them.

    Args:
        files: of examples, as `input/file`; of all of them the `count` with the smallest ids are taken.
        longest: most tokens of a text; the rest of a longer one is left out.

    Returns:
        With each text the position from which on the next token is the answer's (the last position of the prompt).

    Raises:
        DataError: there is no example.
    """
    found = {(example.id, example.answer or ""): example for example in examples_of(inputs, files)}
    if not found:
        raise DataError("there is no example to calibrate on", f"the files are: {', '.join(files)}")
    texts = []
    for key in sorted(found)[:count]:
        parts = rendered(tokenizer, found[key])[: 1 if found[key].answer is None else 2]
        encoded = tokenizer(list(parts), add_special_tokens=False)["input_ids"]
        texts.append(([id for part in encoded for id in part][:longest], len(encoded[0]) - 1))
    return texts
