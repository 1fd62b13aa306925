"""Extraction of functions and search for duplicates, on tiny inline sources."""

from __future__ import annotations

from collections import Counter

import pytest

from assets.code_corpus import lua, perl, ruby
from assets.code_corpus.comments import useful_comment, without_legal_comments
from assets.code_corpus.duplicates import NearDuplicateIndex
from assets.code_corpus.examples import Example, Origin, cut_after_function, file_example, function_examples
from assets.code_corpus.overlap import Problems
from assets.code_corpus.selection import Quota, choose
from assets.code_corpus.sources import SOURCES

ORIGIN = Origin("package", "1.0", "lib/file", "MIT")

LUA_SOURCE = """\
-- Counts the words "end" and "function" in a text.
-- The keywords in strings do not count.
local function count_words(text)
  local pattern = "end if function do"
  local long = [[
end
]]
  -- end of the set-up: if do function
  for word in text:gmatch("%a+") do
    if word == 'end' then n = n + 1 end
  end
  repeat n = n - 1 until n < 10
  return function() return n end
end

function M.nested(list)
  local function inner(x)
    return x + 1
  end
  return inner(list[1])
end

local one_line = function(x) return x end
function open(x)
  if x then
"""

RUBY_SOURCE = """\
class Word
  # The end of a word.
  def self.last_letter(word = default(), *rest) # :nodoc:
    text = <<~TEXT
      def not_a_method
      end
    TEXT
    old = <<OLD.strip
  end
OLD
    return nil if word.empty?

    word[-1]
  rescue StandardError
    "end"
  end

  def indented_heredoc
    text = <<-TEXT
      def neither_a_method
      end
    TEXT
    text.strip
  rescue ArgumentError
    nil
  end

  def square(x) = x * x

  def one_line; 1; end

=begin
  def documented
    1
  end
=end
  def each_pair
    items.each do |item|
      if item.end?
        yield item
      end
    end
  end
end
__END__
def data
  1
end
"""

PERL_SOURCE = r"""package Word;

# Closes every } brace of a text.
sub close_braces {
    my ($text) = @_;
    my $brace = "}";
    my $help = <<'HELP';
sub not_a_sub {
}
HELP
    if ($text =~ /\{/) {
        $text .= $brace;
    }
    return $text;
}

=head2 total

Returns the C<sum> of the numbers.

    total(1, 2);

=cut

sub total($$)
{
    my ($first, $second) = @_;
    return $first + $second;
}

sub short { return 1 }

__END__
sub data {
    return 1;
}
"""


def test_lua_function_ends_at_its_own_end_despite_strings_comments_and_nesting():
    first, second = lua.functions(LUA_SOURCE)
    assert (first.name, second.name) == ("count_words", "nested")
    assert first.body.endswith("  return function() return n end")
    assert first.closing == "end"
    assert "local function inner(x)" in second.body


def test_lua_prompt_is_comment_and_signature_without_a_newline_at_the_end():
    first = lua.functions(LUA_SOURCE)[0]
    assert first.prompt.split("\n")[0] == '-- Counts the words "end" and "function" in a text.'
    assert first.prompt.endswith("\nlocal function count_words(text)")
    assert first.prompt + first.completion in LUA_SOURCE


def test_ruby_methods_keep_rescue_and_survive_heredocs_documentation_and_data():
    found = {method.name: method for method in ruby.functions(RUBY_SOURCE)}
    # `last_letter` holds heredoc lines left of its own margin, so it cannot be moved to the left
    assert list(found) == ["indented_heredoc", "each_pair"]
    assert found["indented_heredoc"].body.endswith("  text.strip\nrescue ArgumentError\n  nil")
    assert found["each_pair"].completion == (
        "\n  items.each do |item|\n    if item.end?\n      yield item\n    end\n  end\nend"
    )


def test_ruby_signature_loses_its_remark_and_receiver_is_not_part_of_the_name():
    source = "# The last letter.\ndef self.last?(word = default(), *rest) # :nodoc:\n  a = 1\n  a\nend\n"
    (method,) = ruby.functions(source)
    assert method.name == "last"
    assert method.prompt == "# The last letter.\ndef self.last?(word = default(), *rest)"


def test_perl_subs_survive_braces_in_strings_heredocs_and_patterns():
    found = {sub.name: sub for sub in perl.functions(PERL_SOURCE)}
    assert list(found) == ["close_braces", "total"]
    assert found["close_braces"].body.endswith("    return $text;")
    assert found["close_braces"].comment == "# Closes every } brace of a text."


