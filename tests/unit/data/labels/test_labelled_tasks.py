"""Tasks of labelled texts from files: their tokens, targets, labels and weights, and how rows are divided."""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest

from flora_train.config.errors import UserError
from flora_train.data.assumed_rows import assumed_tasks
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.labels.split import LabelSplit
from flora_train.data.splits import held_of_strata, hold_out_strata, sample_strata
from flora_train.data.token_split import TokenSplit
from flora_train.evaluation.report.results import examples_hash
from tests.unit.data.conftest import byte_tokenizer, run_config
from tests.unit.data.labels.texts import bert_tokenizer, films, roberta_tokenizer


def targets_of(split: TokenSplit) -> list[Any]:
    assert isinstance(split, LabelSplit)
    return [split.target(i) for i in range(len(split))]


def texts_of(split: TokenSplit, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(split.example(i)) for i in range(len(split))]


@pytest.fixture
def load_films(write: Any, load: Any) -> Any:
    """load_films(tokenizer, rows=..., label="label", ...) -> the task of these rows."""

    def load_films(tokenizer: Any, rows: Any = None, **options: Any) -> Any:
        write("films.jsonl", films() if rows is None else rows)
        keys = {key: options.pop(key) for key in ("seed", "max_length") if key in options}
        return load(tokenizer, **keys, films={"train": "films.jsonl", **options})["films"]

    return load_films


def test_labels_are_read_in_a_stable_order_and_tokens_are_the_tokenizers_own(load_films: Any) -> None:
    tokenizer = bert_tokenizer()
    task = load_films(tokenizer, label="label")
    assert task.label is not None
    assert (task.label.task_type, task.label.labels, task.label.outputs) == ("single", ("neg", "pos"), 2)
    assert task.label.class_weights is None
    backwards = load_films(tokenizer, rows=films()[::-1], label="label")
    assert backwards.label == task.label
    expected = {f"{row['text']}": row["label"] for row in films()}
    for split in (task.train, task.validation):
        for i, target in enumerate(targets_of(split)):
            text = tokenizer.decode(split.example(i), skip_special_tokens=True)
            assert expected[text] == task.label.labels[target]
            assert split.example(i).tolist() == tokenizer(text)["input_ids"]


def test_labels_that_are_numbers_are_sorted_by_size(load_films: Any) -> None:
    rows = [{**row, "label": [10, 9, -1][i % 3]} for i, row in enumerate(films())]
    assert load_films(bert_tokenizer(), rows=rows, label="label").label.labels == ("-1", "9", "10")


def test_given_labels_keep_their_order(load_films: Any) -> None:
    task = load_films(bert_tokenizer(), label="label", labels=["pos", "neg"])
    assert task.label.labels == ("pos", "neg")
    assert targets_of(task.train)[0] == 1 - targets_of(load_films(bert_tokenizer(), label="label").train)[0]


def test_a_pair_is_joined_with_token_types(load_films: Any) -> None:
    tokenizer = bert_tokenizer()
    task = load_films(tokenizer, label="label", text=["text", "question"], validation_fraction=0.1)
    rows = {row["text"]: row for row in films()}
    for i in range(len(task.train)):
        first = tokenizer.decode(task.train.example(i)).split("[SEP]")[0].replace("[CLS]", "").strip()
        expected = tokenizer(first, rows[first]["question"])
        assert task.train.example(i).tolist() == expected["input_ids"]
        assert task.train.types(i).tolist() == expected["token_type_ids"]
        assert max(expected["token_type_ids"]) == 1


def test_a_pair_that_the_tokenizer_does_not_separate_is_a_warning(
    load_films: Any, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"label": "label", "text": ["text", "question"]}
    with caplog.at_level(logging.WARNING):
        load_films(bert_tokenizer(), **options)
        load_films(roberta_tokenizer(), **options)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        load_films(byte_tokenizer(), **options)
    assert "tasks.films.text: this tokenizer writes nothing between the texts of a pair" in caplog.text


def test_a_text_of_a_template(load_films: Any) -> None:
    tokenizer = bert_tokenizer()
    task = load_films(tokenizer, label="label", text="{text} . {question}")
    assert any(text == "[CLS] good film 1. is 1 good [SEP]" for text in texts_of(task.train, tokenizer))


