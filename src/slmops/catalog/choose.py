"""Which files of a repository are a model: one set of weights, and what stands beside it.

Promises: weights are safetensors, else GGUF, else ONNX; pickles and code only for who asks for them. Each file that is
left out has a reason. Where a repository holds several models of one form, nothing is guessed: the choice is named.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from slmops.catalog.hub import File, Listing
from slmops.errors import ModelError

BESIDE = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npz", ".npy", ".joblib", ".h5", ".msgpack", ".nemo")
CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1", ".js", ".ipynb", ".jar", ".wasm")
RECORD = ".slmops-pull.json"
"""What slmops keeps of a pull in the folder itself; a file of that name in a repository is not taken."""
_ONNX = re.compile(r"\.onnx$|\.onnx[._]data(_\d+)?$")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class Choice:
    """The files to take, the form of their weights, and why each other file is left out."""

    form: str
    files: tuple[File, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files)


def is_pickle(name: str) -> bool:
    """Whether this is a file that can run code, or grow without bound, when it is loaded. Data of a .onnx is not."""
    return name.lower().endswith(PICKLES) and not _ONNX.search(name)


def is_code(name: str) -> bool:
    """Whether this is a program."""
    return name.lower().endswith(CODE)


def choose(
    files: Sequence[File],
    model: str,
    only: Sequence[str] = (),
    *,
    pickles: bool = False,
    code: bool = False,
    beside: Collection[str] = (),
) -> Choice:
    """Choose what to take.

    Args:
        only: patterns; weights that match none of them are left out.
        beside: names that go with any weights.
        pickles: take pickles too, where there is nothing safer or `only` names them.
        code: take programs too. Nothing runs them.

    Raises:
        ModelError: no weights that may be taken, or several models to choose from.
    """
    names = {file.name for file in files}
    weights, form = _weights(files, model, only, pickles)
    folders = {"", *(_folder(name) for name in weights)}
    taken = set(weights)
    for name in names - {RECORD}:
        if name in beside:
            taken.add(name)
        if _folder(name) in folders and any(fnmatch.fnmatchcase(PurePosixPath(name).name, p) for p in BESIDE):
            taken.add(name)
        if code and is_code(name) and _folder(name) in folders:
            taken.add(name)
    left = tuple(sorted((name, _reason(name, only)) for name in names - taken))
    order = sorted((file for file in files if file.name in taken), key=lambda file: file.name)
    return Choice(form, tuple(order), left)


def packed(listing: Listing, *, code: bool = False) -> Choice:
    """What to fetch of a model that comes in archives: all but code. What is in them is chosen from when they are there."""
    kept = [
        file
        for file in listing.files
        if code or not (file.name in listing.archives and listing.archives[file.name].code)
    ]
    left = [(file.name, "code, which is not needed: --allow-code") for file in listing.files if file not in kept]
    return Choice("in archives", tuple(kept), tuple(sorted([*left, *listing.left])))


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _reason(name: str, only: Sequence[str]) -> str:
    if is_pickle(name):
        return "a pickle, which can run code when it is loaded: --allow-pickle"
    if is_code(name):
        return "code, which is not needed: --allow-code"
    if name.endswith((".safetensors", ".gguf")) or _ONNX.search(name):
        return "other weights: --only" if not only else "not asked for"
    return "not part of the model"


def _matching(names: Iterable[str], only: Sequence[str]) -> list[str]:
    base = PurePosixPath
    return sorted(
        n for n in names if any(fnmatch.fnmatchcase(n, p) or fnmatch.fnmatchcase(base(n).name, p) for p in only)
    )


def _weights(files: Sequence[File], model: str, only: Sequence[str], pickles: bool) -> tuple[list[str], str]:
    sizes = {file.name: file.size for file in files}
    if only:
        found = _matching(sizes, only)
        safe = [n for n in found if n.endswith((".safetensors", ".gguf")) or _ONNX.search(n)]
        dangerous = [n for n in found if is_pickle(n)]
        if dangerous and not pickles:
            raise _pickle(model, dangerous)
        if not safe and not dangerous:
            known = [n for n in sizes if n.endswith((".safetensors", ".gguf", ".onnx"))]
            raise ModelError(f"{model}: no weights match {' or '.join(only)}", f"there are: {_some(sorted(known))}")
        chosen = safe + dangerous
        return chosen, _form(chosen)
    root = [name for name in sizes if "/" not in name]
    tensors = sorted(name for name in root if name.endswith(".safetensors"))
    if tensors:
        plain = [name for name in tensors if name.startswith("model")]
        return (plain or tensors), "safetensors"
    ggufs = sorted(n for n in root if n.endswith(".gguf") and not n.startswith("mmproj"))
    if ggufs:
        groups: dict[str, list[str]] = {}
        for name in ggufs:
            groups.setdefault(_SPLIT.sub("", name), []).append(name)
        if len(groups) > 1:
            raise _several(model, "GGUF files", {g[0]: sum(sizes[n] for n in g) for g in groups.values()})
        return ggufs, "gguf"
    graphs = sorted(name for name in sizes if name.endswith(".onnx"))
    if graphs:
        homes = {_folder(name) for name in graphs}
        alone = len(graphs) == 1 or f"{next(iter(homes))}/genai_config.json".lstrip("/") in sizes
        if len(homes) > 1 or not alone:
            what = (
                {f"{home}/*".lstrip("/"): 0 for home in sorted(homes)} if len(homes) > 1 else dict.fromkeys(graphs, 0)
            )
            for choice in what:
                what[choice] = sum(size for name, size in sizes.items() if fnmatch.fnmatchcase(name, choice))
            raise _several(model, "ONNX models", what)
        home = next(iter(homes))
        return sorted(n for n in sizes if _folder(n) == home and _ONNX.search(n)), "onnx"
    dangerous = sorted(name for name in root if is_pickle(name) and not name.startswith(("training_args", "optimizer")))
    if dangerous and pickles:
        return dangerous, "pickle"
    if dangerous:
        raise _pickle(model, dangerous)
    raise ModelError(f"{model}: no weights in it: neither safetensors nor GGUF nor ONNX", "check that this is a model")


def _form(names: Sequence[str]) -> str:
    if any(is_pickle(name) for name in names):
        return "pickle"
    for end in ("safetensors", "gguf"):
        if any(name.endswith(f".{end}") for name in names):
            return end
    return "onnx"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


def _pickle(model: str, names: Sequence[str]) -> ModelError:
    return ModelError(
        f"{model}: no safetensors weights, but pickles: {_some(names)}",
        "convert it to safetensors first: a pickle can run code when it is loaded; --allow-pickle takes it all the same",
    )


def _several(model: str, what: str, sizes: dict[str, int]) -> ModelError:
    listing = "\n".join(f"  {size / 1e6:10.1f} MB  {name}" for name, size in sorted(sizes.items(), key=lambda x: x[1]))
    return ModelError(f"{model}: several {what} to choose from:\n{listing}", f"add --only '{min(sizes)}', or another")
