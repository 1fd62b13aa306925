"""The server's averages on numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flora_train.config.errors import UserError
from flora_train.federated.factor_mean import interference, mean_of_factors
from flora_train.federated.fedex import mean_with_residual
from flora_train.federated.low_rank import Factors, fit_rank, weighted_sum
from flora_train.federated.modulation_mean import mean_of_modulations
from flora_train.federated.product_mean import mean_of_products
from flora_train.federated.ranks import padded, shortened
from flora_train.federated.scale_mean import mean_of_scales
from flora_train.federated.slora_modulation import factors_of_modulation
from flora_train.federated.slora_sparse import added_to, dense_update, mean_of_values
from flora_train.federated.slora_svd import factors_of_update
from flora_train.federated.weights import shares_of, weighted_mean

OUT, IN = 9, 7
SHARES = [0.5, 0.3, 0.2]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clients(
    ranks: tuple[int, ...] = (2, 2, 2), scalings: tuple[float, ...] = (2.0, 2.0, 2.0)
) -> list[Factors]:
    return [
        Factors(random(rank, IN, seed=k), random(OUT, rank, seed=10 + k), scaling)
        for k, (rank, scaling) in enumerate(zip(ranks, scalings, strict=True))
    ]


def mean_product(parts: list[Factors]) -> Tensor:
    dense = torch.zeros(OUT, IN, dtype=torch.float64)
    for part, share in zip(parts, SHARES, strict=True):
        dense += share * part.scaling * part.B @ part.A
    return dense


def test_shares_are_by_examples() -> None:
    assert shares_of([1, 3, 4]) == [0.125, 0.375, 0.5]
    with pytest.raises(UserError, match="no client answered"):
        shares_of([])
    with pytest.raises(UserError, match="at least 1 example"):
        shares_of([3, 0])


def test_a_mean_of_float32_is_summed_in_float64() -> None:
    """In float32, 1 is lost beside 1e8."""
    tensors = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    mean = weighted_mean(tensors, [0.25, 0.5, 0.25])
    assert mean.dtype == torch.float32
    assert mean.item() == 0.5


def test_the_mean_of_factors_is_not_the_mean_of_products() -> None:
    parts = clients()
    mean = mean_of_factors(parts, SHARES, rank=2, scaling=2.0)
    torch.testing.assert_close(mean.A, 0.5 * parts[0].A + 0.3 * parts[1].A + 0.2 * parts[2].A, **TIGHT)
    torch.testing.assert_close(mean.B, 0.5 * parts[0].B + 0.3 * parts[1].B + 0.2 * parts[2].B, **TIGHT)
    gap = float((mean_product(parts) - mean.dense()).norm())
    assert gap > 1.0
    assert interference(parts, SHARES, mean) == pytest.approx(gap, rel=1e-10)


def test_the_mean_of_factors_is_exact_where_all_clients_have_one_a() -> None:
    parts = [Factors(clients()[0].A, part.B, 2.0) for part in clients()]
    mean = mean_of_factors(parts, SHARES, rank=2, scaling=2.0)
    assert interference(parts, SHARES, mean) < 1e-12


def test_the_mean_of_products_is_exact_where_the_rank_allows() -> None:
    parts = clients()
    fit = mean_of_products(parts, SHARES, rank=6, scaling=0.5)
    torch.testing.assert_close(fit.factors.dense(), mean_product(parts), **TIGHT)
    assert fit.left_out < 1e-10
    assert fit.factors.scaling == 0.5


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3), (5, 4, 3)])
def test_the_mean_of_products_is_the_closest_of_its_rank(ranks: tuple[int, ...]) -> None:
    """As the SVD of the dense mean has it, also where the factors together have more ranks than it."""
    parts = clients(ranks, (2.0, 0.5, 1.0))
    dense = mean_product(parts)
    fit = mean_of_products(parts, SHARES, rank=2, scaling=2.0)
    U, S, Vh = torch.linalg.svd(dense)
    torch.testing.assert_close(fit.factors.dense(), U[:, :2] @ torch.diag(S[:2]) @ Vh[:2], **TIGHT)
    assert fit.left_out == pytest.approx(float(S[2:].norm()), rel=1e-9)
    assert fit.norm == pytest.approx(float(dense.norm()), rel=1e-9)
    assert 0.05 < fit.relative_error < 1


def test_a_fit_never_multiplies_factors_of_low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = clients()

    def refuse(self: Factors) -> Tensor:
        raise AssertionError("the product was formed")

    monkeypatch.setattr(Factors, "dense", refuse)
    fit = mean_of_products(parts, SHARES, rank=3, scaling=1.0)
    assert fit.factors.rank == 3
    with pytest.raises(AssertionError, match="formed"):
        mean_of_products(clients((3, 3, 3)), SHARES, rank=3, scaling=1.0)


def test_ranks_without_a_singular_value_keep_a_row_that_can_learn() -> None:
    parts, spare = [clients()[0]], random(4, IN, seed=5)
    fit = mean_of_products(parts, [1.0], rank=4, scaling=1.0, spare=spare)
    torch.testing.assert_close(fit.factors.dense(), parts[0].dense(), **TIGHT)
    assert torch.equal(fit.factors.A[2:], spare[2:])
    assert not fit.factors.B[:, 2:].any()
    nothing = Factors(random(2, IN, seed=0), torch.zeros(OUT, 2, dtype=torch.float64))
    fit = mean_of_products([nothing], [1.0], rank=2, scaling=1.0, spare=spare[:2])
    assert torch.equal(fit.factors.A, spare[:2])
    assert fit.relative_error == 0.0


@pytest.mark.parametrize("rank", [0, 8])
def test_a_rank_above_the_number_of_singular_values_is_refused(rank: int) -> None:
    with pytest.raises(UserError, match=r"rank = .: a matrix of 9 x 7 has 7 singular values"):
        fit_rank(random(OUT, IN, seed=0), rank, scaling=1.0)
    with pytest.raises(UserError, match="7 singular values"):
        factors_of_update(random(OUT, IN, seed=0), rank=rank, scaling=1.0)
    with pytest.raises(UserError, match="ranks of at most 7"):
        factors_of_modulation(random(OUT, IN, seed=0), random(OUT, IN, seed=1), rank=rank, offset=1.0)


def test_fedex_carries_the_exact_residual() -> None:
    parts = clients()
    mean, residual = mean_with_residual(parts, SHARES)
    torch.testing.assert_close(mean.dense() + residual.dense(), mean_product(parts), **TIGHT)
    assert residual.dense().norm() > 1.0
    # 6 ranks of 9 + 7 numbers are more than the 63 of the matrix.
    assert residual.nbytes == OUT * IN * 8
    two = clients()[:2]
    _, residual = mean_with_residual([Factors(p.A[:1].float(), p.B[:, :1].float()) for p in two], [0.5, 0.5])
    assert residual.nbytes == 2 * (OUT + IN) * 4


def test_fedex_refuses_ranks_and_scalings_that_differ() -> None:
    with pytest.raises(UserError, match="product_mean"):
        mean_with_residual(clients((2, 3, 2)), SHARES)
    with pytest.raises(UserError, match="one rank and alpha"):
        mean_with_residual(clients(scalings=(1.0, 2.0, 1.0)), SHARES)


def test_padding_keeps_the_matrix_and_shortening_the_first_ranks() -> None:
    part = clients()[0]
    whole = padded(part, 5, 0.7)
    assert whole.rank == 5
    torch.testing.assert_close(whole.dense(), part.dense(), **TIGHT)
    torch.testing.assert_close(shortened(whole, 2, 3.0).dense(), part.dense(), **TIGHT)
    fit = mean_of_products(clients(), SHARES, rank=5, scaling=2.0)
    best = mean_of_products(clients(), SHARES, rank=2, scaling=1.0)
    torch.testing.assert_close(shortened(fit.factors, 2, 1.0).dense(), best.factors.dense(), **TIGHT)
    with pytest.raises(ValueError, match="cannot be padded"):
        padded(part, 1, 1.0)


def test_factors_of_ranks_that_differ_are_padded_with_zeros() -> None:
    parts = clients((1, 2, 3), (2.0, 2.0, 2.0))
    mean = mean_of_factors(parts, SHARES, rank=3, scaling=2.0)
    torch.testing.assert_close(mean.A[2], 0.2 * parts[2].A[2], **TIGHT)
    torch.testing.assert_close(mean.A[1], 0.3 * parts[1].A[1] + 0.2 * parts[2].A[1], **TIGHT)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_mean_of_modulations_is_exact_where_the_rank_allows(offset: float) -> None:
    parts, W0 = clients(scalings=(1.0, 1.0, 1.0)), random(OUT, IN, seed=20)
    fit = mean_of_modulations(parts, [offset] * 3, SHARES, rank=6, offset=offset)
    mean = sum(s * W0 * (offset + p.B @ p.A) for p, s in zip(parts, SHARES, strict=True))
    torch.testing.assert_close(W0 * (offset + fit.factors.dense()), mean, **TIGHT)


def test_modulations_of_both_variants_are_averaged_with_one_more_rank() -> None:
    parts, offsets = clients(scalings=(1.0, 1.0, 1.0)), [1.0, 0.0, 1.0]
    mean = sum(s * (o + p.B @ p.A) for p, s, o in zip(parts, SHARES, offsets, strict=True))
    for offset in (0.0, 1.0):
        fit = mean_of_modulations(parts, offsets, SHARES, rank=7, offset=offset)
        torch.testing.assert_close(offset + fit.factors.dense(), mean, **TIGHT)


def test_the_mean_of_scales_computes_the_mean_of_the_outputs() -> None:
    scales, W0, x = [random(OUT, seed=k) for k in range(3)], random(OUT, IN, seed=20), random(IN, seed=21)
    outputs = sum(w * scale * (W0 @ x) for scale, w in zip(scales, SHARES, strict=True))
    torch.testing.assert_close(mean_of_scales(scales, SHARES) * (W0 @ x), outputs, **TIGHT)


def test_slora_s_first_stage_averages_what_the_clients_compute() -> None:
    indices = torch.tensor([0, 5, 17, 40, 62])
    values, W0 = [random(5, seed=k) for k in range(3)], random(OUT, IN, seed=20)
    mean = mean_of_values(values, SHARES)
    expected = sum(w * added_to(W0, v, indices) for v, w in zip(values, SHARES, strict=True))
    torch.testing.assert_close(added_to(W0, mean, indices), expected, **TIGHT)
    update = dense_update(mean, indices, (OUT, IN))
    assert int((update != 0).sum()) == 5
    assert update[5 // IN, 5 % IN] == mean[1]


def test_slora_s_second_stage_begins_with_the_svd_of_the_update() -> None:
    indices = torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(0))[:20].sort().values
    values = random(20, seed=0)
    update = dense_update(values, indices, (OUT, IN))
    fit = factors_of_update(update, rank=3, scaling=2.0)
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    torch.testing.assert_close(fit.factors.dense(), (U[:, :3] * S[:3]) @ Vh[:3], **TIGHT)
    torch.testing.assert_close(fit.factors.B.norm(dim=0), (S[:3] / 2).sqrt(), **TIGHT)
    torch.testing.assert_close(fit.factors.A.norm(dim=1), (S[:3] / 2).sqrt(), **TIGHT)
    assert fit.left_out == pytest.approx(float((update - fit.factors.dense()).norm()), rel=1e-9)
    whole = factors_of_update(update, rank=7, scaling=2.0)
    torch.testing.assert_close(whole.factors.dense(), update, **TIGHT)


def test_a_weighted_sum_of_factors_is_exact() -> None:
    parts = clients((1, 2, 3), (1.0, 2.0, 0.5))
    torch.testing.assert_close(weighted_sum(parts, SHARES).dense(), mean_product(parts), **TIGHT)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_slora_s_second_stage_of_flora_finds_a_modulation_that_exists(offset: float) -> None:
    """dW that some B A of this rank makes is found again, also where W0 is small."""
    W0, true = random(OUT, IN, seed=20), Factors(random(1, IN, seed=1), 0.1 * random(OUT, 1, seed=2))
    W0[0, 0] = 1e-6
    rank = 1 if offset else 2  # the pure variant needs one more rank, of ones
    update = W0 * true.dense()
    fit = factors_of_modulation(W0, update, rank=rank, offset=offset)
    got = W0 * (offset + fit.factors.dense()) - W0
    assert float((got - update).norm()) <= 0.01 * float(update.norm())
    assert fit.left_out == pytest.approx(float((got - update).norm()), rel=1e-6)
    torch.testing.assert_close(fit.factors.A.norm(dim=1), fit.factors.B.norm(dim=0), rtol=1e-6, atol=0)
