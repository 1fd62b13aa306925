"""Compiles the Triton kernels ahead of time for every supported chip, on any Linux machine, without a GPU.

Prints registers, spilled bytes, shared memory and instructions of every kernel, dtype, rank and chip. Exits
with 1 if a kernel spills more, or needs more shared memory, than the limits below. It does not measure speed.

Usage: python benchmarks/compile_kernels.py [--jobs N] [--chips 80 90] [--types bf16] [--save]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flora_train.kernels import adamw_triton as adamw
from flora_train.kernels import merge_triton as merge
from flora_train.kernels.flora import triton_gradient as flora_gradient_triton
from flora_train.kernels.flora import triton_matmul as flora_matmul_triton
from flora_train.kernels.flora import triton_tiles as tiles
from flora_train.kernels.ia3 import triton_kernels as ia3
from flora_train.kernels.lora import triton_kernels as lora
from flora_train.kernels.segments import Segments
from flora_train.kernels.triton_common import TILE_FEATURES, TILE_TOKENS, matmul_constants

RESULT = Path(__file__).parent / "results" / "compiled_kernels.md"
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""CUDA C++ Programming Guide, technical specifications per compute capability. sm_86 and sm_89 run what is
compiled for sm_80 and have less than it."""
SPILLED_BYTES = {80: 0, 90: 0, 100: 16, 120: 16}
"""A few numbers are allowed where `kernels.backend=auto` does not choose these kernels."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RANKS = (16, 32, 64)  # smaller ones are padded to 16
INTEGERS = "i32"
FEATURES = 4096


@dataclass(frozen=True)
class Compiled:
    kernel: str
    dtype: str
    rank: int
    capability: int
    registers: int
    spilled: int
    shared: int
    instructions: int
    matmuls: int

    @property
    def fits(self) -> bool:
        return self.spilled <= SPILLED_BYTES[self.capability] and self.shared <= SHARED_BYTES[self.capability]


TYPED = {"x", "weight", "y", "dy", "dx", "tokens"}
FLOAT32 = {
    "left",
    "right",
    "offset",
    "near",
    "A",
    "B",
    "dA",
    "dB",
    "stack",
    "scaling",
    "scale",
    "hidden",
    "parts",
    "sums",
}
FLOAT32 |= {"factors", "values", "gradients", "first", "second", "numbers"}
OTHERS = {
    "table": "*i32",
    "bounds": "*i32",
    "order": "*i64",
    "slots": "*i64",
    "beta1": "fp32",
    "beta2": "fp32",
    "eps": "fp32",
    "tiles": "*i32",
    "layers": "*i64",
    "experts": "*i64",
}
WITHOUT_RANK = ("IA3 y", "IA3 dX, dl", "AdamW")
ONLY_FLOAT32 = ("AdamW",)


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched."""

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    fetched: Mapping[str, Sequence[int]]


def launched(
    kernel: Any, options: dict[str, Any], fetched: Mapping[str, Sequence[int]] | None = None
) -> Variant:
    """A kernel as Python launches it; Triton's default is 4 warps and 3 stages. fetched: tensors passed as
    descriptors -> tiles."""
    constants = dict(options)
    warps = constants.pop("num_warps", 4)
    return Variant(
        kernel, constants, {"num_warps": warps, "num_stages": constants.pop("num_stages", 3)}, fetched or {}
    )


def tiled(shape: tiles.MatmulTiles | tiles.GradientTiles) -> dict[str, int]:
    return {"num_warps": shape.warps, "num_stages": shape.stages}


