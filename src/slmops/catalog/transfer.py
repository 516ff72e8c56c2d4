"""Bytes from a hub into a folder: in parallel, resumable at any byte, and taken only with the right checksum.

A file is fetched in segments. Its bytes go to their place in `DIGEST.part`, and how many each segment has goes to
`DIGEST.at` after every write, so that a process killed at any time goes on behind the last byte that was written. The
checksum is taken over the whole file before it gets its name, `DIGEST`; wrong bytes are thrown away and fetched once
more. After a loss of power the counts may be ahead of the bytes: the checksum finds that too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops.catalog.hub import CUT, PATIENCE, Again, File, Listing, Origin, given_up
from slmops.errors import IntegrityError, ModelError, RefusedError, ResourceError

SEGMENT = 64 << 20
MARGIN = 16 << 20
"""Bytes of the disk that stay free."""
PARTING = 1.0
"""Seconds that a transfer which ends early waits for its threads; who hears from the hub after that writes nothing."""
LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, as the format's own reader bounds it."""
_MAGIC = b"slmpull1"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Pace:
    """How a transfer goes: threads, bytes of a segment, tries without a new byte, and seconds before the second try.

    `told` hears of pauses that a user would wonder about.
    """

    jobs: int = 8
    segment: int = SEGMENT
    tries: int = 5
    pause: float = 0.5
    sleep: Callable[[float], None] = time.sleep
    told: Callable[[str], None] = lambda text: None

    def before(self, again: Again, tries: int) -> float:
        """Seconds to wait before another try, after `tries` without a new byte; long ones are told."""
        seconds = again.wait if again.wait is not None else min(8.0, self.pause * 2.0 ** max(0, tries - 1))
        if seconds > 3:
            self.told(f"{again.reason}: trying again in {seconds:.0f} s")
        return seconds


