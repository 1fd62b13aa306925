"""What does each adapter write? Rows of many adapters, and of the base model, decoded in one batch that is kept full.

decoder.py   prompts in, texts out: admits rows, steps them together, lets each leave on its own stop string
attention.py one new token of every row, on a CPU
row_cache.py keys and values of the rows that are being decoded
way.py       whether rows can share a batch, or are written one at a time by the model's own generate
room.py      whether there is room for a prompt and its continuation
sampling.py  the next token of every row; what is drawn depends on the row alone
"""

from flora_train.evaluation.generation.batching_mode import batching_note
from flora_train.evaluation.generation.context_limit import check_prompts, check_room
from flora_train.evaluation.generation.decoder import Blocks, Decoder, Generated, Request, complete
from flora_train.evaluation.generation.sampling import Sampling

__all__ = ["Blocks", "Decoder", "Generated", "Request", "Sampling", "batching_note", "check_prompts", "check_room", "complete"]
