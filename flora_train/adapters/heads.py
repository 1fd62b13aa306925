"""Heads: what an adapter of a label task makes its outputs with, in transformers' own code.

The body of the model runs once for all rows of a batch. For the rows of each adapter, the code of
transformers that follows the body runs with that adapter's parameters, which are those that the base's
checkpoint does not contain. Dropout of heads is off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from flora_train.adapters.seeds import seeded_generator
from flora_train.adapters.spec import HeadShape
from flora_train.config.errors import first_line, user_error
from flora_train.models.encoders import POOLER, body_prefix, is_encoder, new_parameters
from flora_train.models.loading import disable_dropout

if TYPE_CHECKING:
    from flora_train.adapters.routing import Routing

Shapes = Mapping[str, tuple[int, ...]]

SAVED_BY_PEFT = ("classifier", "score")
"""PEFT saves every module whose name ends like this with the adapter of a classifier. Where the base's
checkpoint contains one, adapters begin with its values."""


class Head:
    """The heads of one shape: the names and shapes of their parameters, initial values and outputs."""

    def __init__(self, model: nn.Module, shape: HeadShape) -> None:
        self.shape = shape
        self.is_encoder = is_encoder(model.config)
        self._model = model
        self._template = _template(model, shape)
        self._body = _Body(self._template)
        prefix = body_prefix(self._template)
        pooler = f"{prefix}{POOLER}."
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in self._template.named_parameters():
            if name.startswith(pooler) or not name.startswith(prefix):
                shapes[name] = tuple(parameter.shape)
        self._template.set_submodule(prefix[:-1], self._body)
        complete = _in_base(model, shapes)
        self._copied = {module for module in complete if module.endswith(SAVED_BY_PEFT)}
        frozen = complete - self._copied
        self.parameters: Shapes = {
            name: shape for name, shape in shapes.items() if _module(name, prefix) not in frozen
        }
        """Name of a parameter, as in a checkpoint of transformers -> its shape."""
        self.modules = tuple(dict.fromkeys(_module(name, prefix) for name in self.parameters))
        """The modules that hold them, which PEFT saves as a whole."""
        self._frozen = tuple(name for name in shapes if name not in self.parameters)

    def initial(self, seed: int, name: str) -> dict[str, Tensor]:
        """Initial values as transformers': they depend on the seed, the adapter's name and the shape alone,
        beside what the base's checkpoint contains."""
        module = copy.deepcopy(self._template).to_empty(device="cpu")
        generator = seeded_generator(seed, name, "head")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            with torch.no_grad():
                module.apply(module._init_weights)  # type: ignore[arg-type]
        values = dict(module.named_parameters())
        if self._copied:
            of_base = dict(self._model.named_parameters())
            prefix = body_prefix(self._model)
            values |= {n: of_base[n] for n in self.parameters if _module(n, prefix) in self._copied}
        return {name: values[name].detach() for name in self.parameters}

    def __call__(self, states: Tensor, lengths: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Outputs [B, n] of texts, or [B, L, n] of their tokens.

        states: [B, L, d], the body's last states; lengths: int64 [B], tokens of each row without padding.
        """
        states = states.to(next(iter(parameters.values())).dtype)
        if self.shape.kind == "text" and not self.is_encoder:
            # A decoder's head reads the last token alone.
            states = states[torch.arange(len(states), device=states.device), lengths - 1][:, None]
            lengths = torch.ones_like(lengths)
        mask = torch.arange(states.shape[1], device=states.device)[None] < lengths[:, None]
        own = dict(self._model.named_parameters()) if self._frozen else {}
        frozen = {name: own[name].to(states.dtype) for name in self._frozen}
        with self._body.returning(states):
            outputs = functional_call(
                self._template,
                {**parameters, **frozen},
                kwargs={"input_ids": mask.long(), "attention_mask": mask.long()},
            )
        logits: Tensor = outputs.logits
        return logits


class _Body(nn.Module):
    """Stands for the body of a model in its head's code: returns states that were computed before."""

    def __init__(self, template: nn.Module) -> None:
        super().__init__()
        body: nn.Module = template.base_model  # type: ignore[assignment]
        self.pooler: nn.Module | None = getattr(body, POOLER, None)
        self._activation: nn.Module | None = getattr(body, "pooler_activation", None)
        self._states: list[Tensor] = []

    @contextmanager
    def returning(self, states: Tensor) -> Iterator[None]:
        self._states.append(states)
        try:
            yield
        finally:
            self._states.pop()

    def forward(self, *args: object, **kwargs: object) -> BaseModelOutputWithPoolingAndCrossAttentions:
        states, pooled = self._states[-1], None
        if isinstance(self.pooler, nn.Linear) and self._activation is not None:
            pooled = self._activation(self.pooler(states[:, 0]))
        elif self.pooler is not None:
            pooled = self.pooler(states)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=states, pooler_output=pooled)


