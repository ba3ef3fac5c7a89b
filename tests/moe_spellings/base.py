"""What a mixture-of-experts spelling is: a block, its parameters and router, and what it must be lifted to.

B 3 · S 7 · T 21 = B S tokens · H 24 features · F 40 of an expert · E 4 experts · K 2 per token. All are distinct
(but T = T K of top-1), and every row is a multiple of 16 bytes, which the grouped product in bfloat16 asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.moe_spellings.routers import ROUTERS
from tvcompile.kernels.experts import Units, activate
from tvcompile.moe_spec import MoESpec

B, S, T, H, FF = 3, 7, 21, 24, 40

GATED: dict[str, Callable] = {
    "swiglu": lambda g, u: F.silu(g) * u,
    "geglu": lambda g, u: F.gelu(g) * u,
    "geglu_tanh": lambda g, u: u * F.gelu(g, approximate="tanh"),
    "reglu": lambda g, u: F.relu(g) * u,
    "glu": lambda g, u: torch.sigmoid(g) * u,
    "gpt_oss": lambda g, u: (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(g.clamp(max=7) * 1.702),
    "swiglu_by_hand": lambda g, u: g * torch.sigmoid(g) * u,
}
PLAIN: dict[str, Callable] = {
    "relu": lambda g, u: F.relu(u),
    "gelu": lambda g, u: F.gelu(u),
    "gelu_tanh": lambda g, u: F.gelu(u, approximate="tanh"),
    "silu": lambda g, u: F.silu(u),
    "relu2": lambda g, u: F.relu(u).square(),
    "tanh": lambda g, u: torch.tanh(u),
    "power": lambda g, u: F.relu(u) ** 2,
    "selu": lambda g, u: F.selu(u),
    "celu": lambda g, u: F.celu(u, 1.7),
    "hardswish": lambda g, u: F.hardswish(u),
    "softshrink": lambda g, u: F.softshrink(u, 0.3),
    "hardshrink": lambda g, u: F.hardshrink(u, 0.3),
    "threshold": lambda g, u: F.threshold(u, 0.2, -0.7),
    "softplus": lambda g, u: F.softplus(u, 2.0),
    "powers": lambda g, u: u.abs() ** 1.5 - (u * u + 1) ** -0.5 + torch.logaddexp(u, -u),
}
ACTIVATIONS = GATED | PLAIN


class Expert(nn.Module):
    """An expert of its own, in nn.Linear."""

    def __init__(self, kind: str, bias: bool):
        super().__init__()
        self.kind = kind
        self.w_up = nn.Linear(H, FF, bias=bias)
        self.w_down = nn.Linear(FF, H, bias=bias)
        if kind in GATED:
            self.w_gate = nn.Linear(H, FF, bias=bias)

    def forward(self, x):
        g = self.w_gate(x) if self.kind in GATED else None
        return self.w_down(ACTIVATIONS[self.kind](g, self.w_up(x)))


class Block(nn.Module):
    """A router and E experts in stacked tensors (`own`: a ModuleList); `experts` is what a spelling spells.

    order   "io": weights [E,in,out], multiplied as x @ W;  "oi": [E,out,in], by F.linear
    layout  where gate and up lie in w_up: "chunk", "interleave", or "separate" in w_gate and w_up
    three   x stays [B,S,H]; else `experts` is given [T,H]
    """

    kind = "swiglu"
    layout = "chunk"
    order = "io"
    bias = False
    own = False
    router = "softmax_topk"
    count = 4
    top = 2
    three = False
    weigh = "output"

    def __init__(self):
        super().__init__()
        gate = ROUTERS[self.router]
        self.gate = nn.Linear(H, self.count)  # with a bias, which a formula of its product must not forget
        nn.init.normal_(self.gate.weight, std=1.5 / H**0.5)
        if gate.corrected:
            self.correction = nn.Buffer(0.2 * torch.randn(self.count))
        if self.kind in PLAIN:
            self.layout = "plain"
        if self.own:
            self.layout = "plain" if self.kind in PLAIN else "separate"
            self.order = "oi"
            self.list = nn.ModuleList(Expert(self.kind, self.bias) for _ in range(self.count))
            return
        wide = FF if self.layout in ("plain", "separate") else 2 * FF
        self.parameter("up", H, wide)
        self.parameter("down", FF, H)
        if self.layout == "separate":
            self.parameter("gate", H, FF)

    def parameter(self, name: str, inside: int, outside: int) -> None:
        shape = (inside, outside) if self.order == "io" else (outside, inside)
        setattr(self, f"w_{name}", nn.Parameter(torch.randn(self.count, *shape) / inside**0.5))
        setattr(self, f"b_{name}", nn.Parameter(torch.randn(self.count, outside) / 2) if self.bias else None)

    def route(self, x):
        """(weights, ids) [..., K]"""
        return ROUTERS[self.router](self, self.gate(x), x)

    def forward(self, x):
        shape = x.shape
        if not self.three:
            x = x.reshape(-1, H)
        w, ids = self.route(x)
        return self.experts(x, ids, w).reshape(shape)

    def experts(self, x, ids, w):
        raise NotImplementedError

    # What spellings are made of

    def activate(self, pre, gate=None):
        """The experts' activation of what they projected; `gate` only in layout "separate"."""
        act = ACTIVATIONS[self.kind]
        if self.layout == "plain" or self.layout == "separate":
            return act(gate, pre)
        if self.layout == "interleave":
            return act(pre[..., ::2], pre[..., 1::2])
        return act(*pre.chunk(2, dim=-1))

    def linear(self, x, name: str, e: int):
        weight, bias = getattr(self, f"w_{name}")[e], getattr(self, f"b_{name}")
        if self.order == "oi":
            return F.linear(x, weight, None if bias is None else bias[e])
        return x @ weight if bias is None else x @ weight + bias[e]

    def expert(self, x, e: int):
        """Expert e, a Python number, of x [..., H]."""
        if self.own:
            return self.list[e](x)
        gate = self.linear(x, "gate", e) if self.layout == "separate" else None
        return self.linear(self.activate(self.linear(x, "up", e), gate), "down", e)

    def mlp(self, x, product: Callable):
        """Experts as products with all weights at once: product(x, weights, bias or None)."""

        def projected(x, name):
            return product(x, getattr(self, f"w_{name}"), getattr(self, f"b_{name}"))

        gate = projected(x, "gate") if self.layout == "separate" else None
        return projected(self.activate(projected(x, "up"), gate), "down")

    # The yardstick

    def coefficients(self, x):
        """[T,E]: what every expert's output is multiplied by, 0 where it is not chosen."""
        w, ids = self.route(x)
        return torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter_add(1, ids, w)

    def parts_of(self, e: int):
        """[(W [in,out], bias or 0)] of gate (None where there is none), up, down."""

        def part(name):
            if self.own:
                linear = getattr(self.list[e], f"w_{name}")
                return linear.weight.mT, 0.0 if linear.bias is None else linear.bias
            W, b = getattr(self, f"w_{name}")[e], getattr(self, f"b_{name}")
            return W if self.order == "io" else W.mT, 0.0 if b is None else b[e]

        if self.layout in ("plain", "separate"):
            return [None if self.layout == "plain" else part("gate"), part("up"), part("down")]
        W, b = part("up")
        cut = (slice(0, FF), slice(FF, None)) if self.layout == "chunk" else (slice(0, None, 2), slice(1, None, 2))
        halves = [(W[:, c], b[c] if self.bias else 0.0) for c in cut]
        return [*halves, part("down")]

    def reference(self, x):
        """The block's result by the formula, every expert on every token."""
        flat = x.reshape(-1, H)
        coefficients, out = self.coefficients(flat), torch.zeros_like(flat)
        for e in range(self.count):
            c = coefficients[:, e, None]
            rows = flat * c if self.weigh == "input" else flat
            gate, up, down = self.parts_of(e)
            g = None if gate is None else rows @ gate[0] + gate[1]
            y = ACTIVATIONS[self.kind](g, rows @ up[0] + up[1]) @ down[0] + down[1]
            out = out + (torch.where(c != 0, y, 0.0) if self.weigh == "input" else c * y)
        return out.reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A block, and how it must be lifted.

    shape    of x
    layouts  of the Spec that are right (a chunked weight may also be given as two views)
    dtype    in which it trains
    modes    "train" and "infer", or the one of them that is tested
    """

    name: str
    block: type[nn.Module]
    shape: tuple[int, ...]
    layouts: tuple[str, ...]
    dtype: torch.dtype
    modes: tuple[str, ...]

    def build(self, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return self.block().to(dtype)

    def make_inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return [tokens(self.block, self.shape).to(dtype).requires_grad_()]

    def accepts(self, text: str) -> bool:
        """Whether a site's text says what the block computes."""
        spec, block = MoESpec.parse(text), self.block
        if spec.layout not in self.layouts or spec.weigh != block.weigh:
            return False
        gen = torch.Generator().manual_seed(0)
        g, u = 4 * torch.randn(2, 500, generator=gen, dtype=torch.float64)
        expected = ACTIVATIONS[block.kind](g, u)
        orders = [(u, g), (g, u)] if spec.layout == "separate" else [(u, g)]
        return any(torch.allclose(activate(spec.act, Units(*units)), expected) for units in orders)


