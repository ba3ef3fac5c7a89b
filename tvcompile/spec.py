"""What a subgraph computes (Spec), where it was found (Match), and what was refused.

No FX node is inside a Spec: it is hashable, and its text is the op's argument, the cache key and the
line of a golden file. A Match binds a Spec to the nodes of one graph.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import sympy
from sympy.core.symbol import Str
from torch import fx

from . import expr as E, syntax
from .expr import Expr
from .moe_spec import MoESpec

EMPTY_KINDS = {
    "nan": "an added -inf: NaN",
    "nan_cut": "scores replaced by -inf: NaN, no gradient to the scores",
    "mean": "an added finite fill: the mean of V over all kv, gradients still reach the scores",
    "mean_cut": "scores replaced by a finite fill: the mean of V, no gradient to the scores",
    "zero": "zero, no gradient",
}


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """out[b,h,q,:] = sum_kv softmax_kv(score(scale * <q[b,h,q], k[b,h//G,kv]>)) v[b,h//G,kv,:].

    scale    factor of the dot product
    score    formula of the scaled score `s`, b, h, q, kv and captured tensors; `s` alone: no edit
    keep     formula of b, h, q, kv and captured tensors; True: the pair attends
    sink     formula of b, h, q: one more logit that only enlarges the denominator, or None
    dropout  probability of dropping a softmax weight (the others grow by 1/(1-p))
    empty    what a row gives in which nothing is kept or every score is -inf: a key of EMPTY_KINDS, or
             None where softmax itself says it (a row without any kept kv cannot exist)
    """

    scale: float = 1.0
    score: Expr = E.S
    keep: Expr = E.TRUE
    sink: Expr | None = None
    dropout: float = 0.0
    empty: str | None = None

    def __post_init__(self):
        if self.empty is not None and self.empty not in EMPTY_KINDS:
            raise ValueError(f"empty must be one of {', '.join(EMPTY_KINDS)}; got {self.empty!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")

    def __str__(self) -> str:
        clauses = [f"scale={self.scale:.12g}"]
        if self.score != E.S:
            clauses.append(f"score = {syntax.text(self.score)}")
        if self.keep is not E.TRUE:
            clauses.append(f"keep = {syntax.text(self.keep)}")
        if self.sink is not None:
            clauses.append(f"sink = {syntax.text(self.sink)}")
        if self.dropout:
            clauses.append(f"dropout={self.dropout:.12g}")
        if self.empty:
            clauses.append(f"empty={self.empty}")
        return "; ".join(clauses)

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> AttentionSpec:
        """The Spec of a text. Raises ValueError naming the clause that cannot be read."""
        fields: dict = {}
        for clause in text.split(";"):
            name, sign, value = (part.strip() for part in clause.partition("="))
            if name not in ("scale", "score", "keep", "sink", "dropout", "empty") or not sign:
                raise ValueError(f"{clause.strip()!r} is not a clause of an attention spec: {text!r}")
            if name in ("score", "keep", "sink"):
                fields[name] = syntax.parse(value)
            else:
                fields[name] = value if name == "empty" else float(value)
        return AttentionSpec(**fields)

    def formulas(self) -> tuple[Expr, ...]:
        return tuple(f for f in (self.score, self.keep, self.sink) if f is not None)

    def captures(self) -> tuple[str, ...]:
        """Names of the captured tensors, in the order of the op's `captures` argument."""
        names = {E.operands(c)[0].name for f in self.formulas() for c in E.loads(f)}
        return tuple(sorted(names))

    def sizes(self) -> tuple[str, ...]:
        """Names of the sizes beyond S_q and S_kv, in the order of the op's `sizes` argument."""
        known = {"b", "h", "q", "kv", "s", "S_q", "S_kv"}
        names = {x.name for f in self.formulas() for x in f.free_symbols} - known
        return tuple(sorted(names))


def free_of(e: Expr, *symbols: sympy.Symbol) -> bool:
    return not (e.free_symbols & set(symbols))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a softmax or SDPA stays as it was.

    anchor: the ATen op, reason: the first failing clause, where: the user's file, line and code.
    """

    anchor: str
    reason: str
    where: str

    def __str__(self) -> str:
        return f"{self.anchor} at {self.where}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Site:
    """A fused attention as reports show it: text of the Spec, place, kernel, sizes, and configs that were measured."""

    spec: str
    where: str
    kernel: str
    shapes: str
    cost: str = ""
    configs: str = ""


class Refuse(Exception):
    """Raised by the lifting at the first clause that fails; `node` is where."""

    def __init__(self, reason: str, node: fx.Node | None = None):
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of the graph and how its dims become (b, h, position, feature).

    dims    for each dim of `node`, the atoms it is the row-major product of (none: size 1)
    groups  for each of the four dims of the op's argument, the atoms it is made of
    sizes   size of each atom
    """

    node: fx.Node
    dims: tuple[tuple[Expr, ...], ...]
    groups: tuple[tuple[Expr, ...], ...]
    sizes: dict[Expr, Expr] = dataclasses.field(compare=False, hash=False)


@dataclasses.dataclass(frozen=True)
class Size:
    """What a kernel is chosen by: B*H*S_q*S_kv, S_kv, (D, D_v), zeros where a size is not a number."""

    scores: int = 0
    keys: int = 0
    features: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Match:
    """One attention.

    anchor    the contraction with V (or the SDPA node) whose value is replaced
    region    every node between the dot product and the anchor
    q, k, v   operands; out: the anchor's dims in the same words
    captures  captured tensors and their dims of size 1 that the text leaves out, in the order of spec.captures()
    sizes     formulas of the sizes, in the order of spec.sizes()
    copied    captured tensors that the program writes to before the backward pass, which reads them again
    """

    spec: AttentionSpec
    anchor: fx.Node
    region: tuple[fx.Node, ...]
    q: Operand
    k: Operand
    v: Operand
    out: Operand
    captures: tuple[tuple[fx.Node, tuple[int, ...]], ...]
    sizes: tuple[Expr, ...]
    copied: tuple[fx.Node, ...] = ()

    def size(self) -> Size:
        def product(o: Operand, *groups: int) -> int:
            found = [o.sizes[a] for i in groups for a in o.groups[i]]
            return math.prod(map(int, found)) if all(n.is_Integer for n in found) else 0

        keys, rows = product(self.k, 2), product(self.q, 0, 1, 2)
        features = product(self.q, 3), product(self.v, 3)
        return Size(keys * rows, keys if rows else 0, features)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A stacked weight or bias, or one per expert: tensors reshaped and permuted, of whose dims parts are read."""

    nodes: tuple[fx.Node, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    parts: tuple[tuple[int, int] | None, ...]
    stacked: bool

    @property
    def shape(self) -> list[int]:
        """Experts (where stacked), features (but of a bias) and columns."""
        return [self.sizes[d] if part is None else part[1] for d, part in zip(self.order, self.parts)]


@dataclasses.dataclass(frozen=True)
class Choices:
    """Columns of the op's ids and weights, as formulas of t and k (0 where there is one).

    counts  conditions under which a pair counts; factors: what is multiplied to its weight
    """

    ids: Expr
    k: Expr
    size: Expr
    counts: tuple[Expr, ...]
    factors: tuple[Expr, ...]


@dataclasses.dataclass(frozen=True)
class MoEMatch:
    """One mixture of experts.

    anchor   the sum whose value is replaced; region: every node between the first projections and the anchor
    x        the tokens, reshaped to [tokens, H]; t: the position of a token in the formulas of `choices`
    base     a tensor of the anchor's shape that the results are added to, or (`stays`) that stays where a token has no
             expert, or None
    saves    whether a backward pass may follow
    """

    spec: MoESpec
    anchor: fx.Node
    region: tuple[fx.Node, ...]
    x: fx.Node
    t: Expr
    tokens: Expr
    choices: tuple[Choices, ...]
    up: tuple[Weights, ...]
    down: tuple[Weights, ...]
    up_bias: tuple[Weights, ...]
    down_bias: tuple[Weights, ...]
    base: fx.Node | None
    stays: bool
    saves: bool

    @property
    def stacked(self) -> bool:
        """Whether all weights are stacked; else the op is given a tensor for each expert."""
        return all(w.stacked for w in self.weights())

    @property
    def top(self) -> int:
        """K"""
        return sum(int(c.size) for c in self.choices)

    @property
    def experts(self) -> int:
        """E"""
        down = self.down[0]
        return down.shape[0] if down.stacked else len(down.nodes)

    def weights(self) -> tuple[Weights, ...]:
        return (*self.up, *self.down, *self.up_bias, *self.down_bias)

    def read(self) -> set[str]:
        """Names of the nodes that the op's arguments are made of."""
        formulas = [e for c in self.choices for e in (c.ids, *c.counts, *c.factors)]
        loads = [x for e in formulas for x in E.walk(e) if E.op_of(x) in E.OPAQUE]
        names = {n.name.lstrip("%") for x in loads for n in E.operands(x) if isinstance(n, Str)}
        return (
            names
            | {n.name for w in self.weights() for n in w.nodes}
            | {self.x.name}
            | {n.name for n in [self.base] if n}
        )


def where_of(node: fx.Node | None) -> str:
    """`model.py:12 in forward: p = softmax(s)`: the user's own line of a node."""
    trace = (node.meta.get("stack_trace") if node is not None else None) or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith('File "') and "/torch/_functorch/" not in line]
    if not frames:
        return "a line that Dynamo did not record"
    i = frames[-1]
    path, line, function = lines[i][len('File "') :].split(", ", 2)
    code = lines[i + 1] if i + 1 < len(lines) else ""
    return f"{path.rstrip(chr(34))}:{line.removeprefix('line ')} {function}: `{code}`"
