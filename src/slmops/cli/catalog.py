"""`slmops catalog`: which small language models there are, which of them fit a device, and what the hub says now."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.cli.bench import positive
from slmops.cli.common import json_argument, print_json, ram, say, size
from slmops.core.layout import columns

if TYPE_CHECKING:
    from slmops.catalog.fits import Need
    from slmops.catalog.models import Model

HELP = "list small language models: size, context, licence, and which fit a device"

EPILOG = """\
class: micro 100 M to 1.4 B weights, small 1.5 to 13.9 B, medium 14 to 30 B, after rounding to 0.1 B; smaller and larger ones have
none. Weights are counted from the architecture's numbers. Everything works offline but --refresh.

  slmops catalog --class micro --licence apache-2.0
  slmops catalog qwen3                          those with qwen3 in their name
  slmops catalog qwen3-0.6b                     all that is known of one
  slmops catalog --fits pi5-4gb --context 8192
  slmops catalog smollm --refresh               what the hub says otherwise; --write keeps it"""

NONE = "–"
WIDE = 110
"""Columns of a terminal from which on languages and names elsewhere are shown too."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `catalog` takes."""
    parser.add_argument(
        "text", nargs="*", metavar="TEXT", help="only models with this in their name or family; or one name"
    )
    parser.add_argument(
        "--class", choices=("micro", "small", "medium"), dest="size_class", help="only models of this class"
    )
    parser.add_argument(
        "--fits", metavar="DEVICE", help="only models that fit: this machine (this), or a profile such as pi5-8gb"
    )
    parser.add_argument(
        "--context",
        type=positive,
        metavar="TOKENS",
        help="of the conversation that has to fit (4096, or the model's own if less)",
    )
    parser.add_argument("--licence", metavar="NAME,…", help="only models under one of these, such as apache-2.0,mit")
    parser.add_argument("--architecture", metavar="NAME,…", help="only models of one of these, such as llama,qwen3")
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="another catalogue than slmops' own, in the same form"
    )
    parser.add_argument(
        "--refresh", action="store_true", help="ask the hub (HF_ENDPOINT) and show what differs; writes nothing"
    )
    parser.add_argument("--write", action="store_true", help="with --refresh: write the file; with --file, that one")
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """List, show or refresh."""
    from slmops.catalog import models
    from slmops.errors import UsageError

    if options.write and not options.refresh:
        raise UsageError("--write goes with --refresh", "to see what would be written: slmops catalog --refresh")
    if options.context and not options.fits:
        raise UsageError("--context goes with --fits", "name a device, such as --fits this")
    if options.refresh and options.fits:
        raise UsageError("--refresh and --fits do not go together", "refresh first, then ask what fits")
    file = options.file or models.FILE
    every = models.load(file if file.exists() or not options.write else models.FILE)
    found = models.select(every, options.text, options.size_class, _list(options.licence), _list(options.architecture))
    if not found:
        if len(options.text) != 1 or options.size_class or options.licence or options.architecture:
            raise UsageError("no model is all of that", "leave out an option, or run `slmops catalog` to see them all")
        found = [models.find(every, options.text[0])]
    exact = [model for model in found if [model.name] == [text.lower() for text in options.text]]
    if options.refresh:
        return _refresh(exact or found, every, file, options)
    if options.fits:
        return _fits(exact or found, options)
    if options.json:
        print_json([model.facts() for model in exact or found])
    elif exact or (len(found) == 1 and options.text):
        print("\n".join(_card((exact or found)[0])))
    else:
        _print(_table(found))
        say(f"\n{len(found)} of {_models(len(every))}; one in full: slmops catalog {found[0].name}")
    return 0


def _table(found: list[Model]) -> list[str]:
    wide = (_width() or WIDE) >= WIDE
    rows = [["model", "class", "weights", "context", "licence", *(["languages", "Ollama"] if wide else [])]]
    for model in found:
        row = [model.name, model.size_class or NONE, weights(model.weights.total), tokens(model.context), model.licence]
        rows.append([*row, *([_languages(model, 3), model.ollama or NONE] if wide else [])])
    return columns(rows, right=(2, 3))


