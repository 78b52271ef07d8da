"""Surviving weights corrected so that the network's predictions return to the dense network's.

Enters: a masked model and its calibration. Leaves: the same model with other values for its
survivors, or as it was, and a report. Where the layerwise refit brings back each layer's
pre-activations, this one moves all layers together, and spends the weights that are left on what
the output needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_prune._masks import mask_faults
from lightning_prune._targets import count_faults, raise_faults
from lightning_prune._types import Masks
from lightning_prune.refit.borrowing import borrowed
from lightning_prune.refit.calibration import Calibration
from lightning_prune.refit.conjugate_gradient import conjugate_gradient
from lightning_prune.refit.linearisation import NotDifferentiableError, Objective
from lightning_prune.refit.merging import AT_MOST, first_samples
from lightning_prune.refit.report import RefitReport
from lightning_prune.refit.survivors import Survivors

DAMPING = 0.1
"""Damping of the first step, as a multiple of the Gauss-Newton matrix's mean diagonal."""
TRUST, DISTRUST = 0.75, 0.25
"""Gain ratios above and below which the damping is lowered and raised (Marquardt 1963)."""
LOWER, RAISE = 1 / 3, 4.0
"""Factors on the damping then."""
GRAPH_BYTES = 2**28
"""What autograd may keep of one batch that was put together from small ones."""
HALVINGS = 4
"""How often a step that gained less than :data:`DISTRUST` of what was predicted is halved."""
PATIENCE = 2
"""Steps in a row without a better divergence on the samples checked on, after which to stop."""


def refit_outputs(
    model: nn.Module,
    masks: Masks,
    calibration: Calibration,
    *,
    steps: int = 5,
    products: int = 20,
    temperature: float = 2.0,
    samples: int = 4096,
) -> RefitReport:
    """Fit the surviving weights of a masked model to the dense network's output, in place.

    Lowers ``sum over samples of KL(p_dense || p_pruned)``, both softened by ``temperature``, over
    the survivors w of the masked parameters and the biases of the modules that own them, by
    Levenberg-Marquardt steps ``(G + damping) d = -gradient``, with G the Gauss-Newton matrix
    (Martens 2010, "Deep learning via Hessian-free optimization"). G is never built: each step is
    solved by a conjugate gradient truncated after ``products`` products with G, each of them two
    backward passes. A step is taken if it lowers the divergence, and the damping follows the ratio
    of the gain to the predicted gain (Marquardt 1963, "An algorithm for least-squares estimation
    of nonlinear parameters"). The values kept are the best on ``calibration.checked_on``.

    The model is run in eval mode without autocast; its mode, gradients, hooks, ``requires_grad``
    and the random state are left alone, and its weights are written once, at the end. Frozen
    parameters are corrected like others.

    Args:
        model: The model, with its removed weights zero; they stay so.
        masks: ``True`` = kept, by ``named_parameters()`` name.
        calibration: The dense weights, the samples and how the output is read.
        steps: Most steps tried, >= 1.
        products: Products with G a step, >= 1.
        temperature: Softens both outputs while fitting, > 0: unlikely classes then count for more,
            and there is more to fit to in a sample. No meaning for the Gaussian likelihood.
        samples: Most samples of ``calibration.batches`` to fit to, >= 1; the generated ones beside
            them are all used.

    Returns:
        What was done; its errors are the divergences at temperature 1. If that at ``temperature``
        came out no lower, that at 1 higher, or the model can't be differentiated twice, all
        survivors keep their values and ``left`` says why.

    Raises:
        ValueError: Arguments out of range, masks that don't fit the model, or no samples.

    Cost: a step takes about ``2 products + 3`` backward passes over the samples. Autograd keeps up
    to 1 GiB for them, and computes again what doesn't fit. Gathered vectors are in float64, and up
    to 256 MiB of them are remembered.

    Example:
        >>> from lightning_prune.passes.teacher import Teacher
        >>> model = nn.Linear(2, 1)
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
        >>> calibration = Calibration(Teacher.of(model), [x], [], likelihood="gaussian")
        >>> report = refit_outputs(model, {"weight": torch.tensor([[True, False]])}, calibration)
        >>> report.refitted, report.error_after < 1e-4 * report.error_before
        (['weight'], True)
    """
    _check(model, masks, calibration, steps, products, temperature, samples)
    survivors = Survivors(model, masks)
    start = survivors.read()
    with borrowed(model, derivatives=2):
        check = Objective(model, calibration, survivors, calibration.checked_on, temperature)
        before = check.value(start, 1.0)
        best, fault = start, "none of the weights that the masks are about survives"
        if len(start):
            try:
                fit = _fitting_objective(model, calibration, survivors, temperature, samples)
                best, fault = _search(fit, check, start, steps, products), ""
            except NotDifferentiableError as error:
                fault = f"the model cannot be differentiated twice: {error}"
        after = check.value(best, 1.0)
    if not fault and best is start:
        fault = "no step lowered the divergence on the samples checked on"
    elif not fault and not after <= before:
        fault = f"the divergence at temperature 1 would rise from {before:.3g} to {after:.3g}"
    if fault:
        return RefitReport([], dict.fromkeys(masks, fault), before, before)
    survivors.write(best)
    fitted = [name for name in masks if name in survivors.names]
    left = {name: "no weight survives" for name in masks if name not in fitted}
    return RefitReport(fitted, left, before, after)


