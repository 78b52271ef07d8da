"""Correct the surviving weights of each layer so that it gives again what the dense layer gave.

Enters: a pruned model, its masks and calibration samples. Leaves: the same model with other values
in its surviving weights and the biases beside them. In closed form, layer by layer, each fitted on
what the already corrected layers before it feed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune._masks import mask_faults
from lightning_prune._targets import raise_faults
from lightning_prune._types import Masks
from lightning_prune.passes.batches import outside_inference_mode
from lightning_prune.refit.borrowing import borrowed
from lightning_prune.refit.calibration import Calibration
from lightning_prune.refit.columns import as_rows
from lightning_prune.refit.gram import Moments
from lightning_prune.refit.layers import Layer, calls_of, find_layers
from lightning_prune.refit.least_squares import check_ridge, ridge_for, ridged, solve_rows
from lightning_prune.refit.report import RefitReport

ROUND_OFF = 1e-12
"""An improvement below this share of the targets' squares is none."""

NOTHING = "there is nothing to correct"


def refit_layers(
    model: nn.Module, masks: Masks, calibration: Calibration, *, ridge: float | None = None
) -> RefitReport:
    """Refit surviving weights to the dense network's pre-activations, in place; say what was done.

    For each linear layer and convolution with a mask, in the order in which they run, each output
    row's survivors S and its bias minimise

        sum over samples and positions of (a_S . w_S + b - z)^2 + lambda |(w_S, b) - (w_S, b)_now|^2

    with a the columns that the pruned network feeds the layer, the layers before it already
    refitted, z what the dense network's layer gave for the same samples, and lambda ``ridge`` times
    the mean of the diagonal of the Gram matrix. Removed weights stay exactly 0. A layer whose
    squared error on ``calibration.checked_on`` does not become smaller is put back.

    Args:
        model: The pruned network; its mode, gradients, hooks and random numbers are left as they
            were. Frozen weights are corrected too.
        masks: Full name -> bool tensor shaped like the parameter, True = kept; already applied.
        calibration: The dense weights and the samples. Labels are not used.
        ridge: Pull towards the present values, relative to the inputs' mean square; > 0. ``None``
            is 1e-3, and more where a layer has seen fewer than 3,000 inputs: 3 by their number.

    Returns:
        The refitted parameters, and why the others were left: shared by several modules, used
        outside of their layer, of another kind of layer, not improved.

    Raises:
        ValueError: ``ridge`` is no positive number, a mask does not fit the model, or there are no
            samples. Whatever is raised, the weights are as they were before.

    Cost: two forward passes a layer, up to that layer, over all samples; K^2 of memory for rows of
    length K and K^3 of work for each different set of survivors.

    Source: the linear case of Dong, Chen and Pan, 2017, "Learning to prune deep neural networks via
    layer-wise optimal brain surgeon"; refitting one layer after another on the pruned network's own
    inputs: He, Zhang and Sun, 2017, "Channel pruning for accelerating very deep neural networks".

    Example:
        >>> from lightning_prune.passes.teacher import Teacher
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 1.0]]))
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
        >>> calibration = Calibration(Teacher.of(model), [x], [])
        >>> masks = {"weight": torch.tensor([[True, False]])}
        >>> _ = model.weight.data.mul_(masks["weight"])
        >>> refit_layers(model, masks, calibration, ridge=1e-9).refitted
        ['weight']
        >>> model.weight.data
        tensor([[2., 0.]])
    """
    check_ridge(ridge)
    faults = mask_faults(masks, dict(model.named_parameters())) + calibration.faults(model)
    raise_faults(faults, "The refit's arguments")
    report = RefitReport()
    with borrowed(model), _all_or_nothing(model, masks):
        fit = [outside_inference_mode(batch) for batch in calibration.fitted_to]
        checks = [outside_inference_mode(batch) for batch in calibration.held_out]
        runs = (partial(calibration.forward, model, batch) for batch in fit)
        layers, left = find_layers(model, list(masks), runs)
        report.left.update(left)
        for layer in layers:
            try:
                found = _moments(model, layer, calibration, fit)
                checked = _moments(model, layer, calibration, checks) if checks else found
                reason = _refit(layer, _kept(layer, masks), found, checked, ridge)
            except _OtherInputsError as error:
                reason = str(error)
            for name in (layer.name, layer.bias_name):
                if name in masks and reason is None:
                    report.refitted.append(name)
                    report.left.pop(name, None)
                elif name in masks and reason != NOTHING:
                    report.left[name] = reason or ""
    return report


