"""Reading of licences, on tiny inline copyright files."""

from __future__ import annotations

import pytest

from assets.code_corpus.licences import (
    names_other_licence,
    parse_copyright,
    pattern_may_match,
    permissive_choice,
)


@pytest.mark.parametrize(
    ("expression", "licence"),
    [
        ("Artistic or GPL-1+", "Artistic-1.0-Perl"),
        ("BSD-2-clause or Ruby", "BSD-2-Clause"),
        ("Artistic or GPL-1+, and Expat", "Artistic-1.0-Perl AND MIT"),
        ("BSD-3-Clause and BSL-1.0 and LLVM", "BSD-3-Clause AND BSL-1.0 AND NCSA"),
        ("GPL-2+ and Expat", None),
        ("CC-BY-SA-4.0", None),
        ("", None),
    ],
)
def test_permissive_choice(expression: str, licence: str | None):
    assert permissive_choice(expression) == licence


def test_pattern_is_matched_by_tails_but_never_shrinks_to_a_wildcard():
    assert pattern_may_match("util/sasl.lua", "usr/lib/prosody/util/sasl.lua")
    assert pattern_may_match("rails/lib/version.rb", "usr/share/ruby/version.rb")
    assert not pattern_may_match("guides/*", "usr/share/ruby/version.rb")
    assert not pattern_may_match("src/*.rb", "usr/share/ruby/version.rb")


def test_file_under_a_stanza_that_is_not_permissive_is_refused():
    parsed = parse_copyright(
        "Format: https://example.org\nSource: https://example.org/code\n\n"
        "Files: *\nCopyright: 2020 A\nLicense: Expat\n\n"
        "Files: lib/copied.lua\n other.lua\nCopyright: 2021 B\nLicense: GPL-2+\n\n"
        "Files: debian/*\nCopyright: 2022 C\nLicense: GPL-3\n"
    )
    assert parsed is not None
    assert parsed.source == "https://example.org/code"
    assert parsed.licence_of("usr/share/lua/5.1/good.lua") == "MIT"
    assert parsed.licence_of("usr/share/lua/5.1/copied.lua") is None
    assert parsed.licence_of("usr/share/lua/5.1/other.lua") is None


def test_licence_text_must_be_what_its_short_name_says():
    other_text = "\n ".join(["Permission to use this for any purpose and without fee, so long as"] * 8)
    parsed = parse_copyright(f"Files: *\nCopyright: A\nLicense: Expat\n\nLicense: Expat\n {other_text}\n")
    assert parsed is not None
    assert parsed.licence_of("usr/share/perl5/IP.pm") is None


def test_prose_copyright_file_is_not_accepted():
    assert (
        parse_copyright("This package was debianised by somebody.\n\nIt is under the MIT licence.\n") is None
    )


def test_other_licence_in_a_file_is_noticed_but_not_the_dual_licence_of_perl():
    assert names_other_licence("-- under the GNU Lesser General Public License")
    assert not names_other_licence("# GPL or Artistic, the same terms as Perl itself")
    assert not names_other_licence("-- MIT")
