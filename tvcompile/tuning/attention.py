"""What the config of an attention kernel is asked for, the closed formula, and what a search may try.

Ask(Device.of(q.device), "fwd", "bfloat16", 128, 128, work_of(spec), rows=4096, keys=4096)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

from .. import expr as E
from ..spec import AttentionSpec
from . import ask

PASSES = ("fwd", "dq", "dkdv", "decode")
WIDTHS = (64, 128, 256)  # features of a head that rows are made for


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
        M, N = self.BLOCK_M, self.BLOCK_N
        if M & (M - 1) or N & (N - 1) or min(M, N) < 16:
            raise ValueError(f"blocks have a power of two of rows, at least 16: {self}")

    @property
    def merge(self) -> Config:
        """How the results of splits are added up."""
        return Config(16, 64, 4, 1)


def few_rows(width: int, size: int) -> int:
    """Up to so many rows of a group of heads are decoded together: their sums fit the registers of four warps.

    width: features of a head; size: bytes of a number
    """
    return 64 if width * size <= 256 else 32


@functools.lru_cache(maxsize=1024)
def work_of(spec: AttentionSpec) -> str:
    """What a kernel does besides its products, as far as it may change the choice: a mask's class and what is edited.

    mask    full | causal | window (each row sees a bounded range) | data (it loads captures) | mask
    edits   +score a formula of s, +bias it loads captures, +dropout, +sink, +mean rows without keys average
    """
    keep = spec.keep
    if keep == E.TRUE:
        mask = "full"
    elif E.loads(keep):
        mask = "data"
    elif keep == E.le(E.KV, E.Q):
        mask = "causal"
    else:
        mask = "mask"
    bias = "+bias" if E.loads(spec.score) else "+score" if spec.score != E.S else ""
    edits = [bias, "+dropout" * bool(spec.dropout), "+sink" * (spec.sink is not None)]
    return mask + "".join(edits) + "+mean" * (spec.empty in ("mean", "mean_cut"))


@dataclasses.dataclass(frozen=True)
class Ask(ask.Ask):
    """What a config is for.

    pass_     one of PASSES; D, D_v: features of k and of v; work: see work_of
    rows      of q that one program could take; keys: kv positions that a row sees at most; 0 if not known
    programs  how many there are besides splits
    """

    op = "attention"
    answer = Config
    sources = tuple(f"kernels/{x}.py" for x in ("flash*", "blocks", "data", "dropout", "launch", "mint")) + (
        "bounds.py",
        "derive.py",
    )

    D: int = 64
    D_v: int = 64
    work: str = "causal"
    rows: int = 0
    keys: int = 0
    programs: int = 1

    @property
    def width(self) -> int:
        """The width class of its heads; 0 if they are wider than any."""
        return next((w for w in WIDTHS if max(self.D, self.D_v) <= w), 0)

    @property
    def mask(self) -> str:
        """full, causal, mask or data."""
        return self.work.partition("+")[0]

    @property
    def edits(self) -> frozenset[str]:
        """Of score, bias, dropout, sink, mean."""
        return frozenset(self.work.split("+")[1:])

    @property
    def plain(self) -> bool:
        """Whether scores stay as they are, and no data says what is kept."""
        return not self.edits and self.mask != "data"

    @property
    def row(self) -> int:
        """Bytes of a row of a head."""
        return self.width * self.size

    @property
    def amd(self) -> bool:
        return self.device.arch.startswith("gfx")

    @property
    def problem(self) -> str:
        sizes = f"D={self.D} D_v={self.D_v} {self.work} M{ask.bucket(self.rows)} N{ask.bucket(self.keys)}"
        # How far kv is to be split depends on the programs that there are without.
        return sizes + (f" P{ask.bucket(self.programs)}" if self.pass_ == "decode" else "")

    def fitted(self, config: Config) -> Config:
        """For decoding no more rows than there are, and as many splits as keep the GPU busy."""
        if self.pass_ != "decode":
            return config
        M = min(few_rows(self.width, self.size), max(16, 1 << (max(1, self.rows) - 1).bit_length()))
        # More rows, fewer keys at a time: as many scores as the row of the table was made for.
        config = dataclasses.replace(config, BLOCK_N=max(16, config.BLOCK_N * config.BLOCK_M // M))
        # Two programs per multiprocessor, each with four blocks at least.
        splits = min(math.ceil(2 * self.device.units / max(1, self.programs)), self.keys // (4 * config.BLOCK_N), 128)
        return dataclasses.replace(config, BLOCK_M=M, packed=True, splits=max(1, splits))

    def formula(self) -> list[Config]:
        if self.arch is None or not self.width:
            return []
        return [formula(self)]

    def candidates(self) -> list[Config]:
        """Tiles that can fit the registers and shared memory; the formula's config is the first."""
        found = [c for c in _tiles(self.arch or "", self.pass_, self.width) if self._plausible(c)]
        # A row of a table serves many lengths: splits are found when it is used.
        return list(dict.fromkeys([*self.formula(), *found]))

    def _plausible(self, c: Config) -> bool:
        """Whether a config is worth compiling: 16 rows or more for a warp, sums and blocks that can have a place."""
        stays, moves = (c.BLOCK_N, c.BLOCK_M) if self.pass_ == "dkdv" else (c.BLOCK_M, c.BLOCK_N)
        if self.pass_ != "decode" and stays < 16 * min(c.num_warps, 4):
            return False
        sums = stays * self.width * (2 if self.pass_ == "dkdv" else 1) + c.BLOCK_M * c.BLOCK_N
        # What comes to AMD's shared memory comes through registers, of which it compiles for minutes if there are many.
        if self.amd and moves * self.width > 8192:
            return False
        # A thread of NVIDIA has 255 registers, one of AMD 512; Blackwell's sums have memory of their own.
        each = sums / (c.num_warps * (64 if self.amd else 32))
        held = (c.num_stages - (0 if self.arch in ("sm90", "sm100") else 1)) * moves * 2 * self.width * self.size
        return each <= 256 and held <= self.device.shared


