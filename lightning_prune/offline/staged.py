"""Prune a trained model in stages, without a Trainer and without retraining.

Enters: a model and batches. Leaves: the same model with zeros in the place of removed weights, and
the masks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune._masks import mask_faults
from lightning_prune._targets import count_faults, is_number, raise_faults
from lightning_prune._types import Forward, Likelihood, Masks
from lightning_prune.masking import count_removed, find_prunable, layers_left_out
from lightning_prune.offline.descent import Descent, Scoring
from lightning_prune.offline.generated import Sampler, chosen_batches, generated_batches
from lightning_prune.offline.reading import read_batches, several_batches
from lightning_prune.passes.batches import default_forward, few_samples, read_labels
from lightning_prune.passes.isolation import evaluating, random_state_kept, unlogged
from lightning_prune.passes.outputs import doubt_of_classes, without_ignored
from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit import Refit, refit_method
from lightning_prune.saliency import RandomSigns, Target
from lightning_prune.saliency.signs import check_signs
from lightning_prune.selection import Criterion, CriterionLike, Selection, resolve_criterion


def prune(  # noqa: PLR0913  (options of users, given by name)
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sparsity: float,
    stages: int = 1,
    criterion: CriterionLike = "taylor",
    refit: bool | Refit = False,
    generator: Sampler | None = None,
    generated: int | Literal["auto"] | None = None,
    target: Target = "probability",
    likelihood: Likelihood = "categorical",
    tolerance: float = 1e-3,
    signs: RandomSigns | None = None,
    forward: Forward | None = None,
    parameters: list[str] | None = None,
    exclude: list[str] | None = None,
    selection: Selection | None = None,
    masks: Masks | None = None,
    seed: int = 0,
) -> Masks:
    """Remove weights of a trained model, in place, without training it.

    Every stage scores the network as it is then, removes the same share of the weights still there,
    and, with ``refit``, corrects the ones that stay so that the network stays close to what it was
    before the first stage. The batches are kept in memory; labels are used by targets that need
    them, and by nothing else. What is used of the model is its eval mode; modes, gradients and the
    random state are as before, and what the ``forward`` of a LightningModule logs is dropped.

    Args:
        model: A trained network. Its weights are changed only if all goes well.
        batches: The calibration data: ``x``, ``(x, y)`` or dicts; axis 0 of tensors counts samples.
        sparsity: The share of all prunable weights removed at the end, in [0, 1).
        stages: In how many steps; more are better and take longer. 10 to 30 for high sparsities.
        criterion: By what weights are ranked: ``"taylor"`` (w^2 R), ``"obs"``, ``"obc"`` (second
            order; go with ``refit``), ``"saliency"`` (R), ``"magnitude"``, ``"random"`` or a
            callable (scores, parameters) -> scores.
        refit: ``"outputs"`` fits the network's predictions by Gauss-Newton steps, ``"layers"`` each
            layer's pre-activations by a closed form, which is faster; ``"auto"`` (also ``True``)
            takes the outputs where there are 2,000 real samples, else the layers. A tenth of
            the samples is held out, and a correction that makes these worse is refused.
        generator: A VAE, or anything with ``sample(n)``: its inputs join scoring and refit. They
            have to look like the inputs in ``batches``, and to be others at each call: it is called
            for one batch after the other.
        generated: How many; by default as many as there are real samples, but at least 1,000.
            ``"auto"`` tries 0, 250, 1,000 and 2,000 in ways down that are taken back, and
            takes the number that keeps real samples left out of these closest to the dense model;
            none, unless that is clearly better. Takes five times as long from 100 real samples on,
            nine times with fewer.
        target: Which R, as in :func:`~lightning_prune.squared_gradients`.
        likelihood: What the model's output means, as there.
        tolerance: The share of the score's output energy that may be left out to save time.
        signs: Estimate R by random signs: pixels or tokens each predict, exact R takes too long.
        forward: ``forward(module, batch) -> logits`` for batches that the default cannot read.
        parameters: Names or patterns of the parameters to prune; by default all weights of layers.
        exclude: Names or patterns of parameters to leave out of these.
        selection: Pieces, scope and what is spared, as for the callback.
        masks: Those of an earlier call: what they removed stays removed, and counts.
        seed: For ``criterion="random"``, the generator, and the order of a loader that shuffles.

    Returns:
        Parameter name -> bool tensor, ``True`` = kept.

    Raises:
        TypeError: ``batches`` is one tensor or mapping, not an iterable of batches.
        ValueError: Arguments that cannot be used; no batches; a layer that ``criterion="obs"``
            (or ``"obc"``) has no price for.
        NonFiniteScoresError: A score is not finite.

    Warns about parameters that no stage's refit could correct, and says why; and about rows of
    look-up tables that go with R = 0, as no sample reads them.

    Cost: a stage takes the time of one scoring pass (about one forward and backward pass over the
    batches), and of the refit where there is one.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> masks = prune(model, [torch.randn(64, 8)], sparsity=0.5, stages=2)
        >>> int(sum((~mask).sum() for mask in masks.values()))
        88
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile: its names are another model's
    check_signs(signs)
    ranking = resolve_criterion(criterion, seed=seed)
    selection = Selection() if selection is None else selection
    prunable = find_prunable(model, parameters, exclude=exclude)
    chosen: dict[str, Tensor] = dict(prunable.parameters)
    path = _path(sparsity, stages, chosen, masks or {})
    _check(selection, ranking, generator, generated, likelihood, chosen, path)
    method = refit_method(refit)
    forward = without_ignored(default_forward if forward is None else forward, likelihood)
    real = read_batches(batches, seed)
    scoring = Scoring(model, chosen, ranking, target, likelihood, tolerance, signs, forward)
    descent = Descent(scoring, selection, method)
    doubts = [layers_left_out(prunable.left_out)]
    if ranking.needs_scores or ranking.needs_prices or method:
        doubts.append(_doubt_of_labels(scoring, real[0]))
    for doubt in filter(None, doubts):
        warnings.warn(doubt, stacklevel=2)
    with unlogged(model), several_batches(real):
        extra: list[Any] = []
        if generator is not None:
            draw = partial(
                generated_batches,
                model,
                real,
                generator,
                forward=forward,
                likelihood=likelihood,
                seed=seed,
            )
            if generated == "auto":
                extra = chosen_batches(descent.trial(path, masks), real, draw)
            else:
                extra = draw(generated)
        masks = _descended(descent, path, masks, real, extra)
    with torch.inference_mode(False):  # masks are for later use, whatever the mode is here
        return {name: mask.clone() for name, mask in masks.items()}


