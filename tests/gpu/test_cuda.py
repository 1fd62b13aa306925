"""On a GPU: the same training as on the CPU, and no waiting for the device inside a layer. The kernels' own
tests, in tests/unit/kernels, run on a GPU where there is one, with the same parameters (`make test-gpu`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.layer import AdapterLinear
from flora_train.kernels.flora.reference import flora_reference
from flora_train.kernels.segments import Segments
from tests.architectures import tiny_model
from tests.conftest import mixed_specs
from tests.triton_device import TOLERANCE, relative_error
from tests.unit.training.harness import make_trainer, plans_of, snapshot, train_together
from tests.unit.training.test_paging import SLOTS
from tests.unit.training.test_paging import trainer_in as paging_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_on_the_gpu_equals_training_on_the_cpu(tmp_path: Path, optimizer: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    trainers = [
        make_trainer(mixed_specs(lr=2e-3), tmp_path, device=device, optimizer=optimizer)
        for device in ("cpu", "cuda")
    ]
    plans = plans_of(trainers[0], 10)
    for trainer in trainers:
        train_together(trainer, plans)
    for cpu, gpu in zip(trainers[0].bank.pools, trainers[1].bank.pools, strict=True):
        torch.testing.assert_close(gpu.values.cpu(), cpu.values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("disk", [False, True], ids=["pinned", "files"])
def test_joining_and_retiring_adapters_change_no_bit_of_the_others(disk: bool, tmp_path: Path) -> None:
    """Copies run beside the steps, on a stream of their own."""
    resident, paged = (
        paging_trainer(tmp_path / str(slots), slots, disk, device="cuda") for slots in (None, SLOTS)
    )
    for number, plan in enumerate(plans_of(resident, 12)):
        resident.step(number, plan)
        paged.step(number, plan)
        ours, theirs = snapshot(paged), snapshot(resident)
        assert all(
            torch.equal(a.cpu(), b.cpu())
            for name in theirs
            for a, b in zip(ours[name], theirs[name], strict=True)
        ), number
    assert paged.bank.pager is not None
    assert paged.bank.pager.traffic.to_host > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_do_not_wait_for_the_device(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype).cuda()
    bank = AdapterBank.attach(model, mixed_specs())
    bank.route([*range(len(bank.specs)), -1])
    layers = [module for module in model.modules() if isinstance(module, AdapterLinear)]
    x = {
        n: torch.randn(len(bank.specs) + 1, 9, n, device="cuda", dtype=dtype, requires_grad=True)
        for n in (32, 48)
    }
    for repeat in range(2):  # the first pass works out the spans of every layer
        torch.cuda.set_sync_debug_mode("error" if repeat else "default")
        try:
            for layer in layers:
                layer(x[layer.in_features]).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_s_forward_and_backward_replay_from_a_cuda_graph(dtype: torch.dtype) -> None:
    from flora_train.kernels.flora.triton_op import flora_backward_op, flora_op
    from flora_train.kernels.segments import per_segment
    from flora_train.kernels.triton_common import tile_table

    segments = Segments((0, 70, 70, 300))
    device = torch.device("cuda")
    x, dy = (
        torch.randn(300, 128, device=device, dtype=dtype),
        torch.randn(300, 192, device=device, dtype=dtype),
    )
    weight = torch.randn(192, 128, device=device, dtype=dtype)
    A, B = torch.randn(3, 4, 128, device=device), torch.randn(3, 192, 4, device=device)
    bounds, table = tile_table(segments, device, 64)
    shift = per_segment([0.0, 1.0, 1.0], A).view(-1)

    def run() -> tuple[torch.Tensor, ...]:
        y = flora_op(x, weight, A, B, shift, bounds, table, None, 64, True, True)
        return y, *flora_backward_op(dy, x, weight, A, B, shift, bounds, table, None, 64)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles before the capture
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        x.normal_()
        B.normal_()
        graph.replay()
        for replayed, eager in zip(captured, run(), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [4, 16, 32, 64])
@pytest.mark.parametrize("lengths", [(64, 0, 300, 7), (2048, 1024)], ids=["short", "long"])
def test_layers_of_many_tiles(rank: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Wide enough that every program takes several tiles and launches add up, which is too slow for the
    interpreter."""
    from flora_train.kernels.flora.triton_op import FusedFlora

    generator = torch.Generator("cuda").manual_seed(rank)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    segments = Segments(tuple(sum(lengths[:k]) for k in range(len(lengths) + 1)))
    many = Segments((*segments.bounds, *(segments.tokens + 64 * (k + 1) for k in range(60))))
    K, ins, outs = len(many), 1160, 1032
    weight = (random(outs, ins) / ins**0.5).to(dtype)
    leaves = [
        random(many.tokens, ins).to(dtype), random(K, rank, ins), 0.3 * random(K, outs, rank) / rank**0.5,
    ]  # fmt: skip
    dy = (random(many.tokens, outs) / outs**0.5).to(dtype)
    offset = [float(k % 2) for k in range(K)]
    for split in (False, True):
        x, A, B = (leaf.clone().requires_grad_() for leaf in leaves)
        y = FusedFlora.apply(x, weight, A, B, offset, many, split)
        y.backward(dy)
        exact = [leaf.double().requires_grad_() for leaf in leaves]
        reference = flora_reference(
            exact[0], weight.double(), exact[1], exact[2], offset=offset, segments=many
        )
        reference.backward(dy.double())
        assert relative_error(y, reference) <= TOLERANCE[dtype]
        for mine, theirs in zip((x, A, B), exact, strict=True):
            assert relative_error(mine.grad, theirs.grad) <= TOLERANCE[dtype]  # type: ignore[arg-type]
