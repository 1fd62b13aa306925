"""Which member a MeteoRA gate chooses for held-out documents of the quickstart's languages.

    python studies/gates.py RUN           prints the tables; --save writes benchmarks/results/gates_cpu.md

RUN is one of recipe=gates_local, whose gate is over the LoRA adapters of Lua, Perl and Ruby. The documents
are the held-out functions and files of assets/code, from packages that no adapter and no gate has read. A
document is right if most of its tokens, over all layers, choose the adapter of its language first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flora_train.cli  # noqa: F401

# isort: split
import torch
from routed_study.choices import Document, choices_of, document_table, layer_table
from routed_study.heldout import StudyError

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.run_context import load_run, locked
from flora_train.runtime.environment import available_cpus, environment

ROOT = Path(__file__).resolve().parents[1]
CODE = ROOT / "assets" / "code"
RUN = ROOT / "outputs" / "gates_local"
RESULT = ROOT / "benchmarks" / "results" / "gates_cpu.md"
LANGUAGES = ("lua", "perl", "ruby")
GOAL = 0.95


def held_out_texts(language: str, folder: Path) -> list[str]:
    """The held-out documents of a language: functions with their comment, and files."""
    file = folder / f"{language}.validation.jsonl"
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [row.get("prompt", "") + row.get("completion", "") for row in map(json.loads, lines)]


def gate_of(bank: AdapterBank) -> tuple[int, list[str]]:
    """The bank's adapter with a gate, and the names of its members. Raises StudyError without one."""
    for adapter, spec in enumerate(bank.specs):
        gate: Any = getattr(spec, "gate", None)
        if gate is not None:
            return adapter, [member.name for member in gate.members]
    raise StudyError("the run has no adapter of method meteora: train recipe=gates_local")


def member_of(language: str, members: Sequence[str]) -> int:
    """The member that a language is right for. Raises StudyError without one."""
    name = f"{language}-lora"
    if name not in members:
        raise StudyError(f"the gate has no member {name}, only {', '.join(members)}")
    return members.index(name)


def read_choices(
    run: Path, folder: Path, tokens: int, *, limit: int
) -> tuple[dict[str, list[Document]], list[str]]:
    """Language -> its documents, and the members of the gate. limit: documents of a language."""
    with locked(str(run), alone=False):
        context, _ = load_run(str(run))
    bank, tokenizer = context.bank, context.tokenizer
    adapter, members = gate_of(bank)
    bank.model.eval()
    documents: dict[str, list[Document]] = {}
    for language in LANGUAGES:
        right = member_of(language, members)
        for text in held_out_texts(language, folder)[:limit]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
            documents.setdefault(language, []).append(Document(right, choices_of(bank, adapter, ids)))
        print(f"{language}: done", flush=True)
    return documents, members


def lines_of(documents: dict[str, list[Document]], members: Sequence[str], tokens: int) -> Iterator[str]:
    """The whole file, line by line."""
    facts = environment()
    everything = [document for of_language in documents.values() for document in of_language]
    right = sum(document.is_right for document in everything) / len(everything)
    yield "# Which adapter a MeteoRA gate chooses for held-out code"
    yield ""
    yield (
        f"{facts.machine.processor}, {facts.machine.cpus} CPUs; torch {facts.packages['torch']}, "
        f"transformers {facts.packages['transformers']}; commit {facts.commit}. "
        f"recipe=gates_local; the first {tokens} tokens of every document. "
        "`python studies/gates.py outputs/gates_local --save` prints this file."
    )
    yield ""
    verdict = "met" if right >= GOAL else "missed"
    yield (
        f"{right:.1%} of {len(everything)} documents are sent to the adapter of their language by majority "
        f"over tokens and layers (goal: {GOAL:.0%}, {verdict}). The gate is told no language; it was taught "
        "by the languages of its training texts, which are from other packages."
    )
    yield ""
    yield from document_table(documents, members)
    yield ""
    yield "## Tokens whose first choice is right, by layer"
    yield ""
    yield from layer_table(documents)


def main(arguments: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 with a one-line error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=RUN, help="default: outputs/gates_local")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("--code", type=Path, default=CODE, help="documents (default: assets/code)")
    parser.add_argument("--tokens", type=int, default=128, help="of each document (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=1000, help="of each language, at most")
    parser.add_argument("--threads", type=int, default=available_cpus())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        documents, members = read_choices(options.run, options.code, options.tokens, limit=options.documents)
    except (StudyError, UserError, OSError) as error:
        print(f"gates: {error}", file=sys.stderr)
        return 1
    text = "\n".join(lines_of(documents, members, options.tokens)) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
