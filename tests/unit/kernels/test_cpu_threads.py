"""The work of a layer is distributed completely, evenly, and only where it pays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flora_train.kernels.cpu_threads import SCRATCH, Job, Scratch, divide, division_for, run_jobs
from flora_train.kernels.segments import Segments

FEATURES = 1000


@pytest.fixture
def three_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def segments_of(lengths: tuple[int, ...]) -> Segments:
    return Segments((0, *(sum(lengths[: i + 1]) for i in range(len(lengths)))))


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize(
    "lengths", [(5,), (7, 7, 7), (100, 1, 1, 1), (0, 64, 0, 30, 2, 64), tuple(range(1, 40))], ids=str
)
def test_every_token_meets_every_output_feature_once(lengths: tuple[int, ...], threads: int) -> None:
    covered = torch.zeros(sum(lengths), FEATURES, dtype=torch.int64)
    division = divide(segments_of(lengths), threads)
    for jobs in division.by_thread:
        for job in jobs:
            first, last = job.rows(FEATURES)
            covered[job.start : job.end, first:last] += 1
            assert job.parts == division.parts
            assert job.end - job.start == lengths[job.k]
    assert (covered == 1).all()


@pytest.mark.parametrize(
    ("lengths", "threads", "parts"),
    [((64,) * 8, 2, 1), ((64,) * 3, 2, 2), ((90, 60, 30), 2, 1), ((64,) * 5, 4, 2)],
)
def test_segments_are_cut_only_where_threads_would_wait(
    lengths: tuple[int, ...], threads: int, parts: int
) -> None:
    division = divide(segments_of(lengths), threads)
    assert division.parts == parts
    loads = [sum((job.end - job.start) / job.parts for job in jobs) for jobs in division.by_thread]
    assert len(loads) == threads
    assert max(loads) <= 1.2 * sum(lengths) / threads


def test_fewer_segments_than_threads_leave_the_threads_to_torch() -> None:
    assert len(divide(segments_of((64, 64)), 3).by_thread) == 1


def test_workers_compute_with_one_thread_each_and_the_caller_keeps_its_own(three_threads: None) -> None:
    seen: list[int] = []
    run_jobs(
        division_for(segments_of((4,) * 6), torch.device("cpu")),
        lambda job: seen.append(torch.get_num_threads()),
    )
    assert seen == [1] * 6
    assert torch.get_num_threads() == 3


def test_error_in_a_worker_reaches_the_caller(three_threads: None) -> None:
    def work(job: Job) -> None:
        if job.k == 4:
            raise ValueError("in segment 4")

    with pytest.raises(ValueError, match="in segment 4"):
        run_jobs(division_for(segments_of((4,) * 6), torch.device("cpu")), work)


def test_workers_record_no_gradients(three_threads: None) -> None:
    x, y = torch.ones(6, requires_grad=True), torch.zeros(6)
    run_jobs(
        division_for(segments_of((1,) * 6), torch.device("cpu")), lambda job: y[job.k].copy_(x[job.k] * 2)
    )
    assert y.tolist() == [2.0] * 6
    assert not y.requires_grad


def test_scratch_is_kept_for_the_next_layer_and_grows() -> None:
    like = torch.empty(0)
    first = SCRATCH.matrix("test", (8, 16), like)
    assert SCRATCH.matrix("test", (4, 16), like).data_ptr() == first.data_ptr()
    assert SCRATCH.matrix("other", (8, 16), like).data_ptr() != first.data_ptr()
    large = SCRATCH.matrix("test", (80, 16), like)
    assert large.shape == (80, 16)
    assert large.stride() == (32, 1)
    assert SCRATCH.matrix("test", (8, 16), like.double()).dtype == torch.float64


def test_scratch_memory_made_in_inference_mode_is_of_use_in_training() -> None:
    scratch = Scratch()
    with torch.inference_mode():
        scratch.matrix("product", (4, 4), torch.ones(1)).fill_(1.0)
    matrix = scratch.matrix("product", (4, 4), torch.ones(1))
    torch.mm(torch.ones(4, 2), torch.ones(2, 4), out=matrix)
    assert torch.equal(matrix, torch.full((4, 4), 2.0))
