"""Settings of fair scheduling: what is read, and one clear error for each wrong key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.serving import client_identity
from flora_train.serving.client_identity import client_of_hash, key_hash, secret
from flora_train.serving.fair_queue import Prices
from flora_train.serving.fairness import VARIABLE, install, load_settings
from flora_train.serving.vllm_flags import Flags

DIGEST = key_hash("sk-1")


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client_identity.SECRET_VARIABLE, "0123456789abcdef")
    monkeypatch.delenv(VARIABLE, raising=False)


def test_defaults_are_those_of_the_paper() -> None:
    settings = load_settings()
    assert settings.token_prices() == Prices(prompt=1.0, output=2.0, cached=None)
    assert settings.weights_by_client() == {"base": 1.0}


@pytest.mark.parametrize("form", ["yaml", "json", "variable"])
def test_files_and_the_variable_are_read_alike(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {
        "prices": {"prompt": 0.5, "cached": 0.1},
        "weights": {"lua-flora": 2, "org/name": 0.25},
        "base_weight": 3,
        "key_weights": {DIGEST: 4},
        "default_weight": 1.5,
    }
    text = json.dumps(content)
    if form == "yaml":
        text = f"""
prices: {{prompt: 0.5, cached: 0.1}}
weights:
  lua-flora: 2
  org/name: 0.25
base_weight: 3
key_weights:
  {DIGEST}: 4
default_weight: 1.5
"""
    value = text
    if form != "variable":
        file = tmp_path / f"fairness.{form}"
        file.write_text(text)
        value = str(file)
    monkeypatch.setenv(VARIABLE, value)
    settings = load_settings()
    assert settings.token_prices() == Prices(0.5, 2.0, 0.1)
    assert settings.default_weight == 1.5
    assert settings.weights_by_client() == {
        "base": 3.0,
        "adapter:lua-flora": 2.0,
        "adapter:org/name": 0.25,
        client_of_hash(DIGEST, secret()): 4.0,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("weights: {lua: 0}", "weights.lua = 0: must be greater than or equal to 0.000001"),
        ("weights: {lua: -1}", "weights.lua = -1: must be greater than or equal to 0.000001"),
        ("weights: {lua: .nan}", "weights.lua = nan: must be a finite number"),
        ("weights: {lua: .inf}", "weights.lua = inf: must be"),
        ("weights: {lua: much}", "weights.lua = 'much': must be a valid number"),
        ("weights: {lua: yes}", "weights.lua = True: must be a number"),
        ("weights: [lua]", "weights = ['lua']: must be a valid dictionary"),
        ("weigths: {lua: 1}", "weigths: unknown key; the keys here are prices, weights,"),
        (
            "prices: {promt: 1}",
            "prices.promt: unknown key; the keys here are prompt, output, cached. Did you mean",
        ),
        ("prices: {output: 0}", "prices.output = 0: must be greater than 0"),
        ("[1]", "must hold keys and values at the top level"),
        ("weights: {lua: 1", "is not readable YAML"),
    ],
)
def test_wrong_settings_are_one_error(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fairness.yaml"
    file.write_text(content)
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(UserError) as caught:
        install()
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"{file}")
    assert message in line


def test_all_wrong_keys_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, '{"weights": {"a": 0, "b": -1}, "base_weight": 0}')
    with pytest.raises(UserError) as caught:
        install()
    assert len(caught.value.problems) == 3


def test_flags_that_contradict_fair_scheduling_are_refused_before_anything_starts() -> None:
    fair = ("--scheduler-cls", "flora_train.serving.fair_scheduler.FairScheduler")
    Flags((*fair, "--scheduling-policy", "fcfs")).check()
    Flags(("--scheduling-policy", "priority")).check()
    for words in ((*fair, "--scheduling-policy=priority"), ("--scheduling_policy", "priority", *fair)):
        with pytest.raises(
            UserError, match="--scheduling-policy = 'priority': FairScheduler has an order of"
        ):
            Flags(words).check()


def test_wrong_weights_are_refused_by_flora_train_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, '{"weights": {"a": 0}}')
    Flags().check()
    with pytest.raises(UserError, match=r"weights\.a = 0"):
        Flags(("--scheduler-cls=flora_train.serving.fair_scheduler.FairScheduler",)).check()


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        load_settings()


def test_an_api_key_in_place_of_its_hash_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, '{"key_weights": {"sk-very-secret": 2}}')
    with pytest.raises(UserError, match="the keys here are SHA-256 of API keys") as caught:
        load_settings()
    assert "sk-very-secret" not in str(caught.value)
