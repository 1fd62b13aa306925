"""The lines of `flora-train plan` and `flora-train doctor` about a federated run."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rich.console import Console

from flora_train.adapters.layer_usage import unusable_by_shape
from flora_train.adapters.pool import build_pools, numbers_of
from flora_train.adapters.spec import AdapterSpec, expand
from flora_train.commands.plan_text import print_lines
from flora_train.config.federated_schema import DEFAULT_CLIENTS, FederatedConfig
from flora_train.config.schema import RunConfig
from flora_train.federated.loaded import LoadedRun
from flora_train.federated.population import Population
from flora_train.federated.run import PlannedRun, federated_of, plan_runs
from flora_train.federated.specs import client_spec
from flora_train.federated.stages import client_specs
from flora_train.federated.strategy_run import round_options
from flora_train.models.loading import empty_model
from flora_train.run_context import load_data, prepare
from flora_train.runtime.environment import default_device
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.capacity import FLOAT, format_size


def plan_federated(config: RunConfig, folder: RunFolder) -> None:
    """Print what a federated run does and what its adapters take. The rows are read and divided among the
    clients; no weights are loaded.

    Args:
        config: The run, resolved.
        folder: Its folder.

    Raises:
        UserError: The run would be refused for its data or its clients.
    """
    prepare(config, default_device())
    tokenizer, tasks, _ = load_data(config)
    loaded = LoadedRun(config, folder, tokenizer, tasks, empty_model(config.model), base="")
    planned = plan_runs(loaded)
    for own in planned:
        clients = [client.name for client in own.population.clients]
        if not federated_of(loaded).strategies[own.strategy].central:
            round_options(config, own.strategy, seed=own.seed).choose(clients, 0)
    console = Console(soft_wrap=True)
    print_lines(console, _lines(loaded, planned))


def _lines(loaded: LoadedRun, planned: list[PlannedRun]) -> Iterator[tuple[str, str]]:
    """(heading, line) of the plan."""
    federated = federated_of(loaded)
    yield "clients", _clients_line(federated, planned[0].population)
    runs = f"{len(federated.strategies)} strategies x {len(federated.seeds)} seeds"
    yield "rounds", f"{federated.rounds} in each of {len(planned)} runs ({runs})"
    on_disk = 0
    for own in planned:
        numbers, line = _strategy(loaded, own)
        on_disk += 2 * FLOAT * numbers  # the saved state, and the exported adapter
        if own.seed == federated.seeds[0]:
            yield "strategy", line
    yield "disk", f"about {format_size(on_disk)} in {loaded.folder.path}"
    yield "time", "not estimated: the run tells the time of each round"


def _clients_line(federated: FederatedConfig, population: Population) -> str:
    sizes = [len(client.examples) for client in population.clients]
    at_once = federated.clients_per_round or len(sizes)
    examples = f"{min(sizes):,} to {max(sizes):,} examples each (median {round(median(sizes)):,})"
    return f"{len(sizes):,}, of which {at_once:,} train in a round; {examples}"


def _strategy(loaded: LoadedRun, planned: PlannedRun) -> tuple[int, str]:
    """How many numbers a client sends after a round of the last stage, and the line of a strategy."""
    federated, stage = federated_of(loaded), planned.stages[-1]
    names = [client.name for client in planned.population.clients]
    is_central = federated.strategies[planned.strategy].central
    if is_central:
        names = names[:1]
    ranks = None if is_central else federated.client_ranks
    model = empty_model(loaded.config.model)
    unusable = unusable_by_shape(loaded.config.model, model)
    specs = client_specs(stage.spec, names, ranks)
    pools, _ = build_pools(model, [*specs.values(), stage.spec], unusable)
    (whole,), _ = build_pools(model, [stage.spec], unusable)
    numbers = whole.row_size
    if stage.algorithm == "full":
        numbers += sum(weight.numel() for weight in model.parameters())
    memory = format_size(FLOAT * numbers_of(pools))
    line = f"{planned.strategy}: {numbers:,} numbers, {memory} for the adapters of {len(names)} clients"
    if is_central:
        return numbers, f"{line} together; nothing is sent"
    return numbers, f"{line}; a client sends {format_size(FLOAT * numbers)} after a round"


def clients_together(config: RunConfig) -> list[list[AdapterSpec]]:
    """The adapters that share forward passes in a round, for each entry of `adapters`."""
    federated = config.federated
    assert federated is not None
    count = federated.clients_at_once or federated.clients_per_round or federated.num_clients
    if count is None:
        count = len(config.tasks) if federated.split == "tasks" else DEFAULT_CLIENTS
    first = next(iter(config.tasks))
    groups = []
    for spec in expand(config):
        if spec.task == first:
            groups.append([client_spec(spec, f"client-{number}") for number in range(count)])
    return groups
