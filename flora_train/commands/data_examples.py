"""Examples as text, with the learnt part highlighted, as `flora-train data` prints them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from flora_train.config.terminal_text import plain, shown
from flora_train.data.audio.speech_split import SpeechSplit
from flora_train.data.embeddings.rows import NAMES
from flora_train.data.embeddings.split import EmbeddingSplit
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.labels.split import LabelSplit
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit
from flora_train.data.token_text import Piece, token_pieces
from flora_train.data.tokenizer_copies import special_tokens_of

LEARNT, SPECIAL, LEARNT_SPECIAL = "black on bright_green", "magenta", "bold white on green"
"""Styles, where the terminal has colours."""
STYLES = {(True, False): LEARNT, (True, True): LEARNT_SPECIAL, (False, True): SPECIAL, (False, False): ""}
"""(learnt, special token) -> style."""
MARKS = (("[[", "]]"), ("{{", "}}"), ("[[[[", "]]]]"), ("{learnt: ", " :learnt}"))
"""What encloses learnt text where there are no colours: the first of these that occurs in no example."""
WIDE_MARKS = ("\u27e6", "\u27e7")
"""The second choice, where the output can be any character."""
MARGIN = "| "
"""Before every line of an example."""
LONGEST_PIECE = 1000
"""Characters of a piece that is printed in full, unless everything is asked for."""
PIECE_ENDS = (700, 200)
"""Characters that are printed of a longer one, from its begin and from its end."""
MOST_PIECES = 60
"""Pieces of a document that are printed, unless everything is asked for."""
MOST_DOCUMENTS = 3
"""The same of the documents of a packed example."""

Document = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Tokens [n], and the spans [s, 2] of those that are learnt."""


