"""`slmops`: parse, call the verb, and turn every error into one message, one hint and one exit code.

Exit codes: 0 passed, 1 error, 2 usage or a bad file of the user's, 3 a gate failed, 4 a gate is undecided, 130 stopped
by the user. stdout carries data, stderr carries talk.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from keyword import iskeyword
from typing import NoReturn

from slmops import __version__
from slmops.errors import SlmopsError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

VERBS = (
    "init", "import", "doctor", "catalog", "needs", "pull", "plan", "run", "search", "why", "report", "compare", "fidelity", "fit",
    "bench", "chat", "serve", "keys", "cache",
)  # fmt: skip

DESCRIPTION = """\
From a task and a teacher to a small language model on every device:
distil, quantise, evaluate and bundle, from one project file."""

EPILOG = """\
a first project:
  slmops init support-desk && cd support-desk
  slmops run
  slmops report --open

exit codes: 0 passed, 1 error, 2 usage or a bad file, 3 a gate failed, 4 undecided"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"error: {message}", file=sys.stderr)
        print(f"hint: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def parser(only: str = "") -> argparse.ArgumentParser:
    """The whole command line, or that of one verb, which is faster to make. Imports nothing heavy: every verb's module is light."""
    top = _Parser(
        prog="slmops", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"slmops {__version__}")
    top.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    verbs = top.add_subparsers(dest="verb", metavar="COMMAND", required=True, parser_class=_Parser)
    for name in (only,) if only in VERBS else VERBS:
        module = importlib.import_module(f"slmops.cli.{f'{name}_' if iskeyword(name) else name}")
        verb = verbs.add_parser(
            name, help=module.HELP, description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=getattr(module, "EPILOG", None), formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.arguments(verb)
        verb.set_defaults(call=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        return _main(parser(_verb(arguments)).parse_args(arguments))
    except BrokenPipeError:
        _nobody_reads()
        return 0
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _nobody_reads()


def _verb(arguments: Sequence[str] | None) -> str:
    """The verb of a command line; "" where there is none, or help is asked before it."""
    for word in sys.argv[1:] if arguments is None else arguments:
        if word != "--debug":
            return word
    return ""


def _main(options: argparse.Namespace) -> int:
    try:
        code: int = options.call(options)
        return code
    except SlmopsError as error:
        if options.debug:
            raise
        return _tell(error)
    except KeyboardInterrupt:
        print("\nstopped; finished steps are kept, run again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug or isinstance(error, BrokenPipeError):
            raise
        return _tell(_foreign(error))


def _nobody_reads() -> None:
    """Whoever read our output went away, as in `slmops plan | head -1`: that is no error, the rest goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(error: SlmopsError) -> int:
    """Print an error; returns its exit code."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_code


def _foreign(error: Exception) -> SlmopsError:
    """An error that no layer knew: the disk or a permission, or a defect of slmops."""
    if isinstance(error, OSError) and error.filename is not None and error.errno in _DISK:
        from pathlib import Path

        from slmops.store.files import disk_error

        return disk_error(error, Path(os.fsdecode(error.filename)))
    if isinstance(error, OSError) and error.filename is not None:
        return SlmopsError(f"{os.fsdecode(error.filename)}: {error.strerror}", "check this path")
    return SlmopsError(
        f"unexpected error: {type(error).__name__}: {error}",
        "this is a defect of slmops: please report it with the trace that `slmops --debug …` prints; finished steps are kept",
    )


def entry() -> None:
    """The console script."""
    raise SystemExit(main())


if __name__ == "__main__":
    entry()
