"""Places of sorted rows among those of their expert.

    arange(N) - starts[sorted_ids]          starts[e]: how many ids are less than e

No two rows of an expert have one place: it is the row's number less one number of its expert.
"""

from __future__ import annotations

import contextlib
import dataclasses

import sympy
import torch
from sympy.core.symbol import Str
from torch import fx

from .. import expr as E
from ..expr import Expr, IntCall
from ..spec import Refuse
from .projections import group, unwrapped
from .read import Unreadable
from .rows import RowReader, settle


@dataclasses.dataclass(frozen=True)
class Rank:
    """The sort of the rows, and the id of pair `pair` before it."""

    sort: Str
    pair: Expr
    ids: Expr


def find_ranks(r: RowReader) -> dict[fx.Node, Rank]:
    """The nodes that hold such places."""
    found = {}
    for n in r.position:
        if n.op == "call_function" and r.name(n) in ("sub", "subtract") and _is_list_of_integers(n):
            with contextlib.suppress(Refuse, Unreadable):  # what is not read is no rank
                found[n] = _rank(r, n)
    return {n: rank for n, rank in found.items() if rank is not None}


def _is_list_of_integers(n: fx.Node) -> bool:
    val = n.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dim() == 1 and not val.dtype.is_floating_point


def _rank(r: RowReader, n: fx.Node) -> Rank | None:
    a, here = r.arguments(n), r.position[n]
    rows, first = a["self"], a["other"]
    if a.get("alpha", 1) != 1 or not isinstance(rows, fx.Node) or not isinstance(first, fx.Node):
        return None
    row = r.fresh(r.shape(n)[0], "r")
    picked = _picked(r, first)
    if picked is None or r.shape(rows) != r.shape(n) or r.read(rows, (row,), here) != row:
        return None
    starts, ids = picked
    searched = starts.op == "call_function" and r.name(starts) == "searchsorted"
    offsets = starts if searched else _ends(r, starts)
    if offsets is None or r.shape(ids) != r.shape(n):
        return None
    held = E.as_int(r.read(ids, (row,), here))
    sorts = {E.operands(x)[0] for x in E.walk(held) if E.op_of(x) == "perm"}
    if len(sorts) != 1:
        return None
    (sort,), pair = sorts, r.fresh(r.shape(n)[0], "p")
    at = IntCall("inv", sort, pair)
    expert = group(r, offsets, at, n, before=searched)
    own = expert == settle(E.substitute(held, {row: at}, r.bounds), r.bounds)
    return Rank(sort, pair, expert) if own else None


def _picked(r: RowReader, n: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, index) of x[index], x.gather(0, index), ..."""
    if n.op != "call_function" or r.name(n) not in ("index", "index_select", "gather", "take"):
        return None
    a = r.arguments(n)
    index = a["indices"][0] if r.name(n) == "index" else a["index"]
    return (a["self"], index) if len(r.shape(a["self"])) == 1 and isinstance(index, fx.Node) else None


def _ends(r: RowReader, starts: fx.Node) -> fx.Node | None:
    """The running sum of which `starts` is the part before each expert: less its counts, or moved by one."""
    experts = r.shape(starts)[0]
    if starts.op == "call_function" and r.name(starts) == "sub" and r.arguments(starts).get("alpha", 1) == 1:
        ends, counts = (x and unwrapped(r, x) for x in (r.arguments(starts)[k] for k in ("self", "other")))
        running = isinstance(ends, fx.Node) and ends.op == "call_function" and r.name(ends) == "cumsum"
        return ends if running and unwrapped(r, r.arguments(ends)["self"]) is counts else None
    e = r.fresh(sympy.expand(experts - 1), "e")
    before = r.read(starts, (e + 1,), r.position[starts] + 1)
    if E.op_of(before) != "cumsum" or r.read(starts, (sympy.Integer(0),), r.position[starts] + 1) != 0:
        return None
    ends = r.nodes[E.operands(before)[0].name]
    return ends if E.operands(before)[1:] == (e,) and r.shape(ends)[0] == experts else None
