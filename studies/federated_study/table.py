"""The tables of the study as Markdown, and the sentence that answers its question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flora_train.evaluation.result_model import Interval

from .runs import Difference, StudyRun

LORA, SLORA, FULL = "lora", "slora", "full"
"""Strategies that the question is about."""
COMPARED = ((SLORA, LORA), (SLORA, FULL), (FULL, LORA))
SHOWN_ROUNDS = (5, 10, 15, 20)
HARDEST_ALPHA = 0.1
"""The question is asked at this alpha."""


def write_tables(runs: Sequence[StudyRun]) -> Iterator[str]:
    """Everything between the heading and the figure, line by line."""
    for run in runs:
        if run.alpha == HARDEST_ALPHA:
            yield answer(run)
            yield ""
    yield from figure_table(runs)
    yield ""
    yield "## Differences"
    yield ""
    yield from difference_table(runs)
    yield ""
    yield "## By round"
    yield ""
    yield from round_table(runs)
    yield ""
    yield "## Bytes and time"
    yield ""
    yield from cost_table(runs)


def answer(run: StudyRun) -> str:
    """Whether SLoRA closes the gap of LoRA to full fine-tuning, as the numbers say."""
    gap, gain, rest = run.difference(FULL, LORA), run.difference(SLORA, LORA), run.difference(SLORA, FULL)
    more = f"SLoRA - LoRA is {words(gain)}"
    if gain.is_clear and gain.value > 0:
        more += ", so that SLoRA is better than plain LoRA"
    elif gain.is_clear:
        more += ", so that SLoRA is worse than plain LoRA"
    else:
        more += ", which is no clear difference"
    if not (gap.is_clear and gap.value > 0):
        closes = f"There is no clear gap to close: full - LoRA is {words(gap)}"
    elif rest.is_clear and rest.value < 0:
        share = gain.value / gap.value
        closes = (
            f"No: SLoRA - full is {words(rest)}. Of the gap full - LoRA, {words(gap)}, it closes {share:.0%}"
        )
    elif gain.is_clear and gain.value > 0:
        closes = (
            f"Yes, as far as these texts can tell: SLoRA - full is {words(rest)}, and the gap full - LoRA is "
            f"{words(gap)}"
        )
    else:
        closes = (
            f"Undecided: SLoRA - full is {words(rest)} and the gap full - LoRA is {words(gap)}, but SLoRA is "
            "not clearly better than LoRA"
        )
    question = f"**Does SLoRA close the gap to full fine-tuning at alpha = {run.alpha:g}?**"
    return f"{question} {closes}. {more}. {regime(run)}"


def regime(run: StudyRun) -> str:
    """What the answer holds for."""
    report = run.report
    seeds = len(report.strategies[0].seeds)
    return (
        f"This holds for {report.model.rsplit('/', 1)[-1]}, {report.num_clients} clients of which "
        f"{report.clients_per_round} take part in a round, {report.rounds} rounds of {report.local}, "
        f"{report.heldout_examples:,} test texts and {seeds} seeds; learning rates were chosen on "
        "development texts at alpha 0.1 with few rounds and one seed, and are the same for all alphas; those "
        "of heads and of the second stage of SLoRA were not searched."
    )


def words(difference: Difference) -> str:
    """`+1.2 [0.3, 2.1] points (seeds +0.9, +1.5)`."""
    seeds = ", ".join(f"{100 * value:+.1f}" for value in difference.of_seeds)
    return f"{points(difference.interval, signed=True)} points (seeds {seeds})"


def points(interval: Interval, *, signed: bool = False) -> str:
    """`61.2 [60.1, 62.3]`, in points of a hundred."""
    if interval.finite is None:
        return "not finite"
    value, low, high = (100 * number for number in interval.finite)
    sign = "+" if signed else ""
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def figure_table(runs: Sequence[StudyRun]) -> Iterator[str]:
    """A row for each strategy, with a column for each run."""
    yield f"| strategy | {' | '.join(map(title, runs))} |"
    yield f"|---|{'---|' * len(runs)}"
    for name in names_of(runs):
        cells = []
        for run in runs:
            cell = "-"
            if name in run.strategies:
                value = run.value(run.strategies[name])
                spread = "" if value.deviation is None else f" ± {100 * value.deviation:.1f}"
                cell = f"{points(value)}{spread}"
            cells.append(cell)
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    entropies = ", ".join(f"{entropy_of(run):.2f} at {title(run)}" for run in runs)
    yield (
        f"{runs[0].figure} in percent on the test texts after the last round: mean over seeds, interval over "
        f"texts ({runs[0].report.confidence:.0%}), ± deviation over seeds. A seed decides on the division of "
        "the texts, on the clients of each round, on the order of texts and on initial values. Mean entropy "
        f"of a client's labels, in nats: {entropies}."
    )


def entropy_of(run: StudyRun) -> float:
    """Mean entropy of a client's labels over seeds."""
    values = [seed.label_entropy or 0.0 for seed in run.report.strategies[0].seeds]
    return sum(values) / len(values)