def _doubt_of_labels(scoring: Scoring, batch: Any) -> str | None:
    """Return what the labels of two samples say against how the output is read, if they do."""
    labels = read_labels(batch)
    if labels is None or labels.ndim < 2 or scoring.likelihood != "categorical":
        return None
    model, samples = scoring.model, few_samples(batch)
    device = next(iter(scoring.parameters.values())).device
    with unlogged(model), evaluating(model), random_state_kept(device), torch.no_grad():
        return doubt_of_classes(scoring.forward(model, samples), read_labels(samples))


def _descended(
    descent: Descent, path: list[float], masks: Masks | None, real: list[Any], extra: list[Any]
) -> Masks:
    """Go down, and say what did not go as asked for; or leave the model as it was."""
    model = descent.scoring.model
    dense = Teacher.of(model)
    try:
        pruned = descent(dense, path, masks, real, extra)
        if pruned.guarded:
            warnings.warn(
                f"{', '.join(pruned.guarded)} would have lost too much; the guard against collapse "
                "left them more than the ranking asks for.",
                stacklevel=3,
            )
        if notes := [f"{name}: {why}" for name, why in pruned.left.items()]:
            warnings.warn(
                f"The refit left some parameters as they were. {'; '.join(notes)}", stacklevel=3
            )
        for unread in pruned.unread:
            warnings.warn(unread, stacklevel=3)
    except BaseException:  # a warning may be one, too
        dense.restore(model)
        raise
    return pruned.masks


def _path(
    sparsity: Any, stages: Any, parameters: Mapping[str, Tensor], masks: Masks
) -> list[float]:
    """Return the share removed after each stage: each removes the same share of what is left.

    Raises:
        ValueError: There is no such path; the message lists every fault.
    """
    faults = count_faults(stages=stages)
    if not is_number(sparsity) or not 0 <= sparsity < 1:
        faults.append(f"sparsity: expected a share in [0, 1), but got {sparsity!r}")
    faults += mask_faults(masks, parameters)
    raise_faults(faults, "The arguments")
    removed, _ = count_removed(masks)
    total = sum(parameter.numel() for parameter in parameters.values())
    before = removed / total
    if round(sparsity * total) < removed:
        raise ValueError(
            f"Expected `sparsity` of at least {before:.4f}, what `masks` remove already, but got "
            f"{sparsity}."
        )
    # Masks of the same share may be above it by the rounding to whole weights.
    goal = max(float(sparsity), before)
    left = (1 - goal) / (1 - before) if before < 1 else 1.0
    path = [1 - (1 - before) * left ** (k / stages) for k in range(1, stages)]
    return [*path, goal]


def _check(
    selection: Selection,
    ranking: Criterion,
    generator: Any,
    generated: Any,
    likelihood: Any,
    parameters: Mapping[str, Tensor],
    path: list[float],
) -> None:
    faults = selection.faults(parameters, path)
    if likelihood not in get_args(Likelihood):
        faults.append(f"likelihood: expected one of {get_args(Likelihood)}, but got {likelihood!r}")
    if generator is not None and not callable(getattr(generator, "sample", None)):
        faults.append(
            "generator: expected something with a method sample(n), but got "
            f"{type(generator).__name__}"
        )
    if selection.regrow > 0 and not ranking.needs_scores:
        faults.append(
            f"regrow={selection.regrow} compares weights by R, which criterion={ranking.name!r} "
            "has no use for. Choose 'taylor' or 'saliency'"
        )
    if generated is not None and generator is None:
        faults.append(
            f"generated={generated!r} says how many inputs of a generator join, but there is none: "
            "give `generator` as well"
        )
    if generated not in (None, "auto"):
        faults += count_faults(generated=generated)
    raise_faults(faults, "The arguments")