def head_of(model: nn.Module, shape: HeadShape) -> Head:
    """The heads of this shape on this model, made once. Raises UserError where transformers has no class
    with such a head for the model."""
    heads = _HEADS.setdefault(model, {})
    if shape not in heads:
        heads[shape] = Head(model, shape)
    return heads[shape]


_HEADS: WeakKeyDictionary[nn.Module, dict[HeadShape, Head]] = WeakKeyDictionary()


def shapes_of(head: Head | None) -> Shapes:
    """The shapes of a head's parameters; none where there is no head."""
    return {} if head is None else head.parameters


def rows_of_heads(routing: Routing) -> Iterator[tuple[list[int], Head, dict[str, Tensor]]]:
    """For each adapter of a batch that has a head: the positions of its rows, the head, and its parameters,
    differentiable into the pool's gradients."""
    order = range(routing.rows) if routing.order is None else routing.order.tolist()
    for span in routing.spans:
        if span.pool is None or span.slots is None or span.pool.head is None:
            continue
        gathered = span.pool.gather_head(span.slots)
        # Unbound at once: the backward of an index for each adapter would fill all of them with zeros.
        parameters = {name: values.unbind() for name, values in gathered.items()}
        for k, first, end in span.segments:
            rows = [order[row] for row in range(span.start + first, span.start + end)]
            yield rows, span.pool.head, {name: values[k] for name, values in parameters.items()}


def head_model(model: nn.Module, shape: HeadShape) -> nn.Module:
    """transformers' model with such a head on this base, without weights (on the meta device)."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    auto_class = AutoModelForTokenClassification
    if shape.kind == "text":
        auto_class = AutoModelForSequenceClassification
    config = copy.deepcopy(model.config)
    config.num_labels = shape.outputs  # type: ignore[union-attr]
    is_remote = type(model).__module__.startswith("transformers_modules")
    try:
        with torch.device("meta"):
            made: nn.Module = auto_class.from_config(config, trust_remote_code=is_remote)
    except ValueError as error:
        kind = f"transformers has no {auto_class.__name__} of it ({first_line(error)[:80]})"
        raise user_error("model", type(model).__name__, f"cannot have heads: {kind}") from error
    return made


def _template(model: nn.Module, shape: HeadShape) -> nn.Module:
    template = head_model(model, shape)
    config = template.config
    disable_dropout(config)
    for part in (config, config.get_text_config()):  # type: ignore[operator, union-attr]
        # The mask stands for the token ids: a decoder's code then reads the last token that it has.
        part.pad_token_id = 0  # type: ignore[union-attr]
    return template.requires_grad_(False).eval()


def _in_base(model: nn.Module, shapes: Shapes) -> set[str]:
    """The modules of a head whose parameters the checkpoint of the base contains: they stay frozen."""
    if not is_encoder(model.config):
        return set()
    prefix = body_prefix(model)
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    new = new_parameters(model)
    complete: dict[str, bool] = {}
    for name, shape in shapes.items():
        module = _module(name, prefix)
        is_known = own.get(name) == shape and name not in new
        complete[module] = complete.get(module, True) and is_known
    last = _module(list(shapes)[-1], prefix)
    return {module for module, is_complete in complete.items() if is_complete and module != last}


def _module(parameter: str, prefix: str) -> str:
    """The module of a head that a parameter belongs to: a child of the model, or the pooler of its body."""
    if parameter.startswith(prefix):
        return f"{prefix}{POOLER}"
    return parameter.partition(".")[0]
