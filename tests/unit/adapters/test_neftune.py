"""NEFTune noise: its size, its effect on values and gradients, and what it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.integrations.neftune import activate_neftune

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routing import EmbeddingNoise, RowNoise
from flora_train.adapters.spec import AdapterSpec
from tests.architectures import VOCABULARY, tiny_model
from tests.conftest import perturb, spec

ALPHA = 5.0


def specs() -> list[AdapterSpec]:
    return [
        spec("lora", "a", rank=2, neftune_noise_alpha=ALPHA),
        spec("flora", "a", rank=2, neftune_noise_alpha=2 * ALPHA),
        spec("lora", "b", rank=2),
        spec("ia3", "a", neftune_noise_alpha=ALPHA),
    ]


def attached(**options: Any) -> AdapterBank:
    bank = AdapterBank.attach(tiny_model(**options).train(), specs())
    perturb(bank)
    return bank


def embeddings_of(
    bank: AdapterBank, tokens: Tensor, adapters: Sequence[str], noise: Sequence[RowNoise | None]
) -> Tensor:
    """The input embeddings as the layers see them."""
    bank.route(adapters, noise)
    model: Any = bank.model
    embedded: Tensor = model.get_input_embeddings()(tokens).detach()
    bank.abandon()
    return embedded


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def test_noise_has_the_size_of_transformers_own() -> None:
    """Both are uniform: least, largest, mean and variance over many draws for a row without padding."""
    length, width = 7, 64
    samples = {}
    entry = EmbeddingNoise(0, specs()[0], RowNoise(0, length))
    ours = [
        replace(entry, noise=RowNoise(seed, length)).sample(width, torch.device("cpu")) for seed in range(300)
    ]
    samples["ours"] = torch.stack(ours).double()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding.from_pretrained(torch.zeros(4, width))

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embedding

    model: Any = Model()
    activate_neftune(model, ALPHA)
    torch.manual_seed(0)
    row = torch.zeros(1, length, dtype=torch.long)
    samples["theirs"] = torch.stack([model.embedding(row) for _ in range(300)]).double()
    limit = ALPHA / (length * width) ** 0.5
    for name, sample in samples.items():
        assert float(sample.max()) == pytest.approx(limit, rel=1e-3), name
        assert float(sample.min()) == pytest.approx(-limit, rel=1e-3), name
        assert float(sample.mean()) == pytest.approx(0.0, abs=0.01 * limit), name
        assert float(sample.var()) == pytest.approx(limit**2 / 3, rel=0.01), name


def test_loss_and_gradients_are_those_of_embeddings_with_the_noise() -> None:
    """Values and gradients in float64, against a model that is given embeddings."""
    bank = AdapterBank.attach(tiny_model(dtype=torch.float64), specs(), dtype=torch.float64)
    perturb(bank)
    model: Any = bank.model
    tokens = random_tokens(4, 9)
    ids = [0, 1, 2, 3]
    noise = [RowNoise(10 + i, 9) for i in ids]
    bank.route(ids, noise)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    gradients = [pool.gradients.clone() for pool in bank.pools]
    for pool in bank.pools:
        pool.gradients.zero_()
    width = model.config.hidden_size
    embeddings = model.get_input_embeddings().weight.detach()[tokens]
    for i, s in enumerate(bank.specs):
        entry = EmbeddingNoise(i, s, noise[i])
        if s.neftune_noise_alpha:
            embeddings[i] += entry.sample(width, torch.device("cpu")).double()
    bank.route(ids)
    expected = model(inputs_embeds=embeddings, labels=tokens).loss
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for ours, pool in zip(gradients, bank.pools, strict=True):
        torch.testing.assert_close(ours, pool.gradients, rtol=1e-9, atol=1e-12)
        assert pool.gradients.any()
    bank.route(ids)
    without = model(input_ids=tokens, labels=tokens).loss
    assert abs(float(without.detach() - loss.detach())) > 1e-4


def test_rows_without_noise_keep_their_bits() -> None:
    bank, tokens = attached(), random_tokens(5, 6)
    adapters = ["b-lora", "a-lora", "__base__", "a-flora", "a-lora"]
    noise = [RowNoise(1, 6), RowNoise(2, 6), RowNoise(3, 6), RowNoise(4, 6), None]
    plain = embeddings_of(bank, tokens, adapters, [None] * 5)
    noisy = embeddings_of(bank, tokens, adapters, noise)
    assert [torch.equal(noisy[i], plain[i]) for i in range(5)] == [True, False, True, False, True]


def test_noise_depends_on_neither_padding_nor_neighbours() -> None:
    bank, tokens = attached(), random_tokens(3, 12)
    noise = [RowNoise(7, 8), RowNoise(8, 12), RowNoise(9, 5)]
    adapters = ["a-flora", "a-lora", "a-ia3"]
    together = embeddings_of(bank, tokens, adapters, noise)
    for row, (adapter, length) in enumerate(zip(adapters, (8, 12, 5), strict=True)):
        alone = embeddings_of(bank, tokens[row : row + 1, :length], [adapter], [noise[row]])
        assert torch.equal(together[row, :length], alone[0])
    plain = embeddings_of(bank, tokens, adapters, [None] * 3)
    assert torch.equal(together[0, 8:], plain[0, 8:])


def test_noise_differs_between_adapters_and_seeds() -> None:
    noise = RowNoise(1, 6)
    first, second, _, third = specs()
    rows = [
        EmbeddingNoise(0, first, noise),
        EmbeddingNoise(0, replace(first, name="c-lora"), noise),
        EmbeddingNoise(0, first, RowNoise(2, 6)),
        EmbeddingNoise(0, replace(second, neftune_noise_alpha=ALPHA), noise),
        EmbeddingNoise(0, third, noise),
    ]
    samples = [entry.sample(8, torch.device("cpu")) for entry in rows]
    for i, sample in enumerate(samples):
        assert not any(torch.equal(sample, other) for other in samples[i + 1 :])
    assert torch.equal(samples[0], rows[0].sample(8, torch.device("cpu")))


def test_documents_of_a_packed_row_have_noise_of_their_own_length() -> None:
    entry = EmbeddingNoise(0, specs()[0], RowNoise(0, 1000, documents=(900, 100)))
    sample = entry.sample(32, torch.device("cpu")).abs()
    assert float(sample[:900].max()) == pytest.approx(ALPHA / np.sqrt(900 * 32), rel=1e-3)
    assert float(sample[900:].max()) == pytest.approx(ALPHA / np.sqrt(100 * 32), rel=1e-2)
