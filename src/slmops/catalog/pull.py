"""Get a model whole and safe into a folder of its own: from a hub, a registry, or another folder.

Promises: the folder appears at once, whole and checked, or not at all; a pull that was ended anyhow goes on where it was;
two pulls of one folder wait for each other; a second pull of what is there moves no bytes. Nothing of the repository is
run but one pass of its weights, in a process of its own (`slmops.catalog.one_pass`).

Beside the folder NAME stands `.NAME.pull` while it is on its way: `blobs`, the bytes by checksum; `tree`, the folder in the
making; `old`, what was there before; `lock`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.catalog import check
from slmops.catalog.choose import RECORD, Choice, choose, packed
from slmops.catalog.folder import Folder
from slmops.catalog.hub import PATIENCE, Again, File, Hub, Listing, Origin, given_up
from slmops.catalog.source import Source, flat, refusal
from slmops.catalog.transfer import Pace, present, refuse_full, transfer
from slmops.catalog.tree import build, link, opened, recover, sealed
from slmops.catalog.unpack import refuse_packing
from slmops.errors import ModelError, RefusedError, UnreachableError
from slmops.store.files import fsync_folder, read_json, remove_tree, write_json

LARGEST_TEXT = 1 << 20
"""Bytes of a file that is looked at to see what need not be asked for."""
UNASKED = "--no-check was given"


@dataclass(frozen=True)
class Wish:
    """What to take: patterns of weights, pickles, code; `run`: let the model read one text when it is there."""

    only: tuple[str, ...] = ()
    pickles: bool = False
    code: bool = False
    run: bool = True


@dataclass(frozen=True)
class Plan:
    """What a pull would do.

    Attributes:
        here: bytes that are there already, from an earlier pull or a part of one.
        current: the folder holds all of it; nothing is left to do.
        unreachable: why nobody was asked, where the folder is taken as it is.
        origin: who was asked, and is asked for the bytes.
    """

    source: Source
    listing: Listing
    choice: Choice
    wish: Wish
    target: Path
    here: int
    current: bool
    unreachable: str = ""
    origin: Origin | None = field(default=None, compare=False)


def cache() -> Path:
    """Where models go that are not sent elsewhere: SLMOPS_MODELS, or `slmops/models` in the user's cache folder."""
    own = os.environ.get("SLMOPS_MODELS")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "slmops" / "models"


def place(source: Source) -> Path:
    """The folder of a source in the cache: a link between both names does not change."""
    if source.kind == "path":
        import hashlib

        mark = hashlib.sha256(source.name.encode()).hexdigest()[:8]
        return cache() / "local" / f"{Path(source.name).name or 'root'}-{mark}"
    if source.kind != "hub":
        name = re.sub(r"^http://", "", source.name).replace(":", "_")
        return cache() / source.kind / name / (source.revision or "latest").replace(":", "-")
    revision = f"@{source.revision.replace('/', '--')}" if source.revision else ""
    return cache() / "hub" / f"{source.name}{revision}"


def origin_of(source: Source, target: Path | None = None) -> Origin:
    """What to read a source from; `target`: the folder that holds what an earlier pull left of it, or what of one is beside it."""
    if source.kind in ("ollama", "oci"):
        from slmops.catalog.artifact import Registry

        return Registry(near=_texts(target) if target else ())
    if source.kind == "azure":
        from slmops.catalog.foundry import Foundry

        return Foundry()
    return Folder() if source.kind == "path" else Hub()


def _texts(target: Path) -> list[Path]:
    """What is small of an earlier pull, whole or ended, the smallest first."""
    names = [target / file.name for file, _changed in _recorded(_record(target))]
    sizes = {}
    for path in (*names, *_stage(target).glob("blobs/*")):
        with contextlib.suppress(OSError):
            sizes[path] = path.stat().st_size
    return sorted((path for path in sizes if sizes[path] <= LARGEST_TEXT), key=sizes.__getitem__)