class Part:
    """A file on its way: how many bytes of each segment are there. One thread writes a segment at a time."""

    def __init__(self, folder: Path, file: File, segment: int) -> None:
        self.file, self.segment = file, segment
        self.data, self.at = folder / f"{file.digest}.part", folder / f"{file.digest}.at"
        self.whole = folder / file.digest
        self.counts = [0] * max(1, -(-file.size // segment))
        self.lock = threading.Lock()
        self.running = 0
        """Segments that threads are at or have before them."""
        self.stream, self.counter = -1, -1

    def load(self) -> None:
        """Count what an earlier process left, if it fits; writes nothing."""
        head = self._head()
        old = self.at.read_bytes() if self.at.is_file() and self.data.is_file() else b""
        if old[: len(head)] == head and len(old) == len(head) + 8 * len(self.counts):
            counts = list(struct.unpack(f"<{len(self.counts)}Q", old[len(head) :]))
            ends = [k * self.segment + count for k, count in enumerate(counts) if count]
            fits = all(count <= self._length(k) for k, count in enumerate(counts))
            if fits and max(ends, default=0) <= self.data.stat().st_size:
                self.counts = counts

    def _head(self) -> bytes:
        return struct.pack("<8sQQ", _MAGIC, self.file.size, self.segment)

    def open(self) -> None:
        """Go on with what an earlier process left, or begin."""
        self.load()
        fresh = not any(self.counts)
        self.stream = os.open(self.data, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o644)
        self.counter = os.open(self.at, os.O_RDWR | os.O_CREAT, 0o644)
        if fresh:
            os.ftruncate(self.counter, 0)
            _write(self.counter, self._head() + bytes(8 * len(self.counts)), 0)

    def _length(self, k: int) -> int:
        return min(self.segment, self.file.size - k * self.segment)

    def left(self, k: int) -> tuple[int, int]:
        """Where segment `k` goes on, and where it ends."""
        start = k * self.segment
        return start + self.counts[k], start + self._length(k)

    @property
    def missing(self) -> list[int]:
        """Segments that are not there whole."""
        return [k for k in range(len(self.counts)) if self.counts[k] < self._length(k)]

    def add(self, k: int, chunk: bytes) -> None:
        """Write the next bytes of a segment, then that they are there; also where only some could be written."""
        start, stop = self.left(k)
        chunk = chunk[: stop - start]
        done = 0
        try:
            while done < len(chunk):
                done += os.pwrite(self.stream, chunk[done:], start + done)
        finally:
            if done:
                self.counts[k] += done
                _write(self.counter, struct.pack("<Q", self.counts[k]), 24 + 8 * k)

    def head(self, count: int) -> bytes:
        """The first bytes, as far as they are there."""
        return os.pread(self.stream, min(count, self.counts[0]), 0)

    def close(self) -> None:
        """Give the handles back."""
        for handle in (self.stream, self.counter):
            if handle >= 0:
                os.close(handle)
        self.stream = self.counter = -1

    def forget(self) -> None:
        """Throw the bytes away."""
        self.counts = [0] * len(self.counts)
        os.ftruncate(self.stream, 0)
        _write(self.counter, bytes(8 * len(self.counts)), 24)

    def settle(self) -> bool:
        """Give the file its name if its bytes are right; False: they are not, and are gone."""
        if os.fstat(self.stream).st_size != self.file.size or self.file.of(self.data) != self.file.digest:
            self.forget()
            return False
        os.fsync(self.stream)
        self.data.replace(self.whole)
        self.close()
        self.at.unlink(missing_ok=True)
        return True


def _write(handle: int, data: bytes, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], at + done)


def present(folder: Path, files: Iterable[File], pace: Pace) -> int:
    """Bytes of `files` that are in `folder` already, whole or in part."""
    total = 0
    for file in {file.digest: file for file in files}.values():
        if (folder / file.digest).is_file():
            total += file.size
        elif (folder / f"{file.digest}.at").is_file():
            part = Part(folder, file, pace.segment)
            with contextlib.suppress(OSError):
                part.load()
                total += sum(part.counts)
    return total


def refuse_full(folder: Path, need: int, name: str) -> None:
    """Refuse what the disk has no room for.

    Raises:
        ResourceError: with how much is missing.
    """
    free = shutil.disk_usage(folder).free
    if need + MARGIN > free:
        raise ResourceError(
            f"{name}: {_mb(need)} are still to come, and the disk that holds {folder} has {_mb(free)} free",
            "free some space, or name a folder on a larger disk with --to; what is here is kept",
        )


def _mb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def transfer(
    origin: Origin, listing: Listing, files: Sequence[File], folder: Path, pace: Pace, moved: Callable[[int, str], None]
) -> int:
    """Have every file in `folder`, named by its checksum.

    Args:
        moved: called for new bytes with their number and the file's name, from several threads; negative where bytes
            turned out wrong. What it raises ends the transfer.

    Returns:
        How many bytes were fetched.

    Raises:
        ModelError: the hub refuses or fails; what came is kept.
        IntegrityError: the hub's bytes have another checksum than it states, twice.
        ResourceError: the disk is full; what came is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {file.digest: file for file in files}
    parts = []
    for file in wanted.values():
        whole = folder / file.digest
        if whole.is_file() and whole.stat().st_size == file.size and file.of(whole) == file.digest:
            continue
        whole.unlink(missing_ok=True)
        parts.append(Part(folder, file, pace.segment))
    work = _Transfer(origin, listing, pace, moved)
    try:
        for part in parts:
            part.open()
        need = sum(part.file.size - sum(part.counts) for part in parts)
        refuse_full(folder, need, str(listing.source))
        work.run(parts)
    except OSError as error:
        raise disk(error, listing, folder) from error
    finally:
        if not any(
            thread.is_alive() for thread in work.threads
        ):  # a number of a file that one may use is not given away
            for part in parts:
                part.close()
    return work.fetched


def disk(error: OSError, listing: Listing, folder: Path) -> Exception:
    """A full disk or a missing permission, in words."""
    if error.errno not in FULL:
        return ModelError(
            f"{listing.source}: cannot write to {folder}: {error.strerror or error}", "check its permissions"
        )
    free = shutil.disk_usage(folder).free
    return ResourceError(
        f"{listing.source}: no space left for it in {folder} ({_mb(free)} free, or a quota is used up)",
        "free some space and run again, or name a folder on a larger disk with --to; what is here is kept",
    )


class _Transfer:
    """The threads of one transfer, and what they share: the errors, and whether to stop."""

    def __init__(self, origin: Origin, listing: Listing, pace: Pace, moved: Callable[[int, str], None]) -> None:
        self.origin, self.listing, self.pace, self.moved = origin, listing, pace, moved
        self.stop, self.late = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []
        self.fetched = 0

    def run(self, parts: Sequence[Part]) -> None:
        tasks: queue.SimpleQueue[tuple[Part, int]] = queue.SimpleQueue()
        count = 0
        for part in parts:
            if not part.missing:
                self._settle(part)
            part.running = len(part.missing)
            for k in part.missing:
                tasks.put((part, k))
                count += 1
        jobs = min(self.pace.jobs, count)
        if not jobs:
            return
        threads = [threading.Thread(target=self._work, args=(tasks,), daemon=True) for _ in range(jobs)]
        self.threads = threads
        try:
            for thread in threads:
                thread.start()
            while alive := [thread for thread in threads if thread.is_alive()]:
                if self.errors:
                    break
                alive[0].join(0.1)
        finally:
            self.stop.set()
            end = time.monotonic() + PARTING
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, end - time.monotonic()))
            self.late.set()  # until then what has come is written, though nothing more is asked for
        if self.errors:
            raise self.errors[0]

    def _work(self, tasks: queue.SimpleQueue[tuple[Part, int]]) -> None:
        try:
            while not self.stop.is_set():
                try:
                    part, k = tasks.get_nowait()
                except queue.Empty:
                    return
                self._segment(part, k)
                with part.lock:
                    part.running -= 1
                    last = not part.running
                if last and not part.missing and not self.stop.is_set():  # no other thread has to do with it any more
                    self._settle(part)
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def _settle(self, part: Part) -> None:
        for last in (False, True):
            if part.settle():
                return
            self.moved(-part.file.size, part.file.name)
            if last:
                break
            for k in range(len(part.counts)):
                self._segment(part, k)
            if self.stop.is_set():
                return
        raise IntegrityError(
            f"{self.listing.source}: {part.file.name}: the bytes that came are not those that {self.listing.who} states "
            f"({part.file.kind} {part.file.digest[:16]}…); they are thrown away",
            f"run again later, or {self.listing.mirror}",
        )

    def _segment(self, part: Part, k: int) -> None:
        """Fetch what is missing of a segment, with as many tries as bring new bytes, and some that do not."""
        tries = 0
        while not self.stop.is_set():
            start, stop = part.left(k)
            if start >= stop:
                return
            try:
                self._read(part, k, start, stop)
                if not self.stop.is_set() and part.left(k)[0] < stop:
                    raise Again(CUT)
            except Again as again:
                tries = 0 if part.left(k)[0] > start else tries + 1
                longest = again.wait is not None and again.wait > PATIENCE
                if tries >= self.pace.tries or longest:
                    raise given_up(again, f"{self.listing.source}: {part.file.name}") from again
                self._sleep(self.pace.before(again, tries))

    def _read(self, part: Part, k: int, start: int, stop: int) -> None:
        with contextlib.closing(self.origin.read(self.listing, part.file, start, stop)) as chunks:
            for chunk in chunks:
                if self.late.is_set():
                    return
                before = part.counts[k]
                try:
                    part.add(k, chunk)
                finally:
                    new = part.counts[k] - before
                    with self.lock:
                        self.fetched += new
                self.moved(new, part.file.name)
                if k == 0 and before < 16:
                    refuse_head(part.file.name, part.file.size, part.head(16), str(self.listing.source))
                if self.stop.is_set() or part.left(k)[0] >= stop:
                    return

    def _sleep(self, seconds: float) -> None:
        end = 0.0
        while end < seconds and not self.stop.is_set():
            step = min(0.25, seconds - end)
            self.pace.sleep(step)
            end += step


def refuse_head(name: str, size: int, head: bytes, model: str) -> None:
    """Refuse a file whose first bytes are not those of its format, before the rest of it comes.

    Raises:
        RefusedError: with the reason; nothing is said of formats without a head, nor of heads that are not there yet.
    """
    again = "do not use this repository, or tell its makers"
    if name.endswith(".safetensors") and (len(head) >= 8 or size < 8):
        length = int.from_bytes(head[:8], "little")
        if size < 8 or not 2 <= length <= size - 8 or length > LARGEST_HEADER:
            raise RefusedError(
                f"{model}: refused for its file {name}: a safetensors header of {length} bytes"
                f"{'' if length > LARGEST_HEADER else f' in a file of {size}'}",
                again,
            )
    if name.endswith(".gguf") and (len(head) >= 4 or size < 4) and head[:4] != b"GGUF":
        raise RefusedError(f"{model}: refused for its file {name}: it does not begin as GGUF does", again)
