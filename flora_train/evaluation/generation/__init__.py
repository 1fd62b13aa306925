"""Text generation with many adapters and the base model in one batch.

decoder.py        prompts to texts: admits rows, steps them together, removes each at its own stop string
requests.py       what is generated: prompts, samples, rows
streaming.py      the text of a row while its tokens arrive
batching_mode.py  whether rows can share a batch, or are generated one at a time
attention.py      attention of one new token per row, on a CPU
kv_cache.py       keys and values of the rows being decoded
merged_decoding.py  merges the only adapter of a batch into the weights where that is faster
merge_costs.py    what merging costs and saves, measured
context_limit.py  checks that a prompt and its continuation fit in the context
sampling.py       the next token of every row; a draw depends on its row only
"""

from flora_train.evaluation.generation.batching_mode import batching_note
from flora_train.evaluation.generation.context_limit import check_prompts, check_room
from flora_train.evaluation.generation.decoder import Decoder, complete
from flora_train.evaluation.generation.merged_decoding import MergedDecoding
from flora_train.evaluation.generation.requests import Blocks, Generated, Request, Row
from flora_train.evaluation.generation.sampling import Sampling

__all__ = [
    "Blocks",
    "Decoder",
    "Generated",
    "MergedDecoding",
    "Request",
    "Row",
    "Sampling",
    "batching_note",
    "check_prompts",
    "check_room",
    "complete",
]