def listed(origin: Origin, source: Source, pace: Pace) -> Listing:
    """The listing, with as many tries as `pace` gives, but three where nobody answers.

    Raises:
        UnreachableError: nobody answers.
        ModelError: no such model or revision, no access, or an unsafe name in it.
    """
    tries = 0
    while True:
        try:
            return origin.listing(source)
        except Again as again:
            tries += 1
            most = min(3, pace.tries) if "reached" in again.reason else pace.tries
            if tries >= most or (again.wait or 0) > PATIENCE:
                raise given_up(again, str(source)) from again
            pace.sleep(pace.before(again, tries))


def plan(
    source: Source, wish: Wish, target: Path | None = None, origin: Origin | None = None, pace: Pace = Pace()
) -> Plan:
    """Ask what there is and decide what to take; no file is written, and none but short descriptions read.

    Raises:
        ModelError: nothing that may be taken, or the folder is someone else's.
        ResourceError: the disk has no room for it.
    """
    target = (target or place(source)).absolute()
    if target.is_symlink():  # what it leads to is filled, and the link stays
        target = target.resolve()
    if target.is_mount():
        raise ModelError(
            f"{target} is where a disk is mounted, and cannot be put in its place whole",
            f"name a folder in it: --to {target / 'model'}",
        )
    if source.kind == "path" and target.resolve().is_relative_to(Path(source.name).resolve()):
        raise ModelError(f"{target} is where the model is already", "name another folder with --to")
    record = _record(target)
    try:
        origin = origin or origin_of(source, target)
        listing = listed(origin, source, pace)
    except UnreachableError as error:
        known = _remembered(record, source, wish, target)
        if known is None:
            raise
        return Plan(source, *known, wish, target, known[1].size, True, error.message.partition(": ")[2])
    choice = _choose(listing, wish)
    if _holds(record, target, listing, choice, wish):
        return Plan(source, listing, choice, wish, target, choice.size, True)
    _refuse_foreign(target, record)
    stage = _stage(target)
    here = present(stage / "blobs", choice.files, pace) if source.kind != "path" else 0
    held = _known(record, target)
    here += sum(
        file.size for file in choice.files if file.digest in held and not (stage / "blobs" / file.digest).exists()
    )
    parent = next(folder for folder in (target.parent, *target.parent.parents) if folder.is_dir())
    unpacked = sum(file.size for file in choice.files if file.name in listing.archives)
    refuse_full(parent, max(0, choice.size - here) + unpacked, str(source))
    return Plan(source, listing, choice, wish, target, min(here, choice.size), False, origin=origin)


def _choose(listing: Listing, wish: Wish) -> Choice:
    if listing.archives:
        choice = packed(listing, code=wish.code)
        for file in choice.files:
            if file.name in listing.archives:
                refuse_packing(listing.archives[file.name].packing, f"{listing.source}: {file.name}")
        return choice
    choice = choose(
        listing.files, str(listing.source), wish.only, pickles=wish.pickles, code=wish.code, beside=listing.beside
    )
    return dataclasses.replace(choice, left_out=tuple(sorted([*choice.left_out, *listing.left])))


def get(
    plan: Plan,
    moved: Callable[[int, str], None] = lambda count, name: None,
    waiting: Callable[[], None] = lambda: None,
    said: Callable[[str], None] = lambda text: None,
    origin: Origin | None = None,
    pace: Pace = Pace(),
) -> dict[str, Any]:
    """Carry a plan out.

    Args:
        moved: called for bytes that came, with their number and the file's name, from several threads.
        waiting: called once where another process pulls the same folder.
        said: called with what is done after the last byte.

    Returns:
        The record of the folder, with `fetched`: bytes that came.

    Raises:
        ModelError, IntegrityError, ResourceError: the folder is as it was; what came is kept beside it.
    """
    target = plan.target
    stage = _stage(target)
    if plan.current:
        if stage.exists() and _over(stage):
            with _alone(stage, waiting):
                if _over(stage):
                    _clear(stage)
        return {**_late(plan, _record(target) or {}), "fetched": 0}
    origin = origin or plan.origin or origin_of(plan.source)
    with _alone(stage, waiting):
        _mend(stage, target)
        record = _record(target)
        if _holds(record, target, plan.listing, plan.choice, plan.wish):
            _clear(stage)
            return {**(record or {}), "fetched": 0}
        _refuse_foreign(target, record)
        try:
            record, fetched = _fill(plan, stage, record, origin, pace, moved, said)
        except RefusedError:
            _clear(stage)
            raise
        _land(stage, target)
        _clear(stage)
    return {**record, "fetched": fetched}


