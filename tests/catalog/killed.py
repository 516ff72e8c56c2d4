"""A pull that dies at a chosen step, in a process forked from one without threads."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def pull(endpoint: str, target: str, last: int, pace: dict[str, int], model: str = "hf:acme/desk") -> None:
    """Pull a model into `target`, and die by SIGKILL before the operation `last` on the disk; 0: never."""
    os.environ["HF_ENDPOINT"] = endpoint
    from slmops.catalog.pull import Wish, get, plan
    from slmops.catalog.source import parse
    from slmops.catalog.transfer import Pace

    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapper

    if last:
        os.pwrite, os.link, os.ftruncate = counted(os.pwrite), counted(os.link), counted(os.ftruncate)
        for name in ("replace", "unlink", "mkdir"):
            setattr(Path, name, counted(getattr(Path, name)))
    get(plan(parse(model), Wish(run=False), Path(target), pace=Pace(**pace)), pace=Pace(**pace))
