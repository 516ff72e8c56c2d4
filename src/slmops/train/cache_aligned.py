"""One teacher pass for a student with another tokenizer: what the teacher thinks at the cuts that both tokenizers share.

For each answer the file keeps, per chunk of text between two common cuts, the teacher's log likelihood of the chunk, which
student token ends it, and the teacher's largest next-token probabilities where it begins. The end token of each side is
part of the last chunk, or a chunk of its own. See `train.cross_tokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as Base
from slmops.core.spec import Arithmetic, Positive
from slmops.errors import TrainingError
from slmops.train.pass_memory import BATCH, Settings, pieces, require_pass
from slmops.train.sft import PACKAGES, TAKES, check_rows

DECLARATION = Declaration(
    name="train.cache_aligned",
    version="3",
    makes="logits",
    takes={"teacher": "model"} | TAKES,
    extra="train",
    packages=PACKAGES,
    threads=True,
)


class Params(Base):
    """What is kept: `files` as the student's training has them, and `ranks` probabilities of each place.

    `precision` and `batch_size` as in `train.cache_logits`.
    """

    files: tuple[str, ...]
    ranks: Positive = 32
    max_length: Positive | None = None
    precision: Arithmetic = "auto"
    batch_size: Positive = BATCH


def cuts(offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each token the character at which it ends, or None where it ends inside a character.

    Args:
        offsets: start and end of each token in the text; the pieces of one character share both.
    """
    out: list[int | None] = []
    for place, (_start, end) in enumerate(offsets):
        inside = place + 1 < len(offsets) and offsets[place + 1][0] < end
        out.append(None if inside else end)
    return out


def common(teacher: Sequence[int | None], student: Sequence[int | None]) -> list[tuple[int, int]]:
    """Pairs (teacher's token, student's token) that end at the same character, ascending; the text's end among them."""
    ends = {end: place for place, end in enumerate(teacher) if end is not None}
    found = [(ends[end], place) for place, end in enumerate(student) if end is not None and end in ends]
    return [pair for n, pair in enumerate(found) if n == 0 or (pair[0] > found[n - 1][0] and pair[1] > found[n - 1][1])]


