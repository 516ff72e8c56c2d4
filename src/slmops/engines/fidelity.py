"""Whether a converted model is the model that it was made from: the same tokens for the same prompts, measured at once.

Prompts are of the validation split; both engines read the greedy answers of the first. A float32 model that does not agree is
an error; rounded ones only report. `fidelity.json` keeps the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.engine import Engine, Sampling
from slmops.core.example import Example
from slmops.core.method import Context
from slmops.engines.chain import CONTINUATION, kl
from slmops.errors import ConversionError
from slmops.store.rows import read_examples

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def choose(data: Path, count: int) -> list[Example]:
    """`count` validation prompts, those with the smallest ids; never test prompts.

    Raises:
        ConversionError: there is no validation prompt.
    """
    examples = {example.id: example for example in read_examples(data / "validation.jsonl")}
    if not examples:
        raise ConversionError(
            "there are no validation prompts to check the conversion on", "set data.splits.validation"
        )
    return [examples[key] for key in sorted(examples)[:count]]


def compare(reference: Engine, converted: Engine, examples: Sequence[Example], on_done: Any = None) -> dict[str, Any]:
    """Agreement of two engines along the greedy answers of the first.

    Returns:
        `prompts`, `positions`, `token_agreement` (share of positions with the same most likely token), `mean_kl`
        (nats), `max_logit_difference`, `template_equal` (share of prompts with equal token ids), `skipped` (prompts
        that leave no room in the context), and for the first that differs `first_divergence` or `first_template_difference`.
    """
    import numpy as np

    positions = agreed = templates = skipped = 0
    divergence = largest = 0.0
    first: dict[str, Any] | None = None
    first_template: dict[str, Any] | None = None
    prompts = [reference.encode(example.prompt_messages()) for example in examples]
    room = reference.context_length
    if converted.context_length < room:  # what is compared is a prompt with its answer
        room = min(room, max(1, converted.context_length - CONTINUATION + 1))
    fitting = [ids for ids in prompts if len(ids) < room]
    answers = iter(reference.generate(fitting, Sampling(max_new_tokens=CONTINUATION)))
    for example, ids in zip(examples, prompts, strict=True):
        other = converted.encode(example.prompt_messages())
        templates += ids == other
        if ids != other and first_template is None:
            first_template = {"id": example.id, "reference": ids, "converted": other}
        if len(ids) >= room:
            skipped += 1
        else:
            whole = [*ids, *next(answers).tokens[:-1]]
            start = len(ids) - 1
            a, b = _rows(reference, whole, start), _rows(converted, whole, start)
            wanted, got = a.argmax(-1), b.argmax(-1)
            positions += len(a)
            agreed += int((wanted == got).sum())
            divergence += kl(a, b)
            largest = max(largest, float(np.abs(a - b).max()))
            if first is None and (wanted != got).any():
                step = int((wanted != got).argmax())
                first = {
                    "id": example.id,
                    "step": step,
                    "reference": reference.decode([int(wanted[step])]),
                    "converted": reference.decode([int(got[step])]),
                }
        if on_done:
            on_done(1)
    return {
        "prompts": len(examples),
        "skipped": skipped,
        "positions": positions,
        "token_agreement": agreed / positions if positions else None,
        "mean_kl": round(max(divergence / positions, 0.0), 9) if positions else None,
        "max_logit_difference": round(largest, 6),
        "template_equal": templates / len(examples),
        "first_divergence": first,
        "first_template_difference": first_template,
    }


def check(
    source: Path, out: Path, examples: Sequence[Example], precision: str, least: float, ctx: Context
) -> dict[str, Any]:  # fmt: skip
    """Compare a converted model with the one that it was made from, write fidelity.json into its folder, and judge.

    Args:
        source: the folder in Hugging Face form, run in torch.
        out: the converted model's folder.
        precision, least: see `judge`.

    Returns:
        See `compare`.

    Raises:
        ConversionError: see `judge`.
    """
    from slmops.engines import open_engine

    reference, converted = open_engine(source, kind="torch"), open_engine(out)
    ctx.progress.start("checking against PyTorch", len(examples), "prompts")
    found = compare(reference, converted, examples, on_done=ctx.progress.advance)
    ctx.progress.stop()
    reference.close()
    converted.close()
    write(found, precision, out)
    judge(found, precision, least)
    return found


def choose_for(adapters: Sequence[str], data: Mapping[str, Path], count: int) -> dict[str, list[Example]]:
    """For each adapter, prompts of its own dataset; see `choose`.

    Raises:
        ConversionError: an adapter has no dataset, or that no validation prompt.
    """
    missing = next((name for name in adapters if name not in data), None)
    if missing is not None:
        raise ConversionError(f"no prompts to check adapter {missing} on", f"give the input data.{missing}")
    return {name: choose(data[name], count) for name in adapters}


def check_adapters(
    base: Path, adapters: Mapping[str, Path], out: Path, examples: Mapping[str, Sequence[Example]], precision: str, least: float,
    ctx: Context,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The same as `check` for a base whose adapters are switched: the base, called `(none)`, and each adapter.

    Args:
        adapters: name to the folder in Hugging Face form in which it is merged into the base.
        examples: by adapter; the base is asked those of the first.
    """
    from slmops.engines import open_engine

    first = next(iter(examples))
    converted: Any = open_engine(out)
    found = {}
    try:
        for name, source in {"(none)": base, **adapters}.items():
            asked = examples[first if name == "(none)" else name]
            converted.use(None if name == "(none)" else name)
            reference = open_engine(source, kind="torch")
            ctx.progress.start(f"checking {name} against PyTorch", len(asked), "prompts")
            found[name] = compare(reference, converted, asked, on_done=ctx.progress.advance)
            ctx.progress.stop()
            reference.close()
    finally:
        converted.close()
    (out / "fidelity.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, value in found.items():
        try:
            judge(value, precision, least)
        except ConversionError as error:
            who = "the base" if name == "(none)" else f"adapter {name}"
            raise ConversionError(f"{who}: {error.message}", error.hint) from None
    return found


def write(found: dict[str, Any], precision: str, out: Path) -> None:
    """Write fidelity.json, with the precision of the converted model."""
    found["precision"] = precision
    (out / "fidelity.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def judge(found: Mapping[str, Any], precision: str, least: float) -> None:
    """Refuse a conversion that is wrong, as opposed to rounded.

    Args:
        least: share of equal next tokens that a float32 model must reach.

    Raises:
        ConversionError: token ids differ, no prompt fits, or a float32 model agrees less than it must.
    """
    if found["template_equal"] < 1.0:
        where = found["first_template_difference"]
        raise ConversionError(
            f"the runtime's tokenizer or chat template gives other token ids than transformers for prompt {where['id']}: "
            f"{where['converted'][:12]} instead of {where['reference'][:12]}",
            "the runtime knows no normaliser and only plain Jinja templates; remove the normaliser from tokenizer.json",
        )
    if not found["positions"]:
        raise ConversionError("every validation prompt is longer than the context", "train with a longer context")
    if precision == "fp32" and found["token_agreement"] < least:
        where = found["first_divergence"]
        raise ConversionError(
            f"the converted model agrees with PyTorch on {found['token_agreement']:.2%} of next tokens, less than "
            f"{least:.2%}; first at prompt {where['id']}, token {where['step']}: "
            f"{where['converted']!r} instead of {where['reference']!r}",
            "the architecture may have a feature that the builder does not know; see fidelity.json",
        )


def _rows(engine: Any, ids: list[int], start: int) -> NDArray[np.float64]:
    """Logits from position `start` on, float64 (len(ids) - start, vocabulary)."""
    import numpy as np

    rows: NDArray[np.float64] = np.asarray(engine.logits(ids, start), np.float64)
    return rows
