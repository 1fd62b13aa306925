"""Loads multiplicative adapters into vLLM's LoRA slots, and tells the layers which tokens use them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import vllm.lora.utils
import vllm.lora.worker_manager
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer

from flora_train.config.errors import user_error
from flora_train.kernels.backend import use_backend
from flora_train.serving.adapter_files import LoraFolder, read_adapter
from flora_train.serving.batch_rows import BatchRows
from flora_train.serving.fit import LayerFacts, check_fits
from flora_train.serving.layers import LAYERS, AdaptedLogits, CurrentBatch, MultiplicativeMixin, facts_of
from flora_train.serving.multipliers import MultiplicativeAdapter, Multiplier

PREFIX = "base_model.model."
NOT_LINEAR = "is not a linear layer, and fLoRA and IA3 are served on linear layers only"

FULLY_SHARDED = "is sharded by --fully-sharded-loras, with which only LoRA is served"
NO_GRAPHS = (
    "is multiplicative, and vLLM's second model runner would replay CUDA graphs without it: start vLLM with "
    "--enforce-eager, or with VLLM_USE_V2_MODEL_RUNNER=0"
)


class MultiplicativeModel(LoRAModel):
    """A multiplicative adapter in the form in which vLLM keeps LoRAs: A and B of every module."""

    multipliers: dict[str, Multiplier]
    """Name of a module, as vLLM names it before merging -> what the adapter does there."""


class MultiplicativeManager(LRUCacheLoRAModelManager):
    """vLLM's manager of the adapters of one process, for LoRA and multiplicative adapters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_backend("auto", self.device)
        self.batch = CurrentBatch()
        self.plain_loras: set[int] = set()
        """Ids of LoRAs that were checked. An id stands for the content of the files (admission.py)."""
        config = kwargs["vllm_config"]
        has_graphs = self.device.type == "cuda" and not config.model_config.enforce_eager
        self._without_graphs = (
            NO_GRAPHS if has_graphs and getattr(config, "use_v2_model_runner", False) else None
        )
        self._compiled = [m for m in self.model.modules() if getattr(m, "do_not_compile", None) is False]
        for layer in self.modules.values():
            if isinstance(layer, MultiplicativeMixin):
                layer.batch = self.batch

    def check(self, adapter: LoraFolder | MultiplicativeAdapter, source: str) -> None:
        """Raises UserError where this model cannot serve the adapter exactly.

        vLLM itself checks a LoRA's layers that are not linear.
        """
        facts, others = self._facts
        if isinstance(adapter, LoraFolder):
            names = {self.served_name(name): shapes for name, shapes in adapter.layers.items()}
            checked = {name: shapes for name, shapes in names.items() if name not in others}
            adapter = replace(adapter, layers=checked)
        else:
            if self._without_graphs is not None:
                raise user_error("adapter", source, self._without_graphs)
            facts = others | facts
            adapter = replace(adapter, multipliers=self._by_served_name(adapter))
        limit = self.lora_config.max_lora_rank
        check_fits(adapter, facts, max_rank=limit, source=source, ignored_prefixes=self._ignored)

    @functools.cached_property
    def _facts(self) -> tuple[dict[str, LayerFacts], dict[str, LayerFacts]]:
        """Of the modules on which everything is served, and of those on which vLLM serves LoRA."""
        facts: dict[str, LayerFacts] = {}
        others: dict[str, LayerFacts] = {}
        for name, layer in self.modules.items():
            parts = self.packed_modules.get(name, [name])
            if isinstance(layer, MultiplicativeMixin):
                facts |= zip(parts, facts_of(layer, len(parts)), strict=True)
            else:
                is_linear = isinstance(layer, BaseLinearLayerWithLoRA)
                obstacle = FULLY_SHARDED if is_linear else NOT_LINEAR
                others |= dict.fromkeys((name, *parts), LayerFacts(0, 0, obstacle=obstacle))
        return facts, others

    @functools.cached_property
    def _ignored(self) -> list[str]:
        """Starts of the names of modules that this process does not have, or that vLLM leaves out."""
        modules = self.model.named_modules()
        elsewhere = [name for name, module in modules if isinstance(module, PPMissingLayer)]
        return [*(getattr(self.model, "lora_skip_prefixes", None) or ()), *elsewhere]

    def served_name(self, name: str) -> str:
        """vLLM's name of a module, from that of transformers."""
        served, _ = parse_fine_tuned_lora_name(f"{PREFIX}{name}.lora_A.weight", self._name_mapper())
        return served

    def read(self, adapter: MultiplicativeAdapter, lora_id: int) -> MultiplicativeModel:
        """A checked adapter in the form in which vLLM keeps it."""
        tensors = {}
        for name, multiplier in adapter.multipliers.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = multiplier.A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = multiplier.B
        model = MultiplicativeModel.from_lora_tensors(
            lora_id,
            tensors,
            PEFTHelper(r=1, lora_alpha=1, target_modules=[]),  # a scale of 1
            device="cpu",
            dtype=self.lora_config.lora_dtype,
            weights_mapper=self._name_mapper(),
        )
        model.rank = adapter.rank
        model.multipliers = self._by_served_name(adapter)
        return model

    def _name_mapper(self) -> Any:
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        return None if mapper is None else mapper.get_rename_mapper()

    def _by_served_name(self, adapter: MultiplicativeAdapter) -> dict[str, Multiplier]:
        return {self.served_name(name): multiplier for name, multiplier in adapter.multipliers.items()}

    def activate_adapter(self, lora_id: int) -> bool:
        is_new = super().activate_adapter(lora_id)
        model = self._registered_adapters.cache[lora_id]
        if is_new and isinstance(model, MultiplicativeModel):
            slot = self.lora_index_to_id.index(lora_id)
            for name, layer in self.modules.items():
                multipliers = [model.multipliers.get(part) for part in self.packed_modules.get(name, [name])]
                if any(multiplier is not None for multiplier in multipliers):
                    layer.use_multipliers(slot, multipliers)
        return is_new

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        multiplicative = {
            lora_id: slot
            for slot, lora_id in enumerate(self.lora_index_to_id)
            if lora_id is not None and self._is_multiplicative(lora_id)
        }
        self.batch.rows = self._rows(mapping.index_mapping, multiplicative)
        for module in self._compiled:
            # Compiled code is that of batches without multiplicative or merged rows.
            module.do_not_compile = self.batch.is_eager
        if self.batch.rows is not None:
            mapping = LoRAMapping(
                _without(mapping.index_mapping, multiplicative),
                _without(mapping.prompt_mapping, multiplicative),
                is_prefill=mapping.is_prefill,
                type=mapping.type,
            )
        super()._set_adapter_mapping(mapping)

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()
        self.batch.rows = None

    def _is_multiplicative(self, lora_id: int) -> bool:
        return isinstance(self._registered_adapters.cache.get(lora_id), MultiplicativeModel)

    def _rows(self, ids: Iterable[int], multiplicative: dict[int, int]) -> BatchRows | None:
        tokens_of: dict[int, list[int]] = {}
        has_lora = False
        for token, lora_id in enumerate(ids):
            slot = multiplicative.get(lora_id)
            if slot is not None:
                tokens_of.setdefault(slot, []).append(token)
            elif lora_id:
                has_lora = True
        if not tokens_of:
            return None
        return BatchRows(
            {slot: tuple(tokens) for slot, tokens in tokens_of.items()},
            has_lora,
            self.device,
        )


