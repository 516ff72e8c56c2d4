"""Entries as TensorBoard event files: `.slmops/tensorboard/EXPERIMENT/STEP-KEY8/`, there whole or not at all.

Curves and numbers are scalars, parameters go into the text and the hparams tabs, the report lies beside the events. Written
by TensorBoard's own writer; torch is not needed. Look at them with `tensorboard --logdir .slmops/tensorboard`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from slmops.flow.tracking import Entry
from slmops.store.files import remove_tree


class TensorBoard:
    """Event files of one experiment."""

    name = "TensorBoard"
    hint = "free some disk space and check the permissions of .slmops/tensorboard"

    def __init__(self, state: Path, experiment: str) -> None:
        self.folder = state / "tensorboard" / experiment.replace("/", "-")
        self._beside = state / "tensorboard.part"

    def place(self, entry: Entry) -> Path:
        """The folder of an entry."""
        return self.folder / f"{entry.step}-{entry.key[:8]}"

    def has(self, entry: Entry) -> bool:
        """Whether its folder is there."""
        return self.place(entry).is_dir()

    def write(self, entry: Entry) -> None:
        """Write the folder beside, then rename it."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        remove_tree(self._beside)
        self._beside.mkdir(parents=True)
        writer = EventFileWriter(str(self._beside))
        try:
            for name, at, value in entry.curve:
                summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
                writer.add_event(Event(wall_time=entry.time_of(at), step=at, summary=summary))
            end = entry.started + entry.seconds
            for name, value in entry.values.items():
                summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
                writer.add_event(Event(wall_time=end, step=entry.last, summary=summary))
            about = {"step": entry.step, "method": entry.method, "key": entry.key, **entry.texts}
            for summary in (
                text_pb("about", _table(about)),
                text_pb("parameters", _table(entry.params)),
                hparams_pb(dict(entry.params), trial_id=entry.key, start_time_secs=entry.started),
            ):
                writer.add_event(Event(wall_time=end, step=entry.last, summary=summary))
        finally:
            writer.close()
        for file in entry.files:
            shutil.copyfile(file, self._beside / file.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._beside.rename(self.place(entry))


def _table(rows: Mapping[str, str]) -> str:
    """A Markdown table."""
    cells = ((name, value.replace("\n", " ").replace("|", "\\|")) for name, value in rows.items())
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in cells)])
