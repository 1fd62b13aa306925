"""Reads text files piece by piece: UTF-8 with or without a byte order mark, and with any line ends."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 20
"""Bytes that are read at once."""
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32: save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16: save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16: save it as UTF-8"),
    (b"\x1f\x8b", "compressed (gzip): unpack it"),
    (b"PK\x03\x04", "compressed (zip): unpack it"),
)
"""First bytes of files in other formats, and what to do with them."""


def decode(path: Path) -> str:
    """The text of a file, with \n as line ends. Raises ValueError if it is not UTF-8 text."""
    return "".join(text_chunks(path))


def text_chunks(path: Path) -> Iterator[str]:
    """The text of a file in parts, with \n as line ends. Raises ValueError, with the position, where it is
    not UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    characters = 0
    for position, content in _bytes(path):
        undecoded = len(decoder.getstate()[0])
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 text (byte {position - undecoded + error.start})") from None
        if (zero := text.find("\0")) >= 0:
            at = characters + zero
            raise ValueError(f"is not text: character {at} is a zero, as in binary files and in UTF-16")
        characters += len(text)
        yield line_ends.decode(text, final=not content)


def _bytes(path: Path) -> Iterator[tuple[int, bytes]]:
    """(position, content) of the parts of a file without its byte order mark; the last part is empty."""
    with path.open("rb") as file:
        content = file.read(CHUNK_BYTES)
        for mark, encoding in ENCODINGS:
            if content.startswith(mark):
                raise ValueError(f"is not UTF-8 text (byte 0): it is {encoding}")
        position = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
        content = content[position:] or file.read(CHUNK_BYTES)
        while content:
            yield position, content
            position += len(content)
            content = file.read(CHUNK_BYTES)
        yield position, b""


def lines_of(chunks: Iterable[str]) -> Iterator[str]:
    """The lines of a text without their ends. Only \n ends a line: U+2028 and similar characters occur
    unescaped in JSON text."""
    begun: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if last := "".join(begun):
        yield last


def paragraphs_of(lines: Iterable[str]) -> Iterator[str]:
    """The parts of a text between blank lines; one empty part if there is none."""
    paragraph: list[str] = []
    count = 0
    for line in lines:
        if line:
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph, count = [], count + 1
    if paragraph or not count:
        yield "\n".join(paragraph)
