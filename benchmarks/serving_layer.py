"""One served linear layer without the engine: the plugin's fLoRA, and LoRA in vLLM's form, at decoding,
prefill and with adapters of single tokens, as multiples of the plain matmul.

LoRA in vLLM's form: its Triton kernels on a GPU with vLLM installed, else batched matmuls with gathered
factors, as its CPU code has. Beside it stands the fastest of all forms, which include a pair of matmuls for
each adapter. fLoRA is flora_train.serving.projection.project as the plugin calls it, residual, with a plan
that is made once for a batch. Factors have the layer's number format, in slots of rank 8, 16 or 32. All forms
take turns; each figure is the median of the rounds' ratios. On a GPU everything is measured twice: as Python
launches it, and in a CUDA graph. vLLM runs batches with fLoRA without graphs.

On a CPU, a second table says from how many tokens of an adapter forming W * M is faster than a row for each
rank: the plugin's rule (layer_plan.py) is fitted to it.

Usage: python benchmarks/serving_layer.py [--device cuda] [--quick] [--rounds N] [--save]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median

import flora_train.cli  # noqa: F401  (before torch: how its threads wait, as in a run)

# isort: split
import torch
from torch import Tensor
from torch.nn.functional import linear

from flora_train.kernels.backend import use_backend
from flora_train.runtime.environment import environment
from flora_train.serving import layer_plan
from flora_train.serving.batch_rows import BatchRows
from flora_train.serving.layer_plan import SlotUse
from flora_train.serving.projection import LayerFactors, project

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 2, 4, 8, 16, 32)
QUICK_RANKS = (4, 16)
SHAPES = {"cpu": [(576, 576), (576, 1536), (1536, 576)], "cuda": [(4096, 4096), (4096, 11008), (11008, 4096)]}
"""(inputs, outputs): those of SmolLM2-135M, and of Llama-2 7B."""
CROSSOVER_TOKENS, CROSSOVER_RANKS = (4, 8, 16, 32, 64), (2, 4, 16)
CROSSOVER_ADAPTERS = 8
GOALS = {1: 1.0, 2: 1.0, 4: 1.0, 16: 0.8}
"""Rank -> least speed, of that of LoRA in vLLM's form."""
VLLM_FORMS = ("vLLM's Triton kernels", "gathered")
"""The first that a batch has is vLLM's."""
SECONDS = 0.05
"""That one timing should take."""
Form = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A batch of tokens."""

    name: str
    tokens: int
    adapters: int
    """Of which each has as many tokens, in turn where `mixed`, else one after the other."""
    mixed: bool = False

    def slots(self) -> list[int]:
        """The slot of every token."""
        if self.mixed:
            return [token % self.adapters for token in range(self.tokens)]
        return [token * self.adapters // self.tokens for token in range(self.tokens)]


CASES = [
    Case("decoding, 1 row", 1, 1),
    Case("decoding, 8 rows of 8 adapters", 8, 8),
    Case("decoding, 64 rows of 64 adapters", 64, 64),
    Case("prefill, 2,048 tokens of 1 adapter", 2048, 1),
    Case("prefill, 2,048 tokens of 4 adapters", 2048, 4),
    Case("256 tokens, each with an adapter of its own", 256, 256),
    Case("2,048 tokens, 64 adapters in turn", 2048, 64, mixed=True),
]


class Layer:
    """A weight, a batch, and factors in slots."""

    def __init__(
        self, case: Case, shape: tuple[int, int], rank: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(*sizes: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*sizes, generator=generator, device=device)).to(dtype)

        inputs, outputs = shape
        slot_rank = next(allowed for allowed in (8, 16, 32) if rank <= allowed)
        self.case, self.rank, self.device = case, rank, device
        self.x, self.weight = random(case.tokens, inputs), random(outputs, inputs, scale=inputs**-0.5)
        self.A = random(case.adapters, slot_rank, inputs)
        self.B = random(case.adapters, slot_rank, outputs, scale=0.05)
        self.A[:, rank:], self.B[:, rank:] = 0, 0
        self.lora_B = self.B.mT.contiguous()
        slots = case.slots()
        self.slots = torch.tensor(slots, device=device)
        tokens_of = {
            slot: tuple(token for token, its in enumerate(slots) if its == slot)
            for slot in range(case.adapters)
        }
        self.rows = BatchRows(tokens_of, False, device)
        self.factors = LayerFactors([self.A], [self.B])
        for slot in tokens_of:
            self.factors.use(slot, SlotUse((rank,), (True,), ("",), near_one=True))
        self.runs = [(slot, len(list(run))) for slot, run in groupby(slots)]

    def base(self) -> Tensor:
        return linear(self.x, self.weight)

    def flora(self) -> Tensor:
        return project(
            self.x,
            self.factors,
            self.rows,
            product=lambda x, part: linear(x, self.weight),
            weight=lambda: self.weight,
            bias=None,
        )

    def gathered_lora(self) -> Tensor:
        """LoRA as vLLM computes it on a CPU: the factors of every token are gathered."""
        y = self.base()
        thin = torch.bmm(self.A[self.slots], self.x[:, :, None])
        return y.add_(torch.bmm(self.lora_B[self.slots], thin)[:, :, 0])

    def lora_by_adapter(self) -> Tensor:
        """LoRA with a pair of matmuls for every run of tokens of an adapter."""
        y = self.base()
        start = 0
        for slot, count in self.runs:
            part = slice(start, start + count)
            y[part].addmm_(self.x[part] @ self.A[slot].T, self.B[slot])
            start += count
        return y

    def lora_forms(self) -> dict[str, Form]:
        """Ways to compute LoRA that fit into memory and are no absurd number of matmuls."""
        forms: dict[str, Form] = {}
        gathered = self.case.tokens * (self.A[0].numel() + self.B[0].numel()) * self.A.element_size()
        if gathered <= 2**31:
            forms["gathered"] = self.gathered_lora
        if len(self.runs) <= 64:
            forms["by adapter"] = self.lora_by_adapter
        kernels = triton_lora(self)
        if kernels is not None:
            forms["vLLM's Triton kernels"] = kernels
        return forms


def triton_lora(layer: Layer) -> Form | None:
    """LoRA by vLLM's own kernels; None without a GPU or vLLM."""
    if layer.device.type != "cuda":
        return None
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except ImportError:
        return None
    adapters, slot_rank, _ = layer.A.shape
    meta = LoRAKernelMeta.make(adapters, layer.case.tokens, layer.device)
    meta.prepare_tensors(layer.slots)
    arguments = meta.meta_args(layer.case.tokens, False)

    def lora() -> Tensor:
        y = layer.base()
        thin = torch.zeros(1, layer.case.tokens, slot_rank, dtype=torch.float32, device=layer.device)
        lora_shrink(layer.x, [layer.A[:, None]], thin, *arguments, 1.0)
        lora_expand(thin, [layer.lora_B[:, None]], y, *arguments, offset_start=0, add_inputs=True)
        return y

    return lora


