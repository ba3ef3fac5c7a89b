"""What was measured on this machine: configs by the key of their Ask, in memory and in the user's cache folder.

    load()                                       # the files into memory, when a graph is compiled
    find(ask)                                    # Entry or None, from memory
    keep(ask, Entry({...}, "measured on NVIDIA H100, 2026-11-24", 1.12))
    with turn("fwd 128", wait=600) as mine: ...  # one process searches, the others wait or go on

One file per family: operator, architecture, a hash of the kernels' source, and the version of what compiles them. What
was measured with other kernels is another file's, so it is never found; of such files the oldest are removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .. import options
from .ask import Ask
from .kept import Kept

MOST_ROWS, MOST_FILES = 2000, 64
PACKAGE = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fields of a Config, where they come from, and how many times as fast as the formula's config it is."""

    config: Mapping[str, Any]
    source: str
    ratio: float = 1.0


_memory: dict[str, dict[str, Entry]] = {}  # family -> key -> Entry
_seen: dict[Path, tuple[int, int]] = {}  # what files were when they were read
_lock = threading.RLock()
_watchers: list[Callable[[], None]] = []  # called when something new is known


def folder() -> Path:
    return options.cache_folder() / "tuning"


def family(ask: Ask) -> str:
    """The name of the file that an Ask's measurements are in."""
    return _family(ask.op, ask.sources, ask.device.arch)


@functools.lru_cache(maxsize=256)
def _family(op: str, sources: tuple[str, ...], arch: str) -> str:
    if arch == "cpu":
        arch, compiler = f"cpu-{torch.backends.cpu.get_cpu_capability().replace(' ', '')}", f"torch{_minor('torch')}"
    else:
        compiler = f"triton{_minor('triton', 'triton-rocm', 'pytorch-triton', 'pytorch-triton-rocm')}"
    return f"{op}-{arch}-{source_hash(sources)}-{compiler}"


def _minor(*names: str) -> str:
    """major.minor of the first package that is installed."""
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return ".".join(metadata.version(name).split(".")[:2])
    return "0"


@functools.lru_cache(maxsize=64)
def source_hash(patterns: tuple[str, ...]) -> str:
    """Of the files of the package that match."""
    files = sorted({f for pattern in patterns for f in PACKAGE.glob(pattern)})
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()[:12]


# Memory


def watch(call: Callable[[], None]) -> None:
    """Calls it whenever something new is known."""
    _watchers.append(call)


def find(ask: Ask) -> Entry | None:
    """What was measured for exactly this Ask; no file is read."""
    return _memory.get(family(ask), {}).get(ask.key) if _memory else None


def entries() -> dict[tuple[str, str], Entry]:
    """All that is in memory, by (family, key)."""
    return {(name, key): entry for name, held in _memory.items() for key, entry in held.items()}


@functools.lru_cache(maxsize=1)
def state() -> str:
    """A hash of all that is in memory: graphs that are cached with configs in them are valid for one state."""
    held = sorted((*at, repr(sorted(entry.config.items()))) for at, entry in entries().items())
    return hashlib.sha256(repr(held).encode()).hexdigest()[:16]


watch(state.cache_clear)


def _remember(name: str, rows: Mapping[str, Any]) -> None:
    """Takes rows of a file or of another process into memory; a row of another form is left out."""
    known = {f.name for f in dataclasses.fields(Entry)}
    good = {key: Entry(**row) for key, row in rows.items() if isinstance(row, dict) and set(row) == known}
    with _lock:
        held = _memory.setdefault(name, {})
        if changed := {k: e for k, e in good.items() if held.get(k) != e}:
            held.update(changed)
            for call in _watchers:
                call()


# Files


def load() -> None:
    """Reads the files that changed since they were read."""
    try:
        found = {f: f.stat() for f in folder().glob("*.json")}
    except OSError:
        return
    for file, about in found.items():
        mark = about.st_mtime_ns, about.st_size
        if _seen.get(file) != mark:
            _seen[file] = mark
            _remember(file.stem, Kept(file).rows())