def variants(dtype: str, rank: int, capability: int) -> dict[str, Variant]:
    """The launches of flora_train's Triton kernels for tokens of this dtype on this chip."""
    type_ = DTYPES[dtype]
    of_rank, of_lora, of_expand = (
        matmul_constants(type_, rank),
        lora.tuning(type_, rank),
        lora.expand_tuning(type_, rank),
    )
    blocks = {"TOKENS": TILE_TOKENS, "FEATURES": TILE_FEATURES, "ORDERED": False}
    found = {}
    for uses_tma in (False, True) if capability == 90 and dtype != "fp32" else (False,):
        how = ", fetched" if uses_tma else ""
        matmul = of_rank | {"ORDERED": False, "GROUP": flora_matmul_triton.GROUP, "USES_TMA": uses_tma}
        lengths = (1, 128, 4096)
        for tokens in sorted(
            {
                tiles.tile_tokens(Segments((0, n)), type_, rank, capability=capability, uses_tma=uses_tma)
                for n in lengths
            }
        ):
            for backward in (False, True):
                for split in (False, True) if dtype != "fp32" and not backward else (False,):
                    name = f"fLoRA {'dX' if backward else 'y, split' if split else 'y'}, {tokens} tokens{how}"
                    exact = {
                        "SPLIT": split,
                        "M_PRECISION": "tf32x3" if split else of_rank["PRECISION"],
                        "TRANSPOSED": backward,
                    }
                    shape = tiles.matmul_tiles(type_, rank, uses_tma=uses_tma, split=split)
                    exact |= tiled(shape) | {"FEATURES": shape.features, "SUMMED": shape.summed}
                    one = {"weight_feature" if backward else "weight_summed": 1}
                    variant = matmul | exact | one | {"TOKENS": tokens}
                    stored = [shape.summed, shape.features] if backward else [shape.features, shape.summed]
                    fetched = {"x": [tokens, shape.summed], "weight": stored} if uses_tma else {}
                    found[name] = launched(flora_matmul_triton._modulated_matmul, variant, fetched)
        for each in (1, 4096) if uses_tma else (1,):
            tile = tiles.gradient_tiles(type_, rank, tokens_per_adapter=each, uses_tma=uses_tma)
            variant = (
                of_rank
                | tiled(tile)
                | {"TOKENS": tile.tokens, "OUTS": tile.outs, "INS": tile.ins, "ORDERED": False, "ADD": True}
            )
            shapes = {
                "x": (tile.tokens, tile.ins),
                "dy": (tile.tokens, tile.outs),
                "weight": (tile.outs, tile.ins),
            }
            found[f"fLoRA dA, dB, {tile.outs} x {tile.ins}{how}"] = launched(
                flora_gradient_triton._adapter_gradients,
                variant | {"USES_TMA": uses_tma},
                shapes if uses_tma else {},
            )
    parts = blocks | {"PARTS": 8}
    of_merge = matmul_constants(torch.float32, rank) | {
        "FIELDS": merge.FIELDS,
        "OUTS": merge.TILE_OUTS,
        "INS": merge.TILE_INS,
        "num_warps": merge.WARPS,
    }
    return found | {
        "LoRA shrink": launched(lora._shrink, of_lora | parts | {"stack_feature": 1}),
        "LoRA shrink of dY": launched(lora._shrink, of_lora | parts | {"stack_rank": 1}),
        "LoRA expand": launched(lora._expand, of_expand | blocks | {"stack_rank": 1, "ADD": True}),
        "LoRA expand to dX": launched(lora._expand, of_expand | blocks | {"stack_feature": 1, "ADD": False}),
        "LoRA dA, dB": launched(lora._outer, of_lora | parts),
        "IA3 y": launched(ia3._scale, blocks),
        "IA3 dX, dl": launched(ia3._scale_gradients, parts),
        "AdamW": launched(adamw._adamw, {"BLOCK": adamw.BLOCK}),
        "merge, LoRA": launched(merge._merge, of_merge | {"MULTIPLY": False}),
        "merge, fLoRA": launched(merge._merge, of_merge | {"MULTIPLY": True}),
    }


def configurations(
    chips: Sequence[int], types: Sequence[str], ranks: Sequence[int] = RANKS
) -> Iterator[tuple[str, str, int, int]]:
    """(kernel, dtype, rank, compute capability); a kernel without ranks occurs once."""
    for capability in chips:
        for dtype in types:
            for rank in ranks:
                for name in variants(dtype, rank, capability):
                    if (name not in WITHOUT_RANK or rank == ranks[0]) and (
                        name not in ONLY_FLOAT32 or dtype == "fp32"
                    ):
                        yield name, dtype, rank, capability