def in_graph(form: Form) -> Form | None:
    """The form as a CUDA graph; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            form()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            y = form()
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


def timed(form: Form, times: int, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        form()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def measure(forms: dict[str, Form], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every form in every round; a round of a slow form is one call."""
    times = {}
    for name, form in forms.items():
        timed(form, 2, device)
        times[name] = max(1, min(100, round(SECONDS / timed(form, 1, device))))
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            seconds[name].append(timed(form, times[name], device))
    return seconds


@dataclass
class Row:
    """One line of the table."""

    case: Case
    rank: int
    base: float
    """Seconds."""
    flora: float
    """Multiple of the base."""
    loras: dict[str, float]
    """Form of LoRA -> multiple of the base."""
    speeds: dict[str, float]
    """Form of LoRA -> fLoRA's speed, of its speed."""

    def markdown(self) -> str:
        goal = GOALS.get(self.rank)
        own = next((form for form in VLLM_FORMS if form in self.loras), None)
        best = min(self.loras, key=self.loras.__getitem__)
        lora, speed, verdict = "", "does not fit", ""
        if own is not None:
            lora, speed = f"{self.loras[own]:.2f}", f"**{self.speeds[own]:.2f}**"
            if goal is not None:
                verdict = f"{goal:.1f}: {'reached' if self.speeds[own] >= goal else 'MISSED'}"
        return (
            f"| {self.case.name} | {self.rank} | {1e6 * self.base:.0f} | {self.flora:.2f} | "
            f"{lora} | {speed} | {verdict} | {self.speeds[best]:.2f} ({best}) |"
        )


HEADER = [
    "| batch | rank | matmul, us | fLoRA | LoRA | fLoRA's speed, of LoRA's | goal | of the fastest LoRA's |",
    "|---" * 8 + "|",
]


def compare(layer: Layer, rounds: int, graph: bool) -> Row | None:
    """None where fLoRA or the matmul cannot be captured in a graph."""
    forms: dict[str, Form] = {"base": layer.base, "flora": layer.flora, **layer.lora_forms()}
    if graph:
        captured = {name: in_graph(form) for name, form in forms.items()}
        forms = {name: form for name, form in captured.items() if form is not None}
        if not {"base", "flora"} < set(forms):
            return None
    seconds = measure(forms, rounds, layer.device)
    loras = [name for name in forms if name not in ("base", "flora")]

    def ratio(first: str, second: str) -> float:
        return median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))

    return Row(
        layer.case,
        layer.rank,
        median(seconds["base"]),
        ratio("flora", "base"),
        {name: ratio(name, "base") for name in loras},
        {name: ratio(name, "flora") for name in loras},
    )