def _without(ids: Iterable[int], multiplicative: dict[int, int]) -> tuple[int, ...]:
    """Multiplicative adapters as the base model."""
    return tuple(0 if lora_id in multiplicative else lora_id for lora_id in ids)


def install() -> None:
    """Make vLLM use these layers and this manager."""
    LRUCacheWorkerLoRAManager._manager_cls = _manager_class()
    classes = vllm.lora.utils._all_lora_classes
    if LAYERS[0] in classes:
        return
    if isinstance(classes, set):
        raise TypeError("this version of vLLM chooses LoRA layers in no order")
    vllm.lora.utils._all_lora_classes = (*LAYERS, *classes)
    vllm.lora.utils.LogitsProcessorWithLoRA = AdaptedLogits
    _install_loader()
    _install_eager_batches()


def _manager_class() -> type[MultiplicativeManager]:
    from flora_train.serving.merging_manager import MergingManager, max_requests

    return MultiplicativeManager if max_requests() is None else MergingManager


def _install_loader() -> None:
    load_lora = WorkerLoRAManager._load_adapter

    @functools.wraps(load_lora)
    def load_adapter(self: WorkerLoRAManager, lora_request: LoRARequest) -> LoRAModel:
        manager = self._adapter_manager
        if lora_request.lora_int_id in manager.plain_loras:
            return load_lora(self, lora_request)
        adapter = read_adapter(
            get_adapter_absolute_path(lora_request.lora_path), shown=lora_request.lora_name
        )
        manager.check(adapter, lora_request.lora_name)
        if isinstance(adapter, MultiplicativeAdapter):
            return manager.read(adapter, lora_request.lora_int_id)
        lora = load_lora(self, lora_request)
        manager.plain_loras.add(lora_request.lora_int_id)
        return lora

    WorkerLoRAManager._load_adapter = load_adapter


def _install_eager_batches() -> None:
    """CUDA graphs hold batches without multiplicative or merged rows; others run without a graph."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    determine = GPUModelRunner._determine_batch_execution_and_padding

    @functools.wraps(determine)
    def determine_without_graph(self: Any, *args: Any, **kwargs: Any) -> Any:
        manager = getattr(getattr(self, "lora_manager", None), "_adapter_manager", None)
        if isinstance(manager, MultiplicativeManager) and manager.batch.is_eager:
            kwargs["force_eager"] = True
        return determine(self, *args, **kwargs)

    GPUModelRunner._determine_batch_execution_and_padding = determine_without_graph
