"""What a client does with a message of a round: load its examples, follow the base, train, answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flwr.app import Context, RecordDict

from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.schema import RunConfig
from flora_train.federated.flower.base_history import follow_base
from flora_train.federated.flower.recipe_digest import RECIPE, check_same, digests_of
from flora_train.federated.flower.records import VALUES, arrays_in, facts_in, packed
from flora_train.federated.flower.settings import Settings, read_settings
from flora_train.federated.loaded import LoadedRun, load_federated
from flora_train.federated.local_training import Client
from flora_train.federated.population import make_population, names_of_clients
from flora_train.federated.remote import Answer, answer_of
from flora_train.federated.stages import Stage, client_specs, stages_of
from flora_train.federated.state import mask_of_pool
from flora_train.federated.strategy_run import round_options
from flora_train.run_context import resolve_config
from flora_train.runtime.environment import default_device
from flora_train.runtime.run_folder import RunFolder


def train_client(client: str, content: RecordDict, context: Context) -> RecordDict:
    """A client's answer to a message of a round.

    Args:
        client: Its name.
        content: The values, number and stage of the round, and what was added to the base.
        context: Of the node: its configuration, and what it kept of earlier rounds.

    Returns:
        Values and facts.

    Raises:
        UserError: The client is none of the recipe, its recipe, data or base are others than the server's, or
            the message does not fit its adapter.
    """
    facts, settings = facts_in(content), read_settings(context.run_config)
    if facts.get("client") != client:
        raise user_error("client", client, f"the server takes this node for {facts.get('client')}")
    config = resolve_config(settings.config)
    names = names_of_clients(config)
    if client not in names:
        hint = f"is no client of the recipe, which has {choices(names)}.{did_you_mean(client, names)}"
        raise user_error("client", client, hint)
    check_same(digests_of(config, {}), {RECIPE: facts.get(RECIPE)}, "this node")
    own = own_config(config, client)
    loaded = load_federated(own, RunFolder(Path(own.folder)), default_device())
    labels = [] if loaded.labels is None else list(loaded.labels.labels)
    if labels != list(facts.get("labels", [])):
        hint = f"the server has {choices(facts.get('labels', []))}: give both the same labels, in one order"
        raise user_error("labels", ", ".join(labels), hint)
    digests = digests_of(config, loaded.tasks)
    check_same(digests, facts, "this node")
    stage = _stage(config, settings, loaded, str(facts.get("stage")))
    answer = _train(client, stage, loaded, settings, content=content, context=context, names=names)
    return packed(replace(answer, facts={**answer.facts, **digests}))


def own_config(config: RunConfig, client: str) -> RunConfig:
    """The configuration of one client. Where every task is a client, it needs its own task's data only."""
    federated = config.federated
    assert federated is not None
    if federated.split != "tasks":
        return config
    alone = federated.model_copy(update={"num_clients": None, "clients_per_round": None})
    return config.model_copy(update={"tasks": {client: config.tasks[client]}, "federated": alone})


def _stage(config: RunConfig, settings: Settings, loaded: LoadedRun, name: str) -> Stage:
    stages = {stage.name: stage for stage in stages_of(config, settings.strategy, loaded.labels)}
    for own, stage in stages.items():
        if own == name:
            return stage
    raise user_error("stage", name, "this client's recipe has another strategy than the server's")


def _train(
    client: str,
    stage: Stage,
    loaded: LoadedRun,
    settings: Settings,
    *,
    content: RecordDict,
    context: Context,
    names: list[str],
) -> Answer:
    population = make_population(loaded.config, loaded.tasks, settings.seed)
    spec = client_specs(stage.spec, names, settings.federated.client_ranks)[client]
    trainer = loaded.trainer([spec], population, changes_base=stage.algorithm == "fedex")
    base = follow_base(content, context, trainer.bank, loaded=loaded.base)
    (data,) = [own for own in population.clients if own.name == client]
    return answer_of(
        trainer,
        Client(client, spec.name, data.examples),
        arrays_in(content, VALUES),
        local=round_options(settings.config, settings.strategy, seed=settings.seed).local,
        round_number=int(facts_in(content).get("round", 0)),
        seed=settings.seed,
        base=base,
        mask=mask_of_pool(trainer.bank.pools[0]),
    )
