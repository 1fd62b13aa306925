"""When the held-out loss is measured, and how programming problems are solved and executed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from flora_train.config.base import MOST_PROCESSES, MOST_ROWS, MOST_STEPS, ConfigModel, PathText
from flora_train.config.language_names import ProgrammingLanguages

COLDEST = 0.001
"""Lowest temperature above 0, by which logits are divided."""
Sandbox = Literal["bubblewrap", "none"]
MOST_COMPLETIONS = 10_000
"""Completions of one problem."""
Ks = Annotated[list[Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)]], Field(min_length=1, max_length=100)]


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EvaluationConfig(ConfigModel):
    interval: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Number of steps between two evaluations on the held-out rows. null: evaluate only at the end."""
    select_best: bool = True
    """For every adapter, use the parameters of its best evaluation: that of the lowest held-out loss, or of
    the best figure (tasks.*.select_by). false: use those of its last step."""
    max_examples: int | None = Field(None, ge=1, le=MOST_ROWS)
    """Number of held-out examples per task in the evaluations during training, which select the best
    parameters. The report uses all examples. Default: all."""
    bootstrap_samples: int = Field(2000, ge=100, le=100_000)
    """Number of bootstrap resamples of the held-out examples, or of the problems, for every interval."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence level of the intervals."""
    max_new_tokens: int = Field(64, ge=1, le=1_000_000)
    """Largest number of tokens that are generated for a sample prompt, a problem or a clip. MultiPL-E's own
    protocol uses 1024."""
    problems: Annotated[list[PathText], BeforeValidator(_one_or_several)] = []
    """Programming problems that the base model and the adapters solve at the end of the run, in the language
    of each task: starter (easy ones that come with this package), a folder of MultiPL-E's
    humaneval-<language>.jsonl, a table of your own (.yaml, in the format of eval/starter_problems.yaml), or
    hub:nuprl/MultiPL-E. A list combines several. Default: none."""
    languages: ProgrammingLanguages | None = Field(None, min_length=1)
    """Programming languages to evaluate. Default: those of all tasks with tasks.*.language."""
    max_problems: int | None = Field(None, ge=1, le=MOST_ROWS)
    """Number of problems of each language, the first ones of each set. The report shows how many there are.
    Default: all."""
    num_samples: int = Field(20, ge=1, le=MOST_COMPLETIONS)
    """Number of completions per problem, for the base model and for each adapter."""
    pass_at_k: Ks = Field([1], validate_default=True)
    """Values of k for pass@k, each at most num_samples. MultiPL-E reports 1, 10 and 100."""
    temperature: float = Field(0.2, ge=0, le=100)
    """Sampling temperature of completions; 0 is greedy decoding. MultiPL-E uses 0.2 for pass@1, and 0.8 for
    pass@10 and pass@100."""
    top_p: float = Field(0.95, ge=1e-6, le=1)
    """Nucleus sampling: sample from the most likely tokens with this total probability."""
    beams: int = Field(1, ge=1, le=256)
    """Speech: number of beams of beam search; 1 is greedy decoding."""
    embedded_clips: int = Field(12, ge=0, le=10_000)
    """Speech: number of clips that the report embeds with a player. Use 0 for clips that must not be passed
    on."""
    batch_rows: int = Field(32, ge=1, le=65_536)
    """Number of completions decoded at the same time on one device. Results depend on it only through
    rounding."""
    sandbox: Sandbox = "bubblewrap"
    """Isolation of generated programs. bubblewrap: each runs in a sandbox of its own. none: no isolation,
    which the report states; programs can then read your files, and the environment of your processes in
    /proc."""
    cpu_seconds: float | None = Field(None, ge=0.01, le=86_400)
    """CPU time that a program may use, in seconds. Default: that of its language in eval/languages.yaml
    (mostly 15)."""
    workers: int | None = Field(None, ge=1, le=MOST_PROCESSES)
    """Number of programs that run at the same time. Default: the machine's cores."""

    @field_validator("pass_at_k")
    @classmethod
    def _at_most_num_samples(cls, k: list[int], info: ValidationInfo) -> list[int]:
        num_samples = info.data.get("num_samples")
        if num_samples is not None and max(k) > num_samples:
            hint = f"raise num_samples = {num_samples}, or lower k"
            raise ValueError(f"pass@{max(k)} requires {max(k)} completions per problem: {hint}")
        return k

    @field_validator("temperature")
    @classmethod
    def _greedy_once(cls, temperature: float, info: ValidationInfo) -> float:
        num_samples = info.data.get("num_samples")
        if 0 < temperature < COLDEST:
            raise ValueError(f"must be 0 (greedy), or at least {COLDEST}")
        if temperature == 0 and num_samples is not None and num_samples > 1:
            hint = "set evaluation.num_samples=1, or a temperature above 0"
            raise ValueError(f"generates the same completion {num_samples} times: {hint}")
        return temperature
