"""The values of one adapter as they travel: the parameters of its layers and of its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from torch import Tensor

LayerValues = Mapping[str, Tensor]
"""Parameter -> tensor, of one layer."""


@dataclass(frozen=True)
class AdapterValues:
    """All that a client and the server send each other. No other number travels."""

    layers: Mapping[str, LayerValues]
    """Module -> parameter -> tensor."""
    head: LayerValues = field(default_factory=dict)
    """Parameter of the head -> tensor; empty without head."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the order in which they travel: the same for the same adapter."""
        for module in sorted(self.layers):
            for param in sorted(self.layers[module]):
                yield f"{module}.{param}", self.layers[module][param]
        for param in sorted(self.head):
            yield f"head.{param}", self.head[param]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def digest(self) -> str:
        """SHA-256 of names, shapes and bits, as hexadecimal digits."""
        found = sha256()
        for name, tensor in self.tensors():
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\x1f".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def map(self, change: Callable[[str, Tensor], Tensor]) -> AdapterValues:
        """The same names with other tensors. change: (name, tensor) -> tensor."""
        layers: dict[str, dict[str, Tensor]] = {}
        for module, params in self.layers.items():
            layers[module] = {param: change(f"{module}.{param}", tensor) for param, tensor in params.items()}
        head = {param: change(f"head.{param}", tensor) for param, tensor in self.head.items()}
        return AdapterValues(layers, head)
