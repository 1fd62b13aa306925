"""Special tokens in templates are tokens, those in rows are text; text has the tokenizer's own tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.data.task import notes_on_rows
from flora_train.data.templates import PromptCompletion, make_formatter
from flora_train.data.text_encoder import TextEncoder
from flora_train.data.token_split import TokenSplit
from flora_train.data.tokenization import tokenize, tokenizer_hash
from tests.rows import located, outline_of
from tests.unit.data.conftest import byte_tokenizer, run_config
from tests.unit.data.many_tokenizers import KINDS, MARKS, smollm2, unigram, words

make = cache(lambda kind: KINDS[kind]())
LOSSLESS = ["bytes", "unigram-first", "unigram-always", "legacy-llama", "prefixed-bytes", "slow", "smollm2"]


def special_ids(tokenizer: Any, ids: Any) -> list[int]:
    """Without the unknown token, which ordinary text can be."""
    return [i for i in map(int, ids) if i in TextEncoder(tokenizer).special and i != tokenizer.unk_token_id]


def rendered(rows: list[dict[str, Any]], **task: Any) -> list[PromptCompletion]:
    config = run_config({"t": {"train": "unused.jsonl", **task}}).tasks["t"]
    formatter = make_formatter(config, outline_of(rows), "tasks.t")
    return [formatter(row) for row in located(rows)]


@pytest.mark.parametrize("kind", KINDS)
def test_special_token_in_a_row_is_text_and_in_a_template_a_token(kind: str) -> None:
    tokenizer = make(kind)
    end = tokenizer.eos_token
    (example,) = rendered(
        [{"q": f"one {end} two", "a": f"b{end}c"}], prompt=f"{end}{{q}}{end}", completion=" {a}"
    )
    split = tokenize([example], tokenizer, 256, truncation="truncate")
    ids = split.example(0).tolist()
    assert (
        special_ids(tokenizer, ids[len(TextEncoder(tokenizer).start) :]) == [tokenizer.eos_token_id] * 3
    )  # two of the template
    assert split.counts.special_tokens == {end: 2}
    if kind in LOSSLESS:
        text = tokenizer.decode(ids).replace(f"{end} ", end).replace(f" {end}", end)
        assert f"{end}two{end}" in text
        assert f"b{end}c{end}" in text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bytes", "smollm2", "words")])
@pytest.mark.parametrize("mark", [str(mark) for mark in MARKS])
def test_added_tokens_are_treated_alike_flagged_special_or_not_stripping_or_not(kind: str, mark: str) -> None:
    tokenizer = make(kind)
    if mark not in tokenizer.get_added_vocab():
        pytest.skip("a slow tokenizer has fewer")
    (example,) = rendered([{"a": f"x  {mark}  y"}], text="{a}")
    ids = tokenize([example], tokenizer, 256, truncation="truncate").example(0).tolist()
    start = len(TextEncoder(tokenizer).start)
    assert special_ids(tokenizer, ids[start:]) == [tokenizer.eos_token_id]
    if kind in LOSSLESS:
        assert f"x  {mark}  y" in tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_true_makes_those_in_rows_tokens_as_the_tokenizer_does(kind: str) -> None:
    tokenizer = make(kind)
    end = tokenizer.eos_token
    (example,) = rendered([{"a": f"one {end} two"}], text="{a}")
    split = tokenize([example], tokenizer, 256, truncation="truncate", special_tokens=True)
    native = tokenizer(f"one {end} two", add_special_tokens=False)["input_ids"]
    assert split.example(0).tolist() == [*TextEncoder(tokenizer).start, *native, tokenizer.eos_token_id]
    assert split.counts.special_tokens == {end: 1}


def test_token_that_row_and_template_spell_together_is_text() -> None:
    tokenizer = make("unigram-first")
    (example,) = rendered([{"a": "think>"}], text="x <{a}")
    assert special_ids(tokenizer, tokenize([example], tokenizer, 64, truncation="truncate").example(0)) == [
        1,
        2,
    ]  # start and end


def test_words_single_characters_and_spaces_that_were_added_stay_tokens() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["covid", "\u00f6", "  ", "\n\n", "\u2581\u2581"])
    text = "covid \u00f6  x\n\ny"
    (example,) = rendered([{"a": text}], text="{a}")
    native = tokenizer(text)["input_ids"]
    assert len(native) == 7
    assert tokenize([example], tokenizer, 64, truncation="truncate").example(0).tolist() == [
        *native,
        tokenizer.eos_token_id,
    ]


def test_added_token_that_a_prepended_space_would_hide_is_a_token_in_templates_and_counted_in_rows() -> None:
    tokenizer = make("legacy-llama")
    think = tokenizer.get_vocab()["<think>"]
    assert think not in tokenizer("4<think>")["input_ids"]  # Llama 2's own reading
    (example,) = rendered([{"a": "b<think>"}], text="4<think>{a}")
    for special_tokens, count in ((False, 1), (True, 2)):
        split = tokenize([example], tokenizer, 64, truncation="truncate", special_tokens=special_tokens)
        assert split.example(0).tolist().count(think) == count
        assert split.counts.special_tokens == {"<think>": 1}
    assert TextEncoder(tokenizer).prompt("4<think>", special_tokens=True)[-1] == think


def test_unknown_words_are_no_special_tokens() -> None:
    tokenizer = words()
    (example,) = rendered([{"a": "one zebra two"}], text="{a}")
    split = tokenize([example], tokenizer, 64, truncation="truncate")
    assert split.counts.special_tokens == {}
    assert tokenizer.decode(split.example(0)) == "one <unk> two </s>"


ORDINARY = st.text(st.sampled_from("ab  \n:the4<>|/s[]{}ü語🙂é\t"), max_size=30)


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS)
@given(text=ORDINARY)
def test_text_without_special_tokens_is_tokenised_as_by_the_tokenizer_itself(kind: str, text: str) -> None:
    tokenizer, encoder = make(kind), _encoder(kind)
    native = tokenizer(text, add_special_tokens=False)["input_ids"]
    if special_ids(tokenizer, native):
        return
    (found,) = encoder.encode([(text, [(0, len(text))])])
    assert found.ids.tolist() == native
    if (copy := encoder._copy("start", False, with_placeholders=True)) is not None:
        assert copy.encode(text, add_special_tokens=False).ids == native


PART = st.one_of(
    ORDINARY,
    st.sampled_from(
        ["</s>", "<s>", "<think>", "<|turn|>", "<|im_end|>", "<e>", "<unk>", "<", "think>", "[L] "]
    ),
)


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.tuples(PART, st.booleans()), max_size=6))
def test_only_the_templates_special_tokens_are_tokens_whatever_rows_hold(
    kind: str, parts: list[tuple[str, bool]]
) -> None:
    tokenizer, encoder = make(kind), _encoder(kind)
    text, rows, expected = "", [], []
    literal, ids = "", {word: i for i, word in encoder.special.items()}
    names = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))))
    for part, of_row in [*parts, ("", True)]:
        if of_row:
            expected += [ids[word] for word in names.findall(literal) if ids[word] != tokenizer.unk_token_id]
            rows.append((len(text), len(text) + len(part)))
        literal = "" if of_row else literal + part
        text += part
    (found,) = encoder.encode([(text, rows)])
    assert special_ids(tokenizer, found.ids) == expected
    sizes = [found.bytes_before(n) for n in range(len(found.ids) + 1)]
    assert sizes == sorted(sizes)
    if len(found.ids):
        assert (sizes[0], sizes[-1]) == (0, len(text.encode()))


@cache
def _encoder(kind: str) -> TextEncoder:
    return TextEncoder(make(kind))


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize(
    ("prompt", "completion"), [("a:", " b"), ("a:", "b"), ("a:\n", "the ab"), ("a ", "4"), ("a:", "\n b")]
)
def test_completion_is_read_as_the_text_after_the_prompt_without_a_space_more_or_less(
    kind: str, prompt: str, completion: str
) -> None:
    tokenizer = make(kind)
    split = tokenize([PromptCompletion(prompt, completion)], tokenizer, 64, truncation="truncate")
    ((ids, spans),) = split.documents(0)
    read = int(spans[0, 0])
    start = len(TextEncoder(tokenizer).start)
    assert tokenizer.decode(ids[start:-1]) == tokenizer.decode(
        tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    )
    assert ids[:read].tolist() == TextEncoder(tokenizer).prompt(prompt, special_tokens=True)
    assert split.label_bytes.tolist() == [len(completion.encode())]


@pytest.mark.parametrize(
    ("completion", "pieces"), [(" b", ["\u2581", "b"]), ("b", ["b"]), ("\nb", ["\u2581", "b"])]
)
def test_completion_of_words_that_are_marked_between_spaces_continues_the_prompt(
    completion: str, pieces: list[str]
) -> None:
    tokenizer = make("spaced-pieces")
    split = tokenize([PromptCompletion("a:", completion)], tokenizer, 64, truncation="truncate")
    assert tokenizer.convert_ids_to_tokens(split.example(0).tolist()) == ["\u2581", "a", ":", *pieces, "</s>"]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_completion_after_a_special_token_is_read_as_the_tokenizer_reads_the_whole(scheme: str) -> None:
    tokenizer = unigram(scheme, start=False)
    for prompt in ("ab<|turn|>", "ab<|user|>"):  # the second strips the spaces behind it
        split = tokenize([PromptCompletion(prompt, " ab")], tokenizer, 64, truncation="truncate")
        assert split.example(0).tolist() == [
            *tokenizer(f"{prompt} ab", add_special_tokens=False)["input_ids"],
            2,
        ]


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("completion", [" b", "b", "\nab", "  ab"])
def test_decoded_completion_keeps_its_first_space(kind: str, completion: str) -> None:
    tokenizer = make(kind)
    encoder = TextEncoder(tokenizer)
    ((ids, spans),) = tokenize(
        [PromptCompletion("the ab:", completion)], tokenizer, 64, truncation="truncate"
    ).documents(0)
    read = int(spans[0, 0])
    assert encoder.decode_after(ids[:read].tolist(), ids[read:].tolist()) == completion


@pytest.mark.parametrize("kind", ["bytes", "unigram-first", "legacy-llama"])
@pytest.mark.parametrize("text", ["{s}one{e}", "{s}one", "one{e}", "one{e}\n", "{s}one {e} two{e}"])
@pytest.mark.parametrize("truncation", ["truncate", "split"])
def test_start_and_end_token_that_a_text_has_itself_are_not_doubled(
    kind: str, text: str, truncation: str
) -> None:
    tokenizer = make(kind)
    start, end = tokenizer.bos_token, tokenizer.eos_token
    (plain,) = rendered([{"a": text.format(s="", e="").strip()}], text="{a}")
    (example,) = rendered([{"a": text.format(s=start, e=end)}], text="{a}")
    split = tokenize([example], tokenizer, 64, truncation=truncation, special_tokens=True)
    ids = split.example(0).tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == max(1, text.count("{e}"))
    if text == "{s}one{e}" and kind != "unigram-first":  # which puts no space before a text behind a token
        alone = tokenize([plain], tokenizer, 64, truncation=truncation)
        assert (ids, split.label_bytes.tolist()) == (alone.example(0).tolist(), alone.label_bytes.tolist())
        assert split.spans.tolist() == alone.spans.tolist()


def test_start_token_that_a_prompt_has_itself_is_not_doubled_in_training_nor_generation() -> None:
    tokenizer = make("unigram-first")
    split = tokenize([PromptCompletion("<s>a", "b")], tokenizer, 64, truncation="truncate")
    assert split.example(0).tolist().count(1) == 1
    assert TextEncoder(tokenizer).prompt("<s>a", special_tokens=True).count(1) == 1
    assert (
        TextEncoder(tokenizer).prompt("<s>a", special_tokens=False).count(1) == 1
    )  # the start; the prompt's is text


def texts(split: TokenSplit, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(split.example(i)) for i in range(len(split))]


def test_task_reads_rows_held_out_rows_and_packed_rows_alike_and_counts(write, load) -> None:
    tokenizer = byte_tokenizer(start=True)
    write("a.jsonl", [{"text": f"x{i}<e>y"} for i in range(10)])
    for packing in (False, True):
        task = load(tokenizer, a={"train": "a.jsonl", "validation": "a.jsonl", "packing": packing})["a"]
        for split in (task.train, task.validation):
            ids = split.tokens.tolist()
            assert ids.count(tokenizer.eos_token_id) == ids.count(tokenizer.bos_token_id) == 10
            assert split.counts.special_tokens == {"<e>": 10}
        assert texts(task.validation, tokenizer)[0] == "<s>x0<e>y<e>"
        real = load(
            tokenizer,
            a={"train": "a.jsonl", "validation": "a.jsonl", "packing": packing, "special_tokens": True},
        )["a"]
        assert real.data_hash != task.data_hash
        for split in (real.train, real.validation):
            assert split.tokens.tolist().count(tokenizer.eos_token_id) == 20
            assert split.counts.special_tokens == {"<e>": 10}


def test_special_tokens_in_rows_are_counted_in_a_note_that_says_how_they_are_read(write, load) -> None:
    tokenizer = byte_tokenizer()
    write("a.jsonl", [{"text": f"x{i}<e>y<p><e>"} for i in range(10)])
    write("b.jsonl", [{"text": "plain"}] * 4)
    sources = {"a": {"train": "a.jsonl"}, "b": {"train": "b.jsonl"}}
    (note,) = notes_on_rows(load(tokenizer, **sources), run_config(sources))
    assert note == (
        "special tokens written in rows of a (30: <e> 20, <p> 10) are text; "
        "tasks.a.special_tokens=true makes them tokens"
    )
    sources["a"]["special_tokens"] = True
    (note,) = notes_on_rows(load(tokenizer, **sources), run_config(sources))
    assert note == "special tokens written in rows of a (30: <e> 20, <p> 10) are tokens"


def test_special_tokens_of_many_tasks_are_one_note(write, load) -> None:
    write("a.jsonl", [{"text": f"x{i}<e>y"} for i in range(10)])
    sources = {name: {"train": "a.jsonl"} for name in "abcdef"}
    (note,) = notes_on_rows(load(byte_tokenizer(), **sources), run_config(sources))
    assert note == (
        "special tokens written in rows of a, b, c, d and 2 more tasks (60: <e> 60) are text; "
        "task_defaults.special_tokens=true makes them tokens"
    )
    sources["b"]["special_tokens"] = True
    assert len(notes_on_rows(load(byte_tokenizer(), **sources), run_config(sources))) == 2


def test_cached_tokens_know_what_was_template_and_what_was_row(write, load) -> None:
    tokenizer = byte_tokenizer()
    write("a.jsonl", [{"text": "x<e>", "plain": "x"}] * 4)
    of_row = load(tokenizer, a={"train": "a.jsonl", "text": "{text}y"})["a"]
    of_template = load(tokenizer, a={"train": "a.jsonl", "text": "{plain}<e>y"})["a"]
    assert of_row.data_hash != of_template.data_hash
    assert (of_row.train.counts.special_tokens, of_template.train.counts.special_tokens) == ({"<e>": 3}, {})


@pytest.mark.parametrize(
    "change", [lambda t: t.add_tokens(["<x>"]), lambda t: setattr(t, "eos_token", "<p>")]
)
def test_tokenizers_that_read_text_differently_have_different_hashes(change: Callable[[Any], Any]) -> None:
    one, other = byte_tokenizer(), byte_tokenizer()
    assert tokenizer_hash(one) == tokenizer_hash(other)
    change(other)
    assert tokenizer_hash(one) != tokenizer_hash(other)


def test_ordinary_rows_and_prompts_of_the_small_model_have_the_tokens_that_they_always_had() -> None:
    tokenizer = smollm2()
    path = Path("assets/code/lua.validation.jsonl")
    for line in path.read_text(encoding="utf-8").splitlines()[:20]:
        row = json.loads(line)
        (example,) = rendered([row], prompt="{prompt}", completion="{completion}")
        ids = tokenize([example], tokenizer, 1 << 20, truncation="truncate").example(0).tolist()
        once, again = (
            tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "completion")
        )
        assert ids == [*once, *again, tokenizer.eos_token_id]
