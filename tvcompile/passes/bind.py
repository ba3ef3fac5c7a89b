"""From an attention in the anchor's own positions to a Match in the words b, h, q, kv."""

from __future__ import annotations

import dataclasses
import functools
import math

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import AttentionSpec, Match, Operand, Refuse
from .masking import HUGE, Masked, depth, empty_meaning
from .naming import Names
from .read import Reader
from .roles import Candidate, Roles, assign, candidates, operand, splits


@dataclasses.dataclass
class Sketch:
    """What the lifting read, before roles are given.

    out       the atoms of each dim of the anchor
    q, k, v   (node, index, position where it is used); kv and d: the summed positions
    parts     score edit and keep, in those positions; whole: scale and edit with the masks still in it
    zeroed    fully masked rows are set to zero if nothing can be computed from them
    cleared   weights are set to zero where their scores are masked
    """

    anchor: fx.Node
    region: tuple[fx.Node, ...]
    out: list[list[Expr]]
    q: tuple
    k: tuple
    v: tuple
    kv: Expr
    d: Expr
    parts: Masked
    scale: float
    whole: tuple[float, Expr]
    sink: Expr | None = None
    dropout: float = 0.0
    zeroed: bool = False
    written: str = "softmax"
    training: bool = False
    cleared: bool = False


def bind(r: Reader, s: Sketch) -> Match:
    """Split merged positions, give roles, choose the tensors to read from, build the Spec."""
    formulas = [s.parts.value, s.parts.keep, s.whole[1], *([s.sink] if s.sink is not None else [])]
    last = r.position[s.anchor]
    sides = {}
    for name in "qkv":
        found = candidates(r, *getattr(s, name))
        sides[name] = [c for c in found if not r.changed_between(c.node, c.at, last)]
        if name == "v":
            sides[name] = [c for c in sides[name] if c.factor == 1]
        if not sides[name]:
            raise Refuse(f"{name.upper()} is written to before the sum with V", s.anchor)
        if not getattr(s, name)[0].meta["val"].dtype.is_floating_point:
            raise Refuse(f"{name.upper()} holds integers", s.anchor)
    formulas = split_positions(r, s, formulas, sides)
    roles, sizes = give_roles(r, s, formulas, sides)
    q, k, v = choose_operands(r, s, roles, sides, sizes)
    factors = [next(c.factor for c in sides[n] if c.node is o.node) for n, o in (("q", q), ("k", k))]
    out = Operand(s.anchor, tuple(tuple(d) for d in s.out), (roles.b, roles.h, roles.q, roles.dv), sizes)
    return build(r, s, roles, formulas, factors[0] * factors[1], (q, k, v, out))


def split_positions(r: Reader, s: Sketch, formulas: list[Expr], sides: dict) -> list[Expr]:
    """n becomes n1*c + n2 wherever a formula or an operand reads n // c or n % c."""
    while True:
        indices = [e for cs in sides.values() for c in cs for e in c.idx]
        found = splits([*formulas, *indices], r.ranges)
        merged = {x for dim in s.out for x in dim}
        # A group of query heads (h // G) is a role, not a merged position, unless h % G occurs too.
        table = {n: _split(r, n, c) for n, c in found.items() if n in merged and _remainder(n, formulas, indices)}
        if not table:
            return formulas
        s.out = [[a for x in dim for a in table.get(x, ([x], x))[0]] for dim in s.out]
        exchange = {n: e for n, (_, e) in table.items()}
        formulas = [E.substitute(e, exchange, r.bounds) for e in formulas]
        for cs in sides.values():
            for c in cs:
                c.idx = tuple(E.recombine(E.substitute(e, exchange, r.bounds)) for e in c.idx)


def _remainder(n: Expr, formulas: list[Expr], indices: list[Expr]) -> bool:
    return any(E.op_of(x) == "%" and E.operands(x)[0] == n for e in [*formulas, *indices] for x in e.atoms(E.IntCall))


def _split(r: Reader, n: Expr, c: Expr) -> tuple[list[Expr], Expr]:
    outer, inner = r.fresh(sympy.cancel(r.ranges[n] / c), "o"), r.fresh(c, "o")
    return [x for x in (outer, inner) if x != 0], sympy.expand(outer * c + inner)