def _fill(
    plan: Plan, stage: Path, record: Mapping[str, Any] | None, origin: Origin, pace: Pace,
    moved: Callable[[int, str], None], said: Callable[[str], None],
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """Make the folder in `stage / "tree"`, the small files first; returns its record and the bytes that came."""
    model, blobs, fetched = str(plan.source), stage / "blobs", 0
    files = origin.summed(plan.listing, plan.choice.files)
    kept = _kept(record, plan, files)
    _adopt(plan.target, record, blobs, model)
    first = [file for file in files if file.name == "config.json"]
    for some in (first, files):
        fetched += transfer(origin, plan.listing, some, blobs, pace, moved)
        if some is first and some and not plan.wish.code:
            check.refuse_code(blobs / first[0].digest, model)
    files, stated = sealed(files, blobs, model)
    layers = [file.name for file in files]
    if plan.listing.archives:
        said("unpacking")
        choice = _unpacked(plan, files, blobs)
        plan, files = dataclasses.replace(plan, choice=choice), choice.files
        kept = [file for file in kept if file.name not in {file.name for file in files}]
    whole = [*files, *kept]
    write_json(stage / "names.json", [[file.name, file.size, file.kind, file.digest] for file in whole])
    tree = build(whole, stage)
    said("checking")
    seen = check.check(tree, [file.name for file in whole], model)
    ran = _run(tree, plan) if plan.wish.run else {"skipped": UNASKED}
    made = _describe(plan, whole, tree, seen, ran)
    for entry in made["files"]:
        entry |= {"stated": stated[entry["digest"]]} if entry["digest"] in stated else {}
    if plan.listing.archives:
        made["archives"] = [layers, *_asked(plan.wish)]
    write_json(tree / RECORD, made)
    (tree / RECORD).chmod(0o644)
    return made, fetched


def _asked(wish: Wish) -> list[Any]:
    """What decides what is taken out of archives."""
    return [list(wish.only), wish.pickles, wish.code]


def _unpacked(plan: Plan, files: Sequence[File], blobs: Path) -> Choice:
    """What to take of files and of what is in archives among them."""
    model, found = str(plan.source), flat(opened(plan.listing, files, blobs))
    choice = choose(found, model, plan.wish.only, pickles=plan.wish.pickles, code=plan.wish.code)
    configs = [file for file in choice.files if file.name == "config.json"]
    if configs and not plan.wish.code:
        check.refuse_code(blobs / configs[0].digest, model)
    return choice


def _late(plan: Plan, record: dict[str, Any]) -> dict[str, Any]:
    """Run the pass that an earlier pull of the same left out, if it is wanted now."""
    if plan.wish.run and record.get("checked", {}).get("skipped") == UNASKED:
        if plan.listing.archives:
            there, wish = [file for file, _changed in _recorded(record)], plan.wish
            choice = choose(there, str(plan.source), wish.only, pickles=wish.pickles, code=wish.code)
            plan = dataclasses.replace(plan, choice=choice)
        checked = {name: value for name, value in record["checked"].items() if name != "skipped"}
        record = {**record, "checked": {**checked, **_run(plan.target, plan)}}
        write_json(plan.target / RECORD, record)
    return record


def gather(
    origin: Origin, listing: Listing, files: Sequence[File], stage: Path, pace: Pace, moved: Callable[[int, str], None]
) -> Path:
    """Files of a repository by their names, in a folder below `stage`, which keeps what came of a pull that failed."""
    recover(files, stage)
    transfer(origin, listing, files, stage / "blobs", pace, moved)
    return build(files, stage)


def _stage(target: Path) -> Path:
    return target.parent / f".{target.name}.pull"


def _record(target: Path) -> dict[str, Any] | None:
    value = read_json(target / RECORD)
    if not isinstance(value, dict) or not isinstance(value.get("files"), list):
        return None
    return value if all(_sound(entry) for entry in value["files"]) else None


def _held(record: Mapping[str, Any] | None, target: Path) -> dict[str, str]:
    """Name to checksum of the files of a folder that are as its record says."""
    found = {}
    for file, changed in _recorded(record):
        path = target / file.name
        with contextlib.suppress(OSError):
            stat = path.stat()
            if stat.st_size == file.size and (stat.st_mtime_ns == changed or file.of(path) == file.digest):
                found[file.name] = file.digest
    return found


def _known(record: Mapping[str, Any] | None, target: Path) -> set[str]:
    """Checksums by which what a folder holds may be asked for."""
    found = _held(record, target)
    stated = {str(entry.get("stated")) for entry in (record or {}).get("files", ()) if entry["name"] in found}
    return {*found.values(), *stated}


def _recorded(record: Mapping[str, Any] | None) -> list[tuple[File, int]]:
    """The files of a record, and when each was changed last."""
    entries = (record or {}).get("files", ())
    return [(File(e["name"], e["size"], e["kind"], e["digest"]), e["changed"]) for e in entries]


def _sound(entry: Any) -> bool:
    """Whether an entry of a record is one that a pull writes."""
    if not isinstance(entry, dict):
        return False
    name, digest = entry.get("name"), entry.get("digest")
    numbers = all(isinstance(entry.get(key), int) for key in ("size", "changed"))
    whole = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest)
    return bool(isinstance(name, str) and refusal(name) is None and numbers and whole) and entry.get("kind") in (
        "sha256",
        "git",
    )


