"""What a multiprocessor of each architecture does per clock, pipe by pipe: tables/devices.json, with its sources.

    rates("sm90").products["2"]      4096 dense bf16 FLOP per clock

AMD's compute unit is a multiprocessor, its wave a warp of 64, its LDS shared memory. Its vector instructions have one
pipe for all kinds (`alu`); `registers` counts both halves of its register file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ..arch import family


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a multiprocessor does per clock, what it holds, and the board that has `units` of them.

    products  FLOP of the tensor cores by bytes of an element, 0 where FMAs make products
    issue     warp instructions; fp32, alu, mufu: results; smem, l2: bytes
    holds     shared KiB, registers of 32 bits, columns of tensor memory, warps of `warp` lanes, ctas
    clocks    latency from a load to its use, handover from a product's start to its use, exchange of a shuffle
    board     clock in GHz, dram in GB/s; fast: parts of names of integer instructions twice as fast as others
    """

    board: str
    units: int
    clock: float
    products: Mapping[str, float]
    issue: float
    fp32: float
    alu: float
    mufu: float
    smem: float
    l2: float
    dram: float
    shared: int
    registers: int
    columns: int
    warps: int
    ctas: int
    warp: int
    latency: float
    handover: float
    exchange: float
    fast: tuple[str, ...] = ()

    @property
    def dram_per_clock(self) -> float:
        """Bytes of DRAM per clock, of the whole board."""
        return self.dram / self.clock


@functools.lru_cache(maxsize=1)
def devices() -> dict[str, dict[str, Any]]:
    """The table as it is written, with sources and what is an estimate."""
    return json.loads((resources.files(__package__) / "tables/devices.json").read_text())["devices"]


@functools.lru_cache(maxsize=64)
def rates(arch: str) -> Rates:
    """The rates of an architecture, or of the one whose configs serve it. Raises KeyError for one without."""
    row = devices()[family(arch) or arch]
    known = {f.name for f in dataclasses.fields(Rates)}
    return Rates(**{k: v for k, v in row.items() if k in known})
