"""python -m tvcompile doctor | tune ...: what is there and what is missing; faster configs for this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """usage: tvcompile doctor          versions, processors, configs, the cache; what is missing, what to do
       tvcompile tune ...        searches configs for this machine (tvcompile tune --help)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name == "doctor" and not rest:
        from rich.console import Console

        from .doctor import doctor

        return doctor(Console())
    if name == "tune":
        from .tune import main as tune

        return tune(rest)
    asked = name in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
