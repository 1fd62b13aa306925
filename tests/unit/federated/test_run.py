"""Whole federated runs: what is saved and reported, and that a stopped run ends with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.federated.build_report import build_report
from flora_train.federated.loaded import LoadedRun
from flora_train.federated.local_training import LocalResult
from flora_train.federated.population import make_population
from flora_train.federated.run import PlannedRun, plan_runs, probe_runs, train_runs
from flora_train.federated.saved_run import SavedRun, read_saved, state_path
from flora_train.federated.strategy_run import StrategyRun, round_options
from flora_train.runtime.signals import Interrupted, StopSignals
from tests.unit.federated.runs import STRATEGIES, load, load_small, raw_config


def saved_of(loaded: LoadedRun, run: str) -> SavedRun:
    saved = read_saved(state_path(loaded.folder.path, run))
    assert saved is not None
    return saved


def stop_after(steps: int) -> Callable[[StopSignals], StopSignals]:
    """Replaces `StopSignals.__enter__` by one that asks to stop after some reads of `stop_requested`."""

    class Counting(StopSignals):
        reads = 0

        @property
        def stop_requested(self) -> bool:
            self.reads += 1
            return self.reads > steps

        @stop_requested.setter
        def stop_requested(self, value: bool) -> None:
            pass

    def enter(signals: StopSignals) -> StopSignals:
        return Counting()

    return enter


def test_every_strategy_is_run_with_every_seed(tmp_path: Path) -> None:
    loaded = load_small(tmp_path, list(STRATEGIES), seeds=[1, 2])
    planned = plan_runs(loaded)
    probe_runs(loaded, planned)
    train_runs(loaded, planned)
    report = build_report(loaded, planned)
    assert [strategy.name for strategy in report.strategies] == list(STRATEGIES)
    assert report.figures == ["accuracy", "macro_f1"]
    assert report.heldout_examples == 24
    for strategy in report.strategies:
        assert [seed.seed for seed in strategy.seeds] == [1, 2]
        for seed in strategy.seeds:
            assert len(seed.rounds) == (1 if strategy.central else 3)
            assert seed.rounds[0].stage == saved_of(loaded, seed.name).rounds[0].stage
            assert sum(seed.examples.values()) == 48
            assert all(own.accepted == (1 if strategy.central else 4) for own in seed.rounds)
            assert set(seed.last.figures) == {"accuracy", "macro_f1"}
        value = strategy.figures["accuracy"]
        of_seeds = [seed.last.figures["accuracy"].value for seed in strategy.seeds]
        assert value.value == pytest.approx(sum(of_seeds) / 2)  # type: ignore[arg-type]
        assert value.low is not None
        assert value.high is not None
        assert value.low <= value.high
    stages = {
        strategy.name: [own.stage for own in strategy.seeds[0].rounds] for strategy in report.strategies
    }
    assert stages["slora"] == ["sparse", "adapter", "adapter"]
    assert stages["sflora"] == ["sparse", "sparse", "adapter"]
    assert stages["full"] == ["full"] * 3
    sent = {strategy.name: strategy.seeds[0].bytes_up for strategy in report.strategies}
    assert sent["ia3"] < sent["products"] < sent["full"]
    pairs = {(own.first, own.second) for own in report.differences}
    assert ("slora", "full") in pairs
    assert len(pairs) == len(STRATEGIES) * (len(STRATEGIES) - 1) // 2


def test_clients_have_figures_on_their_own_held_out_examples(tmp_path: Path) -> None:
    loaded = load_small(tmp_path, ["ia3"], dirichlet_alpha=0.3)
    planned = plan_runs(loaded)
    train_runs(loaded, planned)
    last = saved_of(loaded, "ia3").rounds[-1]
    members = planned[0].population.heldout_positions
    assert set(last.clients) == {name for name, own in members.items() if own}
    assert sorted(position for own in members.values() for position in own) == list(range(24))
    weighted = sum(last.clients[name].value * len(members[name]) for name in last.clients)  # type: ignore[operator]
    assert last.figures["accuracy"].value == pytest.approx(weighted / 24)


def test_training_makes_the_global_adapter_better(tmp_path: Path) -> None:
    loaded = load_small(tmp_path, ["products", "central"], rounds=8)
    train_runs(loaded, plan_runs(loaded))
    rounds = saved_of(loaded, "products").rounds
    assert rounds[-1].loss is not None
    assert rounds[0].loss is not None
    assert rounds[-1].loss < 0.9 * rounds[0].loss
    for run in ("products", "central"):
        assert saved_of(loaded, run).rounds[-1].figures["accuracy"].value > 0.7  # type: ignore[operator]


@pytest.mark.parametrize("strategy", ["products", "slora", "sflora", "fedex", "full"])
@pytest.mark.parametrize("steps", [1, 7, 12])
@pytest.mark.quick("7-products", "7-slora", "1-fedex", "12-full")
def test_a_stopped_run_ends_with_the_same_bits(
    strategy: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"clients_per_round": 2, "clients_at_once": 1}
    whole = load_small(tmp_path / "whole", [strategy], **options)
    train_runs(whole, plan_runs(whole))
    stopped = load_small(tmp_path / "stopped", [strategy], **options)
    with monkeypatch.context() as patched:
        patched.setattr(StopSignals, "__enter__", stop_after(steps))
        with pytest.raises(Interrupted, match="saved after round"):
            train_runs(stopped, plan_runs(stopped))
    train_runs(stopped, plan_runs(stopped))
    expected, found = saved_of(whole, strategy), saved_of(stopped, strategy)
    assert expected.tensors.keys() == found.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor, found.tensors[name]), name
    assert expected.facts == found.facts
    for one, other in zip(expected.rounds, found.rounds, strict=True):
        timeless = {"seconds_clients": 0.0, "seconds_server": 0.0}
        assert one.replace(**timeless) == other.replace(**timeless)


def test_finished_strategies_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_small(tmp_path, ["ia3", "products"])
    train_runs(loaded, plan_runs(loaded))

    def refuse(self: StrategyRun, *args: object) -> None:
        raise AssertionError("a finished strategy was opened")

    monkeypatch.setattr(PlannedRun, "open", refuse)
    train_runs(loaded, plan_runs(loaded))


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    loaded = load_small(tmp_path, ["ia3"])
    train_runs(loaded, plan_runs(loaded))
    path = state_path(loaded.folder.path, "ia3")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"is damaged.*delete it, and resume=true"):
        train_runs(loaded, plan_runs(loaded))


def test_fewer_usable_updates_than_needed_end_the_run_and_keep_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_small(tmp_path, ["products"], min_clients=4)
    planned = plan_runs(loaded)
    opened = PlannedRun.open

    def with_loss(self: PlannedRun, loaded: LoadedRun) -> StrategyRun:
        strategy = opened(self, loaded)
        simulation = strategy.engine  # type: ignore[attr-defined]
        simulation.deliver = lambda update: None if simulation.progress.round == 1 else update
        return strategy

    with monkeypatch.context() as patched:
        patched.setattr(PlannedRun, "open", with_loss)
        with pytest.raises(UserError, match="no client answered"):
            train_runs(loaded, planned)
    assert len(saved_of(loaded, "products").rounds) == 1
    train_runs(loaded, planned)
    assert len(saved_of(loaded, "products").rounds) == 3


def test_tasks_are_clients(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, ["products", "slora"])
    kind = raw["tasks"]["kind"]
    raw["tasks"] = {
        "one": {**kind, "max_examples": 20, "labels": ["fruit", "metal"]},
        "two": {**kind, "max_examples": 9, "labels": ["fruit", "metal"]},
    }
    raw["federated"] = {**raw["federated"], "split": "tasks", "num_clients": None, "dirichlet_alpha": None}
    loaded = load(validate(raw))
    planned = plan_runs(loaded)
    probe_runs(loaded, planned)
    train_runs(loaded, planned)
    report = build_report(loaded, planned)
    assert report.strategies[0].seeds[0].examples == {"one": 20, "two": 9}
    assert report.heldout_examples == 48
    assert set(report.strategies[0].seeds[0].last.clients) == {"one", "two"}


def test_texts_are_trained_by_clients_and_measured_in_bits_per_byte(tmp_path: Path) -> None:
    from tests.e2e.chat_base import save_chat_base

    raw = raw_config(tmp_path, ["products"])
    raw["model"]["path"] = str(save_chat_base(tmp_path / "writer"))
    source = {key: raw["tasks"]["kind"][key] for key in ("train", "validation", "text")}
    raw["tasks"] = {"one": source, "two": {**source, "max_examples": 10}}
    raw["federated"] = {**raw["federated"], "split": "tasks", "num_clients": None, "dirichlet_alpha": None}
    loaded = load(validate(raw))
    planned = plan_runs(loaded)
    probe_runs(loaded, planned)
    train_runs(loaded, planned)
    report = build_report(loaded, planned)
    assert report.figures == ["bits_per_byte"]
    assert report.lower_is_better


def test_clients_of_different_ranks(tmp_path: Path) -> None:
    loaded = load_small(tmp_path, ["products", "flora", "usual"], client_ranks=[1, 2])
    planned = plan_runs(loaded)
    probe_runs(loaded, planned)
    train_runs(loaded, planned)
    for run in ("products", "flora", "usual"):
        ranks = {
            tensor.shape[0] for name, tensor in saved_of(loaded, run).tensors.items() if name.endswith(".A")
        }
        assert ranks == {2}


def test_the_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    loaded = load_small(tmp_path, ["ia3"], seeds=[1, 2])
    first, again = (make_population(loaded.config, loaded.tasks, 1) for _ in range(2))
    other = make_population(loaded.config, loaded.tasks, 2)
    assert first.clients == again.clients
    assert first.clients != other.clients


def test_a_rank_above_what_a_layer_has_is_found_before_the_first_round(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, ["slora"])
    raw["adapters"]["lora"]["rank"] = 500
    loaded = load(validate(raw))
    with pytest.raises(UserError, match="singular values"):
        probe_runs(loaded, plan_runs(loaded))
    assert not loaded.folder.path.exists()


def test_more_clients_than_examples_are_refused(tmp_path: Path) -> None:
    loaded = load_small(tmp_path, ["ia3"], num_clients=49)
    with pytest.raises(UserError, match=r"federated.num_clients = 49: there are 48 examples"):
        plan_runs(loaded)


def test_strategies_with_one_adapter_begin_with_the_same_values(tmp_path: Path) -> None:
    """Also with another list of seeds, so that a run with one of them alone is the same."""
    digests = set()
    for number, seeds in enumerate(([1], [1, 2])):
        loaded = load_small(tmp_path / str(number), ["usual", "products", "fedex"], seeds=seeds)
        for planned in plan_runs(loaded):
            if planned.seed == 1:
                state = planned.open(loaded).engine.state  # type: ignore[attr-defined]
                digests.add(state.values.digest())
    assert len(digests) == 1


def test_clients_of_lower_rank_are_measured_with_the_whole_adapter(tmp_path: Path) -> None:
    """Held-out examples of tasks that are clients meet the adapter that is exported."""
    raw = raw_config(tmp_path, ["products"])
    kind = raw["tasks"]["kind"]
    raw["tasks"] = {name: {**kind, "labels": ["fruit", "metal"]} for name in ("one", "two")}
    changes = {"split": "tasks", "num_clients": None, "dirichlet_alpha": None, "client_ranks": [1, 2]}
    raw["federated"] = {**raw["federated"], **changes}
    loaded = load(validate(raw))
    (planned,) = plan_runs(loaded)
    strategy = planned.open(loaded)
    strategy.round()
    scores = strategy.scores()
    half = len(scores.numerators) // 2
    assert scores.predictions[:half].tolist() == scores.predictions[half:].tolist()


def test_an_average_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    loaded = load_small(tmp_path, ["products"], failed_rounds=1)
    (planned,) = plan_runs(loaded)
    strategy = planned.open(loaded)
    simulation = strategy.engine  # type: ignore[attr-defined]
    before = simulation.state.values.digest()
    simulation.deliver = lambda update: replace(
        update, values=update.values.map(lambda name, tensor: torch.full_like(tensor, 3e38))
    )
    record = strategy.round()
    assert "not finite" in record.failure
    assert simulation.state.values.digest() == before
    with pytest.raises(UserError, match="not finite"):
        strategy.round()


def test_bad_rounds_of_full_fine_tuning_count_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_small(tmp_path, ["full"], failed_rounds=1)
    (planned,) = plan_runs(loaded)
    strategy = planned.open(loaded)
    before = {name: own.clone() for name, own in strategy.trainer.model.named_parameters()}
    monkeypatch.setattr(LocalResult, "failure", "no finite step")
    assert "have weights that can be used" in strategy.round().failure
    for name, own in strategy.trainer.model.named_parameters():
        assert torch.equal(own, before[name])
    assert strategy.facts() == {"round": 1, "failures": 1}
    with pytest.raises(UserError, match="have weights that can be used"):
        strategy.round()


def test_central_training_takes_the_passes_of_all_rounds_together(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, ["central"], local_epochs=2, clients_per_round=1, rounds=4)
    options = round_options(validate(raw), "central", seed=0)
    assert options.local.epochs == 2  # 4 rounds, 2 passes, a quarter of the clients


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "save_every", 7),
        ("training", "tokens_per_step", 512),
        ("evaluation", "interval", 3),
        ("evaluation", "select_best", False),
        ("model", "fsdp", True),
        ("guard", "policy", "rollback"),
    ],
)
def test_settings_without_effect_are_refused(section: str, key: str, value: object, tmp_path: Path) -> None:
    raw = raw_config(tmp_path, ["ia3"])
    raw.setdefault(section, {})[key] = value
    with pytest.raises(UserError, match=rf"{section}\.{key}"):
        validate(raw)


def test_a_task_is_not_called_as_the_global_adapter(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, ["ia3"])
    raw["tasks"] = {"global": raw["tasks"]["kind"]}
    with pytest.raises(UserError, match=r"tasks\.global.*rename it"):
        validate(raw)
