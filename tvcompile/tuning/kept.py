"""Rows of JSON in a file that many processes read and write.

    verdicts = Kept(folder / "selfcheck.json")
    verdicts.update({"fwd 128": ""})        # merged with what other processes wrote meanwhile
    verdicts.rows()                          # {"fwd 128": ""}

A write goes to a file of its own that then takes the old one's place, so a reader always sees a whole file. Writers
take turns by a lock, so nothing that two of them add at once is lost.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

SCHEMA = 1
PATIENCE = 10.0  # seconds that a writer waits for another


class Kept:
    """Rows by key in a JSON file, the latest last; `most` of them, the oldest go."""

    def __init__(self, path: Path, most: int = 2000):
        self.path, self.most = path, most

    def rows(self) -> dict[str, Any]:
        """What the file holds: nothing where there is none; a corrupt one is warned of and counts as none."""
        try:
            return self.parsed()
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"[:200]
        warnings.warn(f"tvcompile: {self.path} is ignored and will be written anew ({why})", stacklevel=3)
        return {}

    def parsed(self) -> dict[str, Any]:
        """What the file holds. Raises what reading, parsing and another schema raise."""
        held = json.loads(self.path.read_text(encoding="utf-8"))
        if held["schema"] != SCHEMA:
            raise ValueError(f"its schema is {held['schema']}, not {SCHEMA}")
        return dict(held["rows"])

    def update(self, rows: Mapping[str, Any]) -> bool:
        """Adds rows, in the place of those of their keys; whether they could be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=PATIENCE):
                held = self._quietly()
                merged = {**{k: v for k, v in held.items() if k not in rows}, **rows}
                self.write(dict(list(merged.items())[-self.most :]))
            return True
        except (OSError, Timeout) as error:
            warnings.warn(f"tvcompile: {self.path} could not be written: {error}", stacklevel=3)
            return False

    def _quietly(self) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.rows()

    def write(self, rows: Mapping[str, Any]) -> None:
        """These rows and no others. Raises OSError."""
        with _replaced(self.path) as file:
            json.dump({"schema": SCHEMA, "rows": rows}, file, indent=1)


@contextmanager
def _replaced(path: Path) -> Iterator[Any]:
    """A file to write that takes the place of `path` when it is complete."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