@pytest.mark.parametrize("text", [["text", "question"], "text"])
@pytest.mark.parametrize("max_length", [5, 7, 8])
def test_long_texts_are_cut_as_the_tokenizer_cuts_them_and_counted(
    load_films: Any, text: Any, max_length: int
) -> None:
    tokenizer = bert_tokenizer()
    rows = [{**row, "text": f"{row['text']} {'z ' * (i % 5)}"} for i, row in enumerate(films())]
    task = load_films(tokenizer, rows=rows, label="label", text=text, max_length=max_length)
    used = [*range(len(task.train))]
    columns = [text] if isinstance(text, str) else text
    expected, cut = Counter[tuple[int, ...]](), 0
    for row in rows:
        texts = [row[column] for column in columns]
        expected[tuple(tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"])] += 1
        cut += len(tokenizer(*texts)["input_ids"]) > max_length
    both = [task.train.example(i) for i in used]
    both += [task.validation.example(i) for i in range(len(task.validation))]
    assert Counter(tuple(example.tolist()) for example in both) == expected
    assert task.train.counts.over_long_truncated + task.validation.counts.over_long_truncated == cut > 0


def test_over_long_texts_are_left_out_if_told(load_films: Any) -> None:
    task = load_films(bert_tokenizer(), label="label", max_length=5, truncation="drop")
    counts = [split.counts.over_long_dropped for split in (task.train, task.validation)]
    assert sum(counts) == sum(i >= 10 for i in range(30))
    assert task.train.token_lengths.max() == 5


def test_a_long_text_of_white_space_is_read_to_its_end(load_films: Any) -> None:
    rows = [*films(), {"text": f"good{' ' * 200_000}bad", "label": "pos"}]
    task = load_films(bert_tokenizer(), rows=rows, label="label", validation_fraction=0.04)
    assert "[CLS] good bad [SEP]" in texts_of(task.train, bert_tokenizer())


def test_special_tokens_in_rows_are_text_unless_the_task_reads_them(load_films: Any) -> None:
    tokenizer = bert_tokenizer()
    rows = [{**row, "text": f"{row['text']} [SEP] a"} for row in films()]
    task = load_films(tokenizer, rows=rows, label="label")
    assert all((task.train.example(i) == tokenizer.sep_token_id).sum() == 1 for i in range(len(task.train)))
    assert task.train.counts.special_tokens == {"[SEP]": len(task.train)}
    task = load_films(tokenizer, rows=rows, label="label", special_tokens=True)
    assert all((task.train.example(i) == tokenizer.sep_token_id).sum() == 2 for i in range(len(task.train)))


def test_several_labels_of_a_text(load_films: Any) -> None:
    task = load_films(bert_tokenizer(), label="genres", multi_label=True)
    assert task.label.labels == ("love", "war")
    counts = Counter(targets_of(task.train)) + Counter(targets_of(task.validation))
    expected = Counter((float("love" in row["genres"]), float("war" in row["genres"])) for row in films())
    assert counts == expected
    assert (0.0, 0.0) in counts


@pytest.mark.parametrize(
    ("cells", "separator"),
    [(["a;b", "a", "", " b ; c"], ";"), (['["a", "b"]', "a", "[]", '["b","c"]'], None)],
)
def test_several_labels_in_cells_of_text(load_films: Any, cells: list[str], separator: str | None) -> None:
    rows = [{"text": f"a {i}", "label": cells[i % 4]} for i in range(40)]
    task = load_films(bert_tokenizer(), rows=rows, label="label", multi_label=True, label_separator=separator)
    assert task.label.labels == ("a", "b", "c")
    expected = {(1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 1.0, 1.0)}
    assert set(targets_of(task.train)) == expected


def test_numbers_for_regression(load_films: Any) -> None:
    task = load_films(bert_tokenizer(), label="stars", regression=True)
    assert (task.label.task_type, task.label.labels, task.label.outputs) == ("regression", (), 1)
    values = [*targets_of(task.train), *targets_of(task.validation)]
    assert sorted(values) == [row["stars"] for row in films()]


def test_tags_stand_at_the_first_token_of_each_word(load_films: Any) -> None:
    tokenizer = bert_tokenizer()
    task = load_films(tokenizer, token_labels="tags")
    assert task.label.labels == ("J", "N")
    words = [tokenizer.convert_ids_to_tokens(int(i)) for i in task.train.example(0)]
    assert words[2:] == ["film", "x", ".", "y", "[SEP]"]
    assert targets_of(task.train)[0] == (-100, 0, 1, 0, -100, -100, -100)


def test_tags_are_cut_with_their_tokens(load_films: Any) -> None:
    task = load_films(bert_tokenizer(), token_labels="tags", max_length=5)
    assert targets_of(task.train)[0] == (-100, 0, 1, 0, -100)
    assert task.train.counts.over_long_truncated == len(task.train)


def test_words_of_a_list_have_a_space_before_them_where_it_belongs_to_a_token(load_films: Any) -> None:
    task = load_films(roberta_tokenizer(), token_labels="tags")
    spaced = roberta_tokenizer(add_prefix_space=True)
    expected = {tuple(spaced(row["tokens"], is_split_into_words=True)["input_ids"]) for row in films()}
    assert {tuple(task.train.example(i).tolist()) for i in range(len(task.train))} == expected
    assert task.train.types(0) is None
    assert Counter(targets_of(task.train)[0]) == Counter({-100: len(task.train.example(0)) - 3, 0: 2, 1: 1})


def test_balanced_weights_are_those_of_scikit_learn(load_films: Any) -> None:
    class_weight = pytest.importorskip("sklearn.utils.class_weight")
    task = load_films(bert_tokenizer(), label="label", class_weights="balanced")
    targets = np.array(targets_of(task.train))
    expected = class_weight.compute_class_weight("balanced", classes=np.arange(2), y=targets)
    np.testing.assert_allclose(task.label.class_weights, expected, rtol=1e-12)
    tags = load_films(bert_tokenizer(), token_labels="tags", class_weights="balanced")
    flat = np.concatenate(targets_of(tags.train))
    expected = class_weight.compute_class_weight("balanced", classes=np.arange(2), y=flat[flat >= 0])
    np.testing.assert_allclose(tags.label.class_weights, expected, rtol=1e-12)


def test_balanced_weight_of_a_label_without_rows_is_one(load_films: Any) -> None:
    labels = ["neg", "never", "pos"]
    task = load_films(bert_tokenizer(), label="label", labels=labels, class_weights="balanced")
    counts = task.train.label_counts_by_name
    total = counts["neg"] + counts["pos"]
    expected = (total / (2 * counts["neg"]), 1.0, total / (2 * counts["pos"]))
    assert task.label.class_weights == pytest.approx(expected)


def test_given_weights(load_films: Any) -> None:
    task = load_films(bert_tokenizer(), label="label", class_weights={"pos": 3})
    assert task.label.class_weights == (1.0, 3.0)


def test_rows_are_held_out_label_by_label_for_test_and_validation(load_films: Any) -> None:
    rows = [{"text": f"a {i}", "label": "abbbccccc"[i % 9]} for i in range(180)]
    options = {"label": "label", "validation_fraction": 0.1, "test_fraction": 0.2}
    task = load_films(bert_tokenizer(), rows=rows, **options)
    counts = [split.label_counts_by_name for split in (task.train, task.validation, task.test)]
    assert counts == [
        {"a": 14, "b": 42, "c": 70},
        {"a": 2, "b": 6, "c": 10},
        {"a": 4, "b": 12, "c": 20},
    ]
    tokenizer = bert_tokenizer()
    texts = [texts_of(split, tokenizer) for split in (task.train, task.validation, task.test)]
    assert len(set(texts[0]) | set(texts[1]) | set(texts[2])) == 180
    again = load_films(tokenizer, rows=rows, **options)
    assert [texts_of(split, tokenizer) for split in (again.train, again.validation, again.test)] == texts
    other = load_films(tokenizer, rows=rows, seed=1, **options)
    assert texts_of(other.validation, tokenizer) != texts[1]
    assert other.validation.label_counts_by_name == counts[1]


def test_a_test_source_replaces_the_rows_that_were_set_apart(write: Any, load: Any) -> None:
    """So that a later evaluation on other rows does not change what was held out."""
    write("films.jsonl", films(60))
    write("other.jsonl", films(6))
    task = {"train": "films.jsonl", "label": "label", "test_fraction": 0.2}
    own, other = (load(bert_tokenizer(), a=keys)["a"] for keys in (task, {**task, "test": "other.jsonl"}))
    assert (len(own.test), len(other.test)) == (12, 6)
    assert own.evaluated is own.test
    assert texts_of(own.train, bert_tokenizer()) == texts_of(other.train, bert_tokenizer())
    assert texts_of(own.validation, bert_tokenizer()) == texts_of(other.validation, bert_tokenizer())


def test_the_row_of_a_label_that_has_one_is_a_training_row(
    load_films: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*films(), {"text": "a", "label": "rare"}]
    with caplog.at_level(logging.WARNING):
        task = load_films(bert_tokenizer(), rows=rows, label="label", validation_fraction=0.5)
    assert task.train.label_counts_by_name["rare"] == 1
    assert "one row has label 'rare'; it is a training row" in caplog.text


def test_few_examples_have_every_label_and_are_part_of_more(load_films: Any) -> None:
    rows = [{"text": f"a {i}", "label": "abcde"[min(i // 4, 4)]} for i in range(200)]
    texts: set[str] = set()
    for limit in (5, 20, 60):
        task = load_films(bert_tokenizer(), rows=rows, label="label", max_examples=limit)
        assert all(task.train.label_counts_by_name.values())
        assert len(task.train) == limit
        assert task.train.counts.unsampled == len(rows) - len(task.validation) - limit
        own = set(texts_of(task.train, bert_tokenizer()))
        assert texts < own
        texts = own


def test_split_by_makes_tasks_that_are_stratified_each(write: Any, load: Any) -> None:
    from flora_train.data.split_by import expand_split_tasks
    from flora_train.data.task import load_tasks
    from tests.unit.data.conftest import run_config

    rows = [{**row, "site": "ab"[i >= 20]} for i, row in enumerate(films(60))]
    path = write("films.jsonl", rows)
    task = {"train": "films.jsonl", "label": "label", "split_by": "site", "validation_fraction": 0.1}
    config = expand_split_tasks(run_config({"films": task}))
    tasks = load_tasks(config, bert_tokenizer(), path.parent / "cache")
    assert {name: len(task.train) for name, task in tasks.items()} == {"films_a": 18, "films_b": 36}
    for made in tasks.values():
        assert all(made.validation.label_counts_by_name.values())  # type: ignore[attr-defined]


def test_held_rows_of_strata_add_up_and_leave_rows_of_each_on_both_sides() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        counts = generator.integers(1, 40, generator.integers(1, 12))
        target = int(generator.integers(1, counts.sum() + 1))
        held = held_of_strata(counts, target)
        assert ((held >= (counts > 1)) & (held < counts)).all()
        room = int((counts - 1).sum())
        assert held.sum() == min(max(target, int((counts > 1).sum())), room)
        exact = counts * target / counts.sum()
        free = (held > 1) & (held < counts - 1)
        if held.sum() == target and not (counts < 2).any() and (exact >= 1).all():
            assert (np.abs(held - exact)[free] < 1.0001).all()


def test_a_sample_of_strata_is_seeded_and_in_order() -> None:
    rows, strata = np.arange(100, 200), np.repeat([0, 1, 2], [5, 25, 70])
    first = sample_strata(rows, strata, 20, 3)
    assert (np.diff(first) > 0).all()
    assert (first == sample_strata(rows, strata, 20, 3)).all()
    assert (first != sample_strata(rows, strata, 20, 4)).any()
    assert np.bincount(strata[first - 100]).tolist() == [1, 5, 14]
    assert (sample_strata(rows, strata, None, 3) == rows).all()
    assert np.bincount(strata[sample_strata(rows, strata, 3, 3) - 100]).tolist() == [1, 1, 1]


def test_nothing_can_be_held_out_where_each_label_has_one_row() -> None:
    with pytest.raises(UserError, match=r"t\.train: has 3 rows?.*set stratify: false"):
        hold_out_strata(np.arange(3), 0.1, 0, key="t")


def test_a_verbalizer_learns_the_word_after_the_prompt(load_films: Any) -> None:
    tokenizer = byte_tokenizer(start=True)
    verbalizer = {"pos": "good", "neg": "awful"}
    prompt = "{text}\nIt is"
    task = load_films(tokenizer, label="label", verbalizer=verbalizer, prompt=prompt)
    assert task.label is None
    assert task.labels == ("pos", "neg")
    words = {row["text"]: verbalizer[row["label"]] for row in films()}
    for i in range(len(task.train)):
        ((tokens, spans),) = task.train.sequence(i)
        text = tokenizer.decode(tokens)
        film = text.removeprefix("<s>").split("\n")[0]
        assert text == f"<s>{film}\nIt is {words[film]}<e>"
        assert tokenizer.decode(tokens[slice(*spans[0])]) == f" {words[film]}<e>"
        assert task.train.label_bytes[i] == len(f" {words[film]}")


def test_a_verbalizer_scores_every_word_without_the_end_token(load_films: Any) -> None:
    tokenizer = byte_tokenizer()
    verbalizer = {"pos": "good", "neg": "\nawful"}
    task = load_films(tokenizer, label="label", verbalizer=verbalizer, text="text", validation_fraction=0.2)
    split = task.evaluated
    assert isinstance(split, ChoiceSplit)
    assert split is task.validation
    for i in range(len(split)):
        own = tokenizer.decode(split.example(i))
        film = " ".join(own.split()[:3]).removesuffix("\nawful")
        for number, word in enumerate([" good", "\nawful"]):
            ((tokens, spans),) = split.sequence(i, number + 1)
            assert tokenizer.decode(tokens) == film + word
            assert tokenizer.decode(tokens[slice(*spans[0])]) == word
            assert split.choice_length(i, number) == len(tokens)
        assert own == f"{film}{[' good', chr(10) + 'awful'][split.references[i]]}<e>"


def test_a_prompt_of_a_verbalizer_keeps_what_follows_a_long_column(load_films: Any) -> None:
    tokenizer = byte_tokenizer()
    rows = [{"text": "ab" * (1 + 9 * (i % 5)), "label": "xy"[i % 2]} for i in range(30)]
    options = {"label": "label", "prompt": "T: {text}\nL:", "verbalizer": {"x": "one", "y": "two"}}
    task = load_films(tokenizer, rows=rows, max_length=40, **options)
    for split in (task.train, task.validation):
        assert split.counts.prompt_too_long == 0
        for i in range(len(split)):
            text = tokenizer.decode(split.example(i))
            assert text.startswith("T: ab")
            assert text.endswith(("\nL: one<e>", "\nL: two<e>"))
            assert len(split.example(i)) <= 40
    cut = sum(len(f"T: {row['text']}\nL: one") + 1 > 40 for row in rows)
    assert task.train.counts.over_long_truncated + task.validation.counts.over_long_truncated == cut
    assert max(task.train.token_lengths) == 40
    options["validation_fraction"] = 0.5
    dropped = load_films(tokenizer, rows=rows, max_length=40, truncation="drop", **options)
    assert dropped.train.counts.over_long_dropped + dropped.validation.counts.over_long_dropped == cut


def test_prompts_of_a_verbalizer_can_be_packed(load_films: Any) -> None:
    options = {"label": "label", "prompt": "{text}:", "verbalizer": {"pos": "x", "neg": "y"}}
    packed = load_films(byte_tokenizer(), packing=True, max_length=64, **options)
    assert packed.train.is_packed
    assert not packed.validation.is_packed
    alone = load_films(byte_tokenizer(), max_length=64, **options)
    documents = Counter(
        tuple(tokens.tolist()) for i in range(len(packed.train)) for tokens, _ in packed.train.sequence(i)
    )
    assert documents == Counter(tuple(alone.train.example(i).tolist()) for i in range(len(alone.train)))


PAIR = ["text", "question"]
ROW = r"films\.jsonl, row 1"
BAD: list[tuple[dict[str, Any], dict[str, Any] | None, str]] = [
    (
        {"label": "label", "labels": ["pos", "Neg"]},
        None,
        rf"'neg', which is not in labels.*{ROW}.*Did you mean 'Neg'",
    ),
    ({"label": "lable"}, None, rf"label = 'lable': is missing in {ROW}.*Did you mean 'label'"),
    ({"label": "label", "text": "txt"}, None, rf"text = 'txt': is missing in {ROW}.*Did you mean 'text'"),
    ({"label": "label"}, {"label": "pos"}, r"has the label 'pos' in all training rows.*another label"),
    ({"label": "label"}, {"label": None}, rf"is empty in {ROW}: give a label"),
    ({"label": "label"}, {"text": " \n"}, rf"text = 'text': is empty in {ROW}.*remove the row"),
    (
        {"label": "label", "text": PAIR},
        {"question": ""},
        rf"text = 'question': is empty in {ROW}, and a pair needs both texts",
    ),
    (
        {"label": "label", "regression": True},
        None,
        rf"is 'neg', which is no number in {ROW}.*remove regression",
    ),
    ({"label": "label", "regression": True}, {"label": "inf"}, rf"is inf, which is not finite in {ROW}"),
    ({"label": "label", "regression": True}, {"label": True}, rf"is true, which is no number in {ROW}"),
    ({"label": "label", "regression": True}, {"label": 2}, r"is 2 in all training rows that are used"),
    ({"label": "genres", "multi_label": True}, {"genres": []}, r"is an empty list in all training rows"),
    ({"label": "genres", "multi_label": True, "labels": ["war"]}, None, r"'love', which is not in labels"),
    ({"label": "genres"}, None, r"holds a list.*row 1: set multi_label: true"),
    (
        {"token_labels": "tags"},
        {"tags": ["J"]},
        rf"token_labels = 'tags': has 1 label for 3 tokens of 'tokens' in {ROW}",
    ),
    ({"token_labels": "tags"}, {"tokens": "a b"}, rf"text = 'tokens': is 'a b' in {ROW}, and no list"),
    ({"token_labels": "tags"}, {"tokens": [], "tags": []}, rf"has no token in {ROW}"),
    ({"token_labels": "tags"}, {"tokens": ["a", "", "b"]}, rf"item 2 is empty in {ROW}"),
    ({"token_labels": "tags"}, {"tags": ["J", None, "N"]}, rf"'tags': item 2 is empty in {ROW}"),
    ({"token_labels": "tags"}, {"tags": '["J"'}, r"begins with a bracket and is no JSON list.*row 1"),
    (
        {"label": "label", "class_weights": {"pos": 2, "x": 1}},
        None,
        r"class_weights = 'x': is no label; labels are neg or pos",
    ),
]


@pytest.mark.parametrize(("options", "change", "message"), BAD)
def test_bad_rows_are_one_error_with_file_row_and_remedy(
    load_films: Any, options: dict[str, Any], change: dict[str, Any] | None, message: str
) -> None:
    rows = [{**row, **(change or {})} for row in films()]
    with pytest.raises(UserError, match=message) as raised:
        load_films(bert_tokenizer(), rows=rows, **options)
    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).startswith("tasks.films")


BAD_WORDS = [
    ({"pos": "good", "neg": "goodish"}, r"verbalizer = 'goodish': begins with the tokens of 'good'"),
    ({"pos": "good"}, r"verbalizer"),
    ({"pos": "good", "other": "bad"}, r"'neg', which is not in verbalizer.*films\.jsonl, row 1"),
]


@pytest.mark.parametrize(("verbalizer", "message"), BAD_WORDS)
def test_bad_words_are_an_error(load_films: Any, verbalizer: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_films(byte_tokenizer(), label="label", verbalizer=verbalizer, prompt="{text}")


def test_words_with_the_same_tokens_are_an_error(load_films: Any) -> None:
    verbalizer = {"pos": "good", "neg": "gōōd", "x": "gõõd"}
    tokenizer = bert_tokenizer()
    tokenizer.eos_token = "[SEP]"
    with pytest.raises(UserError, match=r"verbalizer = 'gōōd': has the same tokens as 'good'"):
        load_films(tokenizer, label="label", verbalizer=verbalizer, prompt="{text}")


def test_a_label_of_held_out_rows_alone(write: Any, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    write("train.jsonl", films())
    write("held.jsonl", [*films(3), {"text": "a", "label": "new"}])
    task = {"train": "train.jsonl", "validation": "held.jsonl", "label": "label"}
    with pytest.raises(UserError, match=r"is 'new' in held\.jsonl, row 4 \(validation\).*no training row"):
        load(bert_tokenizer(), a=task)
    with caplog.at_level(logging.WARNING):
        loaded = load(bert_tokenizer(), a={**task, "labels": ["neg", "new", "pos"]})["a"]
    assert loaded.label.labels == ("neg", "new", "pos")
    assert "no training row has label 'new', which validation rows have" in caplog.text


def test_a_label_whose_rows_are_all_held_out_or_left_out(load_films: Any) -> None:
    rows = [*films(), *({"text": f"b {i}", "label": "new"} for i in range(2))]
    with pytest.raises(UserError, match=r"is 'new' in films\.jsonl, row 31.*no training row.*stratify: true"):
        load_films(
            bert_tokenizer(),
            rows=rows,
            label="label",
            stratify=False,
            max_examples=12,
            validation_fraction=0.5,
        )


def test_room_for_special_tokens_is_checked(load_films: Any) -> None:
    with pytest.raises(UserError, match=r"training\.max_length = 4: has no room for a text beside 3 special"):
        load_films(bert_tokenizer(), label="label", text=["text", "question"], max_length=4)


def test_labels_of_tables_are_text(write: Any, load: Any) -> None:
    lines = ["text,label,tags", *(f'a {i},{i % 2},"[""x"", ""y""]"' for i in range(20))]
    write("a.csv", "\n".join(lines) + "\n")
    task = load(bert_tokenizer(), a={"train": "a.csv", "label": "label"})["a"]
    assert task.label.labels == ("0", "1")
    rows = [json.loads(json.dumps({"text": f"a {i}", "label": float(i % 2)})) for i in range(20)]
    write("b.jsonl", rows)
    assert load(bert_tokenizer(), a={"train": "b.jsonl", "label": "label"})["a"].label == task.label


@pytest.mark.parametrize(
    ("keys", "labels", "target"),
    [
        ({"label": "y", "labels": ["a", "b", "c"]}, ("a", "b", "c"), 0),
        ({"label": "y"}, ("first", "second"), 0),
        ({"label": "y", "multi_label": True, "labels": ["a", "b"]}, ("a", "b"), (0.0, 0.0)),
        ({"label": "y", "regression": True}, (), 0.0),
        ({"token_labels": "y"}, ("first", "second"), (0,) * 64),
    ],
)
def test_rows_that_are_elsewhere_are_assumed_with_labels(keys: Any, labels: Any, target: Any) -> None:
    task = assumed_tasks(run_config({"a": {"train": {"hub": "some/data"}, **keys}}))["a"]
    assert task.label is not None
    assert task.label.labels == labels
    assert isinstance(task.train, LabelSplit)
    assert task.train.target(3) == target
    assert task.train.length(3) == 64
    assert task.train.label_counts.sum() == 0


def test_the_hash_of_examples_is_of_their_labels_in_any_order(load_films: Any) -> None:
    options = {"label": "label", "validation_fraction": 0.2}
    words = {"prompt": "{text}", "verbalizer": {"pos": "x", "neg": "y"}}
    for tokenizer, more in ((bert_tokenizer(), {}), (byte_tokenizer(), words)):
        own = examples_hash(load_films(tokenizer, **options, **more).validation)
        assert own == examples_hash(
            load_films(tokenizer, labels=["pos", "neg"], **options, **more).validation
        )
        swapped = {"pos": "neg", "neg": "pos"}
        rows = [{**row, "label": swapped[row["label"]]} for row in films()]
        assert own != examples_hash(load_films(tokenizer, rows=rows, **options, **more).validation)
    stars = [{**row, "stars": row["stars"] + 0.25} for row in films()]
    hashes = {
        examples_hash(load_films(bert_tokenizer(), rows=rows, label="stars", regression=True).validation)
        for rows in (films(), stars)
    }
    assert len(hashes) == 2
