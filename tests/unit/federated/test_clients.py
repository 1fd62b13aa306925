"""How examples are divided among clients, and which clients take part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flora_train.config.errors import UserError
from flora_train.federated.client_splits import client_names, dirichlet_split, label_entropy, natural_split
from flora_train.federated.participation import choose_clients

LABELS = np.random.default_rng(0).integers(5, size=600)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_a_dirichlet_split_gives_each_example_to_one_client(alpha: float) -> None:
    parts = dirichlet_split(LABELS, 10, alpha=alpha, seed=0)
    assert len(parts) == 10
    assert min(map(len, parts)) >= 1
    assert sorted(np.concatenate(parts)) == list(range(600))
    again = dirichlet_split(list(LABELS), 10, alpha=alpha, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    other = dirichlet_split(LABELS, 10, alpha=alpha, seed=1)
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_a_small_alpha_gives_clients_few_labels_and_a_large_one_all() -> None:
    entropies = [
        np.mean([label_entropy(LABELS, dirichlet_split(LABELS, 10, alpha=alpha, seed=s)) for s in range(5)])
        for alpha in (0.1, 1.0, 100.0)
    ]
    assert entropies[0] < 0.8 < entropies[1] < 1.4 < entropies[2] < np.log(5)
    assert label_entropy([0, 1, 0, 1], [np.array([0, 2]), np.array([0, 1])]) == pytest.approx(np.log(2) / 2)


def test_shares_follow_the_dirichlet_distribution() -> None:
    """Variance of a client's share of a label: (1/K)(1 - 1/K) / (K alpha + 1)."""
    labels, alpha, clients = np.zeros(1000, dtype=np.int64), 2.0, 4
    shares = [len(dirichlet_split(labels, clients, alpha=alpha, seed=s)[0]) / 1000 for s in range(400)]
    assert np.mean(shares) == pytest.approx(0.25, abs=0.02)
    assert np.var(shares) == pytest.approx(0.25 * 0.75 / 9, rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "dirichlet_alpha = 0.0: must be above 0"),
        ({"alpha": float("nan")}, "must be above 0"),
        ({"clients": 601}, "num_clients = 601: there are 600 examples"),
        ({"clients": 0}, "num_clients = 0"),
        (
            {"clients": 100, "alpha": 0.01},
            "in 200 draws some of 100 clients had fewer than 1 of 600 examples",
        ),
        ({"clients": 10, "least": 59, "alpha": 0.1}, "fewer than 59 of 600"),
    ],
)
def test_splits_that_cannot_be_made_are_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"clients": 10, "alpha": 1.0, **options}
    clients = arguments.pop("clients")
    with pytest.raises(UserError, match=message):
        dirichlet_split(LABELS, clients, seed=0, **arguments)


def test_a_natural_split_follows_the_column() -> None:
    owners = ["b", "a", "b", "c", "a", "b"]
    whole = natural_split(owners)
    assert {name: list(part) for name, part in whole.items()} == {"a": [1, 4], "b": [0, 2, 5], "c": [3]}
    assert list(natural_split(owners, least=2)) == ["a", "b"]
    chosen = {tuple(natural_split(owners, 2, seed=seed)) for seed in range(20)}
    assert chosen == {("a", "b"), ("a", "c"), ("b", "c")}
    with pytest.raises(UserError, match="num_clients = 3: 2 clients have at least 2 examples"):
        natural_split(owners, 3, least=2)
    with pytest.raises(UserError, match="example 1 has no client"):
        natural_split(["a", ""])
    with pytest.raises(UserError, match="0 clients have at least 1"):
        natural_split([])


def test_participation_is_seeded_and_fair() -> None:
    names = client_names(12)
    assert names[:2] == ["client_00", "client_01"]
    rounds = [choose_clients(names, 4, seed=0, round_number=number) for number in range(300)]
    assert rounds[:5] == [choose_clients(names, 4, seed=0, round_number=number) for number in range(5)]
    assert rounds != [choose_clients(names, 4, seed=1, round_number=number) for number in range(300)]
    assert all(len(set(chosen)) == 4 and chosen == sorted(chosen) for chosen in rounds)
    counts = [sum(name in chosen for chosen in rounds) for name in names]
    assert min(counts) > 70
    assert max(counts) < 130
    assert choose_clients(names, 12, seed=0, round_number=3) == names
