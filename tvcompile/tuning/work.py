"""What one site of a program computes, as far as tuning has to know: the one place where Asks are made of a problem.

    Attention(spec, "bfloat16", B=2, H=32, H_kv=8, S_q=4096, S_kv=4096, D=128, D_v=128).asks(Device.typical("sm90"))
    -> what the configs of fwd, dq and dkdv are for; of a CPU fwd and bwd; of few rows decode

Plain data, so that another process can be asked; `inputs` makes random tensors of its sizes, `captures` among them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import bounds
from ..arch import Device
from ..moe_spec import MoESpec
from ..spec import AttentionSpec
from . import attention, cpu, moe
from .ask import Ask

GROUPS = 4  # ids that random captures of integers hold, in ascending order, as documents have them


@dataclasses.dataclass(frozen=True)
class Capture:
    """A captured tensor: dtype, sizes, and whether it needs a gradient."""

    dtype: str
    shape: tuple[int, ...]
    wanted: bool = False


@dataclasses.dataclass(frozen=True)
class Attention:
    """tv::attention: sizes as in attention.py, 0 where one is not known; captures and sizes in the order of the op.

    keys, rows: as sizes of the GPU kernels have them; backward: whether a backward pass may follow
    """

    spec: AttentionSpec
    dtype: str
    B: int
    H: int
    H_kv: int
    S_q: int
    S_kv: int
    D: int
    D_v: int
    captures: tuple[Capture, ...] = ()
    sizes: tuple[int, ...] = ()
    backward: bool = True

    @property
    def group(self) -> int:
        return self.H // max(1, self.H_kv)

    def asks(self, device: Device) -> list[Ask]:
        """What the configs of all passes are for."""
        backward = cpu.PASSES[1:] if device.arch == "cpu" else ("dq", "dkdv")
        return [self.ask(device, pass_) for pass_ in ("fwd", *backward[: 2 * self.backward])]

    def ask(self, device: Device, pass_: str, wanted: bool | None = None) -> Ask:
        """Of one pass: fwd, which may become decode, dq and dkdv; on a CPU fwd and bwd. wanted: see cpu.Ask."""
        if device.arch == "cpu":
            wanted = pass_ == "bwd" and any(c.wanted for c in self.captures) if wanted is None else wanted
            sizes = self.B, self.H, self.H_kv, self.S_q, self.S_kv, self.D, self.D_v
            return cpu.Ask(device, pass_, self.dtype, cpu.work_of(self.spec), *sizes, wanted)
        rows, keys = self.S_q * self.group, self.S_kv
        size = torch.finfo(getattr(torch, self.dtype)).bits // 8
        if pass_ == "fwd" and 0 < rows <= attention.few_rows(max(self.D, self.D_v), size):
            # Dropped weights are drawn where whole rows are, so that one program sees each row.
            pass_, keys = "decode", 0 if self.spec.dropout else self.visible
        work, programs = attention.work_of(self.spec), self.B * self.H_kv
        return attention.Ask(device, pass_, self.dtype, self.D, self.D_v, work, rows, keys, programs)

    @property
    def visible(self) -> int:
        """How many kv positions any of few rows may see, as far as `keep` tells without its captures."""
        table: dict[Any, Any] = {name: (n, n) for name, n in zip(self.spec.sizes(), self.sizes)}
        table |= {name: (n, n) for name, n in (("S_q", self.S_q), ("S_kv", self.S_kv), ("H", self.H))}
        table |= {"b": (0, self.B), "h": (0, self.H), "q": (0, self.S_q - 1)}
        kinds = bounds.kinds(self.spec.keep, table | {"kv": bounds.blocks(self.S_kv, 64, 0)})
        return min(self.S_kv, 64 * int(np.count_nonzero(np.broadcast_to(kinds, -(-self.S_kv // 64)))))

    def inputs(self, device: torch.device, seed: int = 0) -> list[Any]:
        """[q, k, v, captures, sizes, spec, seed of dropout], the arguments of the op."""
        make = _maker(device, seed, self.dtype)
        q, k = make(self.B, self.H, self.S_q, self.D), make(self.B, self.H_kv, self.S_kv, self.D)
        v = make(self.B, self.H_kv, self.S_kv, self.D_v)
        captures = [_capture(c, make) for c in self.captures]
        dropout = torch.tensor(seed, device=device) if self.spec.dropout else None
        return [q, k, v, captures, list(self.sizes), str(self.spec), dropout]


@dataclasses.dataclass(frozen=True)
class Experts:
    """tv::moe: sizes as in experts.py, 0 where one is not known.

    stacked   whether the experts' weights are one tensor; biases: whether (up, down) have them
    columns   whether weights lie in memory column by column, as [E,N,K]; backward: whether a backward pass may follow
    """

    spec: MoESpec
    dtype: str
    T: int
    K: int
    E: int
    H: int
    F: int
    H_out: int
    stacked: bool = True
    biases: tuple[bool, bool] = (False, False)
    columns: bool = True
    backward: bool = True

    def asks(self, device: Device) -> list[Ask]:
        """What the configs of all passes are for."""
        forward, backward = ((), ("bwd",)) if device.arch == "cpu" else (moe.PASSES[:2], moe.PASSES[2:])
        return [self.ask(device, pass_) for pass_ in (*forward, *(backward if self.backward else ()))]

    def ask(self, device: Device, pass_: str) -> Ask:
        """Of one of moe.PASSES; on a CPU of bwd."""
        if device.arch == "cpu":
            sizes = self.T, self.K, self.E, self.H, self.F, self.H_out
            return cpu.ExpertAsk(device, pass_, self.dtype, _text(self.spec), *sizes, self.stacked)
        wide = self.F * (1 if self.spec.layout == "separate" else self.spec.parts)  # columns of one tensor of an expert
        columns = {"up": (wide, self.H), "down": (self.H_out, self.F), "dact": (self.F, self.H_out)}
        N, K = (columns | {"dx": (self.H, wide), "dw": (wide, self.H)})[pass_]
        rows = self.T * self.K // max(self.E, 1)
        narrow = any(n % 16 for n in (self.H, self.F, self.H_out))
        return moe.Ask(device, pass_, self.dtype, rows, self.E, N, K, self.K, not self.stacked, narrow)

    def inputs(self, device: torch.device, seed: int = 0) -> list[Any]:
        """[x, ids, weights, up, down, up_bias, down_bias, spec], the arguments of the op but the last."""
        make = _maker(device, seed, self.dtype)
        x = make(self.T, self.H)
        # Distinct experts for each token, as a router chooses them.
        ids = make(self.T, self.E).float().topk(min(self.K, self.E), -1).indices
        weights = make(self.T, ids.shape[1]).softmax(-1)
        two = self.spec.layout == "separate"
        wide = self.F if two else self.F * self.spec.parts
        up = [t for _ in range(1 + two) for t in self._weights(make, self.H, wide)]
        biases = self._biases(make, wide) * self.biases[0], self._biases(make, self.H_out) * self.biases[1]
        if two:
            biases = biases[0] * 2, biases[1]
        return [x, ids, weights, up, self._weights(make, self.F, self.H_out), *biases, str(self.spec)]

    def _weights(self, make: Callable[..., Tensor], rows: int, columns: int) -> list[Tensor]:
        lead, copies = ((self.E,), 1) if self.stacked else ((), self.E)
        shape = (*lead, columns, rows) if self.columns else (*lead, rows, columns)
        found = [make(*shape).mul_(rows**-0.5) for _ in range(copies)]
        return [t.mT for t in found] if self.columns else found

    def _biases(self, make: Callable[..., Tensor], columns: int) -> list[Tensor]:
        return [make(self.E, columns)] if self.stacked else [make(columns) for _ in range(self.E)]


Work = Attention | Experts


def _maker(device: torch.device, seed: int, dtype: str) -> Callable[..., Tensor]:
    """Random tensors by a generator of their own: the program's random numbers stay as they are."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, device=device, generator=generator).to(getattr(torch, dtype))


def _capture(c: Capture, make: Callable[..., Tensor]) -> Tensor:
    """Masks that let nine of ten through, ids of ascending groups, floats around zero."""
    dtype: torch.dtype = getattr(torch, c.dtype)
    x = make(*c.shape).float()
    if dtype == torch.bool:
        return x > -1.28
    if not dtype.is_floating_point:
        n = c.shape[-1] if c.shape else 1
        return (torch.arange(n, device=x.device) * GROUPS // n).expand(c.shape).to(dtype)
    return x.to(dtype)


@functools.lru_cache(maxsize=1024)
def _text(spec: MoESpec) -> str:
    return str(spec)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def of_tensors(tensors: Sequence[Tensor], wanted: Sequence[bool], hint: Callable[[Any], int]) -> tuple[Capture, ...]:
    """Captures as the op's tensors are; wanted: which may need a gradient."""
    shapes = [tuple(map(hint, t.shape)) for t in tensors]
    return tuple(Capture(dtype_name(t.dtype), s, w) for t, s, w in zip(tensors, shapes, wanted, strict=True))
