"""`slmops pull`: get a model from a hub, a registry or a folder, whole and checked, after showing what it is."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slmops.cli.common import json_argument, print_json, say, size

if TYPE_CHECKING:
    from slmops.catalog.pull import Plan

HELP = "get a model from a hub, a registry or a folder, whole, checked and without running its code"

EPILOG = """\
Only safetensors, else GGUF, else ONNX is taken. Run again after any failure: what came is kept and goes on.
The folder is that of --to, or one in the user's cache (~/.cache/slmops/models, or where SLMOPS_MODELS says).
HF_ENDPOINT names a mirror, HF_TOKEN opens gated and private models, HF_HUB_OFFLINE=1 asks nobody. SLMOPS_OLLAMA_REGISTRY names a
mirror of Ollama's library; logins to other registries are those of `docker login`, to Azure those of `az login`.

  slmops pull hf:Qwen/Qwen3-0.6B
  slmops pull qwen3:0.6b
  slmops pull oci:ghcr.io/ORG/NAME:v1
  slmops pull azure:Phi-4-mini-instruct
  slmops pull ORG/NAME-GGUF --only '*Q4_K_M*' --to models/small
  slmops pull hf:ORG/NAME@v1.0 --dry-run --json"""

SHOWN = 20
_AT = {"hub": "commit", "ollama": "manifest", "oci": "manifest"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `pull` takes."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hf:ORG/NAME[@REVISION], ORG/NAME; a name of the catalogue; NAME:TAG of Ollama's library (ollama:NAME, hf.co/ORG/NAME); "
        "oci:REGISTRY/REPOSITORY:TAG (or @sha256:…); azure:NAME[:VERSION] of Azure AI Foundry; or a local folder or .gguf file",
    )
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="the folder to make (default: one in the user's cache)"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN",
        help="take the weights whose names match, as '*Q4_K_M*' or 'onnx/*'; may be given many times",
    )  # fmt: skip
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask before fetching; only a terminal is asked")
    parser.add_argument("--dry-run", action="store_true", help="show what would be fetched, and fetch nothing")
    parser.add_argument("--no-check", action="store_true", help="leave out the pass through the model at the end")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="take pickles where there is nothing safer; nothing loads them here"
    )
    parser.add_argument(
        "--allow-code", action="store_true", help="take the repository's own code too; nothing runs it here"
    )
    parser.add_argument("--jobs", type=int, default=8, metavar="N", help="connections at a time (default: 8)")
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Plan, show, ask, fetch, check. stdout holds the folder, or JSON."""
    from slmops.catalog.names import resolve
    from slmops.catalog.pull import Wish, get, plan
    from slmops.catalog.transfer import Pace
    from slmops.errors import UsageError

    if options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {options.jobs}", "leave it out, or give a positive number")
    pace = Pace(jobs=options.jobs, told=_Once(say))
    wish = Wish(tuple(options.only), options.allow_pickle, options.allow_code, not options.no_check)
    source, meant = resolve(options.model)
    if meant:
        say(meant)
    planned = plan(source, wish, options.to, pace=pace)
    _show(planned)
    if options.dry_run:
        if options.json:
            print_json(_json(planned))
        return 0
    if not planned.current and not options.yes and not _agreed():
        say("nothing was fetched")
        return 1
    with _Bar(planned) as bar:
        record = get(planned, bar.moved, bar.waiting, bar.said, pace=pace)
    _tell(planned, record)
    if options.json:
        print_json({**_json(planned), "fetched": record["fetched"], "checked": record.get("checked", {})})
    else:
        print(planned.target)
    return 0


class _Once:
    """Says a line once, also where several threads meet the same."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.last, self.lock = say, ("", 0.0), threading.Lock()

    def __call__(self, text: str) -> None:
        with self.lock:
            if text != self.last[0] or time.monotonic() - self.last[1] > 3:
                self.say(f"  {text}")
            self.last = (text, time.monotonic())


def _agreed() -> bool:
    """Ask in a terminal; elsewhere the command itself is the answer."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print("fetch it? [Y/n] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    return bool(answer) and answer.strip().lower() in ("", "y", "yes")  # Ctrl-D is no answer