def _width() -> int | None:
    """Of the terminal; None where there is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None


def _print(lines: list[str]) -> None:
    """Lines, cut at the edge of a terminal."""
    width = _width()
    print("\n".join(f"{line[: width - 1]}…" if width and len(line) > width else line for line in lines))


def _card(model: Model) -> list[str]:
    """All that is known of one model."""
    count = model.weights
    active = f", {weights(count.active)} of them for a token" if count.idle else ""
    rows = [
        ["model", model.name],
        ["family", model.family],
        ["class", model.size_class or "none: below micro or above medium"],
        ["weights", f"{count.total:,}{active}"],
        ["architecture", model.architecture],
        ["context", f"{model.context:,} tokens"],
        ["languages", _languages(model, 99)],
        ["licence", f"{model.licence}{' (the hub asks for consent)' if model.gated else ''}"],
        ["hub", model.hub],
        ["Azure AI Foundry", model.azure or "not known"],
        ["Ollama", model.ollama or "not known"],
    ]
    if model.note:
        rows.append(["note", model.note])
    return columns(rows)


def _fits(found: list[Model], options: argparse.Namespace) -> int:
    """Those that fit a device, the largest first."""
    from slmops.catalog import devices, fits

    device = devices.find(options.fits)
    title, memory = (device.title, device.ram_bytes) if device else ("this machine", float(ram()))
    gpu = device is not None and device.gpu
    rows: list[tuple[Model, int, Need]] = []
    for model in found:
        context = min(options.context or fits.CONTEXT, model.context)
        if options.context is None or options.context <= model.context:
            rows.append((model, context, fits.need(model.config, context, gpu)))
    fitting = [row for row in rows if row[2].total <= fits.usable(memory)][::-1]
    basis = fits.basis(title, memory, options.context or fits.CONTEXT, gpu)
    if options.json:
        print_json({
            "device": options.fits, "ram_bytes": memory, "usable_bytes": fits.usable(memory), "basis": basis,
            "models": [
                model.facts() | {"needs": {"context": context, "weights_bytes": need.weights, "cache_bytes": need.cache,
                                           "program_bytes": need.program, "total_bytes": need.total}}
                for model, context, need in fitting
            ],
        })  # fmt: skip
        return 0
    wide = (_width() or WIDE) >= WIDE
    table = [
        [
            "model",
            "weights",
            "in 16 bits" if gpu else "in 4 bits",
            "cache",
            "in all",
            *(["class", "licence"] if wide else []),
        ]
    ]
    for model, _, need in fitting:
        row = [model.name, weights(model.weights.total), size(need.weights), size(need.cache), size(need.total)]
        table.append([*row, *([model.size_class or NONE, model.licence] if wide else [])])
    if fitting:
        _print(columns(table, right=(1, 2, 3, 4)))
    short = len(found) - len(rows)
    left = f"; {_models(short)} left out for a shorter context" if short else ""
    say(f"\n{len(fitting)} of {_models(len(found))} fit {title}{left}")
    say(textwrap.fill(basis, min(_width() or 100, 100)))
    return 0


def _refresh(found: list[Model], every: dict[str, Model], file: Path, options: argparse.Namespace) -> int:
    """Ask the hub for each, show what differs, and write if asked to."""
    import tempfile

    from slmops.catalog import models, refresh
    from slmops.store.files import write_atomic

    answers = []
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(found, 1):
            say(f"{number}/{len(found)} {model.hub}")
            answers.append(refresh.ask(model, Path(folder)))
        refresh.failed(answers)
    if options.json:
        print_json([
            {"name": a.model.name, "changes": [{"key": c.key, "old": c.old, "new": c.new} for c in a.changes],
             "problem": a.problem or None, "note": a.note or None}
            for a in answers
        ])  # fmt: skip
    else:
        print("\n".join(_differences(answers)) or "the hub says the same of all of them")
    changed = {answer.model.name: answer.model for answer in answers if answer.changes}
    if options.write and changed:
        write_atomic(file, models.dump((every | changed).values()).encode())
        say(f"\nwritten: {file}")
    elif changed:
        say("\nnothing is written: --write does that" + ("" if options.file else ", or with --file a copy of your own"))
    return 0


def _differences(answers: list[Any]) -> list[str]:
    lines = []
    for answer in answers:
        said = [f"  {change.key}: {change.old} → {change.new}" for change in answer.changes]
        said += [f"  {text}" for text in (answer.problem and f"not asked: {answer.problem}", answer.note) if text]
        lines += [answer.model.name, *said] if said else []
    return lines


def weights(value: int) -> str:
    """A number of weights for people: `135 M`, `1.71 B`, `14.7 B`."""
    if value < 999.5e6:
        return f"{value / 1e6:.0f} M"
    return f"{value / 1e9:.2f} B" if value < 9.995e9 else f"{value / 1e9:.1f} B"


def tokens(value: int) -> str:
    """A context for people: `2 k`, `128 k`, in units of 1024 where that is whole, of 1000 otherwise."""
    return f"{value // 1024} k" if value % 1024 == 0 else f"{value / 1000:.0f} k"


def _models(number: int) -> str:
    return "1 model" if number == 1 else f"{number} models"


def _languages(model: Model, most: int = 6) -> str:
    names = model.languages
    if names is None:
        return "not stated"
    if names == ("multi",):
        return "many"
    return ", ".join(names[:most]) + (f" +{len(names) - most}" if len(names) > most else "")


def _list(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []
