"""How far the predictions move when one output of a layer moves: sum over (dP_y / dz_r)^2.

Enters: layers and batches. Leaves: one number for each output row of each layer. One forward pass
with the layers' outputs kept, then one backward pass for each class, or where a pass is dear for
each of the few directions that matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_prune._types import Forward, Likelihood
from lightning_prune.exceptions import NonFiniteScoresError, SaliencyError
from lightning_prune.passes.batches import batch_size
from lightning_prune.passes.isolation import derived_seed, own_randomness
from lightning_prune.passes.outputs import check_classes
from lightning_prune.passes.precision import precise_device, widest
from lightning_prune.refit.borrowing import device_of
from lightning_prune.refit.class_directions import WORK, leading_directions
from lightning_prune.refit.layers import Layer, watching

MOST_CLASSES = 64
"""Beyond so many classes the likeliest of a batch stand for all."""


def output_saliency(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    forward: Forward,
    likelihood: Likelihood,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Return the output saliency of each row of each layer.

    The sum over samples, positions and classes of (dP_y / dz)^2, divided by the number of positions
    of a sample: with one position it is the sum over samples and classes, exact or, where backward
    passes are dear, to about :data:`~lightning_prune.refit.class_directions.TOLERANCE`. Has to be
    called with gradients on and the model in eval mode.

    Args:
        model: The model.
        layers: Its layers, as :func:`~lightning_prune.refit.layers.find_layers` returns them.
        batches: Samples, in the form that ``forward`` reads.
        forward: ``forward(model, batch) -> logits``.
        likelihood: How the logits are read.
        temperature: Softens the probabilities; no meaning for ``"gaussian"``.

    Returns:
        Name of the layer's weight -> (D_out,) float64, in probability^2 per pre-activation^2.

    Raises:
        ValueError: Categorical logits without at least 2 classes on axis 1.
        NonFiniteScoresError: Logits are NaN or infinite.
        SaliencyError: A layer has no gradient path to the logits.
    """
    totals: dict[str, Tensor] = {}
    positions = dict.fromkeys((layer.name for layer in layers), 0)
    samples = 0
    for index, batch in enumerate(batches):
        samples += batch_size(batch)
        logits, edges, work = _forward(model, layers, partial(forward, model, batch), index)
        owners = [layer for layer, _ in edges]
        directions = list(_directions(logits, work, likelihood, temperature, index))
        for i, direction in enumerate(directions):
            found = torch.autograd.grad(
                direction,
                [edge for _, edge in edges],
                retain_graph=i + 1 < len(directions),
                allow_unused=True,
            )
            for layer, gradient in zip(owners, found, strict=True):
                if gradient is not None:
                    squares, places = _squares_by_row(layer, gradient)
                    totals[layer.name] = totals.get(layer.name, torch.zeros_like(squares)) + squares
                    positions[layer.name] += places if i == 0 else 0
    if without := [layer.name for layer in layers if layer.name not in totals]:
        raise SaliencyError(
            f"Expected every weight to have a gradient path to the logits, but {without} have "
            "none (detached, or run without gradients). Leave them out with `parameters=`."
        )
    return {
        name: total / max(1.0, positions[name] / max(1, samples)) for name, total in totals.items()
    }


def _forward(
    model: nn.Module, layers: Sequence[Layer], run: Any, index: int
) -> tuple[Tensor, list[tuple[Layer, GradientEdge]], int]:
    """Run the model.

    Returns:
        The logits; for each call of a layer where its output's gradient arrives; the
        multiply-accumulates of the batch that a backward pass to there has to make.
    """
    owners: dict[nn.Module, Layer] = {layer.module: layer for layer in layers}
    edges: list[tuple[Layer, GradientEdge]] = []
    work: list[int] = []

    def see(module: nn.Module, _: Tensor, outputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # by the model itself
            return outputs
        # Added to something that requires gradients, the output does so in a frozen network too.
        # The edge stays that of this value if a later layer changes it in place.
        outputs = (
            outputs + torch.zeros((), dtype=outputs.dtype, device=outputs.device).requires_grad_()
        )
        edges.append((owners[module], get_gradient_edge(outputs)))
        work.append(outputs.numel() * owners[module].weight[0].numel())
        return outputs

    with own_randomness(device_of(model), "refit", index), watching(owners, see):
        logits: Tensor = run()
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteScoresError(
            "Expected finite logits to price weights by, but the model returned NaN or infinity "
            f"for batch {index}. Nothing was pruned by them; check its inputs and weights."
        )
    return logits, edges, sum(work[1:])


def _squares_by_row(layer: Layer, gradient: Tensor) -> tuple[Tensor, int]:
    """Return the squares of an output gradient summed over samples and positions, and their number.

    The positions of a sample are summed as the gradient lies in memory and in its own precision, at
    least float32 (a square below 6e-8 is 0 in float16); samples in float64, where there is such a
    thing.
    """
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    device = precise_device(gradient.device)
    if isinstance(layer.module, nn.Linear):
        rows = gradient.reshape(-1, gradient.shape[-1])
        return rows.to(device).double().square().sum(0), len(rows)
    axis = gradient.ndim - 1 - len(layer.module.kernel_size)
    rows = gradient.flatten(axis + 1)
    rows = rows if axis else rows[None]  # without a batch axis
    squares = torch.linalg.vecdot(rows, rows).to(device).double().sum(0)
    return squares, len(rows) * rows.shape[-1]


def _directions(
    logits: Tensor, work: int, likelihood: Likelihood, temperature: float, index: int
) -> Iterator[Tensor]:
    """Yield scalars whose squared gradients, sample by sample, add up to the sum over classes.

    Samples do not touch one another, so the gradient of a sum over them holds each one's own. What
    one sample has several of (positions of dense predictions, many outputs) enters with random
    signs: the cross terms then vanish on average.
    """
    z = logits.to(widest(logits.device))
    z = z if likelihood == "gaussian" else z / temperature
    generator = torch.Generator().manual_seed(derived_seed("output saliency", index))
    if likelihood == "categorical":
        check_classes(z)
        classes = min(MOST_CLASSES, z.shape[1])
        if z.ndim == 2 and z.dtype == torch.float64 and work > WORK * len(z) * classes**2:
            yield from ((z * found).sum() for found in leading_directions(z, classes))
            return
        p = z.softmax(1)
        likeliest = p.detach().transpose(0, 1).flatten(1).sum(1).topk(classes)
        for y in likeliest.indices.tolist():
            part = p[:, y]
            yield (part if part.ndim == 1 else part * _signs(part.shape, generator, part)).sum()
        return
    # Both classes of a logit move by p (1 - p): twice its square.
    outputs = (z.sigmoid() * math.sqrt(2) if likelihood == "bernoulli" else z).reshape(len(z), -1)
    if outputs.shape[1] <= MOST_CLASSES:
        yield from outputs.sum(0)
        return
    for _ in range(MOST_CLASSES):
        yield (outputs * _signs(outputs.shape, generator, outputs)).sum() / math.sqrt(MOST_CLASSES)


def _signs(shape: torch.Size, generator: torch.Generator, like: Tensor) -> Tensor:
    return (2.0 * torch.randint(0, 2, shape, generator=generator) - 1).to(like)