def answer_cuts(tokenizer: Any, answers: Sequence[str]) -> list[list[int | None]]:
    """The cuts of each answer. The tokens are those of the answer alone, without its end token."""
    rows = tokenizer(list(answers), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [cuts(row) for row in rows]


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write aligned.safetensors and index.json.

    Raises:
        TrainingError: a tokenizer does not tell where its tokens stand in the text, or answers are cut otherwise than alone.
    """
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from slmops.train import encode, network
    from slmops.train.batches import collate
    from slmops.train.loop import deterministic
    from slmops.train.objective import to_device

    rows = encode.read(inputs, params.files)
    check_rows(rows, params.files)
    folder = inputs["tokenizer"] if "tokenizer" in inputs else inputs["base"]
    teacher, student = encode.load_tokenizer(inputs["teacher"]), encode.load_tokenizer(folder)
    for tokenizer, who in ((teacher, "teacher"), (student, "student")):
        if not tokenizer.is_fast:
            raise TrainingError(
                f"the {who}'s tokenizer does not tell where its tokens stand in the text", "it needs a tokenizer.json"
            )
    context = network.context_in(inputs["teacher"])
    data = encode.encode(rows, teacher, min(context, params.max_length or context))
    rows = list(data.rows)
    encode.say_left_out(len(data.left_out), ctx)
    settings = Settings("aligned", params.batch_size, params.max_length, precision=params.precision)
    require_pass(inputs, ["teacher"], settings, data, ctx)
    net = network.frozen(inputs["teacher"], params.precision)
    answers = [row.example.answer or "" for row in rows]
    pairs = [common(t, s) for t, s in zip(answer_cuts(teacher, answers), answer_cuts(student, answers), strict=True)]
    theirs = [len(ids) for ids in teacher(answers, add_special_tokens=False)["input_ids"]]
    ours = encode.encode(rows, student, 1 << 30).answer_tokens.tolist()
    ranks = min(params.ranks, net.vocabulary)
    kept: dict[int, tuple[Any, Any, Any]] = {}
    order = np.argsort(data.lengths, kind="stable")
    ctx.progress.start("the teacher's pass", len(order), "examples")
    with deterministic(ctx.threads), torch.no_grad():
        for start in reversed(range(0, len(order), params.batch_size)):  # the longest first, as in `train.cache_logits`
            batch = order[start : start + params.batch_size]
            part = collate(data, batch, 0.0, "bucket")
            states = net.hidden(net.weights, to_device(part, net.device))
            logp, top = torch.empty(len(part.targets)), torch.empty(len(part.targets), ranks)
            for a, b in pieces(len(part.targets), net.vocabulary):
                logits = net.project(net.weights, states[a:b]).cpu()
                logp[a:b] = -torch.nn.functional.cross_entropy(logits, part.targets[a:b], reduction="none")
                top[a:b] = torch.softmax(logits, -1).topk(ranks, -1).values
            at = 0
            for i in (int(i) for i in batch):
                n = int(data.answer_tokens[i])
                kept[i] = _places(
                    pairs[i], n - theirs[i], theirs[i], ours[i], logp[at : at + n], top[at : at + n], rows[i]
                )
                at += n
            ctx.progress.advance(len(batch))
    ctx.progress.stop()
    counts = torch.tensor([len(kept[i][0]) for i in range(len(rows))])
    tensors = {
        "counts": counts,
        "ends": torch.cat([kept[i][0] for i in range(len(rows))]).to(torch.int32),
        "likelihood": torch.cat([kept[i][1] for i in range(len(rows))]),
        "ranks": torch.cat([kept[i][2] for i in range(len(rows))]).contiguous(),
    }
    save_file(tensors, out / "aligned.safetensors")
    index = {
        "format": 1, "student_tokenizer": encode.tokenizer_digest(folder),
        "teacher_tokenizer": encode.tokenizer_digest(inputs["teacher"]),
        "examples": [encode.answer_digest(row) for row in data.rows],
        "left_out": [encode.answer_digest(row) for row in data.left_out],
    }  # fmt: skip
    (out / "index.json").write_text(json.dumps(index, sort_keys=True) + "\n", "utf-8")
    places, tokens = int(counts.sum()), sum(ours)
    ctx.progress.log(f"{places} common cuts for {tokens} student tokens ({places / tokens:.0%})")
    return {
        "places": places, "student_tokens": tokens, "examples": len(rows), "copies_left_out": len(data.left_out),
        "precision": "bf16" if net.bf16 else "fp32",
    }  # fmt: skip


def _places(
    pairs: Sequence[tuple[int, int]], tail: int, theirs: int, ours: int, logp: Any, top: Any, row: Any
) -> tuple[Any, Any, Any]:
    """Ends (student tokens), likelihoods and ranks of one answer's chunks, the end token as the last.

    Args:
        tail: tokens that the teacher has after the answer's text: its end token and what its template puts before.
        theirs: tokens of the answer's text alone.
        ours: tokens that the student has, its end token included.
    """
    import torch

    if tail < 1:
        raise TrainingError(
            f"{row.file}:{row.line}: the teacher's chat template changes the answer's text",
            "use train.method: sequence",
        )
    places = [pair for pair in pairs if pair[0] < theirs and pair[1] < ours - 1]
    stops = [t + 1 for t, _ in places]
    starts = [0, *stops]
    lengths = [*stops, theirs + tail]
    likelihood = torch.stack([logp[a:b].sum() for a, b in zip(starts, lengths, strict=True)])
    ends = torch.tensor([*(s for _, s in places), ours - 1])
    return ends, likelihood, top[torch.tensor(starts)]