def keep(ask: Ask, entry: Entry) -> None:
    """Remembers an entry, here and in the file of its family."""
    _keep(family(ask), {ask.key: dataclasses.asdict(entry)})


def _keep(name: str, rows: dict[str, Any]) -> None:
    _remember(name, rows)
    Kept(folder() / f"{name}.json", MOST_ROWS).update(rows)
    _remove_oldest(name)


def _remove_oldest(own: str) -> None:
    """Files of kernels and versions that are gone, when there are many."""
    with contextlib.suppress(OSError):
        files = sorted(folder().glob("*.json"), key=lambda f: f.stat().st_mtime_ns)
        stale = [f for f in files if f.stem not in current() | {own}]
        for file in stale[: max(0, len(files) - MOST_FILES)]:
            file.unlink()
            Path(f"{file}.lock").unlink(missing_ok=True)


def current() -> set[str]:
    """Families of the kernels as they are, among those in memory."""
    hashes = {source_hash(kind.sources) for kind in Ask.__subclasses__()}
    return {name for name in _memory if hashes & set(name.split("-"))}


def clear() -> int:
    """Forgets everything, here and in files; how many entries there were."""
    load()
    count = len(entries())
    with _lock:
        _memory.clear()
        _seen.clear()
    for file in folder().glob("*.json*"):
        file.unlink(missing_ok=True)
    for call in _watchers:
        call()
    return count


def export(path: Path | str) -> int:
    """Writes all entries into one file; how many."""
    load()
    held = {name: {k: dataclasses.asdict(e) for k, e in rows.items()} for name, rows in _memory.items()}
    Kept(Path(path), 1 << 30).write(held)
    return len(entries())


def import_(path: Path | str) -> int:
    """Adds the entries of a file that export wrote; how many. Raises ValueError for any other file."""
    try:
        held = Kept(Path(path)).parsed()
        rows = {name: {k: dataclasses.asdict(Entry(**e)) for k, e in of.items()} for name, of in held.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file that `tvcompile tune --export` wrote ({error})") from None
    for name, of in rows.items():
        if any(x in name for x in "/\\") or name.startswith("."):
            raise ValueError(f"{path} names a family {name!r}")
        _keep(name, of)
    return sum(map(len, rows.values()))


# One process at a time

_turns: dict[str, int] = {}


@contextlib.contextmanager
def turn(name: str, wait: float = 0.0) -> Iterator[bool]:
    """True to one process at a time. Another waits at most `wait` seconds; then what was kept meanwhile is known to it.

    Without a process group one that waited gets its turn too: it looks first whether something is left to do. In a
    group rank 0 has the turn and hands what it kept to the others, which may share no file system; they get False.
    """
    store, rank, count = _group()
    _turns[name] = at = _turns.get(name, 0) + 1
    done = f"tvcompile turn {at} {name}"
    if store is not None and rank:
        _hear(store, done, wait)
        load()
        yield False
        return
    before = entries()
    try:
        with _locked(name, wait) as mine:
            load()
            yield mine
    finally:
        if store is not None and count > 1:
            new = [(*at, dataclasses.asdict(e)) for at, e in entries().items() if before.get(at) != e]
            store.set(done, json.dumps(new))


def _group() -> tuple[Any, int, int]:
    """(the key-value store of the process group, rank, how many processes), or (None, 0, 1)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None, 0, 1
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store(), torch.distributed.get_rank(), torch.distributed.get_world_size()


def _hear(store: Any, done: str, wait: float) -> None:
    """Takes over what rank 0 kept in its turn, if it is done in time."""
    import datetime

    with contextlib.suppress(torch.distributed.DistError):
        if wait > 0:
            store.wait([done], datetime.timedelta(seconds=wait))
        if store.check([done]):
            for name, key, row in json.loads(store.get(done)):
                _remember(name, {key: row})


@contextlib.contextmanager
def _locked(name: str, wait: float) -> Iterator[bool]:
    """Whether the lock of this name could be had; it goes when its process does."""
    path = folder() / f"turn-{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=wait)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError:  # a folder that cannot be written: nobody else can be kept from it
        yield True
        return
    try:
        yield True
    finally:
        lock.release()
