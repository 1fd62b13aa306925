"""Rows become prompts and completions by columns or templates."""

from __future__ import annotations

from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.config.task_schema import TaskConfig
from flora_train.data.templates import PromptCompletion, make_formatter
from tests.rows import located, outline_of


def examples(rows: list[dict[str, Any]], **task: Any) -> list[PromptCompletion]:
    formatter = make_formatter(TaskConfig(train="unused", **task), outline_of(rows), "tasks.t")
    return [formatter(row) for row in located(rows)]


def refusals(rows: list[dict[str, Any]], **task: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        examples(rows, **task)
    return [str(problem) for problem in caught.value.problems]


def test_columns_are_taken_by_name_or_guessed() -> None:
    row = {"prompt": "p", "completion": "c", "text": "t", "doc string": "d"}
    assert examples([row]) == [PromptCompletion("p", "c")]
    assert examples([{"text": "t", "prompt": "p"}]) == [PromptCompletion("", "t")]
    assert examples([row], text="doc string") == [PromptCompletion("", "d")]
    assert examples([row], prompt="text", completion="doc string") == [PromptCompletion("t", "d")]


def test_templates_fill_columns_and_keep_doubled_braces() -> None:
    row = {"doc string": "d", "code": "{x}", "n": 3}
    assert examples([row], text="{{ {doc string}: {code} }} {n}") == [PromptCompletion("", "{ d: {x} } 3")]


def test_column_that_some_rows_lack_is_empty_there_wherever_they_stand() -> None:
    rows = [{"prompt": "p"}, {"completion": "c"}, {"prompt": None, "completion": "d"}]
    assert examples(rows) == [PromptCompletion("p", ""), PromptCompletion("", "c"), PromptCompletion("", "d")]
    assert examples([{"a": "x"}, {"b": "y"}], text="{a}/{b}") == [
        PromptCompletion("", "x/"),
        PromptCompletion("", "/y"),
    ]


def test_half_a_character_in_json_becomes_the_replacement_character() -> None:
    assert examples([{"text": "a\ud83d b\ud83d\ude00"}]) == [PromptCompletion("", "a\ufffd b😀")]


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ({"text": "cod"}, "tasks.t.text = 'cod': 'cod' is not a column of the training rows; "
         "they have code or doc. Did you mean 'code'?"),
        ({"text": "# {dok}\n{code}"}, "tasks.t.text = '# {dok}\\n{code}': "
         "'dok' is not a column of the training rows; they have code or doc. Did you mean 'doc'?"),
        ({"text": "{code"}, "tasks.t.text = '{code': is not a template: "
         "expected '}' before end of string (a literal brace is written twice)"),
        ({"text": "{code}}"}, "tasks.t.text = '{code}}': is not a template: "
         "Single '}' encountered in format string (a literal brace is written twice)"),
        ({"text": "{}"},
         "tasks.t.text = '{}': is not a template: braces must contain the name of a column only"),
        ({"text": "{code:>5}"},
         "tasks.t.text = '{code:>5}': is not a template: braces must contain the name of a column only"),
        ({"text": "{code!r}"},
         "tasks.t.text = '{code!r}': is not a template: braces must contain the name of a column only"),
        ({}, "tasks.t: name the columns: text, or prompt and completion; the rows have doc, code"),
    ],
)  # fmt: skip
def test_unusable_column_or_template_names_key_value_and_what_there_is(
    task: dict[str, str], line: str
) -> None:
    assert refusals([{"doc": "d", "code": "c"}], **task) == [line]


def test_pairs_without_an_objective_are_told_what_to_set() -> None:
    (line,) = refusals([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert "the rows have prompt, chosen, rejected. For pairs of completions set objective: dpo" in line


def test_attribute_access_in_a_template_is_a_column_name_not_code() -> None:
    (line,) = refusals([{"a": "x"}], text="{a.__class__}")
    assert "'a.__class__' is not a column" in line
    assert examples([{"a.b": "x"}], text="<{a.b}>") == [PromptCompletion("", "<x>")]


def test_missing_columns_are_reported_together() -> None:
    assert len(refusals([{"a": "x"}], prompt="{b} {c}", completion="d")) == 3


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"bytes"])
def test_value_that_is_neither_text_nor_number_is_an_error(value: Any) -> None:
    (line,) = refusals([{"text": "fine"}, {"text": value}])
    reason = f"column 'text' holds a {type(value).__name__}: it must be text or a number"
    assert line == f"tasks.t.text = 'text': rows.jsonl, row 2: {reason}"


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
def test_missing_cells_are_empty_however_a_table_writes_them(missing: Any) -> None:
    rows = [{"q": "one", "a": missing}, {"q": missing, "a": "two"}]
    found = examples(rows, prompt="{q}:", completion="Answer: {a}.")
    assert found == [PromptCompletion("one:", "Answer: ."), PromptCompletion(":", "Answer: two.")]
    assert [example.is_empty for example in found] == [
        True,
        False,
    ]  # of the first nothing of the row would be learnt


def test_the_word_nan_is_text() -> None:
    assert examples([{"text": "NaN"}, {"text": "nan"}]) == [
        PromptCompletion("", "NaN"),
        PromptCompletion("", "nan"),
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("inf"), "holds inf: it must be text or a finite number"),
        (-float("inf"), "holds -inf"),
        pytest.param(10**5000, "thousands of digits", id="long"),
    ],
)
def test_numbers_that_are_no_text_are_an_error(value: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        examples([{"text": value}])


def test_example_records_which_parts_are_columns() -> None:
    (example,) = examples([{"a": "xy", "b": "z"}], prompt="<{a}|{b}>", completion="{b}")
    assert [example.prompt[a:b] for a, b in example.prompt_rows] == ["xy", "z"]
    assert [example.completion[a:b] for a, b in example.completion_rows] == ["z"]
