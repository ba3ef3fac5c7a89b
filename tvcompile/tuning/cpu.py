"""How the CPU kernels are tiled, what that is asked for, and what a search may try.

Ask(Device.of(q.device), "fwd", "float32", "scale=1; keep = kv <= q", B=1, H=8, H_kv=2, S_q=2048, S_kv=2048, D=128)

The formula is the default of every field: the kernels then decide by the problem's sizes and masks themselves. Keys
hold the whole text of a Spec, without its scale: on a CPU it is what is computed for a mask that takes the time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

from ..spec import AttentionSpec
from . import ask
from .ask import bucket

PASSES = ("fwd", "bwd")
KERNELS = ("cpu.products", "cpu.flash")
SOURCES = ("kernels/tiles.py", "kernels/masks.py", "kernels/mods.py")


@dataclasses.dataclass(frozen=True)
class Config:
    """How attention is cut into tiles.

    kernel    which one of KERNELS serves, where it can; "": as the formula has it
    BLOCK_M   rows of q in a tile; 0: whatever costs least, and all rows at once where the kernel takes them
    scores    that a tile holds at once
    """

    kernel: str = ""
    BLOCK_M: int = 0
    scores: int = 1 << 19

    def __post_init__(self) -> None:
        if self.kernel not in ("", *KERNELS):
            raise ValueError(f"the kernels of the CPU are {', '.join(KERNELS)}: {self}")
        if self.BLOCK_M < 0 or self.scores < 1:
            raise ValueError(f"a tile has at least a row and a score: {self}")


@dataclasses.dataclass(frozen=True)
class Ask(ask.Ask):
    """What a config of attention is for.

    pass_    one of PASSES; work: text of the Spec; wanted: whether captures need a gradient
    B, ...   sizes, as the op has them
    """

    op = "cpu.attention"
    answer = Config
    sources = ("kernels/cpu.py", "kernels/cpu_flash.py", *SOURCES)

    work: str = "scale=1"
    B: int = 1
    H: int = 1
    H_kv: int = 1
    S_q: int = 0
    S_kv: int = 0
    D: int = 64
    D_v: int = 64
    wanted: bool = False

    @property
    def problem(self) -> str:
        lengths = f"B{bucket(self.B)} M{bucket(self.S_q)} N{bucket(self.S_kv)}"
        sizes = f"H={self.H} H_kv={self.H_kv} D={self.D} D_v={self.D_v} {lengths}"
        return f"{sizes} {self.work}" + " +dcaptures" * self.wanted

    def formula(self) -> list[Config]:
        return [Config()]

    def candidates(self) -> list[Config]:
        """Both kernels by heights of tiles, products also by how many scores are held at once."""
        found = [Config(), Config("cpu.flash"), *(Config("cpu.flash", M) for M in (64, 128, 256) if M < self.S_q)]
        heights = (0, *(M for M in (32, 64, 128, 256) if M < self.S_q))
        products = [Config("cpu.products", M) for M in heights]
        return found + products + [Config("cpu.products", M, 1 << n) for M, n in itertools.product((0, 128), (17, 21))]


@functools.lru_cache(maxsize=1024)
def work_of(spec: AttentionSpec) -> str:
    """The text of a Spec whose scale does not matter."""
    return str(dataclasses.replace(spec, scale=1.0))


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """How a mixture of experts is cut.

    batch   activations of the experts that backward takes together, unless one has more
    chunk   activations per thread that are computed at a time: a few such tensors stay in cache; 0: all at once
    """

    batch: int = 1 << 20
    chunk: int = 1 << 17

    def __post_init__(self) -> None:
        if self.batch < 1 or self.chunk < 0:
            raise ValueError(f"a batch and a chunk have at least one activation, or a chunk all (0): {self}")

    @property
    def whole(self) -> ExpertConfig:
        """For a compiler that cuts by itself."""
        return ExpertConfig(chunk=0)


@dataclasses.dataclass(frozen=True)
class ExpertAsk(ask.Ask):
    """What a config of tv::moe is for: pass_ is bwd, Inductor cuts forward by itself; work: text of the Spec.

    Sizes as experts.py has them.
    """

    op = "cpu.moe"
    answer = ExpertConfig
    kernels = "cpu_experts", "cpu_fused", "cpu_products", "experts", "cpu"
    sources = (*(f"kernels/{name}.py" for name in kernels), *SOURCES)

    work: str = "act = u"
    T: int = 0
    K: int = 1
    E: int = 1
    H: int = 0
    F: int = 0
    H_out: int = 0
    stacked: bool = True

    @property
    def problem(self) -> str:
        sizes = f"T{bucket(self.T)} K={self.K} E={self.E} H={self.H} F={self.F} H_out={self.H_out}"
        return f"{sizes} {self.work}" + " listed" * (not self.stacked)

    def formula(self) -> list[ExpertConfig]:
        return [ExpertConfig()]

    def candidates(self) -> list[ExpertConfig]:
        steps = itertools.product((20, 17, 19, 22), (16, 15, 17, 19))
        return [ExpertConfig(1 << batch, 1 << chunk) for batch, chunk in steps]
