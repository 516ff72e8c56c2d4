"""What a method is: the one shape that every module in data, train, convert, evaluate and bundle has.

A method is a module with three names: `DECLARATION`, `Params` and `run`. The module's own imports are light; heavy
ones (torch, onnxruntime, …) sit inside `run`, so that planning never pays for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from slmops.core.environment import Environment
from slmops.core.model import Value

Facts = dict[str, Any]


class Params(Value):
    """Base of every method's parameters. All of them are part of the step's key."""


@dataclass(frozen=True)
class Declaration:
    """What a method says of itself.

    Attributes:
        name: `room.file`, for instance `train.sft`.
        version: raised by hand whenever the same inputs give another output.
        makes: kind of the artifact it writes: dataset, tokenizer, model, adapters, logits, widths, predictions, measurement, report,
            bundle.
        takes: input name to artifact kind; a name that ends in `?` is optional, one that ends in `*` may come many times
            (as `name.a`, `name.b`).
        extra: the pip extra that its heavy imports need, or "".
        packages: distributions whose versions can change the result; they go into the key.
        threads: whether the number of threads can change the result; it goes into the key if so.
        reproducible: False for measurements: the same key may give other bytes on another run.
        neutral: parameters (dotted paths) that cannot change the result, such as a time-out; they stay out of the key.
        environment: where it runs a tool whose packages clash with those of slmops; its versions go into the key.
        runtimes: the runtimes that a step with these parameters runs models in, whose packages go into its key too.
    """

    name: str
    version: str
    makes: str
    takes: Mapping[str, str] = field(default_factory=dict)
    extra: str = ""
    packages: tuple[str, ...] = ()
    threads: bool = False
    reproducible: bool = True
    neutral: tuple[str, ...] = ()
    environment: Environment | None = None
    runtimes: Callable[[Mapping[str, Any]], Iterable[str]] = lambda params: ()


class Progress(Protocol):
    """Where a method says how far it is. Implementations print, record or ignore.

    An implementation may raise a `SlmopsError` from any call: that ends the step, with this error.
    """

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Begin a named piece of work of `total` units (None: unknown)."""

    def advance(self, done: int = 1, note: str = "") -> None:
        """Say that `done` more units are finished; `note` is shown beside the bar (a loss, a rate)."""

    def stop(self) -> None:
        """End the current piece of work."""

    def log(self, text: str) -> None:
        """A line that the user should read; kept in the step's log."""

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that hold after `step` units of work, such as a validation loss; after a resume all come again."""


class SilentProgress:
    """Progress that shows nothing and keeps its lines in `lines`: for tests and for use as a library."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Nothing is shown."""

    def advance(self, done: int = 1, note: str = "") -> None:
        """Nothing is shown."""

    def stop(self) -> None:
        """Nothing is shown."""

    def log(self, text: str) -> None:
        """Keep the line."""
        self.lines.append(text)

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing is shown."""


def named_inputs(inputs: Mapping[str, Path], kind: str) -> dict[str, Path]:
    """The inputs `kind.NAME` of a method by NAME, in their order."""
    return {name.removeprefix(f"{kind}."): path for name, path in inputs.items() if name.startswith(f"{kind}.")}


@dataclass
class Context:
    """What a method gets beside its inputs.

    Attributes:
        seed: seeds every random choice; part of the key.
        scratch: a folder of this step alone that survives a kill: checkpoints live here. Removed after success.
        shared: a folder for caches keyed by content that all steps of a project share (endpoint answers).
        threads: how many CPU threads to use.
        progress: see `Progress`.
        strict: leaks and other repairs are errors.
        budget: most money to spend on endpoints in this run, in the price list's currency; None: no bound.
        clock: seconds since the epoch.
    """

    seed: int
    scratch: Path
    shared: Path
    threads: int = 1
    progress: Progress = field(default_factory=SilentProgress)
    strict: bool = False
    budget: float | None = None
    clock: Callable[[], float] = lambda: 0.0


class Method(Protocol):
    """The shape of a method module."""

    DECLARATION: Declaration
    Params: type[Params]

    def run(self, params: Any, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
        """Read `inputs` (verified, read-only folders), write files into `out` (empty), return facts (JSON values)."""