def _show(plan: Plan) -> None:
    listing, choice = plan.listing, plan.choice
    kind = plan.source.kind
    where = f" from {listing.endpoint}" if kind != "path" else ""
    at = f", {_AT[kind]} {listing.commit[:12]}" if kind in _AT else ""
    say(f"{plan.source}{at}{where}")
    if plan.unreachable:
        say(f"  note      {plan.unreachable}: taken as it was fetched before")
    if listing.about:
        say(f"  model     {listing.about}")
    say(f"  licence   {listing.licence or 'not stated: look at the model card before you use it'}")
    if listing.gated:
        say("  access    gated: who may read it is asked on its page; HF_TOKEN says who you are")
    say(f"  size      {size(choice.size)} in {_count(len(choice.files), 'file')} ({choice.form})")
    for file in choice.files[:SHOWN]:
        say(f"            {size(file.size):>9}  {file.name}")
    if len(choice.files) > SHOWN:
        say(f"            and {len(choice.files) - SHOWN} more (--json lists all)")
    reasons: dict[str, list[str]] = {}
    for name, reason in choice.left_out:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        say(f"  left out  {', '.join(names[:5])}{more} ({reason})")
    say(f"  into      {plan.target}")
    if listing.archives and not plan.current:
        say(
            "  archives  their files are chosen from when they are unpacked; pickles, links and unsafe names are refused"
        )
    if plan.current:
        say("  here      all of it: nothing to fetch")
    elif plan.here:
        say(f"  here      {size(plan.here)} of it, from an earlier pull; {size(choice.size - plan.here)} to fetch")


def _json(plan: Plan) -> dict[str, Any]:
    return {
        "source": str(plan.source), "commit": plan.listing.commit, "endpoint": plan.listing.endpoint,
        "licence": plan.listing.licence, "about": plan.listing.about,
        "gated": plan.listing.gated, "form": plan.choice.form, "bytes": plan.choice.size, "here": plan.here,
        "folder": str(plan.target), "current": plan.current,
        "files": [{"name": f.name, "bytes": f.size, f.kind: f.digest} for f in plan.choice.files],
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.choice.left_out],
    }  # fmt: skip


def _tell(plan: Plan, record: dict[str, Any]) -> None:
    checked = record.get("checked", {})
    if not plan.current:
        parts = [_count(checked.get("files", 0), "checksum")]
        parts += [_count(checked["tensors"], "tensor")] if checked.get("tensors") else []
        if "runtime" in checked:
            parts.append(checked.get("note") or f"tokenizer and one pass in {checked['runtime']}")
        say(f"checked: {', '.join(parts)}; {size(record['fetched'])} fetched")
    if "skipped" in checked:
        say(f"not tried: one pass through the model: {checked['skipped']}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class _Bar:
    """Bytes as they come: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, plan: Plan) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(file=sys.stderr, highlight=False)
        self.live = console.is_terminal
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(compact=True), console=console, transient=True, disable=not self.live,
        )  # fmt: skip
        self.total, self.done = plan.choice.size, plan.here
        self.task = self.bars.add_task("fetching", total=self.total, completed=self.done)
        self.quiet = plan.current
        self.spoken = time.monotonic()
        self.lock = threading.Lock()

    def __enter__(self) -> _Bar:
        if not self.quiet:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def moved(self, count: int, name: str) -> None:
        """Bytes came, or turned out wrong."""
        with self.lock:
            self.done += count
            self.bars.update(self.task, completed=self.done)
            if not self.live and time.monotonic() - self.spoken > 15:
                self.spoken = time.monotonic()
                say(f"  {size(self.done)} of {size(self.total)}  {name}")
        if count < 0:
            say(f"  {name}: wrong bytes came, fetching it once more")

    def waiting(self) -> None:
        """Another process is at it."""
        say("another pull of this folder is at work: waiting for it")

    def said(self, text: str) -> None:
        """What goes on after the last byte."""
        self.bars.update(self.task, description=text)