def _holds(record: Mapping[str, Any] | None, target: Path, listing: Listing, choice: Choice, wish: Wish) -> bool:
    """Whether the folder holds all that would be fetched, and all of its own, unchanged."""
    wanted = {file.name for file in choice.files}
    if listing.archives and (record or {}).get("archives") == [[file.name for file in choice.files], *_asked(wish)]:
        wanted = set()
    if not _same(record, listing.source) or record is None or record.get("commit") != listing.commit:
        return False
    return wanted | {file.name for file, _ in _recorded(record)} <= set(_held(record, target))


def _same(record: Mapping[str, Any] | None, source: Source) -> bool:
    return record is not None and record.get("source") == _label(source)


def _label(source: Source) -> str:
    return f"{source.kind}:{source.name}"


def _remembered(
    record: Mapping[str, Any] | None, source: Source, wish: Wish, target: Path
) -> tuple[Listing, Choice] | None:
    """What an earlier pull of the same left, if it is all there and has all that is asked for."""
    recorded = _recorded(record)
    if record is None or not _same(record, source) or len(_held(record, target)) < len(recorded):
        return None
    if source.revision not in (record.get("revision"), record.get("commit"), f"sha256:{record.get('commit')}"):
        return None
    files = tuple(file for file, _changed in recorded)
    try:
        choice = choose(files, str(source), wish.only, pickles=wish.pickles, code=wish.code)
    except ModelError:
        return None
    return Listing(source, str(record["commit"]), files, record.get("licence"), str(record.get("endpoint"))), choice


