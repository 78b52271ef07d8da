"""The two refits under one name each, and which of them ``"auto"``, or ``refit=True``, means.

Enters: a masked model and its calibration. Leaves: the same model with corrected survivors.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from lightning_prune._types import Masks
from lightning_prune.passes.batches import batch_size
from lightning_prune.refit.calibration import Calibration
from lightning_prune.refit.gauss_newton import refit_outputs
from lightning_prune.refit.layerwise import refit_layers
from lightning_prune.refit.report import RefitReport

Refit: TypeAlias = Literal["auto", "layers", "outputs"]

ENOUGH = 2000
"""Real samples from which on ``"auto"`` fits the outputs. With fewer the survivors learn what the
network says about these samples by heart, and its pre-activations say more about each. Pruned to
95 % in 8 stages a 784-40-20-10 had, by ``"layers"`` and by ``"outputs"``, 85.6 and 75.8 % right by
50 digits, 91.1 and 84.5 by 200, 92.4 and 92.0 by 1,000; by 3,240, in 26 stages to 98 %, 86.9 and
91.3 (docs/refit.md, docs/quality.md)."""


def refit_method(refit: Any) -> Refit | None:
    """Return which refit a user asked for, ``None`` for none.

    Raises:
        ValueError: It is neither True, False nor a name.

    Example:
        >>> refit_method(True), refit_method("layers"), refit_method(False)
        ('auto', 'layers', None)
    """
    if refit is False:
        return None
    if refit is True:
        return "auto"
    if refit in get_args(Refit):
        return refit  # type: ignore[no-any-return]
    names = ", ".join(map(repr, get_args(Refit)))
    raise ValueError(
        f"Expected argument `refit` to be True, False, or one of {names}, got {refit!r}."
    )


def refit_survivors(
    model: nn.Module, masks: Masks, calibration: Calibration, method: Refit
) -> RefitReport:
    """Correct the surviving weights of a masked model, in place.

    Args:
        model: Its removed weights are zero.
        masks: ``True`` = kept, by parameter name.
        calibration: Data, and the dense network to stay close to.
        method: ``"layers"``: each layer's pre-activations, by closed form, one layer after the
            other. ``"outputs"``: the network's predictions, by Gauss-Newton steps through all
            layers. ``"auto"``: the outputs where there are :data:`ENOUGH` real samples, else the
            layers.
    """
    if method == "auto":
        samples = sum(map(batch_size, [*calibration.batches, *calibration.held_out]))
        method = "outputs" if samples >= ENOUGH else "layers"
    if method == "layers":
        return refit_layers(model, masks, calibration)
    return refit_outputs(model, masks, calibration)
