"""Licences of a package's files, from Debian's machine-readable copyright files.

Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/ ("DEP-5"). The file names
source-tree paths, and a package holds installed paths, so patterns are matched loosely: by every tail of
the pattern against every tail of the path. A file is kept only if *every* stanza that might be about it
allows a permissive licence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

# Debian's spelling in lower case -> SPDX, best liked first where a choice is given.
# Perl's usual "Artistic or GPL-1+" is used under the Artistic licence.
PERMISSIVE = {
    "expat": "MIT",
    "mit": "MIT",
    "mit/x": "MIT",
    "mit/x11": "MIT",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "isc": "ISC",
    "apache-2.0": "Apache-2.0",
    "artistic-2.0": "Artistic-2.0",
    "artistic": "Artistic-1.0-Perl",
    "artistic-1.0": "Artistic-1.0-Perl",
    "ruby": "Ruby",
    "bsl-1.0": "BSL-1.0",
    "boost-1.0": "BSL-1.0",
    "zlib": "Zlib",
    # LDC's word for the licence of the University of Illinois
    "llvm": "NCSA",
}
# what the text behind a short name must say; Debian calls a few other texts "Expat"
_EXPECTED_WORDS = {
    "MIT": "permission is hereby granted, free of charge",
    "BSD-2-Clause": "redistribution and use",
    "BSD-3-Clause": "redistribution and use",
    "ISC": "permission to use, copy, modify",
}
SHORTEST_LICENCE_TEXT = 400
_PREFERENCE = list(dict.fromkeys(PERMISSIVE.values()))

_OTHER_LICENCE = re.compile(
    r"\b(?:[AL]?GPL(?:v?\d)?|GNU (?:Lesser |Library |Affero )?General Public|Creative Commons|CC[- ]BY|"
    r"Mozilla Public|Eclipse Public)\b",
    re.IGNORECASE,
)
_PERL_TERMS = re.compile(r"Artistic|same terms as (?:the )?Perl|under the same terms as", re.IGNORECASE)


@dataclass(frozen=True)
class Stanza:
    """One `Files:` paragraph."""

    patterns: tuple[str, ...]
    licence: str
    holders: tuple[str, ...]


@dataclass(frozen=True)
class CopyrightFile:
    """A parsed copyright file; `source` is where upstream publishes the code."""

    source: str
    stanzas: tuple[Stanza, ...]

    def stanzas_for(self, path: str) -> list[Stanza]:
        """Every stanza that may be about the installed file `path`, the most specific (last) one last."""
        upstream = [s for s in self.stanzas if not all(p.startswith("debian/") for p in s.patterns)]
        return [s for s in upstream if any(pattern_may_match(pattern, path) for pattern in s.patterns)]

    def licence_of(self, path: str) -> str | None:
        """SPDX name to use `path` under, or None when any stanza about it allows no permissive licence."""
        allowed = [permissive_choice(stanza.licence) for stanza in self.stanzas_for(path)]
        return allowed[-1] if allowed and None not in allowed else None


def permissive_choice(expression: str) -> str | None:
    """The permissive SPDX licence to take from a DEP-5 expression; None when there is none.

    `, and` binds weakest, then `or`, then `and`:
    "Artistic or GPL-1+, and Expat" gives "Artistic-1.0-Perl AND MIT".
    """
    joined = []
    for part in re.split(r",\s+and\s+", expression.strip()):
        choices = []
        for alternative in re.split(r"\s+or\s+", part):
            terms = [term.strip().lower() for term in re.split(r"\s+and\s+", alternative)]
            if all(term in PERMISSIVE for term in terms):
                choices.append(" AND ".join(dict.fromkeys(PERMISSIVE[term] for term in terms)))
        if not choices:
            return None
        joined.append(
            min(choices, key=lambda c: _PREFERENCE.index(c) if c in _PREFERENCE else len(_PREFERENCE))
        )
    return " AND ".join(dict.fromkeys(joined))


def pattern_may_match(pattern: str, path: str) -> bool:
    """Whether the source-tree `pattern` could mean the installed `path` (tails of both are compared).

    >>> pattern_may_match("util/sasl.lua", "usr/lib/prosody/util/sasl.lua")
    True
    """
    if pattern == "*":
        return True
    path_parts, pattern_parts = path.split("/"), pattern.removeprefix("./").split("/")
    path_tails = ["/".join(path_parts[i:]) for i in range(len(path_parts))]
    for start in range(len(pattern_parts)):
        tail = pattern_parts[start:]
        # `guides/*` must not end up as `*`, nor `src/*.lua` as `*.lua`
        if "*" in tail[0] and start > 0:
            break
        if any(fnmatchcase(candidate, "/".join(tail)) for candidate in path_tails):
            return True
    return False


def parse_copyright(text: str) -> CopyrightFile | None:
    """Parse a DEP-5 copyright file; None when the text is not machine-readable."""
    source, stanzas, misnamed = "", [], set()
    for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
        fields = _fields(paragraph)
        source = source or " ".join(fields.get("source", "").split())
        licence, _, licence_text = fields.get("license", "").partition("\n")
        if not _text_fits(licence, licence_text):
            misnamed.add(licence)
        if "files" not in fields:
            continue
        holders = tuple(line.strip() for line in fields.get("copyright", "").splitlines() if line.strip())
        stanzas.append(Stanza(tuple(fields["files"].split()), licence, holders))
    if not any("*" in stanza.patterns for stanza in stanzas):
        return None
    named = [replace(s, licence="misnamed") if s.licence in misnamed else s for s in stanzas]
    return CopyrightFile(source, tuple(named))


def names_other_licence(source: str) -> bool:
    """Whether a file's own text speaks of a licence that is not permissive (Perl's dual licence is fine)."""
    return bool(_OTHER_LICENCE.search(source)) and not _PERL_TERMS.search(source)


def _text_fits(licence: str, text: str) -> bool:
    """Whether a licence's text says what its short name promises; short texts are remarks or references."""
    expected = _EXPECTED_WORDS.get(PERMISSIVE.get(licence.lower(), ""), "")
    words = " ".join(text.lower().split())
    return len(words) < SHORTEST_LICENCE_TEXT or expected in words


def _fields(paragraph: str) -> dict[str, str]:
    """`Name: value` fields of a paragraph, names in lower case; indented lines continue the last field."""
    fields: dict[str, str] = {}
    name = None
    for line in paragraph.splitlines():
        if line[:1] in (" ", "\t") and name:
            fields[name] += "\n" + line.strip()
        elif match := re.match(r"([A-Za-z-]+):[ \t]*(.*)", line):
            name = match[1].lower()
            fields[name] = match[2]
    return fields
