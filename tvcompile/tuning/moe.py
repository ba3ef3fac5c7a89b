"""Which Config a product of tv::moe gets, by a closed formula of the architecture and the rows of an expert.

    choose(Ask("sm90", "up", 2, rows=384))[0] -> Config(128, 256, 64, 8, 3, descriptors=True)

BLOCK_M   follows the rows m that an expert has on average, T*K / E: it is streamed through the weights once
BLOCK_N   with few rows, what a program reads of the weights at a time; else what fills the registers with sums
stages    as many as shared memory holds, four at most
"""

from __future__ import annotations

import dataclasses

from . import SHARED, family

PASSES = ("up", "down", "dact", "dx", "dw")


@dataclasses.dataclass(frozen=True)
class Config:
    """How a grouped product is tiled.

    BLOCK_M, BLOCK_N, BLOCK_K   rows and columns of the result (g and u together), and of the sum that a trip adds
    num_warps, num_stages       warps of a program; tiles in flight
    descriptors                 whether what is not gathered comes through tensor descriptors (TMA)
    specialize                  whether also what is gathered does, and loads and products run in warps of their own
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    specialize: bool = False

    def __post_init__(self) -> None:
        if any(n & (n - 1) or n < 16 for n in (self.BLOCK_M, self.BLOCK_N, self.BLOCK_K)):
            raise ValueError(f"blocks are powers of two, at least 16: {self}")


@dataclasses.dataclass(frozen=True)
class Ask:
    """arch: sm90, ...   pass_: one of PASSES   size: bytes of an element   rows: of an expert, 0 if unknown"""

    arch: str
    pass_: str
    size: int
    rows: int = 0


def choose(ask: Ask) -> list[Config]:
    """Configs, the best first, the plainest last; none for an architecture without any."""
    arch = family(ask.arch)
    if arch is None:
        return []
    found = [formula(arch, ask.pass_, ask.size, ask.rows or 128, plain) for plain in (False, True)]
    return list(dict.fromkeys(found))


def formula(arch: str, pass_: str, size: int, rows: int, plain: bool = False) -> Config:
    """plain: by pointers alone, where the best takes descriptors; 256 columns would spill then."""
    able = size == 2 and arch in ("sm90", "sm100")
    described = able and not plain
    if size == 4:
        M, N, K, warps = min(row_block(rows), 64), 64, 32, 4
    elif (M := 128 if pass_ == "dw" else row_block(rows)) == 128:
        N, K, warps = 128 if pass_ == "dact" or (able and plain) else 256, 64, 8
    elif M == 64:
        N, K, warps = 128, 64, 4
    else:
        N, K, warps = 128, 128, 4
    # Blackwell's tensor cores take tiles of 128 rows from shared memory and give their sums to memory of their own.
    apart = described and arch == "sm100" and M == 128 and pass_ != "dw"
    return Config(M, N, K, warps, stages(arch, (M + N) * K * size, pass_ == "dw"), described, apart)


def row_block(m: int) -> int:
    """BLOCK_M for m rows of an expert: up to twice as many where they are few, since experts are never equally busy."""
    if m <= 64:
        return max(16, min(_power(2 * m), 64))
    return min(_power(m), 128)


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def stages(arch: str, tiles: int, chained: bool) -> int:
    """num_stages for tiles of so many bytes; chained: the loop also loads which rows it takes, a stage before them."""
    if arch.startswith("gfx"):
        return 2
    spare = 0 if arch in ("sm90", "sm100") else 1  # before sm90 one of the tiles lies in registers
    held = min(4, (SHARED[arch] - 1) * 1024 // tiles + spare)
    return max(2, 2 * held - 1 if chained else held)