def _refuse_foreign(target: Path, record: Mapping[str, Any] | None) -> None:
    """Refuse a folder with files that no pull put there: they would be lost when another takes its place."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ModelError(f"{target} is a file", "name a folder with --to")
    own = {RECORD, *(str(entry["name"]) for entry in (record or {}).get("files", ()))}
    for base, _folders, files in os.walk(target):
        for name in files:
            found = (Path(base) / name).relative_to(target).as_posix()
            if found not in own:
                raise ModelError(f"{target} holds {found}, which no pull put there", "name another folder with --to")


@contextlib.contextmanager
def _alone(stage: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a folder on its way. The lock ends with the process, and its file with the pull."""
    told = False
    while True:
        stage.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(stage / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # its owner has just ended
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told:
                        waiting()
                        told = True
                    time.sleep(0.1)
            try:
                same = (stage / "lock").stat().st_ino == os.fstat(handle).st_ino
            except FileNotFoundError:
                same = False
            if same:
                yield
                return
        finally:
            os.close(handle)


def _over(stage: Path) -> bool:
    """Whether the pull that made this folder was killed after its last step: nothing of another one is in it."""
    return not (stage / "tree").exists() and not any((stage / "blobs").glob("*.at"))


def _clear(stage: Path) -> None:
    """Remove a folder on its way, the lock last: whoever takes a new one then finds nothing that is still being removed."""
    for path in stage.iterdir():
        if path.name != "lock":
            path.unlink() if path.is_file() else remove_tree(path)
    (stage / "lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        stage.rmdir()


def _mend(stage: Path, target: Path) -> None:
    """Undo a change of folders that was killed in its middle, and take up what is in the making."""
    if (stage / "old").exists():
        if not target.exists():
            (stage / "old").replace(target)
        else:
            remove_tree(stage / "old")
    names = read_json(stage / "names.json")
    if isinstance(names, list):
        recover([File(str(n), int(s), k, str(d)) for n, s, k, d in names], stage)
    (stage / "blobs").mkdir(exist_ok=True)


def _kept(record: Mapping[str, Any] | None, plan: Plan, files: Sequence[File]) -> list[File]:
    """What stays of an earlier pull of the same commit, such as weights of another form."""
    if record is None or not _same(record, plan.source) or record.get("commit") != plan.listing.commit:
        return []
    names = {file.name for file in files}
    held = _held(record, plan.target)
    return [file for file, _changed in _recorded(record) if file.name in held and file.name not in names]


def adopt(source: Source, blobs: Path) -> None:
    """Find the bytes of a model that was pulled into the cache by their checksums, for another who wants them."""
    blobs.mkdir(parents=True, exist_ok=True)
    _adopt(place(source), _record(place(source)), blobs, str(source))


def _adopt(target: Path, record: Mapping[str, Any] | None, blobs: Path, model: str) -> None:
    """Find the bytes of the folder as it is by their checksums: as links to the same bytes, or copies of them."""
    stated = {entry["name"]: str(entry.get("stated", "")) for entry in (record or {}).get("files", ())}
    for name, digest in _held(record, target).items():
        also = [stated[name]] if re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", stated[name]) else []
        for known in (digest, *also):
            if not (blobs / known).exists():
                link(target / name, blobs / known, model)


def _run(tree: Path, plan: Plan) -> dict[str, Any]:
    from slmops.catalog.one_pass import ask

    return ask(tree, [file.name for file in plan.choice.files], plan.choice.form, str(plan.source), plan.choice.size)


def _describe(
    plan: Plan, files: Sequence[File], tree: Path, seen: Mapping[str, Any], ran: Mapping[str, Any]
) -> dict[str, Any]:
    entries = [
        {**dataclasses.asdict(file), "changed": (tree / file.name).stat().st_mtime_ns}
        for file in sorted(files, key=lambda file: file.name)
    ]
    return {
        "source": _label(plan.source), "revision": plan.source.revision, "commit": plan.listing.commit,
        "endpoint": plan.listing.endpoint, "licence": plan.listing.licence, "form": plan.choice.form,
        "files": entries, "checked": {**seen, **ran},
    }  # fmt: skip


def _land(stage: Path, target: Path) -> None:
    """Put the folder in its place. Between two renames there is none, which the next pull mends if this one is killed."""
    for base, _folders, _files in os.walk(stage / "tree"):
        fsync_folder(Path(base))
    if target.exists() and any(target.iterdir()):
        target.replace(stage / "old")
    (stage / "tree").replace(target)
    fsync_folder(target.parent)