def give_roles(r: Reader, s: Sketch, formulas: list[Expr], sides: dict) -> tuple[Roles, dict]:
    # A position is one of an operand only if no tensor on the operand's way does without it.
    top = {name: set.intersection(*(_positions(c) for c in cs)) for name, cs in sides.items()}
    in_mask = set().union(*(e.free_symbols for e in formulas))
    out = [x for dim in s.out for x in (dim or [sympy.Integer(0)])]
    positions = {x for x in (*out, s.kv, s.d) if x != 0}
    stray = {x for x in (top["q"] | top["k"] | top["v"] | in_mask) & set(r.ranges) if x not in positions}
    if stray or s.kv in top["q"] or s.d in top["v"] | in_mask:
        raise Refuse("the positions of the scores do not pair Q with K, and K with V", s.anchor)
    roles = assign(out, top["k"], top["v"], top["q"] | in_mask, in_mask, r.ranges)
    if set(roles.dv) & (in_mask | top["q"] | top["k"]) or set(roles.q) & (top["k"] | top["v"]):
        raise Refuse("the scores depend on the feature position of V, or K and V on the query's", s.anchor)
    return roles, {x: r.ranges[x] for x in positions}


def _positions(c: Candidate) -> set:
    return set().union(*(e.free_symbols for e in c.idx))


def choose_operands(r: Reader, s: Sketch, roles: Roles, sides: dict, sizes: dict) -> tuple[Operand, ...]:
    """Q as it is multiplied; K and V with as few heads as both can share."""
    kv, d = (tuple(x for x in (e,) if e != 0) for e in (s.kv, s.d))
    narrow = sides["v"][0].node.meta["val"].dtype
    q = _smallest(r, [(c, operand(r, c, (roles.b, roles.h, roles.q, d), sizes)) for c in sides["q"]], narrow)
    groups, sizes = _head_groups(r, roles, sides, sizes)
    heads = dict.fromkeys((*roles.h, *groups.values()))
    k_by, v_by = (
        _by_heads(r, sides[name], (roles.b, tuple(heads), kv, feature), groups, sizes, narrow)
        for name, feature in (("k", d), ("v", roles.dv))
    )
    shared = sorted({*k_by, *v_by, roles.h}, key=lambda signature: _count(signature, sizes))
    for signature in shared:
        if signature != roles.h[: len(signature)] and not set(signature) & set(groups.values()):
            continue
        k, v = (_with_heads(by, signature, roles, groups) for by in (k_by, v_by))
        if q is not None and k is not None and v is not None:
            return q, k, v
    raise Refuse("Q, K or V is not a plain arrangement of batch, head, position and feature", s.anchor)


def _head_groups(r: Reader, roles: Roles, sides: dict, sizes: dict) -> tuple[dict, dict]:
    """{h // G: atom} for every group of query heads that K or V is indexed by."""
    groups: dict[Expr, Expr] = {}
    for c in (*sides["k"], *sides["v"]):
        for x in (x for e in c.idx for x in e.atoms(E.IntCall)):
            if E.op_of(x) == "//" and roles.h and E.operands(x)[0] == roles.h[-1] and x not in groups:
                size = sympy.cancel(sizes[roles.h[-1]] / E.operands(x)[1])
                if size.is_Integer or (not size.is_number and sympy.denom(size) == 1):
                    groups[x] = r.fresh(size, "g")
    return groups, {**sizes, **{a: r.ranges[a] for a in groups.values() if a != 0}}


def _by_heads(r, cs: list[Candidate], roles, groups, sizes, narrow) -> dict[tuple, Operand]:
    """The smallest arrangement of an operand for each set of head atoms that it can have."""
    found: dict[tuple, list] = {}
    for c in cs:
        grouped = dataclasses.replace(c, idx=tuple(E.substitute(e, groups) for e in c.idx))
        arranged = operand(r, grouped, roles, sizes)
        if arranged is not None:
            used = {a for dim in arranged.dims for a in dim}
            found.setdefault(tuple(a for a in roles[1] if a in used), []).append((c, arranged))
    best = {signature: _smallest(r, options, narrow) for signature, options in found.items()}
    return {signature: o for signature, o in best.items() if o is not None}


def _with_heads(by: dict, signature: tuple, roles: Roles, groups: dict) -> Operand | None:
    """The operand with exactly these head atoms; one without heads may be expanded to any."""
    plain = [o for own, o in by.items() if own == signature or set(own) < set(signature)]
    if not plain:
        return None
    chosen = by.get(signature, plain[0])
    b, _, position, feature = chosen.groups
    return dataclasses.replace(chosen, groups=(b, signature, position, feature))


def _count(signature: tuple, sizes: dict) -> tuple:
    product = functools.reduce(lambda x, a: x * sizes[a], signature, sympy.Integer(1))
    return (0, int(product)) if product.is_Integer else (1, len(signature), str(product))


