"""Rows of shipped tables, as the static model writes them: what a row is for, the 3 % rule, and the file.

{"when": {"arch": "sm90", "pass_": "fwd", "size": 2, "width": 128, "work": "causal"},
 "config": {...}, "source": "static", "shared": 163872}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .ask import bucket
from .static import Ranking

GAIN = 0.03  # what a row has to be better by than the formula's config
PATH = Path(__file__).parent / "tables"


def when_of(ask: Any) -> dict[str, Any]:
    """Which Asks a row is for: of attention a class of widths and of work, of experts one set of sizes."""
    common = {"arch": ask.arch, "pass_": ask.pass_, "size": ask.size}
    if ask.op == "attention":
        return common | {"width": ask.width, "work": ask.work}
    return common | {"E": ask.E, "N": ask.N, "K": ask.K, "top": ask.top, "rows": bucket(ask.rows)}


def row_of(ask: Any, ranking: Ranking) -> dict[str, Any] | None:
    """The row of the first config; None where nothing is ranked or the formula's own is at most 3 % behind."""
    if not len(ranking):
        return None
    best, found = ranking[0]
    own = {c: p.seconds for c, p in ranking}
    # A formula's config that spills or does not fit is none.
    formula = next((own[c] for c in ask.formula() if c in own), None)
    if formula is not None and formula < found.seconds * (1 + GAIN):
        return None
    return {"when": when_of(ask), "config": config_of(best), "source": "static", "shared": found.shared}


def config_of(config: Any) -> dict[str, Any]:
    """The fields of a config that are not the defaults of its class; how often keys are split is found when used."""
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    given = dataclasses.asdict(config)
    return {k: v for k, v in given.items() if v != fields[k] and k not in ("packed", "splits")}


def write(path: Path, rows: Sequence[dict[str, Any]], dropped: Sequence[dict[str, Any]] = ()) -> None:
    """Puts rows before those of a file that say less; of the same `when` they take the place. dropped: go."""
    table: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"source": "static", "about": ABOUT, "rows": []}
    )
    gone = [r["when"] for r in rows] + list(dropped)
    kept = [*rows, *(r for r in table["rows"] if r["when"] not in gone)]
    kept.sort(key=lambda r: -len(r["when"]))
    head = json.dumps({k: v for k, v in table.items() if k != "rows"}, indent=1)[:-2]
    path.write_text(head + ',\n "rows": [\n' + ",\n".join("  " + json.dumps(r) for r in kept) + "\n ]\n}\n")


ABOUT = (
    "static: cross-compiled and ranked by tuning/static.py, at least 3 % better than the formula; not timed on a GPU"
)
