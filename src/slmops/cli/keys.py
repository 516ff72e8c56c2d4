"""`slmops keys`: API keys of `slmops serve`."""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.cli.bench import positive
from slmops.cli.common import json_argument, print_json, say
from slmops.core.layout import columns
from slmops.errors import UsageError

if TYPE_CHECKING:
    from slmops.serve.keys import Key

HELP = "make, list, rotate and revoke API keys of a server (add, list, rotate, revoke)"

EPILOG = """\
A key is shown once, when it is made; the file keeps what is needed to know it again. A running server reads the file when it changes.

scopes: infer: ask models, and see which there are; admin: load, unload, pull and remove them; metrics: read /metrics.

  slmops keys add desk-app
  slmops keys add prometheus --scope metrics --days 365
  slmops keys rotate desk-app --overlap 24
  slmops keys revoke desk-app
  slmops serve desk=outputs/demo/bundle/model --host 0.0.0.0 --keys keys.json"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `keys` takes."""
    parser.add_argument(
        "action", choices=("add", "list", "rotate", "revoke"),
        help="add: a key for a new name; rotate: another for a name, whose old ones end later; revoke: end a name's keys at once",
    )  # fmt: skip
    parser.add_argument("name", nargs="?", metavar="NAME", help="who has the key, or (revoke) the id of one key")
    parser.add_argument("--file", type=Path, default=Path("keys.json"), help="the keys (keys.json)")
    parser.add_argument("--scope", metavar="NAMES", help="add: what it may do, with commas (infer)")
    parser.add_argument("--days", type=positive, metavar="N", help="add: it ends after so many days (never)")
    parser.add_argument("--overlap", type=float, metavar="HOURS", help="rotate: how long the old ones go on (24)")
    parser.add_argument("--requests-per-minute", type=positive, metavar="N", help="add: instead of the server's limit")
    parser.add_argument("--tokens-per-minute", type=positive, metavar="N", help="add: instead of the server's limit")
    parser.add_argument("--answers", type=positive, metavar="N", help="add: at a time, instead of the server's limit")
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Do the action."""
    from slmops.serve.keys import read, write
    from slmops.store.files import locked

    action, file = options.action, options.file
    _check(options)
    if action == "list":
        _list(read(file), options.json)
        return 0
    with locked(file.with_name(f".{file.name}.lock"), lambda: None):
        keys = read(file) if action != "add" or file.exists() else []
        token, keys = _changed(options, keys)
        write(file, keys)
    if token is None:
        say(f"{options.name} is let in no more")
        return 0
    if options.json:
        print_json({"name": options.name, "key": token, "id": keys[-1].id, "scopes": list(keys[-1].scopes)})
    else:
        print(token)
        say("it is not shown again")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse options that are of another action."""
    if (options.name is None) != (options.action == "list"):
        raise UsageError(
            f"`slmops keys {options.action}` " + ("takes no name" if options.name else "wants a name"),
            "see `slmops keys --help`",
        )
    own = {
        "scope": "add",
        "days": "add",
        "requests_per_minute": "add",
        "tokens_per_minute": "add",
        "answers": "add",
        "overlap": "rotate",
    }
    for option, action in own.items():
        if getattr(options, option) is not None and options.action != action:
            raise UsageError(f"--{option.replace('_', '-')} is for `slmops keys {action}`", "leave it out")
    if options.overlap is not None and not 0 <= options.overlap < 24 * 366:
        raise UsageError(f"--overlap {options.overlap:g} is no time", "give hours, from 0 to a year")


def _changed(options: argparse.Namespace, keys: list[Key]) -> tuple[str | None, list[Key]]:
    """The new key, if one is made, and all that are kept."""
    from slmops.serve.keys import SCOPES, make, rotate

    now, name = time.time(), options.name
    if options.action == "rotate":
        return rotate(keys, name, now, 3600 * (24 if options.overlap is None else options.overlap))
    if options.action == "revoke":
        kept = [key for key in keys if name not in (key.name, key.id)]
        if len(kept) == len(keys):
            raise UsageError(f"there is no key {name}", "see `slmops keys list`")
        return None, kept
    scopes = tuple(dict.fromkeys(part.strip() for part in (options.scope or "infer").split(",")))
    if odd := [scope for scope in scopes if scope not in SCOPES]:
        raise UsageError(f"there is no scope {odd[0]!r}", f"there are: {', '.join(SCOPES)}")
    if any(key.name == name and key.valid(now) for key in keys):
        raise UsageError(
            f"there is a key {name} already", f"`slmops keys rotate {name}` makes another, or revoke it first"
        )
    limits: dict[str, Any] = {
        "requests_per_minute": options.requests_per_minute, "tokens_per_minute": options.tokens_per_minute, "answers": options.answers,
        "expires": int(now + 86400 * options.days) if options.days else None,
    }  # fmt: skip
    token, key = make(name, scopes, now, **limits)
    return token, [*(one for one in keys if one.name != name), key]  # those of its name have ended


def _list(keys: list[Key], as_json: bool) -> None:
    now = time.time()
    if as_json:
        names = ("name", "id", "scopes", "created", "expires", "requests_per_minute", "tokens_per_minute", "answers")
        print_json([{name: getattr(key, name) for name in names} | {"valid": key.valid(now)} for key in keys])
        return
    rows = [["name", "id", "scopes", "made", "ends"]]
    for key in keys:
        ends = "never" if key.expires is None else _day(key.expires) if key.valid(now) else "has ended"
        rows.append([key.name, key.id, ",".join(key.scopes), _day(key.created), ends])
    print("\n".join(columns(rows)))


def _day(moment: int) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d %H:%M")