def _smallest(r: Reader, options: list[tuple[Candidate, Operand | None]], narrow: torch.dtype) -> Operand | None:
    """Of the candidates with the fewest elements the shallowest; deeper past a factor, or to one in order."""
    result, least, factor = None, None, 1.0
    for c, arranged in options:
        if arranged is None or (c.widened and c.node.meta["val"].dtype != narrow):
            continue
        elements = functools.reduce(lambda x, y: x * y, r.shape(c.node), sympy.Integer(1))
        if result is None:
            better = True
        else:
            past = elements != least or c.factor != factor or (_in_order(arranged) and not _in_order(result))
            better = past and E.at_most(elements, least)
        if better:
            result, least, factor = arranged, elements, c.factor
    return result


def _in_order(o: Operand) -> bool:
    """Are its dims the op's own, so that nothing has to be moved?"""
    return o.dims == o.groups


def meaning_of_empty_rows(s: Sketch) -> str | None:
    """As `empty_meaning`, for a softmax that is written by hand: it may not subtract the maximum."""
    finite = any(not math.isinf(f.value) for f in s.parts.fills)
    if s.written == "logsumexp" and finite:
        raise Refuse("in a fully masked row exp(x - logsumexp(x)) is not a softmax: the fill's rounding hides log S")
    if s.written == "plain" and finite:
        fills = tuple(dataclasses.replace(f, value=-math.inf) for f in s.parts.fills)  # exp(fill) is 0: 0 / 0
        return empty_meaning(dataclasses.replace(s.parts, fills=fills), s.training)
    return empty_meaning(s.parts, s.training, s.anchor.meta["val"].dtype)


def _others_may_win(r: Reader, s: Sketch, score: Expr) -> bool:
    """May what is added to the score put all that a row keeps as low as what a finite fill masks?"""
    finite = [-f.value for f in s.parts.fills if not math.isinf(f.value)]

    def learned(load: Expr) -> bool:
        given = r.nodes[E.operands(load)[0].name[1:]].meta.get("example_value")  # as Dynamo saw it
        return isinstance(given, torch.Tensor) and given.requires_grad

    if not finite or depth(score, learned) < 1e-3 * min(finite):
        return False
    if s.cleared or s.written != "softmax" or min(finite) < HUGE and s.anchor.meta["val"].dtype.itemsize < 4:
        raise Refuse("what a row means whose pairs are masked twice depends on rounding", s.anchor)
    return True


def build(r: Reader, s: Sketch, roles: Roles, formulas: list[Expr], factor: float, operands: tuple) -> Match:
    """Name the positions, decide what an empty row means, collect the captured tensors."""
    names = Names(r, roles, s.kv, operands)
    score, keep, whole, *sink = [names.rename(e) for e in formulas]
    empty, scale = None, s.scale
    if keep is not E.TRUE and s.parts.fills and names.may_be_empty(keep):
        empty = "zero" if s.cleared else meaning_of_empty_rows(s)
        if empty is None:
            scale, score, keep = s.whole[0], whole, E.TRUE
        elif empty.startswith("nan") and (s.zeroed or sink):
            empty = "zero"
    if keep is not E.TRUE and _others_may_win(r, s, score):
        scale, score, keep, empty = s.whole[0], whole, E.TRUE, None
    if empty is None and s.zeroed and any(E.kind(x) == "float" for x in E.loads(score)):
        empty = "zero"  # a captured bias may be -inf in a whole row
    roster = names.capture((score, keep, *sink))
    score, keep, *sink = [roster.rename(e) for e in (score, keep, *sink)]
    spec = AttentionSpec(float(f"{scale * factor:.12g}"), score, keep, sink[0] if sink else None, s.dropout, empty)
    if AttentionSpec.parse(str(spec)) != spec:
        raise Refuse("what it computes has no text that reads back as itself", s.anchor)
    last = r.position[s.anchor]
    for node in roster.nodes.values():
        if r.changed_between(node, r.used_at.get(node, last), last):
            raise Refuse(f"{node.name} is written to between its use and the sum with V", s.anchor)
    q, k, v, out = operands
    captures = tuple((roster.nodes[name], roster.unit_dims[name]) for name in spec.captures())
    sizes = tuple(roster.sizes[name] for name in spec.sizes())
    copied = (x for x in roster.nodes.values() if s.training and r.changed_between(x, last, len(r.position)))
    return Match(spec, s.anchor, s.region, q, k, v, out, captures, sizes, tuple(copied))
