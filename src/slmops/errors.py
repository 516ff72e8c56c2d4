"""The whole error tree of slmops.

Every error that a user can meet is one of these classes. Each carries a message (what happened), a hint (what to do
now) and the exit code that the command line ends with. Lower layers wrap foreign errors at the edge where they meet
them; `slmops.cli.main` is the only place that catches and prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class SlmopsError(Exception):
    """Base of all errors. `hint` is one or two sentences that tell the user what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(SlmopsError):
    """The command line or a file the user wrote asks for something that cannot be done."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a file: where it stands, what is wrong and how to mend it."""

    message: str
    hint: str = ""
    file: str = ""
    line: int | None = None
    path: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.line else (f"{self.file}: " if self.file else "")
        what = f"{self.path}: " if self.path else ""
        return f"{where}{what}{self.message}" + (f" ({self.hint})" if self.hint else "")


class SpecError(UsageError):
    """The project file (or `what`) is wrong. Carries every problem of the file, not only the first."""

    def __init__(self, problems: Sequence[Problem], hint: str = "", what: str = "the project file") -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        listing = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{head} in {what}:\n{listing}", hint)


class DataError(SlmopsError):
    """A data file cannot be used. `file` and `line` (1-based) say where."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "", *, file: str = "", line: int | None = None) -> None:
        where = f"{file}:{line}: " if file and line else (f"{file}: " if file else "")
        super().__init__(f"{where}{message}", hint)
        self.file = file
        self.line = line


class LeakError(DataError):
    """Evaluation data was found in training data and `--strict` was given."""


class MissingExtraError(SlmopsError):
    """An optional dependency is not installed; the hint is the line that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed", f"install it with: pip install 'slmops[{extra}]'")
        self.extra = extra


class EndpointError(SlmopsError):
    """A remote teacher failed in a way that retries did not mend."""


class BudgetError(SlmopsError):
    """Going on would spend more than the given budget. Everything paid for so far is kept."""


class ModelError(SlmopsError):
    """A model folder cannot be loaded or does not fit what is asked of it."""


class RefusedError(ModelError):
    """A model is not taken because of what it holds: an unsafe name, code, a header that does not fit its file."""


class UnreachableError(ModelError):
    """A hub of models cannot be reached, or must not be asked: what is here already may do."""


class TrainingError(SlmopsError):
    """Training cannot go on (divergence, nothing to learn from, inputs that do not align)."""


class CompressionError(SlmopsError):
    """A model cannot be made smaller in this way."""


class ConversionError(SlmopsError):
    """A model cannot be converted, or its converted form does not behave like the original."""


class ToolError(SlmopsError):
    """A tool in an environment of its own failed, or that environment cannot be made."""


class IntegrityError(SlmopsError):
    """Stored bytes are not the bytes that were recorded."""


class ResourceError(SlmopsError):
    """Not enough disk or memory for what is asked. `retry_after`: seconds after which there may be, where somebody can tell."""

    def __init__(self, message: str, hint: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class NoRoomError(ResourceError):
    """A model to be loaded does not fit into the memory that may be taken, beside those that are in use."""


class StepError(SlmopsError):
    """A step of a run failed for a reason slmops does not know; carries the step's name and its log."""


class StoppedError(SlmopsError):
    """A step was ended by whoever watched it, such as a search that gave a trial up."""
