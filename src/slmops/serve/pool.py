"""The models of a server, by name. What needs them all is here; what one does is in `slmops.serve.model`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from slmops.serve.model import Model, Settings


class Pool:
    """Models under their names, in the order in which they came. Used from one event loop."""

    def __init__(self, wanted: Sequence[Settings] = ()) -> None:
        self._models: dict[str, Model] = {}
        for settings in wanted:
            self.add(settings)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def names(self) -> list[str]:
        """Of all models."""
        return list(self._models)

    def find(self, name: str) -> Model | None:
        """A model, loaded or not; None if there is none of this name."""
        return self._models.get(name)

    def add(self, settings: Settings) -> Model:
        """A new model, which is not loaded yet. One that had its name is no longer found, but not stopped.

        Raises:
            ModelError: its tokenizer cannot be read.
        """
        model = self._models[settings.name] = Model(settings)
        return model

    async def start(self) -> None:
        """Load all.

        Raises:
            ModelError: one cannot be loaded.
        """
        for model in self:
            await model.start()

    async def stop(self) -> None:
        """End all processes."""
        await asyncio.gather(*(model.stop() for model in self))
