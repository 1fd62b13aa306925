"""Copies of a fast tokenizer that differ in one respect: which special tokens they recognize, or what they
put before a text."""

from __future__ import annotations

import json
import secrets
import unicodedata
from collections.abc import Mapping
from typing import Any, Literal

from flora_train.config.errors import user_error

BETWEEN_SPACES = ("WhitespaceSplit", "Whitespace", "BertPreTokenizer")
"""Steps that drop white space, so that later steps see single words and no beginning of a text."""

Place = Literal["start", "text", "token"]
"""What precedes a text: nothing, other text, or a token that splits the text (a special token)."""

NONCE = secrets.token_hex(8)
"""Part of the placeholders for special tokens, drawn for every process, so that no text contains them."""


def special_tokens_of(tokenizer: Any) -> dict[int, str]:
    """Id -> text of the added tokens that are not ordinary text: those flagged special, and others that look
    like markup (`<think>`).

    Added tokens that are words, single characters or white space are read as tokens everywhere.
    """
    found = {
        int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items() if _is_markup(token)
    }
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return found | {int(i): str(text) for i, text in named if _bare(str(text))}


def _is_markup(token: Any) -> bool:
    text = _bare(str(token.content))
    return bool(text) and (
        bool(token.special) or (len(text) > 1 and any(unicodedata.category(c)[0] not in "LMNZ" for c in text))
    )


def _bare(text: str) -> str:
    """A text without white space, also in the form of SentencePiece."""
    return text.replace("\u2581", " ").strip()


def placeholder(token: int) -> str:
    """The placeholder of a special token in the copies that `recognize_placeholders` makes."""
    return f"\uf8ff{NONCE}:{token}\uf8ff"


def recognize_placeholders(spec: dict[str, Any], special: Mapping[int, str]) -> None:
    """Make a tokenizer (as JSON) recognize `placeholder(id)` instead of its special tokens, whose text is
    then ordinary text."""
    renamed = {text: placeholder(i) for i, text in special.items()}
    for token in spec["added_tokens"]:
        if token["id"] in special:
            token |= {"content": placeholder(token["id"]), "normalized": False}
    model = spec["model"]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if isinstance(model["vocab"], list):  # Unigram: [piece, score]
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
        return
    model["vocab"] = {renamed.get(piece, piece): i for piece, i in model["vocab"].items()}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b[prefix:]} & renamed.keys()]


def pipeline_at(pipeline: Mapping[str, Any], place: Place, more: bool) -> dict[str, Any]:
    """Normalizer and pre-tokenizer (as JSON) for a text after `place`. more: whether text follows it.

    Tokenizers add a mark before the first word and strip the ends, which is right only for a whole text.
    """
    normalizer, pre_tokenizer = pipeline["normalizer"], pipeline["pre_tokenizer"]
    if place == "text" and drops_spaces(pipeline):
        # words are marked by the pre-tokenizer; here every run of spaces becomes one mark, so that the first
        # word can have none
        spaces = (
            [ONE_SPACE] if more else [ONE_SPACE, {"type": "Strip", "strip_left": False, "strip_right": True}]
        )
        normalizer = {"type": "Sequence", "normalizers": [*([normalizer] if normalizer else []), *spaces]}
        pre_tokenizer = pre_tokenizer["pretokenizers"][1]
    return {
        "normalizer": _edited(normalizer, place, more),
        "pre_tokenizer": _edited(pre_tokenizer, place, more),
    }


def drops_spaces(pipeline: Mapping[str, Any]) -> bool:
    """Whether words are marked where spaces precede them, and spaces are dropped, also at the end of a text
    (T5)."""
    steps = (pipeline.get("pre_tokenizer") or {}).get("pretokenizers", [])
    return [step["type"] for step in steps] == ["WhitespaceSplit", "Metaspace"]


ONE_SPACE = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}


def _edited(part: Any, place: Place, more: bool) -> Any:
    """A normalizer or pre-tokenizer (as JSON) with each of its steps adapted to the place."""
    if part is None:
        return None
    if steps := next((key for key in ("normalizers", "pretokenizers") if key in part), None):
        kinds = [step["type"] for step in part[steps]]
        cut = next((i for i, kind in enumerate(kinds) if kind in BETWEEN_SPACES), len(kinds))
        return {
            **part,
            steps: [_edited(step, place, more) if i < cut else step for i, step in enumerate(part[steps])],
        }
    kind = part["type"]
    changed: dict[str, Any] = {}
    if kind == "Metaspace" and (
        place == "text" or (place == "token" and part.get("prepend_scheme") == "first")
    ):
        changed = {"prepend_scheme": "never"}
    elif kind == "ByteLevel" and place == "text":
        changed = {"add_prefix_space": False}
    elif kind == "Prepend" and place == "text":
        changed = {"prepend": ""}
    elif kind == "Strip":
        changed = {
            "strip_left": part["strip_left"] and place == "start",
            "strip_right": part["strip_right"] and not more,
        }
    return {**part, **changed}


def steps_of(part: Any) -> list[dict[str, Any]]:
    """All steps of a normalizer or pre-tokenizer (as JSON), including those in sequences."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [part, *(step for one in inner for step in steps_of(one))]


def pipeline_of(backend: Any) -> dict[str, Any]:
    """Normalizer and pre-tokenizer of a fast tokenizer as JSON."""
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    return {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}


def copy_tokenizer(backend: Any, pipeline: Mapping[str, Any], special: Mapping[int, str] | None) -> Any:
    """A fast tokenizer with another pipeline.

    special: special tokens that it recognizes by their placeholders only; None: it keeps its own. Raises
    UserError if the copy would give tokens other ids.
    """
    from tokenizers import Tokenizer

    spec = json.loads(backend.to_str())
    spec |= {**pipeline, "post_processor": None, "truncation": None, "padding": None}
    if special is not None:
        recognize_placeholders(spec, special)
    copy = Tokenizer.from_str(json.dumps(spec))
    if any(copy.token_to_id(placeholder(i)) != i for i in special or ()):
        hint = "has a tokenizer that cannot read special tokens in rows as text: set special_tokens: true"
        raise user_error("model.path", None, hint)
    return copy
