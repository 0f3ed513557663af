"""Reading files that a user names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lethe_compile.errors import InputError
from lethe_compile.files import read_json, read_lines, read_text


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes('"a\u2028b\x0bc"\r\n\n  \n"d\x85"'.encode())
    assert list(read_lines(file)) == [(1, '"a\u2028b\x0bc"'), (4, '"d\x85"')]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x\.json cannot be read: No such file"),
        (b"\xff", r"x\.json is not UTF-8 text: "),
        (b"{", r"x\.json is not a sweep: it is not JSON \(.*line 1 column 2"),
    ],
)
def test_what_cannot_be_read_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(file, "a sweep")


def test_a_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
