"""Methods whose adapters are no adapter of any type in PEFT."""

from __future__ import annotations

from torch import Tensor

from flora_train.adapters.methods.base import AdapterMethod, Params
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError, user_error


class WithoutPeftType(AdapterMethod):
    """A method that PEFT has no type for."""

    no_peft_type: str
    """Why it has none, and what to do instead."""

    def peft_config(
        self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]
    ) -> dict[str, object]:
        raise self._refusal(spec)

    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        raise self._refusal(spec)

    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        raise self._refusal(spec)

    def _refusal(self, spec: AdapterSpec) -> UserError:
        return user_error("adapter", spec.name, self.no_peft_type)