class ExamplePrinter:
    """Prints examples on a console, with colours or marks."""

    def __init__(self, console: Console, tokenizer: Any, *, full: bool = False) -> None:
        self.console, self.tokenizer, self.full = console, tokenizer, full
        self.colours = console.color_system is not None and not console.no_color
        self.marks = MARKS[0]
        self._special = sorted(special_tokens_of(tokenizer).values(), key=len, reverse=True)

    def print_legend(self, splits: Iterable[tuple[TokenSplit, Sequence[int]]]) -> None:
        """Say what the highlighting means. splits: the examples that will be printed."""
        if self.colours:
            line = Text.assemble(
                ("learnt text", LEARNT),
                "  ",
                ("learnt special token", LEARNT_SPECIAL),
                "  text that is only read  ",
                ("special token", SPECIAL),
            )
        else:
            self.marks = self._unused_marks(splits)
            line = Text(f"Learnt text is between {self.marks[0]} and {self.marks[1]}; the rest is only read.")
        self.console.print(line)

    def print_example(self, task: Task, index: int) -> None:
        """One training example with its documents."""
        split = task.train
        title = f"\n{task.name}, training example {index + 1:,} of {len(split):,}"
        if isinstance(split, SpeechSplit):
            title += f": {split.paths[index]}, {split.seconds[index]:.1f} s"
        elif isinstance(split, PreferenceSplit) and not split.is_paired:
            title += f": {'a good' if split.labels[index] else 'a bad'} completion"
        elif isinstance(split, LabelSplit) and split.spec.task_type != "tokens":
            title += f": {split.target_text(index)}"
        elif isinstance(split, ChoiceSplit) and not split.is_packed:
            title += f": {split.label_names[split.references[index]]}"
        self.console.print(shown(title, "bold", keep="\n"))
        documents = split.documents(index)
        if isinstance(split, PreferenceSplit) and split.is_paired:
            self._print_pair(*documents)
            return
        if isinstance(split, LabelSplit):
            self._print_labelled(split, index, documents[0])
            return
        names = [""]
        if isinstance(split, EmbeddingSplit):
            for name, (tokens, spans) in zip(NAMES, documents, strict=False):
                self._print_note(f"{name}, {len(tokens):,} tokens")
                self._print_pieces(token_pieces(self.tokenizer, tokens, spans))
            return
        if len(documents) > 1:
            names = [f"document {number} of {len(documents)}, " for number in range(1, len(documents) + 1)]
        most = len(documents) if self.full else MOST_DOCUMENTS
        for name, document in zip(names[:most], documents, strict=False):
            self._print_document(document, name)
        if len(documents) > most:
            self._print_note(f"{len(documents) - most:,} more packed documents (--full prints all)")

    def _print_pair(self, chosen: Document, rejected: Document) -> None:
        """The prompt of a pair once, and both completions below it."""
        tokens, spans = chosen
        begin = int(spans[0, 0])
        self._print_note(f"prompt, {begin:,} tokens")
        self._print_pieces(token_pieces(self.tokenizer, tokens[:begin], spans[:0]))
        for name, document in (("chosen", chosen), ("rejected", rejected)):
            tokens, spans = document
            self._print_note(f"{name}, {len(tokens) - begin:,} tokens, {_learnt(spans):,} learnt")
            self._print_pieces(token_pieces(self.tokenizer, tokens, spans, first=begin))

    def _print_labelled(self, split: LabelSplit, index: int, document: Document) -> None:
        """A text, and below it the labels of its words if it is tagged."""
        tokens, spans = document
        self._print_note(f"{len(tokens):,} tokens")
        self._print_pieces(token_pieces(self.tokenizer, tokens, spans))
        if split.spec.task_type != "tokens":
            return
        values = split.target_values(index)
        begins = np.flatnonzero(values >= 0)
        pairs = []
        for begin, end in pairwise([*begins.tolist(), len(tokens)]):
            word = self.tokenizer.decode(tokens[begin:end].tolist(), skip_special_tokens=True).strip()
            pairs.append(f"{word}/{split.spec.labels[int(values[begin])]}")
        most = len(pairs) if self.full else MOST_PIECES
        more = f" and {len(pairs) - most:,} more" if len(pairs) > most else ""
        self._print_note(f"labels: {' '.join(pairs[:most])}{more}")

    def _print_document(self, document: Document, name: str) -> None:
        tokens, spans = document
        self._print_note(f"{name}{len(tokens):,} tokens, {_learnt(spans):,} learnt")
        self._print_pieces(token_pieces(self.tokenizer, tokens, spans))

    def _print_note(self, text: str) -> None:
        self.console.print(shown(text, "dim"))

    def _print_pieces(self, pieces: list[Piece]) -> None:
        text = self._rendered(self._shortened(pieces))
        for line in text.split("\n", allow_blank=True):
            self.console.print(Text().append(MARGIN, style="dim").append_text(line))

    def _rendered(self, pieces: Sequence[Piece]) -> Text:
        """Pieces with styles, or with marks around those that are learnt."""
        text = Text()
        inside = False
        for piece in pieces:
            if piece.learnt != inside and not self.colours:
                text.append(self.marks[0] if piece.learnt else self.marks[1])
            inside = piece.learnt
            text.append_text(self._piece(piece))
        if inside and not self.colours:
            text.append(self.marks[1])
        return text

    def _piece(self, piece: Piece) -> Text:
        style = STYLES[piece.learnt, piece.special]
        if piece.special:
            return Text(plain(piece.text, keep=""), style=style)
        return Text(plain(self._escaped(piece.text)), style=style)

    def _escaped(self, text: str) -> str:
        """A text with a backslash before everything that looks like a special token, and is none."""
        for token in self._special:
            text = text.replace(token, f"\\{token}")
        return text

    def _shortened(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces without the middle of long ones."""
        if self.full:
            return pieces
        left_out = len(pieces) - MOST_PIECES
        if left_out > 0:
            half = MOST_PIECES // 2
            note = Piece(f"\n... {left_out:,} pieces (--full prints all) ...\n", False, False)
            pieces = [*pieces[:half], note, *pieces[-half:]]
        return [_shorter(piece) for piece in pieces]

    def _unused_marks(self, splits: Iterable[tuple[TokenSplit, Sequence[int]]]) -> tuple[str, str]:
        """The first marks that no example contains."""
        texts = list(self._texts(splits))
        candidates = list(MARKS[:-1])
        if self.console.encoding.startswith("utf"):
            candidates.insert(1, WIDE_MARKS)
        for marks in candidates:
            if not any(mark in text for text in texts for mark in marks):
                return marks
        return MARKS[-1]

    def _texts(self, splits: Iterable[tuple[TokenSplit, Sequence[int]]]) -> Iterator[str]:
        for split, indices in splits:
            for index in indices:
                yield str(self.tokenizer.decode(split.example(index).tolist(), skip_special_tokens=False))


def _learnt(spans: NDArray[np.int32]) -> int:
    """Number of learnt tokens."""
    return int((spans[:, 1] - spans[:, 0]).sum())


def choose_examples(split: TokenSplit, number: int) -> list[int]:
    """Examples at equal distances, of which the first is the first one."""
    number = min(number, len(split))
    return [i * len(split) // number for i in range(number)]


def _shorter(piece: Piece) -> Piece:
    left_out = len(piece.text) - sum(PIECE_ENDS)
    if len(piece.text) <= LONGEST_PIECE:
        return piece
    first, last = PIECE_ENDS
    text = f"{piece.text[:first]} ... {left_out:,} characters (--full prints all) ... {piece.text[-last:]}"
    return Piece(text, piece.learnt, piece.special)
