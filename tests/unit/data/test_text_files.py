"""Text is the same in pieces of any size, and errors name the same places."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.data import text_files
from flora_train.data.text_files import decode, lines_of, paragraphs_of, text_chunks

TEXTS = st.text(st.sampled_from("ab\r\n\u00fc\u2028\U0001f600 "), max_size=12)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text") / "a.txt"


@pytest.fixture(scope="module", autouse=True)
def pieces() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK_BYTES", 3)
        yield


@given(text=TEXTS, mark=st.booleans())
def test_a_text_in_pieces_is_the_whole_text_with_one_kind_of_line_end(
    path: Path, text: str, mark: bool
) -> None:
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    whole = text.replace("\r\n", "\n").replace("\r", "\n")
    assert decode(path) == whole
    lines = whole.split("\n")
    if not lines[-1]:
        lines.pop()
    assert list(lines_of(text_chunks(path))) == lines
    assert list(paragraphs_of(lines_of(text_chunks(path)))) == re.split(r"\n{2,}", whole.strip("\n"))


@given(before=TEXTS, after=TEXTS)
def test_errors_name_the_byte_or_the_character_wherever_pieces_end(
    path: Path, before: str, after: str
) -> None:
    path.write_bytes(before.encode() + b"\xff" + after.encode())
    with pytest.raises(ValueError, match=rf"is not UTF-8 text \(byte {len(before.encode())}\)"):
        decode(path)
    path.write_bytes(f"{before}\0{after}".encode())
    with pytest.raises(ValueError, match=rf"is not text: character {len(before)} is a zero"):
        decode(path)


def test_a_character_that_the_file_cuts_off_is_an_error(path: Path) -> None:
    path.write_bytes(b"abcde\xf0\x9f")
    with pytest.raises(ValueError, match=r"\(byte 5\)"):
        decode(path)