def difference_table(runs: Sequence[StudyRun]) -> Iterator[str]:
    """A row for each pair of strategies that all runs have."""
    yield f"| difference, points | {' | '.join(map(title, runs))} |"
    yield f"|---|{'---|' * len(runs)}"
    for first, second in COMPARED:
        if not all({first, second} <= run.strategies.keys() for run in runs):
            continue
        cells = []
        for run in runs:
            own = run.difference(first, second)
            mark = "*" if own.is_clear else ""
            cells.append(f"{words(own)}{mark}")
        yield f"| {first} - {second} | {' | '.join(cells)} |"
    yield ""
    yield (
        "Paired by text and seed. A star: the interval excludes zero, and all seeds have the same sign. The "
        "interval resamples texts; what clients, divisions and initial values change is in the seeds."
    )


def round_table(runs: Sequence[StudyRun]) -> Iterator[str]:
    """The figure after some rounds, means over seeds."""
    heads = " | ".join(f"{title(run)}, round {number}" for run in runs for number in rounds_of(run))
    count = sum(len(rounds_of(run)) for run in runs)
    yield f"| strategy | {heads} |"
    yield f"|---|{'---|' * count}"
    for name in names_of(runs):
        cells = []
        for run in runs:
            values = run.by_round(run.strategies[name]) if name in run.strategies else {}
            for number in rounds_of(run):
                cells.append(f"{100 * values[number]:.1f}" if number in values else "-")
        yield f"| {name} | {' | '.join(cells)} |"


def rounds_of(run: StudyRun) -> list[int]:
    """Rounds that the table shows: those that the run has, and its last."""
    last = run.report.rounds
    return sorted({number for number in SHOWN_ROUNDS if number <= last} | {last})


def cost_table(runs: Sequence[StudyRun]) -> Iterator[str]:
    """What travels in all rounds, and how long they take: means over seeds."""
    yield (
        "| strategy | sent by a client in a round, kB | all rounds, up and down, MB | seconds of all rounds |"
    )
    yield "|---|---|---|---|"
    for name in names_of(runs):
        run = next(run for run in runs if name in run.strategies)
        strategy = run.strategies[name]
        seeds = strategy.seeds
        megabytes = sum(seed.bytes_up + seed.bytes_down for seed in seeds) / len(seeds) / 1e6
        seconds = []
        for own in runs:
            if name in own.strategies:
                of_seeds = [seed.seconds for seed in own.strategies[name].seeds]
                seconds.append(f"{sum(of_seeds) / len(of_seeds):,.0f}")
        sent = strategy.seeds[0].last
        per_client = sent.bytes_up / max(1, sent.accepted) / 1e3
        yield f"| {name} | {per_client:,.0f} | {megabytes:,.1f} | {', '.join(seconds)} |"
    yield ""
    yield (
        f"Bytes at {title(runs[0])}; a client's in the last round. Seconds by rising alpha, without "
        "evaluations. The clients of full fine-tuning run one after the other, those of all others at once: "
        "its seconds are the sum of its clients'."
    )


def names_of(runs: Sequence[StudyRun]) -> list[str]:
    """All strategies, in the order of the recipe."""
    return list(dict.fromkeys(name for run in runs for name in run.strategies))


def title(run: StudyRun) -> str:
    """How columns call a run."""
    return f"alpha {run.alpha:g}, {run.report.num_clients} clients"
