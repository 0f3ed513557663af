"""Files that a user names: what cannot be read, or is not what it should be, is said with the file's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lethe_compile.errors import InputError


def read_text(path: str | Path) -> str:
    """UTF-8 text.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank. Only line feeds end one: JSON may hold other separators.

    Raises:
        InputError: as `read_text`.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, line


def read_json(path: str | Path, what: str) -> Any:
    """The value in a file; `what`, such as "a sweep", is what it should have been.

    Raises:
        InputError: the file cannot be read, or is not JSON; names line and column.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not {what}: it is not JSON ({error})") from error