def crossover(dtype: torch.dtype, rounds: int) -> list[str]:
    """Markdown: the time of rows for all ranks, as a multiple of the time with W * M formed."""
    device, shape = torch.device("cpu"), SHAPES["cpu"][1]
    lines = [
        "",
        "## Where forming W * M overtakes a row for each rank",
        "",
        f"{shape[0]} x {shape[1]}, {CROSSOVER_ADAPTERS} adapters with as many tokens each: the time of the",
        "rows, as a multiple of the time with W * M formed; **bold** where the plugin forms it.",
        "",
        "| rank | " + " | ".join(f"{tokens} tokens" for tokens in CROSSOVER_TOKENS) + " |",
        "|---" * (len(CROSSOVER_TOKENS) + 1) + "|",
    ]
    chosen = layer_plan.forms_weight
    for rank in CROSSOVER_RANKS:
        cells = []
        for tokens in CROSSOVER_TOKENS:
            case = Case("", tokens * CROSSOVER_ADAPTERS, CROSSOVER_ADAPTERS)
            forms = {}
            for forming in (False, True):
                layer_plan.forms_weight = lambda *_, answer=forming, **__: answer  # type: ignore[assignment]
                layer = Layer(case, shape, rank, device=device, dtype=dtype)
                layer.flora()  # makes the plan
                forms[str(forming)] = layer.flora
            seconds = measure(forms, rounds, device)
            ratio = median(a / b for a, b in zip(seconds["False"], seconds["True"], strict=True))
            layer_plan.forms_weight = chosen
            is_formed = chosen(rank, tokens, dtype, "cpu", beside_base=dtype == torch.bfloat16)
            cells.append(f"**{ratio:.2f}**" if is_formed else f"{ratio:.2f}")
        lines.append(f"| {rank} | " + " | ".join(cells) + " |")
    return lines


def check(layer: Layer) -> None:
    """Raises AssertionError unless fLoRA and LoRA are what they should be."""
    A, B = layer.A[layer.slots].double(), layer.B[layer.slots].double()
    x, weight = layer.x.double(), layer.weight.double()
    flora = x @ weight.T
    lora = flora + torch.einsum("tr,tro->to", torch.einsum("ti,tri->tr", x, A), B)
    for k in range(layer.rank):
        flora = flora + B[:, k] * ((x * A[:, k]) @ weight.T)
    tolerance = 1e-4 if layer.x.dtype == torch.float32 else 3e-2
    for name, form in {"flora": layer.flora, **layer.lora_forms()}.items():
        expected = flora if name == "flora" else lora
        error = (form().double() - expected).norm() / expected.norm()
        assert error < tolerance, (name, layer.case, layer.rank, float(error))


def tables(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Markdown of all shapes."""
    lines = []
    ranks: Sequence[int] = QUICK_RANKS if options.quick else RANKS
    shapes = SHAPES[device.type][:1] if options.quick else SHAPES[device.type]
    for shape in shapes:
        for graph in (False, True) if device.type == "cuda" else (False,):
            way = "in a CUDA graph" if graph else "as Python launches it"
            lines += ["", f"## {shape[0]} x {shape[1]}, {way}", "", *HEADER]
            for case in CASES:
                for rank in ranks:
                    layer = Layer(case, shape, rank, device=device, dtype=dtype)
                    if case.tokens <= 64 and not graph:
                        check(layer)
                    row = compare(layer, options.rounds, graph)
                    line = f"| {case.name} | {rank} | | not captured | | | | |"
                    if row is not None:
                        line = row.markdown()
                    lines.append(line)
                    del layer
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one shape, ranks 4 and 16")
    parser.add_argument("--save", action="store_true", help="write results/serving_layer_DEVICE.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.dtype is None:
        options.dtype = "bfloat16"  # in which vLLM serves
    dtype = getattr(torch, options.dtype)
    use_backend("auto", device)
    facts = environment()
    machine = f"{facts.machine.processor}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    with torch.inference_mode():
        rows = tables(options, device, dtype)
        if device.type == "cpu":
            rows += crossover(dtype, options.rounds)
    lines = [
        "# One served layer: fLoRA and LoRA as multiples of the plain matmul",
        "",
        f"{machine}; torch {torch.__version__}, {options.dtype}; commit {facts.commit}.",
        f"Medians of {options.rounds} rounds in which all forms took turns. fLoRA is residual. LoRA is in",
        "vLLM's form; the last column has fLoRA's speed against the fastest form that torch or vLLM has.",
        "`python benchmarks/serving_layer.py --save` prints this file.",
        *rows,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        (RESULTS / f"serving_layer_{device.type}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
