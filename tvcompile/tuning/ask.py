"""What every Ask has in common, whatever kernel it is for."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ..arch import Device, family

UNITS = 32  # multiprocessors that count as a class


def bucket(n: int) -> str:
    """The length class of n: the next power of two; `any` where n is not known."""
    return f"<={1 << (n - 1).bit_length()}" if n > 0 else "any"


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a config is for: the device, the pass and the dtype; subclasses add the problem.

    op        the operator, first word of every key
    answer    the type of its configs
    sources   files of the package that decide how fast a config is: with others, what was measured is stale
    """

    op: ClassVar[str]
    answer: ClassVar[type]
    sources: ClassVar[tuple[str, ...]] = ("kernels/*.py",)

    device: Device
    pass_: str
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}[self.dtype]

    @property
    def arch(self) -> str | None:
        """The architecture whose configs serve this device."""
        return self.device.arch if self.device.arch == "cpu" else family(self.device.arch)

    @property
    def problem(self) -> str:
        """The part of the key that the operator adds: sizes and classes."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """What a measurement is kept under. Versions and the source of the kernels are in the name of its file."""
        if self.device.arch == "cpu":
            return f"{self.op} {self.pass_} {self.device.units} threads {self.dtype} {self.problem}"
        units = -(-self.device.units // UNITS) * UNITS
        return f"{self.op} {self.pass_} {self.device.shared}B units<={units} {self.dtype} {self.problem}"

    def formula(self) -> list[Any]:
        """Configs by closed formulas, the best first; none where no config can serve."""
        raise NotImplementedError

    def candidates(self) -> list[Any]:
        """Every config that a search may try, the formula's among them."""
        raise NotImplementedError

    def fitted(self, config: Any) -> Any:
        """A config of a class of problems, as this one of them takes it."""
        return config

    def fits(self, config: Any) -> bool:
        """Whether the device has the shared memory that a config takes."""
        return True
