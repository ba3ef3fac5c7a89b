"""What a user can set. The only file that reads environment variables."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREFIX = "tv."
CHOICES = {
    "codegen": ("inductor", "none"),
    "log": ("", "report", "diff"),
    "selfcheck": ("on", "off"),
    "tune": ("none", "quick", "full"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of backend "tv"; in `torch.compile(options=...)` they carry the prefix `tv.`.

    strict     an internal error raises; by default the graph falls back to stock Inductor with a warning
    codegen    "inductor", or "none" to run the rewritten ATen graph eagerly (tests, debugging)
    selfcheck  "off" trusts GPU kernels without their check on this GPU
    tune       "quick" or "full" searches for faster configs while it compiles (environment: TVCOMPILE_TUNE)
    log        "report" or "diff" prints what was done as it compiles (environment: TVCOMPILE_LOG)
    """

    strict: bool = False
    codegen: str = "inductor"
    log: str = ""
    selfcheck: str = "on"
    tune: str = "none"

    def __post_init__(self):
        if not isinstance(self.strict, bool):
            raise ValueError(f"tv.strict must be True or False; got {self.strict!r}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"tv.{name} must be one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}"
                )

    @staticmethod
    def parse(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
        """(ours, Inductor's). Raises ValueError for an unknown `tv.` option."""
        given = dict(options or {})
        ours = {k[len(PREFIX) :]: given.pop(k) for k in list(given) if k.startswith(PREFIX)}
        known = {f.name: f for f in dataclasses.fields(Options)}
        if unknown := sorted(set(ours) - set(known)):
            names = ", ".join(PREFIX + n for n in sorted(known))
            raise ValueError(f"unknown option {PREFIX}{unknown[0]}; the options of backend 'tv' are {names}")
        return Options(**{**from_environment(), **ours}), given


def cache_folder() -> Path:
    """Where what is known of this machine is kept: TVCOMPILE_CACHE_DIR, or tvcompile in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TVCOMPILE_CACHE_DIR") or f"{base}/tvcompile").expanduser()


def compiling_environment() -> dict[str, str]:
    """The environment of a process that compiles kernels, also where this one interprets them."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def from_environment() -> dict[str, str]:
    return {name: value for name in ("log", "tune") if (value := os.environ.get(f"TVCOMPILE_{name.upper()}"))}
