"""A continuously refilled batch with many adapters generates what each row generates alone."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.evaluation.generation import Decoder, Generated, Request, Sampling
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from tests.architectures import ARCHITECTURES
from tests.conftest import perturb, spec
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.evaluation.generation.test_complete import PROMPTS, model_for

CAUSAL = [name for name in ARCHITECTURES if name not in ("t5", "whisper")]
GREEDY = Sampling(0.0, 1.0, 0)
WARM = Sampling(1.0, 0.95, 3)


def decode(
    bank: AdapterBank, requests: list[Request], sampling: Sampling, tokens: int = 12, rows: int = 32
) -> dict[Any, Generated]:
    found: dict[Any, Generated] = {}
    decoder = Decoder(
        bank.model, byte_tokenizer(), bank.routed, sampling=sampling, max_new_tokens=tokens, max_rows=rows
    )

    def report(generated: Generated) -> None:
        key = generated.request, generated.sample
        assert key not in found
        found[key] = generated

    decoder.run(requests, report)
    return found


def bank_for(architecture: str = "llama") -> AdapterBank:
    linear = {"target_modules": "all-linear"}
    specs = [spec("flora", rank=2), spec("lora", rank=2), spec("ia3", feedforward_modules=[], **linear)]
    bank = AdapterBank.attach(model_for(architecture, byte_tokenizer()), specs)
    perturb(bank, 0.3)
    return bank


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.quick("llama", "gpt2", "opt", "phi")
def test_rows_of_a_changing_batch_equal_transformers_generate(architecture: str) -> None:
    tokenizer, bank = byte_tokenizer(), bank_for(architecture)
    requests = [Request(adapter, prompt, ("",)) for prompt in PROMPTS for adapter in (2, -1, 0, 1)]
    found = decode(bank, requests, GREEDY, rows=6)
    bank.model.eval()
    for i, request in enumerate(requests):
        ids = torch.tensor([tokenizer(request.prompt)["input_ids"]])
        with bank.routed([request.adapter]):
            alone = bank.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
            )  # type: ignore[operator]
        assert found[i, 0].text == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_samples_do_not_depend_on_batch_size_order_or_neighbours() -> None:
    bank = bank_for()
    requests = [
        Request(a, p, tuple(f"{a} {p} {i}" for i in range(3))) for p in PROMPTS for a in (-1, 0, 1, 2)
    ]
    together = decode(bank, requests, WARM)
    assert len({generated.text for generated in together.values()}) > len(requests)
    for rows in (2, 7):
        assert {key: g.text for key, g in decode(bank, requests, WARM, rows=rows).items()} == {
            k: g.text for k, g in together.items()
        }
    backwards = decode(bank, requests[::-1], WARM)
    assert all(backwards[len(requests) - 1 - i, s].text == g.text for (i, s), g in together.items())
    alone = decode(bank, [Request(requests[5].adapter, requests[5].prompt, requests[5].keys[1:2])], WARM)
    assert alone[0, 0].text == together[5, 1].text


def test_samples_of_a_prompt_share_its_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = Decoder._forward

    def watched(decoder: Decoder, ids: torch.Tensor, *words: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(decoder, ids, *words)

    monkeypatch.setattr(Decoder, "_forward", watched)
    decode(
        bank_for(), [Request(0, "return", tuple("abcd")), Request(1, "local", tuple("ef"))], WARM, tokens=3
    )
    assert shapes[0] == (2, len("return"))  # two prompts, read once each
    assert shapes[1][0] == 6  # six samples


def test_no_batch_is_larger_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = Decoder._step

    def watched(decoder: Decoder, live: list[Any], cache: Any) -> None:
        sizes.append(len(live))
        step(decoder, live, cache)

    monkeypatch.setattr(Decoder, "_step", watched)
    decode(bank_for(), [Request(0, prompt, tuple("abcde")) for prompt in PROMPTS], WARM, rows=7)
    assert max(sizes) == 5  # the second prompt's five samples would not fit beside the first's
    sizes.clear()
    decode(bank_for(), [Request(0, prompt, tuple("ab")) for prompt in PROMPTS], WARM, rows=7)
    assert 6 <= max(sizes) <= 7


def test_a_peft_model_is_decoded_as_peft_generates(tmp_path: Path) -> None:
    bank, tokenizer = bank_for("gpt2"), byte_tokenizer()
    folder = export_peft(bank, bank.specs[1].name, tmp_path / "lora", base=BaseModel("base"))
    theirs = PeftModel.from_pretrained(model_for("gpt2", tokenizer), folder).eval()
    found: dict[int, str] = {}
    decoder = Decoder(
        theirs, tokenizer, lambda adapters: nullcontext(), sampling=GREEDY, max_new_tokens=12, max_rows=2
    )
    decoder.run(
        [Request(-1, prompt, ("",)) for prompt in PROMPTS], lambda g: found.update({g.request: g.text})
    )
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        alone = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        assert found[i] == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_another_seed_draws_other_texts() -> None:
    bank, requests = bank_for(), [Request(0, "local", ("a", "b"))]
    first, second = decode(bank, requests, WARM), decode(bank, requests, Sampling(1.0, 0.95, 4))
    assert {g.text for g in first.values()}.isdisjoint({g.text for g in second.values()})


def test_every_row_ends_at_its_own_stop_string_and_computes_no_more() -> None:
    bank = bank_for()
    whole = decode(bank, [Request(-1, prompt, ("",)) for prompt in PROMPTS], GREEDY, tokens=20)
    texts = [whole[i, 0].text for i in range(len(PROMPTS))]
    stops = [next(char for char in text[3:15] if char.isascii()) for text in texts]
    cut = decode(
        bank,
        [Request(-1, p, ("",), ("\0\0", stop)) for p, stop in zip(PROMPTS, stops, strict=True)],
        GREEDY,
        tokens=20,
    )
    for i, stop in enumerate(stops):
        assert cut[i, 0].text == whole[i, 0].text[: whole[i, 0].text.index(stop)]
        assert cut[i, 0].ended == "stop"
        assert cut[i, 0].tokens < whole[i, 0].tokens
    assert {g.ended for g in whole.values()} <= {"length", "end"}


def test_a_model_without_a_bank_is_decoded_as_it_is() -> None:
    bank, found = bank_for(), []
    plain = model_for("llama", byte_tokenizer())
    decoder = Decoder(
        plain, byte_tokenizer(), lambda adapters: nullcontext(), sampling=GREEDY, max_new_tokens=9
    )
    decoder.run([Request(-1, "return", ("",))], found.append)
    assert found[0].text == decode(bank, [Request(-1, "return", ("",))], GREEDY, tokens=9)[0, 0].text


def test_too_long_a_continuation_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(
        UserError, match=r"max_new_tokens = 60: with a prompt of 6 tokens is more than the 64 .* at most 58"
    ):
        decode(bank_for(), [Request(-1, "return", ("",))], GREEDY, tokens=60)
