"""Low-rank approximations are the best of their rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flora_train.export.low_rank import (
    _least_squares,
    energies,
    modulation,
    relative_error,
    smallest_rank,
    truncated,
)

SHAPES = [(24, 40), (40, 24), (16, 16)]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_truncation_is_that_of_the_singular_value_decomposition(shape: tuple[int, int], rank: int) -> None:
    delta = matrix(*shape)
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    B, A = truncated(delta, rank)
    assert (B.shape, A.shape) == ((shape[0], rank), (rank, shape[1]))
    best = (U[:, :rank] * S[:rank]) @ V[:rank]
    torch.testing.assert_close(B.double() @ A.double(), best, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(energies(delta), S.square(), rtol=1e-9, atol=1e-9)
    error = float((delta - best).norm() / delta.norm())
    assert relative_error([energies(delta)], rank) == pytest.approx(error, abs=1e-7)


def test_a_rank_beyond_the_layer_s_adds_nothing() -> None:
    delta = matrix(6, 4)
    B, A = truncated(delta, 9)
    assert (B.shape, A.shape) == ((6, 9), (9, 4))
    torch.testing.assert_close((B @ A).double(), delta, rtol=1e-5, atol=1e-5)
    B, A = truncated(torch.zeros(6, 4), 2)
    assert not (B @ A).any()


def test_the_smallest_rank_is_the_first_that_is_within_the_error() -> None:
    spectra = [energies(matrix(24, 40)), energies(3 * matrix(16, 16, seed=1))]
    for allowed in (0.9, 0.5, 0.1, 1e-6):
        rank = smallest_rank(spectra, allowed)
        assert relative_error(spectra, rank) <= allowed
        assert rank == 1 or relative_error(spectra, rank - 1) > allowed
    assert relative_error([torch.zeros(4, dtype=torch.float64)], 1) == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_modulation_that_was_there_is_found_again(shape: tuple[int, int]) -> None:
    weight, B, A = matrix(*shape, seed=2), matrix(shape[0], 3, seed=3), matrix(3, shape[1], seed=4)
    delta = weight * (B @ A)
    B, A = modulation(weight, delta, 3, rounds=200)
    assert float((weight * (B @ A) - delta).norm() / delta.norm()) < 1e-3


@pytest.mark.parametrize("rank", [1, 4])
def test_a_modulation_fits_a_lora_better_than_its_truncated_ratio_and_cannot_be_moved_for_the_better(
    rank: int,
) -> None:
    weight, delta = matrix(24, 40, seed=5), matrix(24, 2, seed=6) @ matrix(2, 40, seed=7)

    def loss(B: Tensor, A: Tensor) -> Tensor:
        return (weight * (B @ A) - delta).square().sum()

    start = loss(*(factor.double() for factor in truncated(delta / weight, rank)))
    B, A = (factor.double().requires_grad_(True) for factor in modulation(weight, delta, rank, rounds=400))
    found = loss(B, A)
    assert found < 0.9 * delta.square().sum()
    assert found < 0.9 * start
    found.backward()
    assert float((B.grad.norm() * B.norm() + A.grad.norm() * A.norm()).detach()) < 0.02 * found.item()  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", [2, 5, 7, 20, 34, 52])
def test_modulation_is_as_good_as_from_any_start_and_deterministic(seed: int) -> None:
    """For these the single start from the ratio ends in a local optimum that is 4 to 10 % worse."""
    rows, columns, theirs, rank = [(16, 16, 1, 2), (12, 16, 2, 2), (16, 24, 2, 4), (24, 24, 2, 2)][seed % 4]
    generator = torch.Generator().manual_seed(seed)
    weight, left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, columns), (rows, theirs), (theirs, columns))
    )
    delta = left @ right

    def error(B: Tensor, A: Tensor) -> float:
        return float((weight * (B.double() @ A.double()) - delta).norm() / delta.norm())

    weights, pulled = weight.square(), weight * delta
    single = error(
        *_least_squares(
            weights, pulled, truncated(pulled / (weights + 0.1 * weights.mean()), rank)[1].double(), rounds=30
        )
    )
    found = modulation(weight, delta, rank)
    assert error(*found) < 0.97 * single
    assert all(torch.equal(*pair) for pair in zip(found, modulation(weight, delta, rank), strict=True))


def test_a_modulation_of_a_layer_without_weights_is_finite() -> None:
    for weight in (torch.zeros(6, 4), torch.eye(6, 4)):
        assert all(factor.isfinite().all() for factor in modulation(weight, matrix(6, 4), 2))