def compile_one(name: str, dtype: str, rank: int, capability: int) -> Compiled:
    variant = variants(dtype, rank, capability)[name]
    kernel, constants = variant.kernel, variant.constants
    signature = {argument: argument_type(argument, variant, dtype) for argument in kernel.arg_names}
    aligned = {
        "features",
        "summed",
        "in_features",
        "out_features",
        "x_token",
        "y_token",
        "weight_feature",
        "weight_summed",
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, type_) in enumerate(signature.items())
        if type_.startswith("*") or (argument in aligned and type_ == INTEGERS)
    }
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    return Compiled(
        name,
        dtype,
        rank,
        capability,
        shared=compiled.metadata.shared,
        **resources(compiled.asm["ptx"], capability),
    )


def argument_type(argument: str, variant: Variant, dtype: str) -> str:
    """Triton's type of a kernel argument."""
    if argument in variant.constants:
        return "constexpr"
    if argument in variant.fetched:
        return f"tensordesc<{dtype}{list(variant.fetched[argument])}>"
    of_factors = variant.kernel is flora_gradient_triton._adapter_gradients and argument in ("left", "right")
    if of_factors or argument in TYPED:
        return f"*{dtype}"
    return "*fp32" if argument in FLOAT32 else OTHERS.get(argument, INTEGERS)


def resources(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spilled bytes by ptxas, and the numbers of instructions and of matrix instructions."""
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        file, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        file.write_text(ptx)
        said = tool(
            "ptxas-blackwell" if capability >= 100 else "ptxas",
            "-v",
            f"--gpu-name={arch}",
            str(file),
            "-o",
            str(cubin),
        ).stderr
        code = tool("nvdisasm", "-hex", "-c", str(cubin)).stdout
    registers, spilled = (
        re.search(r"Used (\d+) registers", said),
        re.findall(r"(\d+) bytes spill stores", said),
    )
    assert registers is not None, said
    return {
        "registers": int(registers[1]),
        "spilled": sum(map(int, spilled)),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[@A-Z]", code)),
        "matmuls": len(re.findall(r"\s(?:HMMA|HGMMA|UTC\w*MMA)\.", code)),
    }


def tool(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of the NVIDIA programs that Triton ships."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(program), *words], capture_output=True, text=True, check=True)


def table(found: list[Compiled]) -> list[str]:
    """Markdown."""
    columns = (
        "kernel | type | rank | chip | registers | spilled bytes | shared KiB (of) | instructions | "
        "of them for matrix units"
    )
    lines = [f"| {columns} |", "|---" * 9 + "|"]
    for c in found:
        shared = f"{c.shared / 1024:.0f} ({SHARED_BYTES[c.capability] >> 10})"
        lines.append(
            f"| {c.kernel} | {c.dtype} | {'any' if c.kernel in WITHOUT_RANK else f'to {c.rank}'} | "
            f"sm_{c.capability} | {c.registers} | {c.spilled} | {shared} | {c.instructions} | {c.matmuls} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument(
        "--chips",
        type=int,
        nargs="+",
        choices=list(SHARED_BYTES),
        default=list(SHARED_BYTES),
        help="for these only",
    )
    parser.add_argument(
        "--types", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="for tokens of these only"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", choices=RANKS, default=list(RANKS), help="for adapters of these only"
    )
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        found = list(
            pool.map(
                compile_one, *zip(*configurations(options.chips, options.types, options.ranks), strict=True)
            )
        )
    heading = [
        "# The Triton kernels, compiled",
        "",
        f"triton {triton.__version__}, blocks of {TILE_TOKENS} tokens (fLoRA: as named) x {TILE_FEATURES} "
        "features, tokens in order, 8 parts; fetched: by "
        "the copy engine of sm_90. `python benchmarks/compile_kernels.py --save` prints this file.",
        "",
    ]
    text = "\n".join([*heading, *table(found)]) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text)
    return int(not all(c.fits for c in found))


if __name__ == "__main__":
    sys.exit(main())
