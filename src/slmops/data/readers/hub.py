"""Hugging Face datasets to raw rows: from the hub, a folder that `datasets` saved, or Parquet files.

Class labels come out as their names. Everything heavy is imported inside the functions. What the libraries raise is
wrapped in `DataError` with a hint; a missing library is `MissingExtraError` for the extra `hub`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slmops.data.readers.text import Raw
from slmops.errors import DataError, MissingExtraError

_ID = re.compile(r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")


class HubId(NamedTuple):
    """`hf:ORG/NAME[:CONFIG][@REVISION]`, taken apart."""

    name: str
    config: str | None
    revision: str | None


def parse_hub_id(path: str) -> HubId:
    """Take a hub id apart.

    Raises:
        DataError: it does not have that form.
    """
    match = _ID.fullmatch(path)
    if not match:
        raise DataError(
            f"{path!r} is not a dataset id", "write hf:ORG/NAME, hf:ORG/NAME:CONFIG or hf:ORG/NAME@REVISION"
        )
    return HubId(match["name"], match["config"], match["revision"])


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder with `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_hub(path: str) -> dict[str, list[Raw]]:
    """All splits of a dataset on the hub, by name.

    Raises:
        DataError: no such dataset, configuration or revision, no access, or no connection.
        MissingExtraError: `datasets` is not installed.
    """
    wanted = parse_hub_id(path)
    datasets = _datasets()
    try:
        loaded = datasets.load_dataset(wanted.name, wanted.config, revision=wanted.revision)
    except Exception as error:
        raise _wrapped(error, path) from error
    return {name: _rows(split, f"{path} ({name})") for name, split in loaded.items()}


def read_saved(folder: Path, name: str) -> dict[str, list[Raw]]:
    """All splits of a folder that `save_to_disk` wrote; a dataset without splits has the one name "".

    Raises:
        DataError: the folder is damaged.
        MissingExtraError: `datasets` is not installed.
    """
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"cannot be loaded: {_short(error)}", "save the dataset again", file=name) from error
    if isinstance(loaded, datasets.DatasetDict):
        return {split: _rows(part, f"{name} ({split})") for split, part in loaded.items()}
    return {"": _rows(loaded, name)}


def read_parquet(path: Path, name: str) -> list[Raw]:
    """The rows of a Parquet file.

    Raises:
        DataError: not a Parquet file, or empty.
        MissingExtraError: `pyarrow` is not installed.
    """
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("pyarrow", "hub") from error
    try:
        table = parquet.read_table(path)
        features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    except Exception as error:
        raise DataError(f"cannot be read as Parquet: {_short(error)}", "write the file again", file=name) from error
    if not table.num_rows:
        raise DataError("the file is empty", "give a file with at least one row", file=name)
    labels = {
        column: feature["names"]
        for column, feature in features.get("info", {}).get("features", {}).items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and "names" in feature
    }
    return _named(table.to_pylist(), labels, name)


def _rows(split: Any, name: str) -> list[Raw]:
    labels = {column: feature.names for column, feature in split.features.items() if hasattr(feature, "int2str")}
    return _named(split.to_list(), labels, name)


def _named(rows: Sequence[dict[str, Any]], labels: dict[str, list[str]], name: str) -> list[Raw]:
    """Rows with class numbers replaced by class names; -1 and null mean that there is no label."""
    out = []
    for number, row in enumerate(rows, 1):
        for column, names in labels.items():
            value = row.get(column)
            row[column] = names[value] if isinstance(value, int) and 0 <= value < len(names) else None
        out.append(Raw(row, f"{name} row {number}", None))
    return out


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "hub") from error
    datasets.disable_progress_bars()
    return datasets


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _wrapped(error: BaseException, path: str) -> DataError:
    names: set[str] = set()
    walk: BaseException | None = error
    texts = []
    while walk is not None:
        names |= {kind.__name__ for kind in type(walk).__mro__}
        texts.append(str(walk))
        walk = walk.__cause__ or walk.__context__
    text = " ".join(texts)
    if "GatedRepoError" in names or "gated" in text:
        message = "the dataset is gated"
        hint = "ask for access on its page, then set HF_TOKEN or run: hf auth login"
    elif "RevisionNotFoundError" in names or "doesn't contain revision" in text or "Revision Not Found" in text:
        message, hint = "the dataset has no such revision", "check what stands after the @"
    elif "BuilderConfig" in text or "Config name is missing" in text:
        message, hint = _short(error), "name the configuration: hf:ORG/NAME:CONFIG"
    elif (
        "OfflineModeIsEnabled" in names
        or "Offline" in text
        or names & {"ConnectError", "ConnectionError", "TimeoutException"}
    ):
        message = "the hub cannot be reached"
        hint = "check the network and HF_ENDPOINT; or download the dataset and give its folder as data.path"
    elif names & {"RepositoryNotFoundError", "DatasetNotFoundError"} or "404" in text:
        message, hint = "there is no such dataset, or it is private", "check the name; for a private one set HF_TOKEN"
    else:
        message, hint = (
            f"cannot be loaded: {_short(error)}",
            'try: python -c "import datasets; datasets.load_dataset(…)"',
        )
    return DataError(message, hint, file=path)
