"""Configs for an Ask, best first: what was measured on this machine, the shipped table, the closed formula.

Always an answer where a kernel can serve at all. What was measured serves the key that it was measured for. A row of a
table serves an Ask of its architecture that has what the row's `when` says:

    "work": "causal"          this value
    "work": ["causal", ...]   one of these; of several values, as `edits`, nothing that is not among these
    "rows": "<=4096"          known, and no more; of rows that differ in that the smallest that holds comes first
    "rows": ">64"             more, or not known

Nothing is ever taken from the nearest key. Looking up reads no file but the tables, once, and searches nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from . import store
from .ask import Ask


@dataclasses.dataclass(frozen=True)
class Choice:
    """A config and where it comes from: `measured on ...`, `table sm90: static`, `formula`, with the architecture
    where another one's configs serve."""

    config: Any
    source: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: what an Ask has to be, the fields of its Config, the bytes of shared memory it takes."""

    when: Mapping[str, Any]
    config: Mapping[str, Any]
    source: str
    shared: int = 0

    def serves(self, ask: Ask) -> bool:
        return self.shared <= ask.device.shared and all(_holds(getattr(ask, n), x) for n, x in self.when.items())

    @property
    def bounds(self) -> tuple[float, ...]:
        """Least first: how far the row reaches in each thing that some row bounds."""
        found = {n: int(x[2:]) for n, x in self.when.items() if _bounds(x)}
        return tuple(found.get(n, math.inf) for n in ("rows", "keys"))


def _bounds(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted.startswith("<=")


def _above(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted.startswith(">")


def _holds(value: Any, wanted: Any) -> bool:
    if _bounds(wanted):
        return 0 < value <= int(wanted[2:])
    if _above(wanted):
        return value == 0 or value > int(wanted[1:])
    if isinstance(wanted, list):
        return value <= set(wanted) if isinstance(value, frozenset) else value in wanted
    return value == wanted


def _text(op: str) -> str:
    file = resources.files(__package__) / f"tables/{op}.json"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@functools.lru_cache(maxsize=8)
def rows(op: str) -> tuple[Row, ...]:
    """The shipped rows of an operator; none where there is no table."""
    table = json.loads(_text(op) or '{"rows": [], "source": ""}')
    found = (Row(r["when"], r["config"], r.get("source", table["source"]), r.get("shared", 0)) for r in table["rows"])
    return tuple(sorted(found, key=lambda row: row.bounds))


@functools.lru_cache(maxsize=8)
def _plain(op: str) -> tuple[str, ...]:
    """What every row names by one value: rows are filed under these."""
    whens = [row.when for row in rows(op)]
    plain = [{n for n, x in when.items() if not (isinstance(x, list) or _bounds(x) or _above(x))} for when in whens]
    return tuple(sorted(set.intersection(*plain))) if plain else ()


@functools.lru_cache(maxsize=1024)
def _filed(op: str, answer: type, values: tuple[Any, ...]) -> tuple[tuple[Row, Any], ...]:
    """Rows of these values, with what else they ask for, and their configs."""
    plain = _plain(op)
    found = (row for row in rows(op) if all(row.when[n] == x for n, x in zip(plain, values)))
    rest = (dataclasses.replace(row, when={n: x for n, x in row.when.items() if n not in plain}) for row in found)
    return tuple((row, answer(**row.config)) for row in rest)


@functools.lru_cache(maxsize=8192)
def choose(ask: Ask) -> tuple[Choice, ...]:
    """Choices, the best first; none for a device or a size that no kernel serves."""
    formula = ask.formula()
    if not formula or ask.arch is None:
        return ()
    fallback = "" if ask.arch == ask.device.arch else f" (fallback from {ask.arch})"
    found = measured(ask)
    for row, config in _filed(ask.op, ask.answer, tuple([getattr(ask, name) for name in _plain(ask.op)])):
        if row.serves(ask) and ask.fits(config):
            found.append(Choice(ask.fitted(config), f"table {ask.arch}: {row.source}{fallback}"))
    found += [Choice(ask.fitted(config), "formula" + fallback) for config in formula]
    best: dict[Any, Choice] = {}
    for choice in found:
        best.setdefault(choice.config, choice)
    return tuple(best.values())


def measured(ask: Ask) -> list[Choice]:
    """What was measured for exactly this on this machine, as it was; nothing if its fields are no config's."""
    entry = store.find(ask)
    try:
        return [] if entry is None else [Choice(ask.answer(**entry.config), entry.source)]
    except (TypeError, ValueError):
        return []


store.watch(choose.cache_clear)


@functools.lru_cache(maxsize=1)
def _shipped() -> str:
    """A hash of the tables and of all that configs come from."""
    tables = "".join(_text(kind.op) for kind in sorted(Ask.__subclasses__(), key=lambda kind: kind.op))
    return hashlib.sha256(tables.encode()).hexdigest()[:16] + store.source_hash(("**/*.py",))


def state() -> str:
    """Changes whenever the same Ask might get another config, or a config another kernel."""
    return f"{_shipped()} {store.state()}"