def _moments(
    model: nn.Module, layer: Layer, calibration: Calibration, batches: list[Any]
) -> Moments:
    """Sum the pruned network's columns, and what the dense one made of its own, over samples."""
    moments = Moments.empty(layer, bias=layer.bias is not None)
    for index, batch in enumerate(batches):
        dense = partial(calibration.dense.logits, model, batch, calibration.forward)
        pruned = partial(calibration.forward, model, batch)
        sought, given = calls_of(layer, dense, index), calls_of(layer, pruned, index)
        if [a.shape for a, _ in sought] != [a.shape for a, _ in given]:
            raise _OtherInputsError("its layer's inputs are of other shapes than the dense one's")
        for (_, z), (a, _) in zip(sought, given, strict=True):
            moments.add(layer.module, a, z)
    return moments


class _OtherInputsError(Exception):
    """What reaches a layer hangs on values (experts, early exits): nothing is comparable."""


def _kept(layer: Layer, masks: Masks) -> Tensor:
    """Return which entries of the rows (weights, and the bias if there is one) survive."""
    keep = as_rows(layer.module, masks[layer.name].to(layer.weight.device))
    if layer.bias is None:
        return keep
    bias = masks.get(layer.bias_name, torch.ones_like(layer.bias, dtype=torch.bool))
    return torch.cat([keep, as_rows(layer.module, bias.to(keep.device))], 2)


def _rows(layer: Layer) -> Tensor:
    """Return the rows as they are now, (G, D_out / G, K), the bias last."""
    rows = as_rows(layer.module, layer.weight.detach())
    if layer.bias is None:
        return rows
    return torch.cat([rows, as_rows(layer.module, layer.bias.detach())], 2)


def _refit(
    layer: Layer, keep: Tensor, found: Moments, checked: Moments, ridge: float | None
) -> str | None:
    """Solve one layer; write the solution and return ``None``, or return why not."""
    if not bool(keep.any()):
        return "nothing of its layer is left"
    gram = found.gram
    if not bool(torch.isfinite(gram).all() & torch.isfinite(found.cross).all()):
        return "its layer's inputs or the dense layer's outputs are not finite"
    now, keep = _rows(layer), keep.to(gram.device)
    before = now.to(gram)
    if all(_is_exact(moments, before, now.dtype) for moments in (found, checked)):
        return NOTHING
    ridge = ridge_for(found.positions) if ridge is None else ridge
    try:
        solved = torch.stack(
            [
                _solve(gram[g], found.cross[g], keep[g], before[g], ridge)
                for g in range(gram.shape[0])
            ]
        )
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return "its normal equations have no stable solution; a larger `ridge` gives them one"
    rows = solved.to(now)  # rounded as it will be stored: that is what has to be better
    if not bool(torch.isfinite(rows).all()):
        return "its solution is not finite"
    error, old = checked.error(rows.to(gram)), checked.error(before)
    if not error < old - ROUND_OFF * checked.squares:
        return (
            f"no better on the samples checked on: squared error {_mean(error, checked)} after "
            f"and {_mean(old, checked)} before, a position"
        )
    _write(layer, rows)
    return None


def _is_exact(moments: Moments, rows: Tensor, precision: torch.dtype) -> bool:
    """Whether rows give the targets but for what these lose in the precision they came in."""
    lost = max(ROUND_OFF, torch.finfo(precision).eps ** 2)
    return moments.error(rows) <= lost * moments.squares


def _solve(gram: Tensor, cross: Tensor, keep: Tensor, now: Tensor, ridge: float) -> Tensor:
    """Return the rows (D, K) of one group that least squares gives."""
    if float(gram.diagonal().sum()) == 0:
        return now * keep  # no input at all: nothing to tell one solution from another
    ridged_gram, pull = ridged(gram, ridge)
    return solve_rows(ridged_gram, cross.mT + pull * now, keep)


def _mean(error: float, moments: Moments) -> str:
    return f"{max(0.0, error) / max(1, moments.positions):.3g}"


def _write(layer: Layer, rows: Tensor) -> None:
    size = rows.shape[2] - (layer.bias is not None)
    layer.weight.copy_(rows[..., :size].reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(rows[..., size].reshape(layer.bias.shape))


@contextmanager
def _all_or_nothing(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Put all weights that may change back if the block is left by an exception."""
    named = dict(model.named_parameters())
    names = {*masks, *(f"{name.removesuffix('weight')}bias" for name in masks)} & named.keys()
    kept = {name: named[name].detach().clone() for name in sorted(names)}
    try:
        yield
    except BaseException:
        for name, value in kept.items():
            named[name].data.copy_(value)
        raise