def _tiles(arch: str, pass_: str, width: int) -> list[Config]:
    """Every combination of what a pass may take on an architecture."""
    amd, described = arch.startswith("gfx"), arch in ("sm90", "sm100", "sm120")
    stages = (1, 2) if amd or arch == "sm120" else (2, 3)
    if pass_ == "decode":
        sides: list[tuple[int, int]] = [(16, n) for n in (16, 32, 64, 128)]
        return [Config(*tile, w, s, packed=True) for tile in sides for w in (2, 4, 8) for s in (1, *stages)]
    stay, move = (32, 64, 128), (16, 32, 64, 128)
    sides = [(m, n) for m in move for n in stay] if pass_ == "dkdv" else [(m, n) for m in stay for n in move[1:]]
    backward = pass_ in ("dq", "dkdv")
    found = []
    for tile, warps, flight in itertools.product(sides, (4, 8), (1, 2) if backward else stages):
        for by_descriptor, hoist in itertools.product((False, True)[: 1 + described], (True, False)[: 1 + backward]):
            c = Config(*tile, warps, flight, by_descriptor, hoist=hoist)
            found.append(c)
            if arch == "sm100" and by_descriptor and pass_ in ("fwd", "dkdv"):
                found.append(dataclasses.replace(c, specialize=True))
    return found


def formula(asked: Ask) -> Config:
    """A config that fits everywhere: the block that stays takes a quarter of a 64 KiB register file's accumulators, the
    moving blocks a third of shared memory.

    What edits scores takes registers for each score that a thread holds, and so does in backward what reads data: then
    256 threads share 32 x 32 of them, or 32 x 16 in backward. AMD's warps have 64 threads.
    """
    return {"fwd": _fwd, "dq": _dq, "dkdv": _dkdv, "decode": _decode}[asked.pass_](asked)


def _fwd(a: Ask) -> Config:
    if a.size == 4 and (a.edits or a.row <= 256):
        # Products of float32 are multiplications, whose operands lie in registers.
        return Config(*((32, 32) if a.row <= 256 else (16, 16)), _warps(a), 1)
    tile = (32, 32) if a.edits else _sides(a)
    return Config(*tile, _warps(a), 2 if a.size == 2 else 1)


def _dq(a: Ask) -> Config:
    if not a.plain and a.size == 2 and a.row > 256:
        return Config(16, 32, 4, 1)
    if a.size == 4 and "mean" in a.edits:
        return Config(16, 32 if a.row > 512 and not a.amd else 16, _warps(a), 1)
    tile = _sides(a) if a.plain else (32, 16)
    return Config(*tile, _warps(a), 2 if a.size == 2 else 1)


def _dkdv(a: Ask) -> Config:
    if a.arch == "gfx950" and a.row > 512:
        return Config(16, 16 if a.plain else 32, 4, 2)  # with one stage it spills there
    # Sums and two blocks in flight of AMD share the registers of a thread.
    stages = 2 if a.size == 2 and not a.amd else 1
    if not a.plain:
        return Config(16, 32 if a.row <= 256 else 16, _warps(a), stages, hoist=False)
    stays, moves = _sides(a)
    # dK and dV are two sums that stay.
    return Config(min(moves, 32), min(stays, 32), _warps(a), stages, hoist=a.amd)


def _decode(a: Ask) -> Config:
    if a.size == 4:
        return Config(16, 32 if a.row <= 512 else 16, 4 if a.row <= 256 else _warps(a), 1, packed=True)
    return Config(16, 64 if a.row <= 128 + 128 * a.plain else 32, 4, 2, packed=True)


def _warps(a: Ask) -> int:
    """Of 256 threads."""
    return 4 if a.amd else 8


def _sides(a: Ask) -> tuple[int, int]:
    """Rows that stay, and rows of a moving block."""
    stays = 64 if a.row <= 256 else 32 if a.row <= 512 else 16
    moves = 64
    while moves > 16 and (moves * a.row * 2 > a.device.shared // 3 or a.size == 4):
        moves //= 2
    return stays, moves
