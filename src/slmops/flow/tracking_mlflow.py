"""Entries as MLflow runs: in an SQLite file under .slmops/mlflow/, or on the server of MLFLOW_TRACKING_URI.

MLflow's plain file store takes no new runs any more (it is in maintenance), so the embedded default is SQLite, with the
artifacts in a folder beside it. A run carries the tag `slmops.step_key`, given last: one that has it is whole, and is not
written again. What is known to be there is also noted in `.slmops/mlflow/told/`, so that a run with nothing to do asks nobody.

A server that does not answer is given up after a few seconds; the usual MLFLOW_HTTP_REQUEST_… variables change that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from slmops.core.digest import digest_json
from slmops.flow.tracking import Entry
from slmops.store.files import write_atomic

KEY = "slmops.step_key"
BOUNDS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
"""Set where the user has not: a dead server must not hold the run up, and nothing is told to anybody else."""
LONGEST = {"param": 6000, "tag": 5000}
METRICS, PARAMS = 1000, 100  # that one request may carry

Item = TypeVar("Item")


class MLflow:
    """The runs of one experiment."""

    name = "MLflow"

    def __init__(self, state: Path, experiment: str, uri: str | None = None) -> None:
        self.folder, self.experiment = state / "mlflow", experiment
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
        self._server = bool(self.uri)
        if not self._server:
            self.uri = f"sqlite:///{self.folder / 'mlflow.db'}"
        where = f"the server {self.uri} of MLFLOW_TRACKING_URI" if self._server else str(self.folder)
        self.hint = f"check {where}, or set tracking.mlflow: false"
        self._client: Any = None
        self._experiment_id = ""

    def _told(self, entry: Entry) -> Path:
        return self.folder / "told" / digest_json([self.uri, self.experiment])[7:23] / entry.key

    def has(self, entry: Entry) -> bool:
        """Whether it was written from here."""
        return self._told(entry).exists()

    def open(self) -> Any:
        """The client, with the experiment made if there is none of its name."""
        if self._client is None:
            for name, value in BOUNDS.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            self.folder.mkdir(parents=True, exist_ok=True)
            client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            found = client.get_experiment_by_name(self.experiment)
            artifacts = None if self._server else (self.folder / "artifacts").resolve().as_uri()
            self._experiment_id = (
                found.experiment_id if found else client.create_experiment(self.experiment, artifact_location=artifacts)
            )
            self._client = client
        return self._client

    def write(self, entry: Entry) -> None:
        """Write a run, unless one with this key is there.

        Raises:
            Exception: whatever MLflow raises; if only a file could not be stored, the rest is written first.
        """
        client = self.open()
        filter = f"tags.`{KEY}` = '{entry.key}'"
        if not client.search_runs([self._experiment_id], filter_string=filter, max_results=1):
            self._write(client, entry)
        write_atomic(self._told(entry), b"")

    def _write(self, client: Any, entry: Entry) -> None:
        from mlflow.entities import Metric, Param

        begun = round(entry.started * 1000)
        name = f"{entry.step}-{entry.key[:8]}"
        run = client.create_run(self._experiment_id, start_time=begun, run_name=name).info.run_id
        metrics = [Metric(_name(n), value, round(entry.time_of(at) * 1000), at) for n, at, value in entry.curve]
        end = round((entry.started + entry.seconds) * 1000)
        metrics += [Metric(_name(n), value, end, entry.last) for n, value in entry.values.items()]
        for some in _pieces(metrics, METRICS):
            client.log_batch(run, metrics=some)
        params = [Param(_name(n), value[: LONGEST["param"]]) for n, value in entry.params.items()]
        for few in _pieces(params, PARAMS):
            client.log_batch(run, params=few)
        failed: Exception | None = None
        for file in entry.files:
            try:
                client.log_artifact(run, str(file))
            except Exception as error:
                failed = error
        tags = {"slmops.step": entry.step, "slmops.method": entry.method}
        tags |= {f"slmops.{name}": value for name, value in entry.texts.items()}
        for name, value in tags.items():
            client.set_tag(run, _name(name), value[: LONGEST["tag"]])
        client.set_tag(run, KEY, entry.key)
        client.set_terminated(run, end_time=end)
        if failed is not None:
            write_atomic(self._told(entry), b"")
            raise failed


def _name(text: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]


def _pieces(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
