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
    counted = _counted(r, starts)
    if counted is None or r.shape(ids) != r.shape(n):
        return None
    held = E.as_int(r.read(ids, (row,), here))
    sorts = {E.operands(x)[0] for x in E.walk(held) if E.op_of(x) == "perm"}
    if len(sorts) != 1:
        return None
    (sort,), pair = sorts, r.fresh(r.shape(n)[0], "p")
    at = IntCall("inv", sort, pair)
    expert = group(r, counted.node, at, n, counted.before)
    own = expert == settle(E.substitute(held, {row: at}, r.bounds), r.bounds)
    return Rank(sort, pair, expert) if own else None


def _picked(r: RowReader, n: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, index) of x[index], x.gather(0, index), ..."""
    if n.op != "call_function" or r.name(n) not in ("index", "index_select", "gather", "take"):
        return None
    a = r.arguments(n)
    index = a["indices"][0] if r.name(n) == "index" else a["index"]
    return (a["self"], index) if len(r.shape(a["self"])) == 1 and isinstance(index, fx.Node) else None


@dataclasses.dataclass(frozen=True)
class Counted:
    """A node that counts ids: before each expert, or up to it."""

    node: fx.Node
    before: bool


def _counted(r: RowReader, starts: fx.Node) -> Counted | None:
    """What tells where each expert's rows start: a search, or a running sum, less its counts or moved by one."""
    name, experts, here = r.name(starts) if starts.op == "call_function" else "", r.shape(starts)[0], r.position[starts]
    if name == "searchsorted":
        return Counted(starts, before=True)
    if name == "sub" and r.arguments(starts).get("alpha", 1) == 1:
        ends, counts = (x and unwrapped(r, x) for x in (r.arguments(starts)[k] for k in ("self", "other")))
        running = isinstance(ends, fx.Node) and ends.op == "call_function" and r.name(ends) == "cumsum"
        less = running and unwrapped(r, r.arguments(ends)["self"]) is counts
        return Counted(ends, before=False) if less else None
    e, first = r.fresh(sympy.expand(experts - 1), "e"), r.read(starts, (sympy.Integer(0),), here + 1)
    after = r.read(starts, (e + 1,), here + 1)
    if E.op_of(after) == "cumsum" and first == 0:
        ends = r.nodes[E.operands(after)[0].name]
        if E.operands(after)[1:] == (e,) and r.shape(ends)[0] in (experts, sympy.expand(experts - 1)):
            return Counted(ends, before=False)
    e = r.fresh(experts, "e")
    start = r.read(starts, (e,), here + 1)
    sums = [r.nodes[E.operands(x)[0].name] for x in E.walk(start) if E.op_of(x) == "cumsum"]
    same = len(sums) == 1 and len(r.shape(sums[0])) == 1 and start == r.read(sums[0], (e,), r.position[sums[0]] + 1)
    return Counted(sums[0], before=True) if same else None
