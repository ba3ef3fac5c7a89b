"""Products of matrices on the CPU, in the dtype that is faster there.

bfloat16 and float16 are widened to float32 where the CPU has no instructions for them that are faster; so many of a
weight's numbers at once that they stay in the caches.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .cpu import product_dtype

WIDE = 1 << 21  # numbers of a weight or a gradient that are held in float32 at once
SMALL = 1 << 18  # numbers of a weight; with fewer, a call of oneDNN takes longer than the product
FEW = 48  # rows; for fewer, reading the weights takes the time


def round_up(count: int) -> int:
    """The least number of rows that is at least `count` and one of few: of 32 from 2^i to 2^(i+1).

    oneDNN compiles a kernel for each number of rows, in half a millisecond and more, and keeps 1024 of them; an expert
    has another number in every call. So products take up to 3 % of rows more, of whatever lies behind.
    """
    step = 1 << max(0, count.bit_length() - 6)
    return -(-count // step) * step


def times(out: Tensor, rows: Tensor, W: Tensor, bias: Tensor | None = None) -> None:
    """out [n,N] = rows [n,M] W [M,N] + bias [N], rounded once"""
    dtype = dtype_of_products(rows.dtype, len(rows))
    if dtype != torch.float32 or W.numel() < SMALL or not torch.backends.mkldnn.is_available():
        multiply(out, rows, W, bias)
        return
    rows, bias = rows.to(dtype), None if bias is None else bias.to(dtype)
    if W.dtype != dtype and W.shape[0] > W.shape[1]:
        total = torch.zeros(out.shape, dtype=dtype) if bias is None else bias.repeat(len(out), 1)
        for part, w in widened(W.mT):
            total.addmm_(rows[:, part], w.mT)
        out.copy_(total)
        return
    for part, w in widened(W):
        # torch.mm takes another library, which needs up to five times as long for few rows.
        more = None if bias is None else bias[part]
        out[:, part] = torch.ops.mkldnn._linear_pointwise(rows, w.mT, more, "none", [], "")


def multiply(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """out = a b + bias"""
    dtype = dtype_of_products(a.dtype, a.shape[1])
    bias = None if bias is None else bias.expand_as(out)
    if dtype == out.dtype:
        torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
        return
    if out.stride(0) == 1:
        out, a, b, bias = out.mT, b.mT, a.mT, None if bias is None else bias.mT
    a, b = a.to(dtype), b.to(dtype)
    N = b.shape[1]
    step = max(1, WIDE // max(1, N))
    memory = held(N * min(step, len(a))).view(-1, N)
    for i in range(0, len(a), step):
        rows = slice(i, i + step)
        product = torch.mm(a[rows], b, out=memory[: len(a[rows])])
        out[rows] = product if bias is None else product.add_(bias[rows])


def dtype_of_products(dtype: torch.dtype, count: int) -> torch.dtype:
    """What products of `count` rows, or sums over them, are made in."""
    return torch.float32 if count >= FEW and float32_is_faster(dtype) else product_dtype(dtype)


class Held(threading.local):
    memory = torch.empty(0)


HELD = Held()


def held(count: int) -> Tensor:
    """Memory for so many float32 numbers, the thread's own: to take new memory takes as long as a product does."""
    if HELD.memory.numel() < count:
        with torch.inference_mode(False):  # which may ask first, and would keep it to itself
            HELD.memory = torch.empty(count, dtype=torch.float32)
    return HELD.memory[:count]


def widened(W: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(columns, W [M,n] of these in float32): all of them, or so many that they stay in the caches."""
    M, N = W.shape
    if W.dtype == torch.float32:
        yield slice(None), W
        return
    step = max(1, WIDE // max(1, M))
    memory = held(M * min(step, N))
    for i in range(0, N, step):
        part = W[:, i : i + step]
        n = part.shape[1]
        w = memory[: n * M].view(n, M).mT if W.stride(0) == 1 else memory[: n * M].view(M, n)
        yield slice(i, i + n), w.copy_(part)


@functools.lru_cache(maxsize=4)
def float32_is_faster(dtype: torch.dtype) -> bool:
    """Does this machine multiply numbers of `dtype` faster as float32, what that takes included? Measured once.

    Without tiles (AMX), instructions for bfloat16 gain nothing on some processors.
    """
    if dtype.itemsize >= 4 or product_dtype(dtype) != dtype:
        return False
    with _disable_current_modes():  # also where it is first asked while a graph is traced
        a, b = torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)

        def wide() -> None:
            for _, w in widened(b.mT):
                torch.ops.mkldnn._linear_pointwise(a.float(), w.mT, None, "none", [], "").to(dtype)

        ways: tuple[Callable[[], object], ...] = (wide, lambda: torch.mm(a, b.mT))
        times: list[list[float]] = [[], []]
        for _, (way, taken) in itertools.product(range(6), zip(ways, times)):
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return min(times[0]) < 0.9 * min(times[1])
