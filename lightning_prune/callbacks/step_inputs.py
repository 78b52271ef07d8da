"""Whether the validation step feeds the model what its batch holds, as the scoring does.

Enters: the fit's first validation batch, and what the step calls the model with. Leaves: a warning
where the two differ.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prune.passes.batches import call_inputs


class StepInputs:
    """Watch one validation step of a fit.

    A step that normalises its input before it calls the model leaves no trace on the batch: scores,
    prices and refits would be those of other inputs than the model ever sees.
    """

    def __init__(self) -> None:
        self.done = True
        self._fed: list[Tensor] = []
        self._handle: RemovableHandle | None = None

    def watch(self, module: LightningModule) -> None:
        """Note what the model is called with, from here to :meth:`compare`."""
        if not self.done and self._handle is None:
            self._handle = module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: Any, kwargs: Any) -> None:
        self._fed += [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]

    def compare(self, module: LightningModule, batch: Any) -> None:
        """Warn if no call of the step that has just run had the batch's input, or a part of it."""
        if self._handle is None:
            return
        fed = self._fed
        self.let_go()
        self.done = True
        try:
            inputs = call_inputs(module, batch)
            # A step that calls a submodule shows nothing, and keywords are their own names.
            if not fed or not isinstance(inputs, Tensor) or any(_same(x, inputs) for x in fed):
                return
        except Exception:  # noqa: BLE001 (what cannot be compared is no reason to end a fit)
            return
        rank_zero_warn(
            "SaliencyPruningCallback: validation_step calls the model with another tensor "
            f"{tuple(fed[0].shape)} than the batch's input {tuple(inputs.shape)}, but scores are "
            "taken on the batch's. If the step prepares its input (normalises, reshapes), do that "
            "in `forward`, the loader or `on_after_batch_transfer`, or repeat it in "
            "`forward=lambda module, batch: logits`."
        )

    def let_go(self) -> None:
        """Take the hook off the model."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._fed = None, []


def _same(fed: Tensor, inputs: Tensor) -> bool:
    """Whether one is the other, or some of its samples."""
    if fed is inputs or (fed.shape[1:] == inputs.shape[1:] and len(fed) < len(inputs)):
        return True
    if fed.shape != inputs.shape:
        return False
    return bool(((fed == inputs.to(fed.dtype)) | (fed.isnan() & inputs.isnan())).all())
