"""Teachers that a training asks while it runs, and the refusals that come before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slmops.errors import TrainingError

if TYPE_CHECKING:
    from slmops.train.network import Network
    from slmops.train.sft import Prepared


def scoring(folder: Path, ready: Prepared, student: Network, precision: str) -> tuple[Network, str]:
    """A frozen teacher that sees the student's token ids, and the digest of its files.

    Args:
        precision: of its forward pass, as in `network.precision_for`.

    Raises:
        TrainingError: its tokenizer or its number of tokens is another, or its context is shorter than the examples.
        ModelError: it cannot be loaded.
    """
    from slmops.train import encode, network
    from slmops.train.cache_logits import folder_digest, overlap

    if encode.tokenizer_digest(folder) != encode.tokenizer_digest(ready.tokenizer_folder):
        share = overlap(encode.load_tokenizer(folder), encode.load_tokenizer(ready.tokenizer_folder))
        raise TrainingError(
            f"student and teacher have different tokenizers ({share:.1%} of the vocabulary agrees)",
            "set student.tokenizer: teacher, or train.method: cross_tokenizer",
        )
    teacher = network.frozen(folder, precision)
    if teacher.vocabulary != student.vocabulary:
        raise TrainingError(
            f"the teacher has {teacher.vocabulary} tokens, the student {student.vocabulary}",
            "use a student with the teacher's vocabulary, or train.method: sequence",
        )
    longest = int(ready.data.lengths.max())
    if network.context_of(teacher.model) < longest:
        raise TrainingError(
            f"an example has {longest} tokens, the teacher sees only {network.context_of(teacher.model)}",
            "set train.max_length to the teacher's context, or shorten the examples",
        )
    return teacher, folder_digest(folder)