def _search(fit: Objective, check: Objective, start: Tensor, steps: int, products: int) -> Tensor:
    """Return the best values found, by ``check``; ``start`` itself if no step was better."""
    vector, value = start, fit.value(start)
    best, lowest, idle = start, check.value(start), 0
    gradient = fit.linearise(start)
    damping = DAMPING * _mean_diagonal(fit, start)
    for _ in range(steps):
        if idle == PATIENCE or not math.isfinite(damping) or not float(gradient @ gradient) > 0:
            break
        step, expected = _damped_step(fit, gradient, damping, products)
        new = fit.value(vector + step)
        gain = (value - new) / -expected if expected < 0 else -math.inf
        if not gain > DISTRUST:
            step, new = _shortened(fit, vector, step, new)
        if new < value:
            vector, value = vector + step, new
            checked = check.value(vector)
            idle = 0 if checked < lowest else idle + 1
            if checked < lowest:
                best, lowest = vector, checked
            gradient = fit.linearise(vector)
        if gain > TRUST:
            damping *= LOWER
        elif not gain > DISTRUST:  # also where it is not a number
            damping *= RAISE
    return best


def _shortened(fit: Objective, vector: Tensor, step: Tensor, new: float) -> tuple[Tensor, float]:
    """Halve a step for as long as the objective falls; return it and the objective there.

    A step too long costs as much as a good one, and the direction is often right where the length
    is not: after a one-shot removal, halving took the divergence to a third of what it was without.
    """
    for _ in range(HALVINGS):
        shorter = fit.value(vector + step / 2)
        if math.isfinite(new) and not shorter < new:
            break
        step, new = step / 2, shorter
    return step, new


def _damped_step(
    fit: Objective, gradient: Tensor, damping: float, products: int
) -> tuple[Tensor, float]:
    """Return a step and by how much the undamped quadratic model says the objective changes."""
    step, reached = conjugate_gradient(
        lambda vector: fit.product(vector) + damping * vector, -gradient, products
    )
    return step, reached - 0.5 * damping * float(step @ step)


def _mean_diagonal(fit: Objective, like: Tensor) -> float:
    """Estimate the mean of G's diagonal by one vector of random signs (Hutchinson 1990)."""
    bits = torch.randint(0, 2, like.shape, generator=torch.Generator().manual_seed(0))
    signs = (2 * bits - 1).to(like)
    return float(signs @ fit.product(signs)) / len(signs)


def _fitting_objective(
    model: nn.Module,
    calibration: Calibration,
    survivors: Survivors,
    temperature: float,
    samples: int,
) -> Objective:
    """Return the objective over the samples to fit to, in batches whose graphs fit into memory."""
    # Of real samples those beyond are left out to save time; how many are generated was a choice.
    batches = [*first_samples(calibration.batches, samples), *calibration.generated]
    probe = Objective(model, calibration, survivors, batches[:1], temperature)
    probe.linearise(survivors.read())
    probe.check()
    at_most = GRAPH_BYTES * probe.samples // max(1, probe.graph_bytes)
    del probe
    return Objective(
        model, calibration, survivors, batches, temperature, max(1, min(AT_MOST, at_most))
    )


def _check(
    model: nn.Module,
    masks: Masks,
    calibration: Calibration,
    steps: int,
    products: int,
    temperature: float,
    samples: int,
) -> None:
    faults = mask_faults(masks, dict(model.named_parameters()))
    faults += count_faults(steps=steps, products=products, samples=samples)
    if not 0 < temperature < math.inf:
        faults.append(f"temperature: expected a number > 0, but got {temperature!r}")
    faults += calibration.faults(model)
    raise_faults(faults, "The refit's arguments")
