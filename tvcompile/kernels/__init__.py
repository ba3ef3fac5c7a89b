"""The kernels, in the order they are asked. Importing this package registers the ops of `tv`."""

import importlib.util

from . import cpu, cpu_flash
from .problem import Kernel, Problem

KERNELS: tuple[Kernel, ...] = (cpu_flash.KERNEL, cpu.KERNEL)
if importlib.util.find_spec("triton"):
    from . import flash

    KERNELS += (flash.KERNEL,)

from . import attention  # noqa: E402  registers the op, which looks through KERNELS

__all__ = ["KERNELS", "Kernel", "Problem", "attention"]
