"""Whether the validation step feeds the model what its batch holds, as the scoring does.

Enters: the fit's first validation batch, and what the step calls the model with. Leaves: a warning
where the two differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prune.passes.batches import LABEL_KEYS, call_inputs
from lightning_prune.passes.isolation import ours


class StepInputs:
    """Watch one validation step of a fit.

    A step that normalises its input before it calls the model, or passes a mask beside it, leaves
    no trace on the batch: scores, prices and refits would be those of other inputs than the model
    ever sees.
    """

    def __init__(self) -> None:
        self.done = True
        self._calls: list[tuple[Any, Any]] = []
        self._handle: RemovableHandle | None = None

    def watch(self, module: LightningModule) -> None:
        """Note what the model is called with, from here to :meth:`compare`."""
        if not self.done and self._handle is None:
            self._handle = module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: Any, kwargs: Any) -> None:
        if not ours():  # another callback may run the model between the step and the comparison
            self._calls.append((args, kwargs))

    def compare(self, module: LightningModule, batch: Any) -> None:
        """Warn if no call of the step that has just run had the tensors that the scoring passes.

        Some of a batch's samples are its tensors, too. A call may leave out tensors of a dict.
        """
        if self._handle is None:
            return
        seen = self._calls
        self.let_go()
        self.done = True
        try:
            calls = [named for call in seen if (named := _named_tensors(module, *call))]
            inputs = call_inputs(module, batch)
            own = inputs if isinstance(inputs, Mapping) else {"": inputs}
            given = {name: value for name, value in own.items() if isinstance(value, Tensor)}
            further = [_without(call, given.values()) for call in calls]
        except Exception:  # noqa: BLE001 (what cannot be compared is no reason to end a fit)
            return
        # A step that calls a submodule shows nothing.
        if not calls or not given or not all(further):
            return
        known = [left for left, call in zip(further, calls, strict=True) if len(left) < len(call)]
        rank_zero_warn(_further(known[0]) if known else _another(calls[0], given))

    def let_go(self) -> None:
        """Take the hook off the model."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._calls = None, []


def _another(call: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    fed, inputs = next(iter(call.values())), next(iter(given.values()))
    return (
        "SaliencyPruningCallback: validation_step calls the model with another tensor "
        f"{tuple(fed.shape)} than the batch's input {tuple(inputs.shape)}, but scores are "
        "taken on the batch's. If the step prepares its input (normalises, reshapes), do that "
        "in `forward`, the loader or `on_after_batch_transfer`, or repeat it in "
        "`forward=lambda module, batch: logits`."
    )


def _further(left: Mapping[str, Tensor]) -> str:
    names = ", ".join(f"`{name}` {tuple(value.shape)}" for name, value in left.items())
    return (
        f"SaliencyPruningCallback: validation_step calls the model with {names} beside the batch's "
        "input, but scores are taken without that. If it counts for the logits (a mask does), "
        "repeat the step's call in `forward=lambda module, batch: logits`."
    )


def _named_tensors(module: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Return the tensors of a call by the names that ``forward`` gives them, without labels."""
    names = list(inspect.signature(module.forward).parameters)
    names += [f"argument {i + 1}" for i in range(len(names), len(args))]  # of `*args`
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if name not in LABEL_KEYS} or tensors


def _without(call: Mapping[str, Tensor], given: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return what of a call is none of the given tensors."""
    return {n: fed for n, fed in call.items() if not any(_same(fed, each) for each in given)}


def _same(fed: Tensor, inputs: Tensor) -> bool:
    """Whether one is the other in whatever precision, or some of its samples.

    Exact, as the tensors themselves are at hand. `InputCheck` has one sample of each call, of
    layers inside the model, whose inputs two passes may compute with other roundings.
    """
    if fed is inputs:
        return True
    if (fed.dtype == torch.bool) != (inputs.dtype == torch.bool):  # a mask of what is not 0
        return False
    if fed.ndim and fed.shape[1:] == inputs.shape[1:] and len(fed) < len(inputs):
        return True
    if fed.shape != inputs.shape:
        return False
    return bool(((fed == inputs.to(fed.dtype)) | (fed.isnan() & inputs.isnan())).all())
