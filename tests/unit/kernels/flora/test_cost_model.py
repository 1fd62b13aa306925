"""The chosen formulation, its reason, and the thresholds behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flora_train.kernels.flora.cost_model import (
    Thresholds,
    Work,
    calibrated_on,
    choose_formulation,
    decide,
    thresholds_for,
)

FEW = 16  # 4 terms: 8 runs through W0 a token, against 3 and forming
MEASURED = Thresholds(expanding=100, forming=57, forming_a_rank=6, grouped_bytes=12 << 20)
LARGE = Work(rank=4, residual=False, tokens=8 * FEW, segments=8, in_features=4096, out_features=4096)
ENOUGH = replace(LARGE, residual=True)


def chosen(work: Work) -> str:
    return decide(work, MEASURED).formulation


def test_one_term_is_expanded_whatever_the_tokens() -> None:
    one = replace(LARGE, rank=1, tokens=100_000)
    assert chosen(one) == "rank_expanded"
    assert chosen(replace(one, residual=True)) == "materialised"
    assert chosen(replace(one, device="cuda", triton=True)) == "scaled"
    assert chosen(replace(one, device="cuda", triton=True, residual=True)) == "fused"


def test_few_tokens_per_adapter_are_expanded() -> None:
    for device, triton, otherwise in (
        ("cpu", False, "materialised"),
        ("cuda", False, "grouped"),
        ("cuda", True, "fused"),
    ):
        work = replace(LARGE, device=device, triton=triton)
        assert chosen(work) == "rank_expanded"
        assert chosen(replace(work, tokens=8 * (FEW + 1))) == otherwise
        assert chosen(replace(work, residual=True)) == otherwise


def test_a_cpu_works_on_all_adapters_at_once_while_they_fit_its_cache() -> None:
    small = replace(ENOUGH, in_features=256, out_features=MEASURED.grouped_bytes // (8 * 256 * 4))
    assert chosen(small) == "grouped"
    assert chosen(replace(small, out_features=small.out_features + 1)) == "materialised"
    assert chosen(replace(small, even=False)) == "materialised"
    assert chosen(replace(small, segments=1)) == "materialised"


def test_the_reason_names_the_numbers_that_decided() -> None:
    assert (
        decide(LARGE, MEASURED).reason
        == "for 16 tokens, 4 terms cost 128 runs through W0 and forming W0 * M 129"
    )
    assert "512 MiB > 12 MiB" in decide(ENOUGH, MEASURED).reason
    assert (
        "differ in length"
        in decide(replace(ENOUGH, in_features=64, out_features=64, even=False), MEASURED).reason
    )


def test_the_thresholds_are_those_of_the_calibration() -> None:
    assert thresholds_for(LARGE) != thresholds_for(replace(LARGE, bytes_each=2))
    assert thresholds_for(replace(LARGE, device="mps")) == thresholds_for(replace(LARGE, device="cuda"))
    assert calibrated_on(replace(LARGE, device="mps")) is None
    assert thresholds_for(replace(LARGE, bytes_each=8)) == thresholds_for(LARGE)
    measured = calibrated_on(LARGE)
    assert measured is not None
    assert "torch" in measured


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bytes_each", [2, 4])
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_decoding_a_token_of_each_adapter_sends_all_through_w0_together(
    device: str, bytes_each: int, rank: int
) -> None:
    sizes = {"in_features": 576, "out_features": 1536, "bytes_each": bytes_each, "split": bytes_each == 2}
    work = Work(rank=rank, residual=True, tokens=8, segments=8, device=device, **sizes)
    assert choose_formulation(work) == "rank_expanded"