CORPUS: dict[str, Spelling] = {}
_TOKENS: dict[Any, torch.Tensor] = {}


def tokens(block: type[nn.Module], shape: tuple[int, ...]) -> torch.Tensor:
    """Random tokens whose router is not near a tie: bfloat16 and float64 choose the same experts."""
    key = (block, shape)
    if key not in _TOKENS:
        _TOKENS[key] = _tokens(block, shape)
    return _TOKENS[key].clone()


def _tokens(block: type[nn.Module], shape: tuple[int, ...]) -> torch.Tensor:
    torch.manual_seed(0)
    made, gen = block(), torch.Generator().manual_seed(1)
    x = torch.randn(16 * T, H, generator=gen).bfloat16()
    route = getattr(made, "route", None)
    if route is None:
        return x[: torch.Size(shape[:-1]).numel()].float().reshape(shape)
    with torch.no_grad():
        ids = made.bfloat16().route(x)[1]
        sure = torch.ones(len(x), dtype=torch.bool)
        made = made.double()
        for _ in range(4):
            noise = 0.02 * torch.randn(x.shape, generator=gen, dtype=torch.float64)
            sure &= (made.route(x.double() + noise)[1] == ids).all(-1)
    chosen = x[sure][: torch.Size(shape[:-1]).numel()]
    return chosen.float().reshape(shape)


def moe(
    shape: tuple[int, ...] = (B, S, H),
    dtype: torch.dtype = torch.float32,
    modes: tuple[str, ...] = ("train", "infer"),
    **changes: Any,
):
    """Register the decorated block, with class attributes changed, as a spelling.

    The block as it is runs in both modes; with changes, every other one in training.
    """

    def register(block):
        family = block.__module__.rpartition(".")[2]
        made = type(block.__name__, (block,), {"__module__": block.__module__, **changes}) if changes else block
        name = ".".join([family, block.__name__, *(str(v) for v in changes.values() if not isinstance(v, bool))])
        name += "".join(f".{k}" for k, v in changes.items() if v is True)
        assert name not in CORPUS, name
        plain = made.kind in PLAIN
        own = "separate" if getattr(made, "own", False) else made.layout
        layouts = ("plain",) if plain else (own, "separate") if own == "chunk" else (own,)
        only = modes[len(CORPUS) % 2 :][:1] if changes and len(modes) == 2 else modes
        CORPUS[name] = Spelling(name, made, shape, layouts, dtype, only)
        return block

    return register
