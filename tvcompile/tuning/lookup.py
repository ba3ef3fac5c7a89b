"""Configs for an Ask, best first: what was measured on this machine, the shipped table, the closed formula.

Always an answer where a kernel can serve at all. A row of a table serves an Ask that has the values the row names, of
the Ask's architecture; nothing is ever taken from the nearest key. Looking up reads no file and searches nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
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
    """One line of a table: the values of an Ask that it is for, and the fields of its Config."""

    when: Mapping[str, Any]
    config: Mapping[str, Any]
    source: str

    def serves(self, ask: Ask) -> bool:
        return all(getattr(ask, name) == value for name, value in self.when.items())


@functools.lru_cache(maxsize=8)
def rows(op: str) -> tuple[Row, ...]:
    """The shipped rows of an operator."""
    file = resources.files(__package__) / f"tables/{op}.json"
    if not file.is_file():
        return ()
    table = json.loads(file.read_text())
    return tuple(Row(r["when"], r["config"], r.get("source", table["source"])) for r in table["rows"])


@functools.lru_cache(maxsize=4096)
def choose(ask: Ask) -> tuple[Choice, ...]:
    """Choices, the best first; none for a device or a size that no kernel serves."""
    formula = ask.formula()
    if not formula:
        return ()
    fallback = "" if ask.arch == ask.device.arch else f" (fallback from {ask.arch})"
    found = [
        Choice(ask.answer(**row.config), f"table {ask.arch}: {row.source}{fallback}")
        for row in rows(ask.op)
        if row.serves(ask) and ask.fits(ask.answer(**row.config))
    ]
    found += [Choice(config, "formula" + fallback) for config in formula]
    found = [Choice(ask.fitted(c.config), c.source) for c in found]
    if (entry := store.find(ask)) is not None:
        found.insert(0, Choice(ask.answer(**entry.config), entry.source))
    return tuple(dict.fromkeys(found))
