"""What should the Triton kernels cost on a GPU that is not here? PREDICTIONS from counts of operations and bytes, not timings.

For every kernel of a forward and backward: operations on matrix units, float32 operations that modulate a tile, and bytes from
and to memory, each divided by what the chip does of it in a second. A kernel takes the largest of the three if programs on a
multiprocessor overlap, and matrix plus modulation if they do not: the truth lies between. Prints Markdown; a ratio is to a frozen
linear layer (two matmuls). Usage: python benchmarks/roofline.py [--save]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from flora_train.kernels import flora_tiles
from flora_train.kernels.blocks import matmul_constants
from flora_train.kernels.segments import Segments

RESULT = Path(__file__).parent / "results" / "roofline.md"
DTYPE = torch.bfloat16
BYTES = DTYPE.itemsize
MODULATION = 6
"""float32 operations that make one number of a modulated tile out of the small product: add the offset, widen W0, multiply,
round, and two to move it."""


@dataclass(frozen=True)
class Chip:
    """half, tf32: operations a second on matrix units; float32: on the others; memory: bytes a second."""

    name: str
    capability: int
    half: float
    tf32: float
    float32: float
    memory: float


H100 = Chip(
    "H100 (798 TFLOP/s in bf16 and 3.0 TB/s as measured on such a card, tf32 half of bf16, 60 TFLOP/s float32)",
    90,
    798e12,
    399e12,
    60e12,
    3.0e12,
)


@dataclass(frozen=True)
class Kernel:
    """Operations by unit, and bytes."""

    half: float
    tf32: float
    float32: float
    moved: float

    def seconds(self, chip: Chip, overlapping: bool) -> float:
        parts = [self.half / chip.half + self.tf32 / chip.tf32, self.float32 / chip.float32]
        return max((max if overlapping else sum)(parts), self.moved / chip.memory)


@dataclass(frozen=True)
class Layer:
    d: int
    tokens: int
    adapters: int
    rank: int

    def matmul(self) -> Kernel:
        """x W0^T."""
        return Kernel(2.0 * self.tokens * self.d**2, 0, 0, BYTES * (2 * self.tokens * self.d + self.d**2))


def modulated(layer: Layer, chip: Chip, split: bool) -> Kernel:
    """y or dX: every block of tokens modulates all of W0 for itself."""
    each = layer.tokens // layer.adapters
    block = flora_tiles.block_tokens(Segments((0, each)), DTYPE, layer.rank, chip.capability)
    blocks = layer.adapters * -(-each // block)
    rank = matmul_constants(DTYPE, layer.rank)["RANK"]
    numbers = float(blocks) * layer.d**2
    moved = layer.matmul().moved + 4.0 * layer.adapters * 2 * layer.d * layer.rank
    return Kernel((1 + split) * 2 * numbers * block, (3 if split else 1) * 2 * rank * numbers, MODULATION * numbers, moved)


def gradients(layer: Layer) -> Kernel:
    """dA and dB from tiles of dY^T X, and the parts of them that are summed afterwards."""
    rank = matmul_constants(DTYPE, layer.rank)["RANK"]
    side = -(-layer.d // flora_tiles.gradient_tile(DTYPE))
    out_tiles, in_tiles = flora_tiles.gradient_tiles(layer.adapters, side, side)
    numbers = float(layer.adapters) * layer.d**2
    parts = 2 * 4.0 * layer.adapters * layer.d * layer.rank * (-(-side // out_tiles) + -(-side // in_tiles))
    moved = BYTES * (2 * layer.tokens * layer.d + layer.d**2) + parts
    return Kernel(2.0 * layer.tokens * layer.d**2, 2 * 2 * rank * numbers, numbers, moved)


def flora(layer: Layer, chip: Chip, split: bool, overlapping: bool) -> float:
    """Seconds of forward and backward."""
    kernels = (modulated(layer, chip, split), modulated(layer, chip, False), gradients(layer))
    return sum(kernel.seconds(chip, overlapping) for kernel in kernels)


def expansion(layer: Layer, chip: Chip) -> float:
    """The paper's: every rank's copy of the tokens, through W0 and back."""
    product = layer.matmul()
    matmul = Kernel(layer.rank * product.half, 0, 0, layer.rank * product.moved)
    products = Kernel(0, 0, 0, layer.rank * BYTES * 4 * layer.tokens * layer.d)  # a * x, and the sum of b * z
    return 2 * (matmul.seconds(chip, True) + products.seconds(chip, True))


def lora(layer: Layer, chip: Chip) -> float:
    """The frozen layer, and four thin matmuls that read x, dY, y and dX once more."""
    thin = Kernel(6 * 2.0 * layer.tokens * layer.d * max(16, layer.rank), 0, 0, BYTES * 8 * layer.tokens * layer.d)
    return frozen(layer, chip) + thin.seconds(chip, True)


def frozen(layer: Layer, chip: Chip) -> float:
    return 2 * layer.matmul().seconds(chip, True)


def rows(chip: Chip) -> Iterator[str]:
    """Markdown."""
    for d in (2048, 4096):
        for tokens, adapters in ((8192, 128), (8192, 32), (8192, 8), (8192, 1)):
            for rank in (1, 4, 16, 32, 64):
                layer = Layer(d, tokens, adapters, rank)
                base = frozen(layer, chip)
                spans = (
                    f"{flora(layer, chip, split, True) / base:.2f} to {flora(layer, chip, split, False) / base:.2f}"
                    for split in (False, True)
                )
                others = (f"{way(layer, chip) / base:.2f}" for way in (expansion, lora))
                yield f"| {d} | {adapters} x {tokens // adapters} | {rank} | {' | '.join([*spans, *others])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    lines = [
        "# Predicted cost of the Triton kernels: forward + backward as a multiple of a frozen linear layer",
        "",
        "**Predictions, nothing here was timed.** `python benchmarks/roofline.py --save` prints this file; benchmarks/kernels.py times the",
        "same on a GPU. Registers, shared memory and instructions of every configuration: compiled_kernels.md.",
        "",
        f"{H100.name}, bfloat16. From: matmuls and modulation overlap; to: they do not.",
        "",
        "| d | adapters x tokens each | rank | fLoRA, precision=fused | fLoRA, precision=split | rank expansion | LoRA |",
        "|---" * 7 + "|",
        *rows(H100),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
