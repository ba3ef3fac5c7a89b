"""The kernels, in the order they are asked. Importing this package registers the ops of `tv`."""

from .cpu import PRODUCTS
from .problem import Kernel, Problem

KERNELS: tuple[Kernel, ...] = (PRODUCTS,)

from . import attention  # noqa: E402  registers the op, which looks through KERNELS

__all__ = ["KERNELS", "Kernel", "Problem", "attention"]
