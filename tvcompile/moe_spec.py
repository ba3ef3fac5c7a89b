"""What a mixture of experts computes (MoESpec). Its text is the op's argument, as AttentionSpec's is."""

from __future__ import annotations

import dataclasses
import functools

from . import expr as E, syntax
from .expr import Expr

LAYOUTS = {
    "plain": "u = x up",
    "chunk": "g | u = x up, each half of the columns",
    "interleave": "g = even columns of x up, u = odd ones",
    "separate": "g = x gate, u = x up, two tensors",
}
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """out[t] = sum_k weights[t,k] * (act(x[t] up[e] + up_bias[e]) down[e] + down_bias[e]),  e = ids[t,k].

    act     formula of `u`, and of `g` unless the layout is plain
    layout  where g and u lie in the up projection: a key of LAYOUTS
    weigh   "output": as above; "input": the weight multiplies x[t] instead of the expert's output
    out     dtype of the result where it is not x's, else ""
    """

    act: Expr = E.UP
    layout: str = "plain"
    weigh: str = "output"
    out: str = ""

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {self.layout!r}")
        if self.weigh not in ("output", "input"):
            raise ValueError(f"weigh must be output or input; got {self.weigh!r}")
        if self.out and self.out not in DTYPES:
            raise ValueError(f"out must be one of {', '.join(DTYPES)}; got {self.out!r}")
        allowed = {E.UP} if self.layout == "plain" else {E.UP, E.GATE}
        if strange := self.act.free_symbols - allowed:
            raise ValueError(f"act holds {sorted(map(str, strange))}, which layout {self.layout!r} does not have")

    def __str__(self) -> str:
        clauses = [f"act = {syntax.text(self.act)}"]
        clauses += [f"layout={self.layout}"] * (self.layout != "plain")
        clauses += [f"weigh={self.weigh}"] * (self.weigh != "output")
        clauses += [f"out={self.out}"] * bool(self.out)
        return "; ".join(clauses)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> MoESpec:
        """The Spec of a text. Raises ValueError naming the clause that cannot be read."""
        fields: dict = {}
        for clause in text.split(";"):
            name, sign, value = (part.strip() for part in clause.partition("="))
            if name not in ("act", "layout", "weigh", "out") or not sign:
                raise ValueError(f"{clause.strip()!r} is not a clause of a MoE spec: {text!r}")
            fields[name] = syntax.parse(value) if name == "act" else value
        return MoESpec(**fields)

    @property
    def parts(self) -> int:
        """How many projections are activated together: 1, or 2 for g and u."""
        return 1 if self.layout == "plain" else 2
