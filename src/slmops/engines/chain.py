"""A chain of models, each made from the one before, on one set of prompts: what every hop kept.

All models read the same tokens: each prompt as the chain's anchor writes it, and the anchor's greedy answer (see
`slmops.core.fidelity`). Each is loaded once; its logits lie in a file until the last model made from it was compared. Tokens
are matched by what they stand for, so a model with fewer tokens is compared over those that both have, and a prompt that one
of them cannot write with the anchor's tokens is left out. How a model's own tokenizer and chat template write the prompts is
compared apart from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.engine import Engine, Sampling
from slmops.core.example import Example
from slmops.core.fidelity import Link, anchor, ordered
from slmops.core.report import Meeting
from slmops.errors import ConversionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONTINUATION = 32
"""Tokens of each greedy answer that are compared."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Heard:
    """What a model made of the prompts.

    Attributes:
        tokens: what each of its token ids stands for.
        written: each prompt as its own tokenizer and template write it, as tokens; None for a model with prompts of its own.
        answers: its greedy answers, as text and as tokens.
        rows: for each prompt its place in `logits`, (first row, end); None for a prompt that it cannot be asked.
        logits: file of float32 (rows, vocabulary).
    """

    tokens: tuple[str, ...]
    written: tuple[tuple[str, ...], ...] | None
    answers: tuple[tuple[str, tuple[str, ...]], ...]
    rows: tuple[tuple[int, int] | None, ...]
    logits: Path


@dataclass(frozen=True)
class Asked:
    """One prompt as the anchor's tokens, and the positions from `start` on at which models are compared."""

    tokens: tuple[str, ...]
    start: int


def measure(
    links: Sequence[Link], opened: Callable[[Link], tuple[Engine, Path]], examples: Sequence[Example],
    messages: Callable[[Link, Example], Messages], work: Path, on_done: Callable[[str], None] | None = None,
) -> dict[str, Meeting]:  # fmt: skip
    """Meet every link with its parent.

    Args:
        opened: the engine of a link, and the folder with its tokenizer.
        messages: what a link is asked; for all but guided links the example's own messages.
        work: a folder for logits.
        on_done: called with the name of each link.

    Returns:
        By the name of the link, for those that have a parent.

    Raises:
        ConversionError: every prompt is longer than the context.
    """
    order = ordered(links)
    first = anchor(links)
    asked = _asked(first, opened, [messages(first, example) for example in examples])
    if not any(asked):
        raise ConversionError("every validation prompt is longer than the context", "train with a longer context")
    heard: dict[str, Heard] = {}
    met: dict[str, Meeting] = {}
    folders: dict[str, Path] = {}
    for place, link in enumerate(order):
        engine, folder = opened(link)
        folders[link.name] = folder
        try:
            heard[link.name] = _listen(
                link, engine, folder, asked, [messages(link, e) for e in examples], work / f"{place}.npy"
            )
        finally:
            engine.close()
        if link.parent is not None:
            met[link.name] = meet(heard[link.parent], heard[link.name], [example.id for example in examples])
            if link.near:
                far = furthest(folders[link.parent], folder)
                met[link.name] = met[link.name].model_copy(update={"furthest_weight": far})
        needed = {later.parent for later in order[place + 1 :]}
        for name in [name for name in heard if name not in needed]:
            heard.pop(name).logits.unlink(missing_ok=True)
        if on_done:
            on_done(link.name)
    return met


def _asked(
    link: Link, opened: Callable[[Link], tuple[Engine, Path]], prompts: Sequence[Messages]
) -> list[Asked | None]:
    """The prompts and greedy answers of the anchor as tokens; None where the prompt leaves no room in the context."""
    engine, folder = opened(link)
    try:
        tokens = token_texts(engine, folder)
        ids = [engine.encode(messages) for messages in prompts]
        fitting = [i for i in ids if 0 < len(i) < engine.context_length]
        answers = iter(engine.generate(fitting, Sampling(max_new_tokens=CONTINUATION)))
        found: list[Asked | None] = []
        for prompt in ids:
            if not 0 < len(prompt) < engine.context_length:
                found.append(None)
                continue
            whole = [*prompt, *next(answers).tokens[:-1]]
            found.append(Asked(tuple(tokens[i] for i in whole), len(prompt) - 1))
        return found
    finally:
        engine.close()


