"""Which Config an attention kernel gets: the shipped table, and a closed formula where it has no row.

    choose(Ask("sm90", "fwd", 2, 128, rows=4096, keys=4096, programs=64, units=132)) -> [Choice, ...], best first

A row serves the widths up to its own, of its architecture or of the next older one of the same family. The formula's
answer follows, so that there is another one where the first fails its check. Data lie in tables/*.json, each file with
its provenance.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from importlib import resources

PASSES = ("fwd", "dq", "dkdv", "decode")
WIDTHS = (64, 128, 256)  # features of a head that rows are made for
SHARED = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm120": 99, "gfx942": 64, "gfx950": 160}
"""KiB of shared memory a block may have, per architecture that has configs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How an attention kernel is tiled.

    BLOCK_M, BLOCK_N   rows of q and kv positions of a block
    num_warps          warps of a program; num_stages: blocks of the moving side in flight
    descriptors        whether K and V come through tensor descriptors (TMA)
    specialize         whether loads, products and softmax of the loop over FULL blocks run in warps of their own
    hoist              whether that loop may keep what does not change in registers
    packed             whether a program takes the q heads of a group together; splits: programs that share its kv
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    specialize: bool = False
    hoist: bool = True
    packed: bool = False
    splits: int = 1

    def __post_init__(self) -> None:
        if any(n & (n - 1) or n < 16 for n in (self.BLOCK_M, self.BLOCK_N)):
            raise ValueError(f"blocks have a power of two of rows, at least 16: {self}")

    @property
    def merge(self) -> Config:
        """How the results of splits are added up."""
        return Config(16, 64, 4, 1)


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a config is for.

    arch      sm90, gfx942, ...; pass_: one of PASSES
    size      bytes of an element of q, k, v; width: the larger of D and D_v
    rows      rows of q that one program could take; keys: kv positions that a row sees at most; 0 if not known
    programs  how many there are besides splits; units: multiprocessors of the GPU
    """

    arch: str
    pass_: str
    size: int
    width: int
    rows: int = 0
    keys: int = 0
    programs: int = 1
    units: int = 1


@dataclasses.dataclass(frozen=True)
class Choice:
    """A config and where it comes from."""

    config: Config
    source: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what it is for, and the fields of its Config."""

    arch: str
    pass_: str
    size: int
    width: int
    config: Config


@functools.lru_cache(maxsize=1)
def rows() -> tuple[Row, ...]:
    """All shipped configs of tv.attention."""
    table = json.loads((resources.files(__package__) / "tables/attention.json").read_text())
    return tuple(Row(r["arch"], r["pass"], r["size"], r["width"], Config(**r["config"])) for r in table["rows"])


def few_rows(width: int) -> int:
    """Up to so many rows of a group of heads are decoded together: their sums fit the registers of four warps."""
    return 64 if width <= 128 else 32


def family(arch: str) -> str | None:
    """The architecture whose configs serve: itself, or the nearest older one with the same instructions."""
    if arch in SHARED:
        return arch
    older = {"sm87": "sm86", "sm101": "sm100", "sm103": "sm100", "sm110": "sm100", "sm121": "sm120"}
    return older.get(arch)


def choose(ask: Ask) -> list[Choice]:
    """Configs for a pass, best first; empty for an architecture without any."""
    arch = family(ask.arch)
    width = next((w for w in WIDTHS if ask.width <= w), None)
    if arch is None or width is None:
        return []
    found = [Choice(r.config, f"table {arch} {r.pass_} {r.width}") for r in rows() if _serves(r, ask, arch, width)]
    found.append(Choice(formula(arch, ask.pass_, ask.size, width), "formula"))
    return [Choice(_fitted(c.config, ask), c.source) for c in found]


def _serves(row: Row, ask: Ask, arch: str, width: int) -> bool:
    return (row.arch, row.pass_, row.size, row.width) == (arch, ask.pass_, ask.size, width)


def _fitted(c: Config, ask: Ask) -> Config:
    """No more rows than there are; for decoding, as many splits as keep the GPU busy."""
    if ask.pass_ != "decode":
        return c
    M = min(few_rows(ask.width), max(16, 1 << (max(1, ask.rows) - 1).bit_length()))
    # More rows, fewer keys at a time: as many scores as the row of the table was made for.
    c = dataclasses.replace(c, BLOCK_N=max(16, c.BLOCK_N * c.BLOCK_M // M))
    # Two programs per multiprocessor, each with four blocks at least.
    splits = min(math.ceil(2 * ask.units / max(1, ask.programs)), ask.keys // (4 * c.BLOCK_N), 128)
    return dataclasses.replace(c, BLOCK_M=M, packed=True, splits=max(1, splits))


def formula(arch: str, pass_: str, size: int, width: int) -> Config:
    """A config that fits everywhere: the block that stays takes half of a 64 KiB register file's accumulators, the
    moving blocks a third of shared memory."""
    if pass_ == "decode":
        return Config(16, 64 if size * width <= 256 else 32 if size * width <= 512 else 16, 4, 2, packed=True)
    stays = 64 if width * size <= 256 else 32 if width * size <= 512 else 16
    budget = SHARED[arch] * 1024 // 3
    moves = 64
    while moves > 16 and (moves * width * size * 2 > budget or size == 4):
        moves //= 2
    M, N = (moves, stays) if pass_ == "dkdv" else (stays, moves)
    return Config(M, N, 4, 2 if size == 2 else 1)
