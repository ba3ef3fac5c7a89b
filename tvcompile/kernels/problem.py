"""One call of tv::attention: the tensors, the Spec, and the record that a kernel is.

Shapes: q [B,H,S_q,D]   k [B,H_kv,S_kv,D]   v [B,H_kv,S_kv,D_v]; q head h reads kv head h // G.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..arch import Device
from ..spec import AttentionSpec
from ..tuning import cpu
from ..tuning.work import Attention, dtype_name
from .mods import Scope


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, lse and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hint(n: int | torch.SymInt) -> int:
    """A size as a number; of one that may change, the number it has now, or 0 if nothing is known of it."""
    return n if isinstance(n, int) else int(n.node.hint or 0)


def heads_last(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An empty [B,H,S,D] that lies in memory as [B,S,H,D]."""
    B, H, S, D = shape
    return like.new_empty((B, S, H, D), dtype=dtype or like.dtype).transpose(1, 2)


def as_heads_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B,H,S,D] itself if it has the dtype and lies as [B,S,H,D], else such a copy."""
    _, H, S, D = x.shape
    if x.dtype == dtype and x.stride() == (S * H * D, D, H * D, 1) and x.numel():
        return x
    return heads_last(x, x.shape, dtype).copy_(x)


@functools.lru_cache(maxsize=4096)
def _read(spec: str) -> tuple[AttentionSpec, tuple[str, ...], tuple[str, ...]]:
    parsed = AttentionSpec.parse(spec)
    return parsed, parsed.captures(), parsed.sizes()


@functools.lru_cache(maxsize=1024)
def _size_names(spec: AttentionSpec) -> tuple[str, ...]:
    return spec.sizes()


@dataclasses.dataclass(frozen=True)
class Problem:
    """config: how the CPU kernels cut it."""

    spec: AttentionSpec
    q: Tensor
    k: Tensor
    v: Tensor
    scope: Scope
    seed: Tensor | None = None
    config: cpu.Config = cpu.Config()

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captures: Sequence[Tensor] | None,
        sizes: Sequence[int] | None,
        spec: str,
        seed: Tensor | None,
    ) -> Problem:
        parsed, names, size_names = _read(spec)
        (B, H, S_q, _), S_kv = q.shape, k.shape[2]
        scope = Scope(
            b=(0, B),
            h=(0, H),
            q=(0, S_q),
            kv=(0, S_kv),
            captures=dict(zip(names, captures or ())),
            sizes={**dict(zip(size_names, sizes or ())), "S_q": S_q, "S_kv": S_kv, "H": H},
            dtype=compute_dtype(q.dtype),
            device=q.device,
        )
        return Problem(parsed, q, k, v, scope, seed)

    @property
    def group(self) -> int:
        return self.q.shape[1] // max(1, self.k.shape[1])

    @property
    def features(self) -> tuple[int, int]:
        """(D, D_v), numbers always: kernels are compiled for them."""
        return int(self.q.shape[3]), int(self.v.shape[3])

    @property
    def work(self) -> Attention:
        """What tuning knows of it: without the captures' shapes."""
        (B, H, S_q, _), (_, H_kv, S_kv, _) = self.q.shape, self.k.shape
        sizes = tuple(hint(self.scope.sizes[name]) for name in _size_names(self.spec))
        shape = hint(B), hint(H), hint(H_kv), hint(S_q), hint(S_kv)
        return Attention(self.spec, dtype_name(self.q.dtype), *shape, *self.features, sizes=sizes)

    @property
    def scores(self) -> int:
        """B*H*S_q*S_kv"""
        return self.q.shape[0] * self.q.shape[1] * self.q.shape[2] * self.k.shape[2]

    @property
    def empty(self) -> str | None:
        """What rows without any kept kv give; with a sink, which takes all, they are zero."""
        return "zero" if self.spec.sink is not None else self.spec.empty

    def results(self) -> tuple[Tensor, Tensor]:
        """(out, lse), not yet filled in."""
        B, H, S_q, _ = self.q.shape
        out = heads_last(self.q, (B, H, S_q, self.v.shape[3]))
        return out, self.q.new_empty((B, H, S_q), dtype=self.scope.dtype)


@dataclasses.dataclass(frozen=True)
class Given:
    """What backward gets beside the problem: grad_out, out [B,H,S_q,D_v], lse [B,H,S_q], rest like lse or empty."""

    grad_out: Tensor
    out: Tensor
    lse: Tensor
    rest: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Gradients:
    """dq, dk, dv, and by name one for every capture that wants it; shapes as the tensors'."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    captures: dict[str, Tensor]

    @staticmethod
    def zeros(p: Problem, wanted: tuple[str, ...]) -> Gradients:
        """dq in q's dtype, as every row is written once; sums in the compute dtype."""
        dtype = p.scope.dtype
        captures = {n: torch.zeros(p.scope.captures[n].shape, dtype=dtype) for n in wanted}
        dk, dv = (torch.zeros(x.shape, dtype=dtype) for x in (p.k, p.v))
        return Gradients(heads_last(p.q, p.q.shape).zero_(), dk, dv, captures)


@dataclasses.dataclass(frozen=True)
class Need:
    """What a kernel is asked.

    wanted  None: forward; in backward the captures that need a gradient
    scores  about B*H*S_q*S_kv, 0 if not known; keys: S_kv
    features  (D, D_v); device: which GPU, or the CPU
    prefer  name of the kernel that was measured to be the fastest, "" if nothing was measured
    """

    spec: AttentionSpec
    dtype: torch.dtype
    wanted: tuple[str, ...] | None = None
    scores: int = 0
    keys: int = 0
    features: tuple[int, int] = (0, 0)
    device: Device = Device("cpu")
    prefer: str = ""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """name, device, and

    supports  need -> None or the reason why it does not serve
    forward   problem -> (out, lse), or (out, lse, rest)
    backward  problem, given, names of captures that need a gradient -> Gradients
    """

    name: str
    device: str
    supports: Callable[[Need], str | None]
    forward: Callable[[Problem], tuple[Tensor, ...]]
    backward: Callable[[Problem, Given, tuple[str, ...]], Gradients]