def _listen(
    link: Link, engine: Engine, folder: Path, asked: Sequence[Asked | None], prompts: Sequence[Messages], file: Path
) -> Heard:
    """Everything about one model that hops need."""
    import numpy as np

    tokens = token_texts(engine, folder)
    ids = {token: id for id, token in enumerate(tokens)}
    own = [engine.encode(messages) for messages in prompts]
    room = [i for i, prompt in enumerate(own) if 0 < len(prompt) < engine.context_length]
    answers: list[tuple[str, tuple[str, ...]]] = [("", ())] * len(own)
    for place, answer in zip(room, engine.generate([own[i] for i in room], Sampling(CONTINUATION)), strict=True):
        answers[place] = answer.text, tuple(tokens[i] for i in answer.tokens)
    rows: list[tuple[int, int] | None] = []
    count = 0
    given: list[tuple[list[int], int] | None] = []
    for ask in asked:
        whole = [] if ask is None else [ids.get(token, -1) for token in ask.tokens]
        if ask is None or -1 in whole or len(whole) > engine.context_length:
            given.append(None)
            rows.append(None)
            continue
        given.append((whole, ask.start))
        rows.append((count, count + len(whole) - ask.start))
        count += len(whole) - ask.start
    logits: Any = None
    width = len(tokens)
    for one, row in zip(given, rows, strict=True):
        if one is not None and row is not None:
            found: NDArray[np.float32] = engine.logits(*one)
            if logits is None:  # a table may have more rows than there are tokens, or fewer
                width = min(len(tokens), found.shape[1])
                logits = np.lib.format.open_memmap(file, "w+", np.float32, (count, width))
            logits[row[0] : row[1]] = found[:, :width]
    written = None if link.guided else tuple(tuple(tokens[i] for i in prompt) for prompt in own)
    return Heard(tuple(tokens[:width]), written, tuple(answers), tuple(rows), file)


def meet(parent: Heard, child: Heard, ids: Sequence[str]) -> Meeting:
    """What a model has in common with the one that it was made from.

    Args:
        ids: of the prompts, for messages.
    """
    import numpy as np

    known = set(child.tokens) & set(parent.tokens)
    columns = _columns(parent.tokens, child.tokens, known)
    left, right = (
        np.load(one.logits, mmap_mode="r") if any(one.rows) else np.zeros((0, len(one.tokens)), np.float32)
        for one in (parent, child)
    )
    names = parent.tokens if columns is None else [parent.tokens[i] for i in columns[0]]
    positions = agreed = compared = 0
    divergence = best = kept = 0.0
    first: dict[str, Any] | None = None
    for id, a, b in zip(ids, parent.rows, child.rows, strict=True):
        if a is None or b is None:
            continue
        p, q = left[a[0] : a[1]], right[b[0] : b[1]]
        p, q = (p, q) if columns is None else (p[:, columns[0]], q[:, columns[1]])
        compared += 1
        positions += len(p)
        wanted, got = p.argmax(-1), q.argmax(-1)
        agreed += int((wanted == got).sum())
        divergence += kl(p, q)
        chances = np.exp(log_softmax(p.astype(np.float64)))
        best += float(chances.max(-1).sum())
        kept += float(chances[np.arange(len(got)), got].sum())
        if first is None and (wanted != got).any():
            step = int((wanted != got).argmax())
            first = {"id": id, "step": step, "parent": names[int(wanted[step])], "child": names[int(got[step])]}
    equal, difference = _template(parent, child, known, ids)
    pairs = zip(parent.answers, child.answers, strict=True)
    same = sum(a[1] == b[1] or (parent.tokens != child.tokens and a[0] == b[0]) for a, b in pairs)
    return Meeting(
        prompts=len(ids), compared=compared, positions=positions,
        token_agreement=agreed / positions if positions else None,
        mean_kl=round(max(divergence / positions, 0.0), 9) if positions else None,
        kept=kept / best if positions else None, same_answers=same / len(ids), template_equal=equal,
        first_divergence=first, first_template_difference=difference,
    )  # fmt: skip


