"""Copies of a tokenizer that differ from it in one respect: which special tokens they recognise, or what they put before a text."""

from __future__ import annotations

import json
import secrets
import unicodedata
from collections.abc import Mapping
from typing import Any, Literal

from flora_train.config.errors import user_error

BETWEEN_SPACES = ("WhitespaceSplit", "Whitespace", "BertPreTokenizer")
"""Steps that drop white space: what follows them sees single words, and no beginning of a text."""

Place = Literal["start", "text", "token"]
"""What stands before a text: nothing, other text, or a token that splits the text (a special token)."""

NONCE = secrets.token_hex(8)
"""Part of the stand-ins for special tokens, drawn anew for every process: no text can hold them by chance or on purpose."""


def special_tokens_of(tokenizer: Any) -> dict[int, str]:
    """Id -> text of the added tokens that are no ordinary text: those flagged special, and others that look like markup (`<think>`).

    Added tokens that are words, single characters or white space stand for themselves, in rows as elsewhere."""
    found = {int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items() if _is_markup(token)}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return found | {int(i): str(text) for i, text in named if _bare(str(text))}


def _is_markup(token: Any) -> bool:
    text = _bare(str(token.content))
    return bool(text) and (bool(token.special) or (len(text) > 1 and any(unicodedata.category(c)[0] not in "LMNZ" for c in text)))


def _bare(text: str) -> str:
    """Without white space, also as SentencePiece writes it."""
    return text.replace("\u2581", " ").strip()


def stand_in(token: int) -> str:
    """The text that stands for a special token in the copies that `recognise_stand_ins` makes."""
    return f"\uf8ff{NONCE}:{token}\uf8ff"


def recognise_stand_ins(spec: dict[str, Any], special: Mapping[int, str]) -> None:
    """Let a tokenizer (as JSON) recognise `stand_in(id)` in place of its special tokens, whose own text is then text like any other."""
    renamed = {text: stand_in(i) for i, text in special.items()}
    for token in spec["added_tokens"]:
        if token["id"] in special:
            token |= {"content": stand_in(token["id"]), "normalized": False}
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
    """Normalizer and pre-tokenizer (as JSON) for a text that stands at `place`. more: whether text follows it.

    What tokenizers put before the first word, and what they strip at the ends, is right for a whole text only."""
    normalizer, pre_tokenizer = pipeline["normalizer"], pipeline["pre_tokenizer"]
    if place == "text" and drops_spaces(pipeline):
        # each word gets a mark there; here each run of spaces becomes one, so that the first word can be without
        spaces = [ONE_SPACE] if more else [ONE_SPACE, {"type": "Strip", "strip_left": False, "strip_right": True}]
        normalizer = {"type": "Sequence", "normalizers": [*([normalizer] if normalizer else []), *spaces]}
        pre_tokenizer = pre_tokenizer["pretokenizers"][1]
    return {"normalizer": _edited(normalizer, place, more), "pre_tokenizer": _edited(pre_tokenizer, place, more)}


def drops_spaces(pipeline: Mapping[str, Any]) -> bool:
    """Whether a text's words are marked where spaces stood before them, and the spaces dropped, those at its end included (T5)."""
    steps = (pipeline.get("pre_tokenizer") or {}).get("pretokenizers", [])
    return [step["type"] for step in steps] == ["WhitespaceSplit", "Metaspace"]


ONE_SPACE = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}


def _edited(part: Any, place: Place, more: bool) -> Any:
    """A normalizer or pre-tokenizer (as JSON) with each of its steps as it is for that place."""
    if part is None:
        return None
    if steps := next((key for key in ("normalizers", "pretokenizers") if key in part), None):
        kinds = [step["type"] for step in part[steps]]
        cut = next((i for i, kind in enumerate(kinds) if kind in BETWEEN_SPACES), len(kinds))
        return {**part, steps: [_edited(step, place, more) if i < cut else step for i, step in enumerate(part[steps])]}
    kind = part["type"]
    changed: dict[str, Any] = {}
    if kind == "Metaspace" and (place == "text" or (place == "token" and part.get("prepend_scheme") == "first")):
        changed = {"prepend_scheme": "never"}
    elif kind == "ByteLevel" and place == "text":
        changed = {"add_prefix_space": False}
    elif kind == "Prepend" and place == "text":
        changed = {"prepend": ""}
    elif kind == "Strip":
        changed = {"strip_left": part["strip_left"] and place == "start", "strip_right": part["strip_right"] and not more}
    return {**part, **changed}


def steps_of(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer (as JSON), those inside sequences among them."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [part, *(step for one in inner for step in steps_of(one))]


def pipeline_of(backend: Any) -> dict[str, Any]:
    """Normalizer and pre-tokenizer of a fast tokenizer, as JSON."""
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    return {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}


def copy_tokenizer(backend: Any, pipeline: Mapping[str, Any], special: Mapping[int, str] | None) -> Any:
    """A fast tokenizer with this pipeline. special: tokens that it knows by their stand-ins only (None: it keeps its own).

    Raises UserError where the copy would give tokens other ids."""
    from tokenizers import Tokenizer

    spec = json.loads(backend.to_str())
    spec |= {**pipeline, "post_processor": None, "truncation": None, "padding": None}
    if special is not None:
        recognise_stand_ins(spec, special)
    copy = Tokenizer.from_str(json.dumps(spec))
    if any(copy.token_to_id(stand_in(i)) != i for i in special or ()):
        raise user_error(
            "model.path", None, "its tokenizer cannot be told to read special tokens in rows as text: set special_tokens: true"
        )
    return copy
