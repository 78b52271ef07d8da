"""What removing a weight costs once the other weights of its row have made up for it.

Enters: a model, masks, batches. Leaves: a price for each weight of linear layers and convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_prune._masks import mask_faults
from lightning_prune._targets import raise_faults
from lightning_prune._types import Forward, Likelihood, Masks, Scores
from lightning_prune.exceptions import NonFiniteScoresError
from lightning_prune.passes.batches import batch_size, default_forward, outside_inference_mode
from lightning_prune.passes.isolation import own_randomness
from lightning_prune.refit.borrowing import borrowed, device_of
from lightning_prune.refit.columns import Linear, as_rows, groups
from lightning_prune.refit.elimination import elimination_costs
from lightning_prune.refit.gram import Moments
from lightning_prune.refit.layers import UNCALLED, Layer, find_layers, watching
from lightning_prune.refit.least_squares import check_ridge, inverse_diagonals, ridge_for
from lightning_prune.refit.output_saliency import output_saliency

GRAM_BYTES = 256 * 2**20
"""Layers whose Gram matrices fit in here share a forward pass."""


def obs_prices(
    model: nn.Module,
    masks: Masks,
    names: Iterable[str],
    batches: list[Any],
    *,
    forward: Forward = default_forward,
    likelihood: Likelihood = "categorical",
    temperature: float | None = None,
    ridge: float | None = None,
    one_by_one: bool = False,
) -> Scores:
    """Return the second-order price of each weight.

    For weight i of output row r with survivors S,

        price_i = w_i^2 / [(H_S + lambda 1)^-1]_ii * s_r / N

    with H the sum over samples and positions of a a^T, a the columns that the network as it is now
    feeds the layer, lambda ``ridge`` times the mean of H's diagonal, s_r the output saliency

        s_r = sum over samples and classes of (dP_y / dz_r)^2

    of P = softmax(logits / temperature), and N the number of samples: to second order, and with
    inputs and output gradients taken as independent, the sum over samples of the squared change of
    the probabilities. So prices compare across rows and layers. For convolutions s_r is summed over
    positions and divided by their number, which takes positions as independent too (the Kronecker
    factors of Grosse and Martens).

    Args:
        model: The network as it is now; its mode, gradients, hooks and random numbers are left as
            they were.
        masks: Full name -> bool tensor, True = kept, for what was pruned already; may be empty.
        names: Full names of the weights to price.
        batches: Samples, in the form that ``forward`` reads. Labels are not used.
        forward: ``forward(model, batch) -> logits``.
        likelihood: How the logits are read: ``"categorical"`` (softmax over axis 1; of more than 64
            classes the 64 likeliest), ``"bernoulli"``, ``"gaussian"``.
        temperature: Softens the probabilities, > 0. At 1 a confident network's probabilities hardly
            move for any small change, and the samples that it wavers on price all weights. Of 50
            digits these are too few: pruned to 90 % a network had 69 % right at 1, and 91 % at 4;
            with 3,600 there was no such difference. Hence ``None``: about 4 for a few samples,
            falling evenly to 1 at 3,000. No meaning for ``"gaussian"``.
        ridge: Keeps inputs that are 0 in every sample or repeat one another solvable; > 0. ``None``
            is 1e-3, and more where a layer has seen fewer than 3,000 inputs: 3 by their number.
        one_by_one: Price the weights of short rows at their turn, when the row is taken apart, see
            :func:`~lightning_prune.refit.elimination.elimination_costs`.

    Returns:
        Name -> prices shaped like the weight, in probability^2, float32 or the weight's float64; 0
        for removed weights.

    Raises:
        ValueError: A name is not the weight of a linear layer or convolution whose output is its
            columns times its weight, ``ridge`` or ``temperature`` is no positive number, or there
            are no batches.
        NonFiniteScoresError: Logits, inputs or prices are not finite.

    Cost: one forward pass and one backward pass a class, or where passes are dear one for each of
    the few directions in which the probabilities move; another forward pass for every 256 MiB of
    Gram matrices (K^2 numbers of 8 bytes each), and K^3 of work for each different set of survivors
    of rows of length K.

    Source: LeCun, Denker and Solla, 1990, "Optimal brain damage"; Hassibi and Stork, 1993, "Second
    order derivatives for network pruning: Optimal Brain Surgeon"; for convolutions Grosse and
    Martens, 2016, "A Kronecker-factored approximate Fisher matrix for convolution layers".

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 1.0]]))
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> obs_prices(model, {}, ["weight"], [x], likelihood="gaussian", ridge=1e-9)["weight"]
        tensor([[9., 1.]])
    """
    check_ridge(ridge)
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"Expected argument `temperature` to be > 0, but got {temperature!r}.")
    if not batches:
        raise ValueError("Expected argument `batches` to hold at least one batch, but got none.")
    names = list(names)
    present = dict(model.named_parameters())
    faults = [f"{n!r}: the model has no parameter of this name" for n in names if n not in present]
    raise_faults([*faults, *mask_faults(masks, present)], "The weights to price or their masks")
    samples = sum(batch_size(batch) for batch in batches)
    if temperature is None:
        temperature = max(1.0, 4.0 - samples / 1000)
    with torch.inference_mode(False):
        batches = [outside_inference_mode(batch) for batch in batches]
    with borrowed(model):
        layers, left = find_layers(model, names, (partial(forward, model, b) for b in batches))
    _raise_left(left)
    with borrowed(model, derivatives=1):
        saliency = output_saliency(model, layers, batches, forward, likelihood, temperature)
    prices: Scores = {}
    with borrowed(model):
        for layer, moments in _moments(model, layers, batches, forward):
            keep = masks.get(layer.name, torch.ones_like(layer.weight, dtype=torch.bool))
            s = saliency[layer.name] / samples
            prices[layer.name] = _price(layer, moments, keep, s, ridge, one_by_one)
    return {name: prices[name] for name in names}


def check_priced(
    model: nn.Module, names: list[str], batch: Any, *, forward: Forward, likelihood: Likelihood
) -> list[str]:
    """Raise what :func:`obs_prices` would raise of such a batch, without the work of the prices.

    Args:
        model: As for :func:`obs_prices`, like the other arguments.
        names: Full names of the weights to price.
        batch: Few samples will do.
        forward: ``forward(model, batch) -> logits``.
        likelihood: How the logits are read.

    Returns:
        The names whose layers these samples have not called. Others may.
    """
    with torch.inference_mode(False):
        batch = outside_inference_mode(batch)
    with borrowed(model):
        layers, left = find_layers(model, names, [partial(forward, model, batch)])
    uncalled = [name for name, why in left.items() if why == UNCALLED]
    _raise_left({name: why for name, why in left.items() if name not in uncalled})
    if layers:
        with borrowed(model, derivatives=1):
            output_saliency(model, layers, [batch], forward, likelihood)
    return uncalled


def _raise_left(left: dict[str, str]) -> None:
    if left:
        lines = [f"{name!r}: {reason}" for name, reason in left.items()]
        raise ValueError(
            "\n- ".join(
                [
                    "Expected weights of linear layers and convolutions, which second-order prices "
                    "are defined for. Exclude these parameters or use criterion='taylor':",
                    *lines,
                ]
            )
        )


def _together(layers: list[Layer]) -> Iterator[list[Layer]]:
    """Yield layers whose Gram matrices are held at once: as many as fit, at least one."""
    part: list[Layer] = []
    size = 0
    for layer in layers:
        columns = as_rows(layer.module, layer.weight).shape[2]
        more = 8 * groups(layer.module) * columns**2
        if part and size + more > GRAM_BYTES:
            yield part
            part, size = [], 0
        part.append(layer)
        size += more
    yield part


def _moments(
    model: nn.Module, layers: list[Layer], batches: list[Any], forward: Forward
) -> Iterator[tuple[Layer, Moments]]:
    """Yield each layer with the moments of its inputs, some layers from one pass."""
    for part in _together(layers):
        found: dict[nn.Module, Moments] = {
            layer.module: Moments.empty(layer, bias=False) for layer in part
        }
        see = partial(_add, found)
        for index, batch in enumerate(batches):
            with own_randomness(device_of(model), "refit", index), watching(found, see):
                forward(model, batch)
        yield from ((layer, found.pop(layer.module)) for layer in part)


def _add(found: dict[nn.Module, Moments], module: nn.Module, inputs: Tensor, _: Tensor) -> None:
    found[module].add(cast(Linear, module), inputs)


def _price(
    layer: Layer,
    moments: Moments,
    keep: Tensor,
    saliency: Tensor,
    ridge: float | None,
    one_by_one: bool,
) -> Tensor:
    """Return the prices of one layer; ``saliency`` is that of its rows (D_out), a sample."""
    gram = moments.gram
    ridge = ridge_for(moments.positions) if ridge is None else ridge
    w = as_rows(layer.module, layer.weight.detach()).to(gram)
    kept = as_rows(layer.module, keep.to(gram.device))
    s = as_rows(layer.module, saliency.to(gram))
    if not bool(torch.isfinite(gram).all()):
        raise NonFiniteScoresError(
            f"Expected finite inputs of the layer of {layer.name!r} to price its weights by, but "
            "they contain NaN or infinity. Nothing was pruned by them."
        )
    means = gram.diagonal(dim1=1, dim2=2).mean(1)
    kept = kept & (means > 0)[:, None, None]  # without any input no weight of a group matters
    # In place: nothing else is read from a matrix that may be the largest thing in memory.
    gram.diagonal(dim1=1, dim2=2).add_(torch.where(means > 0, ridge * means, 1.0)[:, None])
    if one_by_one:
        found = elimination_costs(gram, w, kept)
    else:
        diagonals = torch.stack([inverse_diagonals(h, k) for h, k in zip(gram, kept, strict=True)])
        found = torch.where(kept, w.square() / diagonals, 0.0)
    found = found * s
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    return found.reshape(layer.weight.shape).to(layer.weight.device, dtype)
