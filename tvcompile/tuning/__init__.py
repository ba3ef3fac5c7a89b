"""Configs of the GPU kernels per architecture; data in tables/*.json, each file with its provenance."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Row:
    """arch, pass (fwd, dq, dkdv), dtype, D: what is asked; config: the fields of a kernel's Config."""

    arch: str
    pass_: str
    dtype: str
    D: int
    config: Mapping[str, int]


@functools.lru_cache(maxsize=1)
def rows() -> tuple[Row, ...]:
    """All shipped configs of tv.attention."""
    table = json.loads((resources.files(__package__) / "tables/attention.json").read_text())
    return tuple(Row(r["arch"], r["pass"], r["dtype"], r["D"], r["config"]) for r in table["rows"])
