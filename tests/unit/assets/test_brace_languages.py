"""Extraction of functions from languages with braces and from Python, on tiny inline sources."""

from __future__ import annotations

import pytest

from assets.code_corpus import d, go, js, php, python, rust
from assets.code_corpus.languages import SYNTAX
from assets.code_corpus.local_sources import ALL_SOURCES, LOCAL_SOURCES

JS_SOURCE = r"""
/**
 * Counts the `}` of a text.
 *
 * @param {string} text
 */
export default function countBraces(text) {
  const pattern = /[}"'`/]{2}/g; // a brace: }
  const half = text.length / 2, other = text.length / 3;
  return `${text.match(/}/g).map((x) => { return `{${x}` })} }`;
}

const twice = async (x) => {
  /* } */
  return "{" + '\'{' + x;
};

class Box {
  open() {
    return this;
  }
}
"""

PHP_SOURCE = r"""<?php
class Text
{
    /**
     * Says how many braces are {@see open}.
     *
     * @return int
     */
    #[Pure]
    final public static function braces(string $text = '{'): int // not {
    {
        # a brace: }
        $help = <<<'END'
        function notOne() {
        END;
        return "}" . substr_count($text, '}');
    }

    public function own()
    {
        return $this->own;
    }
}
?>
function page() {
}
"""

RUST_SOURCE = r"""
impl<'a> Text<'a> {
    /// The first brace.
    ///
    /// # Examples
    ///
    /// ```
    /// first("{");
    /// ```
    #[inline]
    pub fn first<'b>(text: &'b str) -> char {
        let brace = '}'; /* { /* nested { */ } */
        let raw = r#"}"{"#;
        brace
    }
}
#[test]
fn checks() {
    assert!(true);
    assert!(true);
}
"""

D_SOURCE = r"""
/++
    The larger one.
    Params:
        x = a number
+/
T larger(T)(T x, T y)
if (isNumeric!T)
{
    auto brace = q"[{]" ~ `}` ~ '}'; /+ { /+ } +/ +/
    return x > y ? x : y;
}

int contract(int x)
in (x > 0)
{
    return x;
}

struct S
{
    int half() { return 1; }

    int twice()
    {
        if (a)
        {
            return 2;
        }
        return 1;
    }
}
"""


def test_javascript_patterns_templates_and_strings_do_not_count_as_braces():
    first, second = js.functions(JS_SOURCE)
    assert first.prompt == "// Counts the `}` of a text.\nfunction countBraces(text) {"
    assert first.completion.endswith("} }`;\n}")
    assert (second.name, second.signature, second.closing) == ("twice", "const twice = async (x) => {", "};")


def test_php_method_becomes_a_function_with_its_brace_on_the_signature():
    first, second = php.functions(PHP_SOURCE)
    assert first.prompt == "// Says how many braces are open.\nfunction braces(string $text = '{'): int {"
    assert first.completion.endswith("    return \"}\" . substr_count($text, '}');\n}")
    assert second.name == "own"
    assert php.RECEIVER.search(second.body)


def test_rust_keeps_lifetimes_drops_attributes_examples_and_tests():
    (function,) = rust.functions(RUST_SOURCE)
    assert function.prompt == "/// The first brace.\npub fn first<'b>(text: &'b str) -> char {"
    assert function.completion.endswith("\n    brace\n}")


def test_go_strings_runes_and_interfaces_do_not_count_as_braces():
    source = (
        "// Show shows v.\n//\n//go:noinline\nfunc Show(v interface{}, m map[string]struct{}) (s string, "
        "err error) {\n"
        "\ts = `{` + \"{\" + string('{')\n\tif v == nil {\n\t\treturn\n\t}\n\treturn\n}\n"
        "func (b *Box[T]) Open() {\n\tb.open = true\n\treturn\n}\n"
    )
    first, second = go.functions(source)
    assert first.prompt.startswith("// Show shows v.\nfunc Show(v interface{}")
    assert first.completion.endswith("\treturn\n}")
    assert go.RECEIVER.search(second.signature)


def test_d_signature_is_one_line_and_its_brace_stays_below():
    first, second = d.functions(D_SOURCE)
    assert first.prompt == "/**\nThe larger one.\n*/\nT larger(T)(T x, T y) if (isNumeric!T)"
    assert first.completion.startswith("\n{\n    auto brace")
    assert (second.name, second.member) == ("twice", True)


def test_python_docstring_belongs_to_the_prompt():
    source = (
        'def twice(x: int) -> int:\n    """Doubles it.\n\n    :param x: '
        'a number\n    """\n    y = 2 * x\n    return y\n'
    )
    (function,) = python.functions(source + "\n@cached\ndef other():\n    return 1\n")
    assert function.prompt == 'def twice(x: int) -> int:\n    """Doubles it."""'
    assert function.completion == "\n    y = 2 * x\n    return y"


def test_every_language_has_sources_and_syntax():
    assert (
        set(SYNTAX) == set(ALL_SOURCES) == {"lua", "perl", "ruby", "php", "js", "go", "rust", "d", "python"}
    )


@pytest.mark.parametrize("language", sorted(LOCAL_SOURCES))
def test_local_tables_are_sorted_and_hold_out_whole_packages(language: str):
    sources = LOCAL_SOURCES[language]
    for names in (sources.train, sources.validation):
        assert list(names) == sorted(set(names))
        assert len(names) >= (1 if sources.few_packages else 8)
    assert not set(sources.train) & set(sources.validation)
