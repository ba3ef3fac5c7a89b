"""The kernels, in the order they are asked. Importing this package registers the ops of `tv`."""

import importlib.util

from . import cpu, cpu_experts, cpu_flash
from .experts import ExpertKernel
from .problem import Kernel, Problem

KERNELS: tuple[Kernel, ...] = (cpu_flash.KERNEL, cpu.KERNEL)
MOE_KERNELS: tuple[ExpertKernel, ...] = (cpu_experts.KERNEL,)
if importlib.util.find_spec("triton"):
    from . import flash, moe_triton

    KERNELS += (flash.KERNEL,)
    MOE_KERNELS += (moe_triton.KERNEL,)

from . import attention, moe  # noqa: E402  they register the ops, which look through the kernels

__all__ = ["KERNELS", "Kernel", "MOE_KERNELS", "Problem", "attention", "moe"]
