"""What was measured on this machine, by the key of an Ask: in memory, and in a file of the user's cache folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import options
from .ask import Ask


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fields of a Config, where they come from, and how many times as fast as the formula's config it is."""

    config: Mapping[str, Any]
    source: str
    ratio: float = 1.0


_memory: dict[str, dict[str, Entry]] = {}  # family -> key -> Entry


def _file() -> Path:
    return options.cache_folder() / "tuning.json"


def family(ask: Ask) -> str:
    return f"{ask.op}-{ask.device.arch}"


def load() -> None:
    with contextlib.suppress(OSError, ValueError):
        _take(json.loads(_file().read_text()))


def _take(held: dict) -> None:
    from .lookup import choose

    for name, rows in held.items():
        _memory.setdefault(name, {}).update({key: Entry(**row) for key, row in rows.items()})
    choose.cache_clear()


def find(ask: Ask) -> Entry | None:
    return _memory.get(family(ask), {}).get(ask.key) if _memory else None


def keep(ask: Ask, entry: Entry) -> None:
    load()
    _take({family(ask): {ask.key: dataclasses.asdict(entry)}})
    export(_file())


def entries() -> dict[tuple[str, str], Entry]:
    return {(name, key): entry for name, held in _memory.items() for key, entry in held.items()}


def clear() -> int:
    load()
    count = len(entries())
    _memory.clear()
    _take({})
    _file().unlink(missing_ok=True)
    return count


def export(path: Path | str) -> int:
    held = {name: {k: dataclasses.asdict(e) for k, e in rows.items()} for name, rows in _memory.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    new = Path(f"{path}.{os.getpid()}")
    new.write_text(json.dumps(held))
    os.replace(new, path)
    return len(entries())


def import_(path: Path | str) -> int:
    try:
        held = json.loads(Path(path).read_text())
        _take(held)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file that --export wrote ({error})") from None
    export(_file())
    return sum(map(len, held.values()))


@contextlib.contextmanager
def turn(name: str, wait: float = 0.0) -> Iterator[bool]:
    load()
    yield True