def _columns(a: Sequence[str], b: Sequence[str], known: set[str]) -> tuple[list[int], list[int]] | None:
    """Columns of either model's logits for the tokens that both have, in one order; None where all are the same already."""
    if list(a) == list(b):
        return None
    places = {token: place for place, token in enumerate(b)}
    left = [place for place, token in enumerate(a) if token in known]
    return left, [places[a[place]] for place in left]


def _template(
    parent: Heard, child: Heard, known: set[str], ids: Sequence[str]
) -> tuple[float | None, dict[str, Any] | None]:
    """How many prompts both write with the same tokens, of those whose tokens the child has; and the first that differs."""
    if parent.written is None or child.written is None:
        return None, None
    asked = equal = 0
    first: dict[str, Any] | None = None
    for id, a, b in zip(ids, parent.written, child.written, strict=True):
        if not known.issuperset(a):
            continue
        asked += 1
        equal += a == b
        if a != b and first is None:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            first = {"id": id, "at": at, "parent": list(a[at : at + 12]), "child": list(b[at : at + 12])}
    return (equal / asked if asked else None), first


def furthest(parent: Path, child: Path) -> dict[str, Any] | None:
    """The matrix of a folder in Hugging Face form that is furthest from what it was: `name` and `distance`, |A - B| / |A|.

    None if none has the name and shape that it had.
    """
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for file in sorted(parent.glob("*.safetensors")):
        with safe_open(file, "pt") as old:
            places |= dict.fromkeys(old.keys(), file)
    found: dict[str, Any] | None = None
    for file in sorted(child.glob("*.safetensors")):
        with safe_open(file, "pt") as new:
            for name in sorted(set(new.keys()) & set(places)):
                with safe_open(places[name], "pt") as old:
                    before, after = old.get_tensor(name).float(), new.get_tensor(name).float()
                if before.dim() < 2 or before.shape != after.shape:
                    continue
                distance = float((after - before).norm() / before.norm().clamp(min=1e-30))
                if found is None or distance > found["distance"]:
                    found = {"name": name, "distance": round(distance, 6)}
    return found


def kl(p: NDArray[np.floating[Any]], q: NDArray[np.floating[Any]]) -> float:
    """KL(p ‖ q) of logits (rows, tokens), nats, summed over the rows."""
    import numpy as np

    a, b = log_softmax(p.astype(np.float64)), log_softmax(q.astype(np.float64))
    return float((np.exp(a) * (a - b)).sum())


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis."""
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def token_texts(engine: Engine, folder: Path) -> list[str]:
    """What each token id of a model stands for; ids without a token, which pad a table, get names of their own.

    Raises:
        ModelError: the folder has no tokenizer.json.
    """
    listed: Any = getattr(engine, "token_texts", None)
    if listed is not None:
        found: list[str] = listed()
        return found
    from slmops.engines import read_json

    tokenizer = read_json(folder / "tokenizer.json")
    words = tokenizer["model"]["vocab"]
    ids: Mapping[str, int] = words if isinstance(words, dict) else {word: i for i, (word, _) in enumerate(words)}
    by_id = {id: token for token, id in ids.items()}
    by_id |= {mark["id"]: mark["content"] for mark in tokenizer.get("added_tokens", ())}
    return [by_id.get(id, f"<unused {id}>") for id in range(max(by_id) + 1)]
