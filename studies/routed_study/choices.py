"""What a gate or router chooses for documents, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec

Counts = NDArray[np.int64]


@dataclass
class FirstChoices:
    """Counts the tokens that each router sends to each member first. A `RouteRecorder` of one document."""

    counts: dict[str, Counts] = field(default_factory=dict)
    """Module -> [members]: tokens whose most probable member each is."""

    def add(self, spec: AdapterSpec, module: str, *, experts: Tensor, probabilities: Tensor) -> None:
        """Called by the routers of a bank."""
        members = probabilities.shape[1]
        counts = experts[:, 0].bincount(minlength=members).cpu().numpy()
        self.counts[module] = self.counts.get(module, np.zeros(members, dtype=np.int64)) + counts


@dataclass(frozen=True)
class Document:
    """The choices for one document."""

    right: int
    """The member of its language."""
    counts: Mapping[str, Counts]

    @property
    def majority(self) -> int:
        """The member that most tokens of most layers choose first; of equal ones the first."""
        return int(np.sum(list(self.counts.values()), axis=0).argmax())

    @property
    def is_right(self) -> bool:
        return self.majority == self.right


@torch.no_grad()
def choices_of(bank: AdapterBank, adapter: int, tokens: Sequence[int]) -> dict[str, Counts]:
    """Module -> the first choices of an adapter for the tokens of one document."""
    recorder = FirstChoices()
    bank.router.recorder = recorder
    try:
        with bank.routed([adapter]):
            bank.model(torch.tensor([list(tokens)], device=bank.device))
    finally:
        bank.router.recorder = None
    return recorder.counts


def layer_of(module: str) -> int:
    """The number of the layer that a module is in: the first number in its name."""
    return next(int(part) for part in module.split(".") if part.isdigit())


def right_share(documents: Sequence[Document], modules: Sequence[str]) -> float:
    """Share of the tokens whose first choice is right, over the gates of these modules."""
    right = tokens = 0
    for document in documents:
        for module in modules:
            counts = document.counts[module]
            right += int(counts[document.right])
            tokens += int(counts.sum())
    return right / tokens


def document_table(documents: Mapping[str, Sequence[Document]], members: Sequence[str]) -> Iterator[str]:
    """Markdown: language by language, how many documents are sent to each member by majority."""
    yield f"| language | documents | right | {' | '.join(members)} | tokens right, all layers |"
    yield f"|---|---|---|{'---|' * len(members)}---|"
    for language, of_language in documents.items():
        chosen = [document.majority for document in of_language]
        sent = [str(chosen.count(member)) for member in range(len(members))]
        right = sum(document.is_right for document in of_language) / len(of_language)
        tokens = right_share(of_language, list(of_language[0].counts))
        yield f"| {language} | {len(chosen)} | {right:.1%} | {' | '.join(sent)} | {tokens:.1%} |"
    everything = [document for of_language in documents.values() for document in of_language]
    right = sum(document.is_right for document in everything) / len(everything)
    tokens = right_share(everything, list(everything[0].counts))
    yield f"| all | {len(everything)} | **{right:.1%}** | {'| ' * len(members)}{tokens:.1%} |"


def layer_table(documents: Mapping[str, Sequence[Document]]) -> Iterator[str]:
    """Markdown: layer by layer, the share of tokens whose first choice is right."""
    everything = [document for of_language in documents.values() for document in of_language]
    layers: dict[int, list[str]] = {}
    for module in everything[0].counts:
        layers.setdefault(layer_of(module), []).append(module)
    yield f"| layer | gates | {' | '.join(documents)} | all | lowest and highest gate |"
    yield f"|---|---|{'---|' * len(documents)}---|---|"
    for layer, modules in sorted(layers.items()):
        shares = [right_share(of_language, modules) for of_language in documents.values()]
        of_gates = {right_share(everything, [module]): module for module in modules}
        low, high = min(of_gates), max(of_gates)
        cells = [f"{share:.1%}" for share in (*shares, right_share(everything, modules))]
        ends = f"{ending(of_gates[low])} {low:.1%}, {ending(of_gates[high])} {high:.1%}"
        yield f"| {layer} | {len(modules)} | {' | '.join(cells)} | {ends} |"


def ending(module: str) -> str:
    """The last part of a module's name."""
    return module.rpartition(".")[2]
