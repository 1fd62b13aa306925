"""Debian packages of each shipped language's corpus, for training and held out.

A held-out package never shares its Debian source package with a training one (checked when the corpus is
built). `perl-modules-5.36` is left out on purpose: its copyright file names paths of the source tree
(`cpan/Text-Tabs/*`) that are not found again among the installed files, so a file's licence cannot be
looked up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LanguageSources:
    """Packages of one language."""

    suffixes: tuple[str, ...]
    """Endings of the source files that are read."""

    train: tuple[str, ...]
    """Packages whose files give training examples."""

    validation: tuple[str, ...]
    """Packages whose files give validation examples only."""

    only_under: dict[str, str] = field(default_factory=dict)
    """Package -> the folder to read, where the rest of a package is bundled third-party code."""

    skipped: re.Pattern[str] | None = None
    """Paths of tests and of generated or bundled files."""

    few_packages: bool = False
    """Whether one package may fill a quota."""


# folders that hold tests, fixtures, generated or bundled code, wherever they occur in a path
SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "t",
        "spec",
        "specs",
        "fixture",
        "fixtures",
        "template",
        "templates",
        "vendor",
        "vendored",
    }
    | {"bundler", "doc", "docs", "example", "examples", "demo", "demos", "sample", "samples", "contrib"}
    | {"benchmark", "benchmarks", "locale", "locales", "unicore", "minified"}
)

SOURCES: dict[str, LanguageSources] = {
    "lua": LanguageSources(
        suffixes=(".lua",),
        train=(
            "lua-argparse",
            "lua-binaryheap",
            "lua-busted",
            "lua-check",
            "lua-cliargs",
            "lua-compat53",
            "lua-copas",
            "lua-cqueues",
            "lua-doc",
            "lua-http",
            "lua-inspect",
            "lua-lgi",
            "lua-ljsyscall",
            "lua-lpeg-patterns",
            "lua-markdown",
            "lua-messagepack",
            "lua-mmdb",
            "lua-moses",
            "lua-nginx-dns",
            "lua-nginx-kafka",
            "lua-nginx-string",
            "lua-nginx-websocket",
            "lua-penlight",
            "lua-posix",
            "lua-resty-core",
            "lua-resty-lrucache",
            "lua-soap",
            "lua-socket",
            "lua-unit",
            "lua-wsapi",
            "luarocks",
            "prosody",
            "prosody-modules",
            "vis",
        ),
        validation=(
            "lua-basexx",
            "lua-cosmo",
            "lua-dkjson",
            "lua-ldoc",
            "lua-luassert",
            "lua-orbit",
            "lua-uri",
            "lua-xmlrpc",
        ),
    ),
    "perl": LanguageSources(
        suffixes=(".pm", ".pl"),
        train=(
            "libalgorithm-diff-perl",
            "libcatalyst-perl",
            "libcgi-pm-perl",
            "libdate-calc-perl",
            "libdate-manip-perl",
            "libdatetime-format-builder-perl",
            "libdatetime-perl",
            "libdbix-class-perl",
            "libdist-zilla-perl",
            "libgraph-perl",
            "libhtml-formhandler-perl",
            "libhttp-message-perl",
            "libjson-pp-perl",
            "liblingua-en-inflect-perl",
            "liblist-allutils-perl",
            "liblist-moreutils-perl",
            "libmath-bigint-perl",
            "libmath-matrixreal-perl",
            "libmime-tools-perl",
            "libmodule-build-perl",
            "libmojolicious-perl",
            "libmoose-perl",
            "libnumber-format-perl",
            "libperl-critic-perl",
            "libplack-perl",
            "libpod-simple-perl",
            "libppi-perl",
            "librose-db-object-perl",
            "libset-intspan-perl",
            "libspreadsheet-writeexcel-perl",
            "libsql-abstract-perl",
            "libtest-simple-perl",
            "libtext-csv-perl",
            "libtext-template-perl",
            "libwww-perl",
            "libyaml-perl",
        ),
        validation=(
            "libdancer2-perl",
            "libhtml-mason-perl",
            "libhtml-tree-perl",
            "liblist-utilsby-perl",
            "liblog-log4perl-perl",
            "libset-scalar-perl",
            "libstatistics-descriptive-perl",
            "libtest-deep-perl",
            "libtext-autoformat-perl",
            "liburi-perl",
            "libyaml-tiny-perl",
        ),
    ),
    "ruby": LanguageSources(
        suffixes=(".rb",),
        train=(
            "jekyll",
            "libruby3.1",
            "nanoc",
            "pry",
            "puma",
            "rubocop",
            "ruby-actionpack",
            "ruby-actionview",
            "ruby-activemodel",
            "ruby-activerecord",
            "ruby-activesupport",
            "ruby-asciidoctor",
            "ruby-chronic",
            "ruby-commander",
            "ruby-concurrent",
            "ruby-dalli",
            "ruby-devise",
            "ruby-dry-types",
            "ruby-faraday",
            "ruby-geocoder",
            "ruby-grape",
            "ruby-hamster",
            "ruby-hashie",
            "ruby-highline",
            "ruby-mail",
            "ruby-mustache",
            "ruby-mustermann",
            "ruby-parslet",
            "ruby-rack",
            "ruby-railties",
            "ruby-rouge",
            "ruby-rspec-core",
            "ruby-rspec-expectations",
            "ruby-sass",
            "ruby-sequel",
            "ruby-sinatra",
            "ruby-thor",
            "ruby-treetop",
            "yard",
        ),
        validation=(
            "ruby-algebrick",
            "ruby-i18n",
            "ruby-kramdown",
            "ruby-liquid",
            "ruby-money",
            "ruby-simplecov",
            "ruby-tty-prompt",
            "ruby-tzinfo",
            "ruby-warden",
        ),
        only_under={"libruby3.1": "usr/lib/ruby/3.1.0"},
    ),
}
