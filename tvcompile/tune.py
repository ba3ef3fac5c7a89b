"""The static model on the command line; see tuning/static_report.py."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from .tuning import static_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    static_report.add_arguments(parser)
    return static_report.run(parser.parse_args(), Console())


if __name__ == "__main__":
    sys.exit(main())