def test_perl_documentation_above_becomes_the_comment_and_the_brace_moves_up():
    total = perl.functions(PERL_SOURCE)[1]
    assert total.prompt == "# Returns the sum of the numbers.\nsub total($$) {"


def test_perl_sub_with_unbalanced_braces_is_left_out():
    assert perl.functions("sub broken {\n    if (1) {\n    return 1;\n}\n") == []


def test_perl_code_only_drops_documentation_and_data():
    code = perl.code_only(PERL_SOURCE)
    assert "=head2" not in code
    assert "sub data" not in code
    assert "sub short" in code


def test_methods_move_to_the_left_margin():
    (function,) = lua.functions("do\n\tlocal function f(x)\n\t\tlocal y = x\n\n\t\treturn y\n\tend\nend\n")
    assert function.completion == "\n\tlocal y = x\n\n\treturn y\nend"


@pytest.mark.parametrize(
    ("comment", "useful"),
    [
        ("--------\n-- Adds two numbers.\n--------", "-- Adds two numbers."),
        ("-- local x = 1;\n-- return x", ""),
        ("-- Copyright 2020 Somebody Else", ""),
        ("-- luacheck: ignore 212", ""),
    ],
)
def test_useful_comment_keeps_descriptions_only(comment: str, useful: str):
    assert useful_comment(comment, "--") == useful


def test_long_comment_is_cut_to_its_first_paragraph():
    comment = "\n".join(["# Adds two numbers.", "#"] + ["# More and more words."] * 9)
    assert useful_comment(comment, "#") == "# Adds two numbers."


def test_licence_comments_are_removed_from_files():
    code = "--[[ Copyright\nall of it ]]\n-- Licensed under X\n-- by Y\n\n-- Adds.\nlocal x = 1\n"
    assert without_legal_comments(code, "--") == "\n-- Adds.\nlocal x = 1\n"


def test_dropped_functions_are_counted_by_reason():
    source = (
        "function tiny(x)\n  return x\nend\n"
        "function M.has_close(x)\n  local y = x\n  return y\nend\n"
        "function table_of_data()\n  x = {\n    1,\n    2,\n    3,\n    4,\n  }\nend\n"
        "function kept(x)\n  local y = x\n  return y\nend\n"
    )
    dropped: Counter[str] = Counter()
    examples = function_examples(source, lua, ORIGIN, Problems(names={"hasclose": "HumanEval_0"}), dropped)
    assert [example.prompt for example in examples] == ["function kept(x)"]
    assert dropped == {"body length": 1, "benchmark name": 1, "data table": 1}


def test_long_file_is_cut_after_a_whole_function():
    code = "".join(f"function f{i}(x)\n  if x then\n    return {i}\n  end\nend\n\n" for i in range(80))
    example = file_example(code, lua, ORIGIN, Problems(), Counter())
    assert example is not None
    assert example.prompt == ""
    assert example.completion.endswith("  end\nend\n")
    assert len(example.completion) <= 2_600
    assert cut_after_function("x = 1\n" * 9, 30) == ""


def test_renamed_and_nearly_equal_code_is_found_again():
    index = NearDuplicateIndex()
    code = "function sum(list) local total = 0 for _, x in ipairs(list) do total = total + x end return total"
    index.add(code)
    assert index.has_renamed(code.replace("total", "result").replace("list", "numbers"))
    assert index.similarity(code.replace("= 0", "= 1")) > 0.6
    assert index.similarity("print('something else altogether') os.exit(1)") == 0.0
    assert index.similarity(code[:60], contained=True) == 1.0


def test_choice_takes_packages_in_turn_and_keeps_the_quota():
    def example(package: str, number: int) -> Example:
        code = " ".join(f"{package}_{number}_{i}" + "+-*/%"[(number + i) % 5] for i in range(12 + number))
        return Example("function", f"function {package}{number}()", code, Origin(package, "1", "x", "MIT"), 0)

    candidates = [example(package, number) for package in ("a", "b", "c") for number in range(6)]
    quota = Quota(total=6, per_package=3, first_ranks=frozenset({0}), first_share=1.0)
    chosen = choose(candidates, quota, 1, None, Counter())
    assert Counter(example.origin.package for example in chosen) == {"a": 2, "b": 2, "c": 2}
    assert chosen == choose(candidates[::-1], quota, 1, None, Counter())


@pytest.mark.parametrize("language", sorted(SOURCES))
def test_source_tables_are_sorted_and_hold_out_whole_packages(language: str):
    sources = SOURCES[language]
    for names in (sources.train, sources.validation):
        assert list(names) == sorted(set(names))
        assert len(names) >= 8
    assert not set(sources.train) & set(sources.validation)
