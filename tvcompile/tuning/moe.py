"""Which Config a product of tv::moe gets, by a closed formula of the architecture and the rows of an expert.

    choose(Ask(Device.typical("sm90"), "up", "bfloat16", rows=384))[0] -> Config(128, 256, 64, 8, 3, descriptors=True)

BLOCK_M   follows the rows m that an expert has on average, T*K / E: it is streamed through the weights once
BLOCK_N   with few rows, what a program reads of the weights at a time; else what fills the registers with sums
stages    as many as shared memory holds, four at most
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from ..arch import Device, family
from . import ask

PASSES = ("up", "down", "dact", "dx", "dw")


@dataclasses.dataclass(frozen=True)
class Config:
    """How a grouped product is tiled.

    BLOCK_M, BLOCK_N, BLOCK_K   rows and columns of the result (g and u together), and of the sum that a trip adds
    num_warps, num_stages       warps of a program; tiles in flight
    descriptors                 whether what is not gathered comes through tensor descriptors (TMA)
    specialize                  whether also what is gathered does, and loads and products run in warps of their own
    halved                      whether a trip takes its BLOCK_K in two steps, whose loads share addresses
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    specialize: bool = False
    halved: bool = False

    def __post_init__(self) -> None:
        if any(n & (n - 1) or n < 16 for n in (self.BLOCK_M, self.BLOCK_N, self.BLOCK_K)):
            raise ValueError(f"blocks are powers of two, at least 16: {self}")
        if self.halved and self.BLOCK_K < 32:
            raise ValueError(f"half of BLOCK_K is at least 16: {self}")


@dataclasses.dataclass(frozen=True)
class Ask(ask.Ask):
    """What a config is for.

    pass_    one of PASSES; rows: of an expert on average, 0 if not known
    E, N, K  experts, columns of the result and length of the sums; top: experts per token; 0 if not known
    listed   whether experts are tensors of their own
    narrow   whether rows in memory begin at no multiple of 16 elements, so that these are loaded one by one
    """

    op = "moe"
    answer = Config
    sources = tuple(f"kernels/{x}.py" for x in ("grouped*", "moe_triton", "routing", "launch", "mint")) + ("derive.py",)

    rows: int = 0
    E: int = 0
    N: int = 0
    K: int = 0
    top: int = 0
    listed: bool = False
    narrow: bool = False

    @property
    def problem(self) -> str:
        how = " listed" * self.listed + " narrow" * self.narrow
        return f"E={self.E} N={self.N} K={self.K} top={self.top} M{ask.bucket(self.rows)}{how}"

    def formula(self) -> list[Config]:
        """The best, and the plainest, by pointers alone."""
        if self.arch is None:
            return []
        rows = self.rows or 128
        found = [formula(self.device, self.pass_, self.size, rows, plain) for plain in (False, True)]
        if self.narrow:
            # Each element on its way takes a register, and one of them or two for where it lies.
            side = 128 // self.size
            found = [Config(min(row_block(rows), side), side, side // 2, 4, 2)] * 2
        return [self.shrunk(config) for config in found]

    def shrunk(self, config: Config) -> Config:
        """Fewer columns where tiles are more than the device has room for, as no device of today asks for."""
        while not self.fits(config) and config.BLOCK_N > 32:
            config = dataclasses.replace(config, BLOCK_N=config.BLOCK_N // 2)
        return config

    def fits(self, config: Config) -> bool:
        """By the bytes of the tiles in flight, of which one lies in registers before Hopper."""
        tiles = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * self.size
        held = (config.num_stages + 1) // 2 if self.pass_ == "dw" else config.num_stages
        return (held - in_registers(self.device)) * tiles + 1024 <= self.device.shared

    def candidates(self) -> list[Config]:
        """Tiles around the formula's; the formula's configs are the first."""
        return list(dict.fromkeys([*self.formula(), *filter(self._plausible, self._tiles())]))

    def _tiles(self) -> Iterator[Config]:
        arch = self.arch or ""
        able = arch in ("sm90", "sm100") and self.size == 2
        usual = 128 if self.pass_ == "dw" else row_block(self.rows or 128)
        sides = [M for M in (usual // 2, usual, 2 * usual) if 16 <= M <= 128]
        for M, N, K, warps in itertools.product(sides, (64, 128, 256), (32, 64, 128), (4, 8)):
            most = stages(self.device, (M + N) * K * self.size, self.pass_ == "dw")
            for flight, described in itertools.product({most, max(2, most - 1)}, (False, True)[: 1 + able]):
                yield Config(M, N, K, warps, flight, described)
                if K * self.size >= 128 and halvable(self.device, self.pass_):
                    yield Config(M, N, K, warps, flight, halved=True)
                if described and arch == "sm100" and M == 128 and self.pass_ != "dw":
                    yield Config(M, N, K, warps, flight, True, True)

    def _plausible(self, c: Config) -> bool:
        """Whether a config is worth compiling: 16 rows or columns for a warp, sums and tiles that can have a place."""
        lanes = c.num_warps * (64 if self.device.arch.startswith("gfx") else 32)
        sums = c.BLOCK_M * c.BLOCK_N / lanes
        spare = 0 if self.arch in ("sm90", "sm100") else 1
        tiles = (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K * self.size
        held = (c.num_stages - spare) * tiles / (2 if self.pass_ == "dw" else 1)
        return 8 <= sums <= 160 and held <= self.device.shared


def formula(device: Device, pass_: str, size: int, rows: int, plain: bool = False) -> Config:
    """plain: by pointers alone, where the best takes descriptors; 256 columns would spill then."""
    arch = family(device.arch)
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
    flight = stages(device, (M + N) * K * size, pass_ == "dw")
    return Config(M, N, K, warps, flight, described, apart, size == 2 and halvable(device, pass_))


def halvable(device: Device, pass_: str) -> bool:
    """Whether two steps of a trip save instructions: those that move addresses are many beside those that multiply."""
    return pass_ != "dw" and not device.arch.startswith("gfx") and in_registers(device) > 0


def row_block(m: int) -> int:
    """BLOCK_M for m rows of an expert: up to twice as many where they are few, since experts are never equally busy."""
    if m <= 64:
        return max(16, min(_power(2 * m), 64))
    return min(_power(m), 128)


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def stages(device: Device, tiles: int, chained: bool) -> int:
    """num_stages for tiles of so many bytes; chained: the loop also loads which rows it takes, a stage before them."""
    if device.arch.startswith("gfx"):
        return 2
    held = min(4, (device.shared - 1024) // tiles + in_registers(device))
    return max(2, 2 * held - 1 if chained else held)


def in_registers(device: Device) -> int:
    """Of the tiles in flight, those that do not lie in shared memory."""
    return 0 if family(device.arch) in ("sm90", "sm100") else 1
