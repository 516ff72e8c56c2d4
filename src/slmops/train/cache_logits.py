"""The teacher's next-token distributions at every answer token, drawn once and kept small.

`sampled` (arXiv 2503.16870): at each position `samples` tokens are drawn with replacement from the teacher's
distribution p = softmax(z / temperature); the file keeps which tokens came and how often. With counts c and n draws,
sum(c / n * f) is an unbiased estimate of sum(p * f) for any f, so the cross-entropy of the student against it has the
full distribution's gradient on average. A plain top-k list has not: it forgets the tail.

`top_k`: the `samples` most likely tokens with their probabilities; what is missing to 1 is the tail, which
`train.logits` treats as one more outcome.

Several teachers (inputs `teacher.NAME`) are one: the weighted mean of their distributions, which is what is kept.

Positions: for each example, in the order of `index.json`, every answer token and the end token. The file says which
teacher, tokenizer and examples it belongs to, and which augmented copies were too long for the teacher; `train.logits`
leaves those out too and refuses anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from slmops.core.digest import digest_file, digest_json
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as Base
from slmops.core.spec import Arithmetic, Positive
from slmops.errors import MissingExtraError, TrainingError
from slmops.train.pass_memory import BATCH, Settings, pieces, require_pass
from slmops.train.sft import PACKAGES, check_rows

if TYPE_CHECKING:
    import torch

    from slmops.train.encode import Encoded
    from slmops.train.network import Network

KEPT = ("counts", "ids", "weights", "entropy", "nll", "hit")
SHARD = 32  # batches between two saved pieces: what a kill can cost

DECLARATION = Declaration(
    name="train.cache_logits",
    version="4",
    makes="logits",
    takes={
        "teacher": "model",
        "teacher.*": "model",
        "data": "dataset",
        "synthetic?": "dataset",
        "augmented?": "dataset",
        "tokenizer?": "tokenizer",
    },
    extra="train",
    packages=PACKAGES,
    threads=True,
)


class Params(Base):
    """What is kept.

    Attributes:
        files: `input/file` of the examples, the same as the student will train on.
        samples: draws per position, or k.
        selection: see the module.
        temperature: of the teacher's distribution; the student must use the same.
        max_length: tokens an example may have; default: the teacher's context.
        weights: of further teachers by name; `teacher` has weight 1.
        precision: of the teachers' pass; `auto` takes bf16 for a teacher above 8 M parameters where the machine
            multiplies it in hardware. What comes out is float32.
        batch_size: examples in one pass; the draws depend on it, their distribution does not.
    """

    files: tuple[str, ...]
    samples: Positive = 12
    selection: Literal["sampled", "top_k"] = "sampled"
    temperature: float = 1.0
    max_length: Positive | None = None
    weights: dict[str, float] = Field(default_factory=dict)
    precision: Arithmetic = "auto"
    batch_size: Positive = BATCH


def folder_digest(folder: Path) -> str:
    """Digest of a teacher: its configuration, weights and tokenizer files."""
    names = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json", ".jinja", ".model")]
    return digest_json({p.name: digest_file(p) for p in names if p.name != "training.json"})


def _who(inputs: Mapping[str, Path], others: Sequence[str]) -> str:
    """The digest of the teacher, or of all of them."""
    found = [folder_digest(inputs[name]) for name in ("teacher", *others)]
    return found[0] if len(found) == 1 else digest_json(found)


def draw(
    logits: torch.Tensor, samples: int, selection: str, temperature: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sparse forms of distributions.

    Args:
        logits: (P, vocabulary) float32.

    Returns:
        counts (P,) int64: entries of each position; ids (N,) int64, ascending in each position for `sampled`, most
        likely first for `top_k`; weights (N,) float32: how often it came, or its probability; entropy (P,) float32 of
        what is kept: of the full distribution (`sampled`), of the k + 1 outcomes (`top_k`).
    """
    import torch

    logp = torch.log_softmax(logits / temperature, -1)
    p = logp.exp()
    positions, vocabulary = p.shape
    if selection == "top_k":
        values, ids = p.topk(min(samples, vocabulary), -1)
        values = values.half().float()  # as they will be stored
        tail = (1 - values.double().sum(-1)).clamp_min(0)
        entropy = -(torch.special.xlogy(values.double(), values.double()).sum(-1) + torch.special.xlogy(tail, tail))
        counts = torch.full((positions,), ids.shape[1])
        return counts, ids.flatten(), values.flatten(), entropy.float()
    drawn = torch.multinomial(p, samples, replacement=True, generator=generator)
    keys = drawn + torch.arange(positions)[:, None] * vocabulary
    unique, often = torch.unique(keys, return_counts=True)
    counts = torch.bincount(unique // vocabulary, minlength=positions)
    return counts, unique % vocabulary, often.float(), -(p * logp).sum(-1)


def mixture(logits: Sequence[torch.Tensor], shares: Sequence[float], temperature: float) -> torch.Tensor:
    """(P, vocabulary) logarithms of the weighted mean of the teachers' distributions at a temperature.

    Args:
        logits: (P, vocabulary) float32 of each teacher.
        shares: their weights, of sum 1.
    """
    import math

    import torch

    each = [torch.log_softmax(z / temperature, -1) + math.log(w) for z, w in zip(logits, shares, strict=True)]
    return each[0] if len(each) == 1 else torch.logsumexp(torch.stack(each), 0)


def teacher_pass(
    networks: Sequence[tuple[Network, float]], data: Encoded, params: Params, ctx: Context
) -> dict[str, torch.Tensor]:
    """One forward pass over all examples, in pieces that survive a kill.

    Args:
        networks: the teachers with their shares.

    Returns:
        `counts`, `ids`, `weights`, `entropy` as in `draw`, and per position `nll` (of the answer token, temperature 1)
        and `hit` (1.0 where the answer token is the most likely), examples in order.
    """
    import numpy as np
    import torch

    from slmops.train.batches import collate
    from slmops.train.checkpoint import write
    from slmops.train.loop import deterministic, digest_weights
    from slmops.train.objective import to_device

    order = np.argsort(data.lengths, kind="stable")
    size, vocabulary = params.batch_size, networks[0][0].vocabulary
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    who = [digest_weights(network.weights) for network, _ in networks]
    places = [[network.device, network.bf16] for network, _ in networks]
    settings = params.model_dump(mode="json")
    mark = digest_json([data.digest(), who, places, settings, ctx.seed, ctx.threads, torch.__version__])
    found: dict[int, dict[str, torch.Tensor]] = {}
    ctx.scratch.mkdir(parents=True, exist_ok=True)
    most = max((int(data.answer_tokens[batch].sum()) for batch in batches), default=0)
    buffers = buffers_for(most, min(params.samples, vocabulary))
    ctx.progress.start("teacher's distributions", len(order), "examples")
    with deterministic(ctx.threads), torch.no_grad():
        for first in reversed(range(0, len(batches), SHARD)):  # the longest first: what they leave serves all others
            path = ctx.scratch / f"logits-{mark[7:23]}-{first}.pt"
            if path.exists():
                piece = torch.load(path, weights_only=True)
                ctx.progress.advance(sum(len(b) for b in batches[first : first + SHARD]))
            else:
                piece = {}
                for number, batch in reversed(list(enumerate(batches))[first : first + SHARD]):
                    part = collate(data, batch, 0.0, "bucket")
                    generator = torch.Generator().manual_seed((ctx.seed * 1_000_003 + number) % (1 << 62))
                    states = [n.hidden(n.weights, to_device(part, n.device)) for n, _ in networks]
                    some = (
                        look(networks, [state[a:b] for state in states], part.targets[a:b], params, generator)
                        for a, b in pieces(len(part.targets), vocabulary)
                    )
                    piece[number] = gathered(buffers, some)
                    ctx.progress.advance(len(batch))
                write(path, piece)
            found |= piece
    ctx.progress.stop()
    joined = {name: torch.cat([found[number].pop(name) for number in range(len(batches))]) for name in KEPT}
    return in_order(joined, torch.from_numpy(np.concatenate(batches)), torch.from_numpy(data.answer_tokens))


def buffers_for(positions: int, entries: int) -> dict[str, torch.Tensor]:
    """By the names in KEPT, room for what is kept of a batch.

    Args:
        entries: of a position, at most.
    """
    import torch

    whole = {"counts": torch.int64, "ids": torch.int64}
    return {
        name: torch.empty(
            positions * (entries if name in ("ids", "weights") else 1), dtype=whole.get(name, torch.float32)
        )
        for name in KEPT
    }


def gathered(
    buffers: Mapping[str, torch.Tensor], some: Iterable[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Pieces one after the other, by name. Each is moved into a buffer as it comes: if it stayed where it was made, between tensors
    as large as logits, the room that those leave could not be used again."""
    ends = dict.fromkeys(KEPT, 0)
    for one in some:
        for name in KEPT:
            tensor = one.pop(name)
            buffers[name][ends[name] : ends[name] + len(tensor)] = tensor
            ends[name] += len(tensor)
            del tensor
    return {name: buffers[name][:end].clone() for name, end in ends.items()}


def look(
    networks: Sequence[tuple[Network, float]], states: Sequence[torch.Tensor], targets: torch.Tensor, params: Params,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What is kept of some positions, by the names in KEPT; see `teacher_pass`.

    Args:
        states: (P, hidden) of each teacher, as `Network.hidden` gives them.
        targets: (P,) int64 answer tokens.
    """
    import torch

    every = [n.project(n.weights, state).cpu() for (n, _), state in zip(networks, states, strict=True)]
    shares = [share for _, share in networks]
    logits = mixture(every, shares, 1.0) if len(every) > 1 else every[0]
    drawn, temperature = logits, params.temperature
    if len(every) > 1:
        drawn, temperature = mixture(every, shares, temperature), 1.0
    counts, ids, weights, entropy = draw(drawn, params.samples, params.selection, temperature, generator)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    hit = (logits.argmax(-1) == targets).float()
    return dict(zip(KEPT, (counts, ids, weights, entropy, nll, hit), strict=True))


def in_order(joined: dict[str, torch.Tensor], members: torch.Tensor, sizes: torch.Tensor) -> dict[str, torch.Tensor]:
    """What was kept of examples in the order of the batches, in the order of the examples.

    Args:
        joined: by name, of all positions, or, for ids and weights, of their entries.
        members: (examples,) int64 which example comes at each place.
        sizes: (examples,) int64 positions of each example, in their own order.
    """
    import torch

    def ranges(starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """start, start + 1, … of each start, as many as its count."""
        return torch.repeat_interleave(starts - begins(counts), counts) + torch.arange(int(counts.sum()))

    def begins(counts: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(counts, 0) - counts

    positions = ranges(begins(sizes[members])[torch.argsort(members)], sizes)
    counts = joined["counts"]
    entries = ranges(begins(counts)[positions], counts[positions])
    return {name: joined.pop(name)[entries if name in ("ids", "weights") else positions] for name in KEPT}


def overlap(teacher: Any, student: Any) -> float:
    """Share of the student's vocabulary entries that the teacher has under the same id."""
    theirs: dict[str, int] = teacher.get_vocab()
    ours: dict[str, int] = student.get_vocab()
    return sum(theirs.get(token) == i for token, i in ours.items()) / max(1, len(ours))


def self_check(
    data: Encoded, kept: dict[str, torch.Tensor], params: Params, vocabulary: int, share: float, size: int
) -> Facts:
    """Numbers that tell, before any time is spent, whether learning from this file makes sense.

    Returns:
        Loss scales in nats per answer token, likelihoods of whole gold answers, vocabulary overlap, bytes.
    """
    import math

    import numpy as np

    nll = kept["nll"].double().numpy()
    ends = np.cumsum(data.answer_tokens)
    per_answer = np.add.reduceat(nll, ends - data.answer_tokens)
    gold = np.array([row.example.origin == "gold" for row in data.rows])
    entropy = float(kept["entropy"].double().mean())
    check: Facts = {
        "examples": len(data.ids),
        "positions": len(nll),
        "entries_per_position": round(float(kept["counts"].double().mean()), 3),
        "answer_cross_entropy": round(float(nll.mean()), 6),
        "teacher_entropy": round(entropy, 6),
        "untrained_cross_entropy": round(math.log(vocabulary), 6),
        "untrained_kl": round(max(0.0, math.log(vocabulary) - entropy), 6),
        "answer_token_is_top": round(float(kept["hit"].double().mean()), 6),
        "gold_examples": int(gold.sum()),
        "gold_answer_likelihood": round(float(np.exp(-per_answer[gold]).mean()), 6) if gold.any() else None,
        "vocabulary_overlap": round(share, 6),
        "bytes": size,
    }
    if params.selection == "top_k":
        total = kept["weights"].double().sum() / len(nll)
        check["tail_mass"] = round(max(0.0, 1 - float(total)), 6)
    return check


def say(check: Facts, ctx: Context) -> None:
    """The self-check as lines to read."""
    ctx.progress.log(
        f"teacher on the answers: {check['answer_cross_entropy']:.3f} nats per token, entropy {check['teacher_entropy']:.3f}; an "
        f"untrained student starts at cross-entropy {check['untrained_cross_entropy']:.2f}, KL {check['untrained_kl']:.2f}"
    )
    gold = check["gold_answer_likelihood"]
    ctx.progress.log(
        f"the answer's token is the teacher's first choice in {check['answer_token_is_top']:.1%} of positions; "
        + (
            f"mean likelihood of the {check['gold_examples']} gold answers {gold:.3f}"
            if gold is not None
            else "no gold answers"
        )
    )
    ctx.progress.log(
        f"vocabulary overlap {check['vocabulary_overlap']:.1%}; {check['positions']} positions, "
        f"{check['entries_per_position']:.1f} tokens each, {check['bytes'] / 1e6:.2f} MB"
    )
    if check["answer_cross_entropy"] > 0.5 * check["untrained_cross_entropy"]:
        ctx.progress.log("warning: the teacher hardly knows these answers: its distributions will teach little")


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write distributions.safetensors, index.json and self_check.json.

    Raises:
        TrainingError: the student's tokenizer is not the teacher's.
    """
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingExtraError("torch or safetensors", "train") from error
    from slmops.train import encode, network

    rows = encode.read(inputs, params.files)
    check_rows(rows, params.files)
    tokenizer = encode.load_tokenizer(inputs["teacher"])
    mark = encode.tokenizer_digest(inputs["teacher"])
    share = 1.0
    if "tokenizer" in inputs:
        share = overlap(tokenizer, encode.load_tokenizer(inputs["tokenizer"]))
        if encode.tokenizer_digest(inputs["tokenizer"]) != mark:
            raise TrainingError(
                f"student and teacher have different tokenizers ({share:.1%} of the vocabulary agrees)",
                "set student.tokenizer: teacher, or train.method: sequence",
            )
    names = sorted(name for name in inputs if name.startswith("teacher."))
    weights = [1.0, *(params.weights.get(name.partition(".")[2], 1.0) for name in names)]
    for name in names:
        if encode.tokenizer_digest(inputs[name]) != mark:
            raise TrainingError(
                f"{name} has another tokenizer than the first teacher",
                "the mean of distributions needs the same tokens",
            )
    context = min(network.context_in(inputs[name]) for name in ("teacher", *names))
    data = encode.encode(rows, tokenizer, min(context, params.max_length or context))
    encode.say_left_out(len(data.left_out), ctx)
    settings = Settings(
        "logits", params.batch_size, params.max_length, params.samples, params.selection, params.precision
    )
    require_pass(inputs, ["teacher", *names], settings, data, ctx)
    teachers = [
        (network.frozen(inputs[name], params.precision), weight / sum(weights))
        for name, weight in zip(["teacher", *names], weights, strict=True)
    ]
    net = teachers[0][0]
    for (other, _), name in zip(teachers[1:], names, strict=True):
        if other.vocabulary != net.vocabulary:
            raise TrainingError(
                f"{name} has {other.vocabulary} tokens, the first teacher {net.vocabulary}", "take it out"
            )
    kept = teacher_pass(teachers, data, params, ctx)
    small = torch.uint16 if net.vocabulary <= 1 << 16 else torch.uint32
    counted = torch.uint8 if params.samples < 256 else torch.uint16
    tensors = {
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(kept["counts"], 0)]),
        "ids": kept["ids"].to(small),
        "weights": kept["weights"].to(counted if params.selection == "sampled" else torch.float16),
        "entropy": kept["entropy"],
    }
    save_file(tensors, out / "distributions.safetensors")
    index: dict[str, Any] = {
        "format": 1, "teacher": _who(inputs, names), "tokenizer": mark, "vocabulary": net.vocabulary,
        "selection": params.selection, "samples": params.samples, "temperature": params.temperature,
        "examples": [encode.answer_digest(row) for row in data.rows], "positions": data.answer_tokens.tolist(),
        "left_out": [encode.answer_digest(row) for row in data.left_out],
    }  # fmt: skip
    (out / "index.json").write_text(json.dumps(index, sort_keys=True) + "\n", "utf-8")
    size = (out / "distributions.safetensors").stat().st_size
    check = self_check(data, kept, params, net.vocabulary, share, size)
    (out / "self_check.json").write_text(json.dumps(check, sort_keys=True, indent=1) + "\n", "utf-8")
    say(check, ctx)
    return check | {"precision": "bf16" if net.bf16 else "fp32", "copies_left_out": len(data.left_out)}
