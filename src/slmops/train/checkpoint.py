"""Checkpoints that a kill at any moment cannot spoil.

A file is written beside its place, flushed to disk and renamed: what is there is whole. The best weights lie in files of
their own, named in the state, so that they are written only when they change. A state of another training (other data,
parameters or code) is not taken.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

STATE = "state.pt"
FORMAT = 1


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write(path: Path, value: Any) -> None:
    """`torch.save` that is there whole or not at all."""
    import torch

    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


class Checkpoints:
    """The checkpoints of one training in its scratch folder.

    Attributes:
        folder: where they lie.
        fingerprint: digest of all that decides the training; a state with another one is ignored.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.fingerprint = fingerprint

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state; best weights that it does not name (key `best_file`) are removed afterwards."""
        write(self.folder / STATE, {**state, "fingerprint": self.fingerprint, "format": FORMAT})
        for old in self.folder.glob("best-*.pt"):
            if old.name != state.get("best_file"):
                old.unlink()

    def load(self) -> dict[str, Any] | None:
        """The last state of this training, or None."""
        import pickle

        import torch

        try:
            state = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            return None
        if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("fingerprint") != self.fingerprint:
            return None
        if state["best_file"] and not (self.folder / state["best_file"]).exists():
            return None
        return state

    def save_best(self, step: int, weights: Mapping[str, torch.Tensor]) -> str:
        """Keep weights that were best at a step; the file's name goes into the next state."""
        name = f"best-{step}.pt"
        write(self.folder / name, {n: w.detach().cpu() for n, w in weights.items()})
        return name

    def load_best(self, name: str) -> dict[str, torch.Tensor]:
        """Weights written by `save_best`."""
        import torch

        loaded: dict[str, torch.Tensor] = torch.load(self.folder / name, map_location="cpu", weights_only=True)
        return loaded
