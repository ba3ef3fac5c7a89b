"""Which rows of which expert a program of a grouped product takes, found on the device with sizes that the host knows.

    pairs sorted by expert (Routing)      e0 e0 e0 | e1 | e3 e3      offsets [0, 3, 4, 4, 6]
    BLOCK_M = 2                           (e0, 0) (e0, 2) (e1, 3) (e3, 4), then programs without any: (E, 6)

Each expert begins a block of its own, so ceil(n / BLOCK_M) + E programs are enough for n pairs however they fall, and n
where each has one at least. No value comes to the host, so CUDA graphs record it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .experts import Routing


@dataclasses.dataclass(frozen=True)
class Schedule:
    """table [2,programs]: the expert of each block of rows (E where there is none), and its first row."""

    table: Tensor
    programs: Any

    @staticmethod
    def of(routing: Routing, BLOCK_M: int) -> Schedule:
        pairs, offsets = routing.order.shape[0], routing.offsets.long()
        E = offsets.shape[0] - 1
        programs = (pairs + BLOCK_M - 1) // BLOCK_M + E
        if isinstance(pairs, int):
            programs = min(programs, pairs)
        blocks = (offsets.diff() + BLOCK_M - 1) // BLOCK_M
        ends = blocks.cumsum(0)
        starts = torch.nn.functional.pad(ends, (1, 0))
        i = torch.arange(programs, device=offsets.device)
        # Not in starts[1:]: Inductor of torch 2.11 can't search a view of what it has not written yet.
        expert = torch.searchsorted(ends, i, right=True)
        first = offsets[expert] + (i - starts[expert]) * BLOCK_M
        return Schedule(torch.stack([expert, first]).to(torch.int32), programs)


def on_device(routing: Routing) -> Routing:
    """In 32 bits, as the kernels read it."""
    return Routing(routing.order.to(torch.int32), routing.offsets.to(torch.int32))
