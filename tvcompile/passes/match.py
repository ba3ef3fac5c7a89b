"""A Spec bound to FX nodes: what `emit` needs to write the fused node, and nothing else."""

from __future__ import annotations

import dataclasses

from torch import fx

from ..expr import Expr
from ..spec import AttentionSpec


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
class Match:
    """One attention.

    anchor    the contraction with V (or the SDPA node) whose value is replaced
    region    every node between the dot product and the anchor
    q, k, v   operands; out: the anchor's dims in the same words
    captures  nodes of the captured tensors, in the order of spec.captures()
    sizes     formulas of the sizes, in the order of spec.sizes()
    """

    spec: AttentionSpec
    anchor: fx.Node
    region: tuple[fx.Node, ...]
    q: Operand
    k: Operand
    v: Operand
    out: Operand
    captures: tuple[fx.Node, ...]
    sizes: tuple[Expr, ...]


def where_of(node: fx.Node | None) -> str:
    """`model.py:12 in forward: p = softmax(s)`: the user's own line of a node."""
    trace = (node.meta.get("stack_trace") if node is not None else None) or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith('File "')]
    if not frames:
        return "a line that Dynamo did not record"
    i = frames[-1]
    path, line, function = lines[i][len('File "') :].split(", ", 2)
    code = lines[i + 1] if i + 1 < len(lines) else ""
    return f"{path.rstrip(chr(34))}:{line.removeprefix('line ')} {function}: `{code}`"
