"""Which generated inputs are worth injecting: a pool of candidates -> the chosen ones.

Enters: candidates, what the model answers to them, how likely the generator finds them. Leaves:
indices into the pool; or new inputs made from pairs of real ones. Everything random follows from a
``torch.Generator``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_prune._types import Likelihood
from lightning_prune.passes.precision import widest

Spread: TypeAlias = Literal["classes", "distance"]
"""How starved inputs are kept from being all alike: predicted classes take turns, or each next one
is far from those before."""


class Interpolator(Protocol):
    """What can make inputs from pairs of real ones, such as a VAE.

    A conditional one takes the pairs' classes (N,) as a fourth argument.
    """

    def interpolate(self, x: Tensor, other: Tensor, t: Tensor, /) -> Tensor:
        """Return inputs (N, *shape) between ``x`` (at t = 0) and ``other`` (at 1), for t (N,)."""


@dataclass(frozen=True)
class Starved:
    """Choose the inputs from which a saliency learns most, near the data and not all alike.

    Args:
        spread: ``"classes"``: the predicted classes take turns, in each the most starved first;
            for logits of one class (or a regression) that is plainly the most starved first.
            ``"distance"``: of the ``oversample * n`` most starved, one after the other that is
            farthest from those chosen (Gonzalez 1985, "Clustering to minimize the maximum
            intercluster distance"). It likes what is unlike everything, hence the floor.
        floor: The share of the pool, in [0, 1), that is left out for having the smallest ELBO.
        oversample: For ``"distance"``: from how many times ``n`` it may choose.

    Raises:
        ValueError: One of the arguments is none of these; the message lists all that aren't.

    Example:
        >>> pool = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> logits = torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.0, 0.3], [0.0, 9.0]])
        >>> Starved()(pool, logits, 2).tolist()
        [0, 2]
    """

    spread: Spread = "classes"
    floor: float = 0.1
    oversample: int = 4

    def __post_init__(self) -> None:
        """Refuse what cannot be chosen by."""
        faults = []
        if self.spread not in get_args(Spread):
            faults.append(f"spread: expected one of {get_args(Spread)}, but got {self.spread!r}")
        if not 0 <= self.floor < 1:
            faults.append(f"floor: expected a share in [0, 1), but got {self.floor!r}")
        if self.oversample < 1:
            faults.append(f"oversample: expected at least 1, but got {self.oversample!r}")
        if faults:
            raise ValueError("Starved cannot be used. " + "; ".join(faults) + ".")

    def __call__(
        self,
        pool: Tensor,
        logits: Tensor,
        n: int,
        *,
        elbo: Tensor | None = None,
        likelihood: Likelihood = "categorical",
    ) -> Tensor:
        """Return the indices (n,) of the chosen candidates, each at most once, the best first.

        Args:
            pool: Candidates (N, *shape).
            logits: What the model answers, (N, C, ...); classes on axis 1.
            n: How many. If fewer than that are above the floor, the best below it follow.
            elbo: The bound on each candidate's log-likelihood, (N,); None leaves the floor out.
            likelihood: How the logits are read.

        Raises:
            ValueError: The pool is smaller than ``n``, or the rows of the three do not match.
        """
        _check_pool(pool, logits, n, elbo)
        score = starvation(logits, likelihood)
        near = torch.ones_like(score, dtype=torch.bool)
        if elbo is not None:
            near = above_floor(elbo, self.floor).to(score.device)
        order = score.argsort(descending=True, stable=True)
        inside, outside = order[near[order]], order[~near[order]]
        if self.spread == "distance":
            starved = inside[: self.oversample * n]
            chosen = starved[farthest_points(pool[starved.to(pool.device)], n).to(order.device)]
        else:
            chosen = inside[in_turns(_classes(logits, likelihood)[inside])][:n]
        # Of the rest as many as are missing: what is far from the data is better than a short draw.
        return torch.cat([chosen, outside[: n - len(chosen)]])


def starvation(logits: Tensor, likelihood: Likelihood = "categorical") -> Tensor:
    """Return how much a sample can tell about its weights, (N,): large where the model wavers.

    The squared Frobenius norm of the outputs' derivative by the logits, the factor through which a
    sample enters the saliency: ``||diag(p) - p p^T||^2 = sum p^2 - 2 sum p^3 + (sum p^2)^2``; for
    independent bits ``sum (p (1 - p))^2``; 1 for a regression, whose samples all count alike. The
    mean over further axes (positions).

    Args:
        logits: (N, C, ...); classes on axis 1.
        likelihood: How they are read.

    Returns:
        In float64 where the device has it: for a confident model the terms nearly cancel.

    Example:
        >>> starvation(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
        tensor([2.5000e-01, 6.0890e-08], dtype=torch.float64)
    """
    z = logits.detach()
    z = z.to(widest(z.device))
    if likelihood == "gaussian":
        return torch.ones_like(z.flatten(1)[:, 0]) if z.ndim > 1 else torch.ones_like(z)
    if likelihood == "bernoulli":
        return (z.sigmoid() * z.neg().sigmoid()).square().reshape(len(z), -1).sum(1)
    p = z.softmax(1)
    squares = p.square().sum(1)
    norm = (squares - 2 * p.pow(3).sum(1) + squares.square()).clamp(min=0.0)
    return norm.reshape(len(z), -1).mean(1)


def above_floor(elbo: Tensor, floor: float) -> Tensor:
    """Return which candidates are near the data (N,): all but the share ``floor`` of lowest ELBO.

    Exactly ``floor * N``, rounded down, are left out, and all whose ELBO is not finite.

    Example:
        >>> above_floor(torch.tensor([-3.0, -1.0, -2.0, float("nan")]), 0.25).tolist()
        [True, True, True, False]
    """
    low = elbo.detach().nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    near = low.isfinite()
    near[low.argsort(stable=True)[: int(floor * len(elbo))]] = False
    return near


def in_turns(classes: Tensor) -> Tensor:
    """Return an order (N,) in which the classes take turns, each keeping its own order.

    A round goes through the classes in the order of their best candidates' places.

    Example:
        >>> in_turns(torch.tensor([5, 5, 5, 2, 2, 7])).tolist()
        [0, 3, 5, 1, 4, 2]
    """
    rounds = torch.zeros_like(classes)
    for label in torch.unique(classes):
        of_class = classes == label
        rounds[of_class] = torch.arange(int(of_class.sum()), device=classes.device)
    return rounds.argsort(stable=True)


def farthest_points(points: Tensor, n: int) -> Tensor:
    """Return n indices (or N, if there are fewer): the first, then each farthest from those before.

    Squared Euclidean distance over all elements; of equal ones the earlier. Costs n passes over
    ``points``.

    Args:
        points: (N, *shape).
        n: How many.

    Example:
        >>> farthest_points(torch.tensor([[0.0], [1.0], [5.0], [4.0]]), 3).tolist()
        [0, 2, 1]
    """
    flat = points.detach().reshape(len(points), math.prod(points.shape[1:]))
    flat = flat if flat.is_floating_point() else flat.float()
    count = min(n, len(flat))
    chosen = torch.zeros(count, dtype=torch.long, device=flat.device)
    nearest = torch.full((len(flat),), torch.inf, dtype=flat.dtype, device=flat.device)
    for k in range(1, count):
        last = chosen[k - 1]
        nearest = torch.minimum(nearest, (flat - flat[last]).square().sum(1))
        nearest[last] = -1.0  # also where all that are left lie on chosen points
        chosen[k] = nearest.argmax()
    return chosen


def reconstructions(
    vae: Interpolator,
    real: Tensor,
    n: int,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return what the VAE makes of n real inputs: each as often as any other, in random order.

    Each real input has one reconstruction, so more than there are real inputs brings repeats.

    Args:
        vae: What reconstructs: an interpolation that has not left its start.
        real: Real inputs (N, *shape).
        n: How many.
        generator: On the CPU; of the order.
        labels: The classes (N,) of the real inputs, for a conditional VAE.

    Returns:
        Inputs (n, *shape), and their classes (n,) if ``labels`` are given.

    Raises:
        ValueError: There are no real inputs.
    """
    rows = _repeated(len(real), n, generator)
    return _between(vae, real, (rows, rows), torch.zeros(n), labels)


def interpolations(
    vae: Interpolator,
    real: Tensor,
    n: int,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return n inputs on the lines between random pairs of real ones, at a uniform place.

    Args:
        vae: What interpolates.
        real: Real inputs (N, *shape); each is the start of a line as often as any other.
        n: How many.
        generator: On the CPU; of pairs and places.
        labels: The classes (N,) of the real inputs, for a conditional VAE: pairs are then of one
            class, so that what lies between them has one too.

    Returns:
        Inputs (n, *shape), and their classes (n,) if ``labels`` are given.

    Raises:
        ValueError: There are no real inputs.
    """
    first = _repeated(len(real), n, generator)
    if labels is None:
        second = _repeated(len(real), n, generator)
    else:
        second = _partners(first, labels.detach().cpu(), generator)
    return _between(vae, real, (first, second), torch.rand(n, generator=generator), labels)


def _between(
    vae: Interpolator,
    real: Tensor,
    pairs: tuple[Tensor, Tensor],
    t: Tensor,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    first, second = (rows.to(real.device) for rows in pairs)
    ends = real[first], real[second]
    if labels is None:
        return vae.interpolate(*ends, t.to(real.device)), None
    classes = labels[first.to(labels.device)]
    conditional: Callable[..., Tensor] = vae.interpolate
    return conditional(*ends, t.to(real.device), classes), classes


def _partners(first: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each row another of its class, drawn at random (itself, if it is the only one)."""
    same = (labels[first][:, None] == labels[None, :]).float()
    return torch.multinomial(same, 1, generator=generator)[:, 0] if len(first) else first


def _repeated(size: int, n: int, generator: torch.Generator) -> Tensor:
    """Return n indices below ``size``: shuffled rounds, one after the other."""
    if not size:
        raise ValueError("Expected at least one real input to make others from, but got none.")
    rounds = [torch.randperm(size, generator=generator) for _ in range(-(-n // size))]
    return torch.cat(rounds)[:n] if rounds else torch.zeros(0, dtype=torch.long)


def _classes(logits: Tensor, likelihood: Likelihood) -> Tensor:
    """Return the predicted class of each sample (N,); positions and bits: that of the mean."""
    if likelihood == "gaussian" or logits.ndim < 2:
        return torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    if likelihood == "categorical":
        p = logits.detach().softmax(1)
        return p.reshape(*p.shape[:2], -1).mean(2).argmax(1)
    return logits.detach().flatten(1).argmax(1)


def _check_pool(pool: Tensor, logits: Tensor, n: int, elbo: Tensor | None) -> None:
    faults = []
    if n > len(pool):
        faults.append(f"expected at least {n} candidates to choose as many, but got {len(pool)}")
    if len(logits) != len(pool):
        faults.append(f"expected logits of {len(pool)} candidates, but got {len(logits)}")
    if elbo is not None and elbo.shape != (len(pool),):
        faults.append(f"expected an ELBO of shape ({len(pool)},), but got {tuple(elbo.shape)}")
    if faults:
        raise ValueError("The pool cannot be chosen from: " + "; ".join(faults) + ".")
