"""E-mails of the SpamAssassin corpus as subject and body, without what says in which folder a mail was filed.

Kept are the subject, without the tags of mailing lists, and the body: text of the plain part, or of the HTML
part if there is no other. All other headers, the footers of mailing lists, header lines of servers and
filters that are quoted in a body, and e-mail addresses are removed.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from email import message_from_string
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

from .example import Example, words_of

LABELS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
"""Folder of the package -> label."""
LEAST_WORDS = 5
"""Words of the shortest mail that is used."""
KEY_WORDS = 12
"""First words of the body that mails of one campaign share."""
MOST_CHARACTERS = 20_000

_TAGS = re.compile(r"\[[^\]]{1,40}\]")
_REPLY = re.compile(r"^\s*((re|fw|fwd|aw)\s*(\[\d+\])?\s*:\s*)+", re.IGNORECASE)
_FOOTER = re.compile(r"^(_{20,}|-{20,})\s*\n(?=.*(mailing list|users' group|sf\.net|listinfo))", re.M | re.I)
_QUOTED_HEADER = re.compile(r"^[>|\s]*(X-[\w-]+|List-[\w-]+|Received|Return-Path|Delivered-To):.*$", re.M)
_ADDRESS = re.compile(r"[\w.+=-]+@[\w-]+(\.[\w-]+)*")


def read_mails(archive: Path) -> list[Example]:
    """All mails of the npm package with their labels. One that repeats an earlier one is left out."""
    mails: dict[str, Example] = {}
    for source, folder, message in _messages(archive):
        text = text_of(message)
        if len(words_of(text)) >= LEAST_WORDS:
            mails.setdefault(" ".join(words_of(text)), Example(text, LABELS[folder], source, source))
    return grouped(mails.values())


def text_of(message: str) -> str:
    """Subject and body of a mail as one text."""
    mail = message_from_string(message)
    subject = _TAGS.sub(" ", _decoded(str(mail.get("Subject", ""))))
    body = _body(mail)
    footers = list(_FOOTER.finditer(body))
    if footers:
        body = body[: footers[-1].start()]
    body = _ADDRESS.sub("<address>", _QUOTED_HEADER.sub("", body))
    text = f"{' '.join(_ADDRESS.sub('<address>', subject).split())}\n\n{_tidy(body)}"
    return text.strip()[:MOST_CHARACTERS]


def grouped(mails: Iterable[Example]) -> list[Example]:
    """The mails with a group each: mails with the same subject, or the same first words, are of one group."""
    mails = list(mails)
    parents = list(range(len(mails)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    first: dict[str, int] = {}
    for i, mail in enumerate(mails):
        for key in _keys(mail.text):
            parents[root(i)] = root(first.setdefault(key, i))
    return [replace(mail, group=mails[root(i)].source) for i, mail in enumerate(mails)]


def _keys(text: str) -> list[str]:
    """What mails of one thread or one campaign share."""
    subject, _, body = text.partition("\n\n")
    keys = []
    if subject_words := [word for word in words_of(_REPLY.sub("", subject)) if not word.isdigit()]:
        keys.append(f"subject {' '.join(subject_words)}")
    body_words = [word for word in words_of(body) if not word.isdigit()][:KEY_WORDS]
    if len(body_words) == KEY_WORDS:
        keys.append(f"body {' '.join(body_words)}")
    return keys


def _messages(archive: Path) -> Iterator[tuple[str, str, str]]:
    """(name, folder, text) of every mail of the package, by name."""
    with tarfile.open(archive) as package:
        names = [name for name in package.getnames() if re.fullmatch(r"package/data/[\w-]+/.*\.json", name)]
        members = {name: package.getmember(name) for name in names}
        # in the order of the archive, which can only be read forwards quickly
        messages = {}
        for name, member in members.items():
            file = package.extractfile(member)
            if file is not None:
                messages[name] = json.loads(file.read())
    for name in sorted(messages):
        content = messages[name]
        yield f"{content['group']}/{content['id']}", content["group"], content["text"]


def _body(mail: Message) -> str:
    """The text of the plain part, or of the HTML part if there is no other."""
    plain, html = [], []
    for part in mail.walk():
        if part.is_multipart() or part.get_content_disposition() == "attachment":
            continue
        if part.get_content_type() == "text/html":
            html.append(_text_of_html(_payload(part)))
        elif part.get_content_maintype() == "text":
            plain.append(_payload(part))
    text = "\n".join(plain)
    if text.strip():
        return text
    return "\n".join(html)


def _payload(part: Message) -> str:
    """The text of a part. Parts with a wrong or unknown encoding are read as Latin-1."""
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        return ""
    try:
        return content.decode(part.get_content_charset() or "latin-1")
    except (LookupError, UnicodeDecodeError):
        return content.decode("latin-1")


def _decoded(header: str) -> str:
    """A header in which =?charset?...?= was decoded, if it can be."""
    try:
        return str(make_header(decode_header(header)))
    except (LookupError, UnicodeError, HeaderParseError, ValueError):
        return header


def _tidy(text: str) -> str:
    """Without repeated spaces and empty lines."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _Text(HTMLParser):
    """Collects the text of a page, without scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self._hidden += 1
        elif tag in ("br", "p", "div", "tr", "li", "td"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style") and self._hidden:
            self._hidden -= 1

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def _text_of_html(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts)
