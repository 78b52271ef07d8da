"""Generated inputs of a chosen kind: a generator and real inputs -> samples to inject.

Enters: a fitted generator, a real batch, the model. Leaves: checked samples, with their classes if
the generator is conditional. Every draw is a function of the seed and of its place in the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_prune.augment.choosing import Starved, interpolations, reconstructions
from lightning_prune.augment.fitting import GeneratorFitter
from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm
from lightning_prune.augment.protocol import Samples
from lightning_prune.augment.vae import VAE
from lightning_prune.passes.isolation import derived_seed, evaluating

Select: TypeAlias = Literal["prior", "starved", "reconstructions", "interpolations"]
"""What is injected: plain samples; of more samples those from which a saliency learns most; what
the generator makes of the batch's real inputs; or inputs between pairs of these."""

FROM_REAL = ("reconstructions", "interpolations")
"""Kinds that are made from real inputs, for which the generator needs ``interpolate``."""


@dataclass(frozen=True)
class Place:
    """Which draw of a run this is.

    Attributes:
        purpose: Draws with different purposes do not disturb one another.
        rank: The number of the process.
        index: Repeat a certain draw; None is the next one.
    """

    purpose: str
    rank: int = 0
    index: int | None = None


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn.

    Args:
        select: The kind, see :data:`Select`.
        pool: For ``"starved"``: candidates for each sample.
        starved: For ``"starved"``: how they are chosen. A VAE of ours leaves out what it finds
            unlikely itself.

    Raises:
        ValueError: One of the arguments is none of these; the message lists all that aren't.

    Example:
        >>> Drawing("starved", pool=8).pool
        8
    """

    select: Select = "prior"
    pool: int = 4
    starved: Starved = Starved()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        faults = []
        if self.select not in get_args(Select):
            faults.append(f"select: expected one of {get_args(Select)}, but got {self.select!r}")
        if self.pool < 1:
            faults.append(f"pool: expected at least 1 candidate a sample, but got {self.pool!r}")
        if faults:
            raise ValueError("Samples cannot be drawn. " + "; ".join(faults) + ".")

    def check(self, vae: Any) -> None:
        """Refuse a generator that cannot make this kind; best before any training.

        Raises:
            TypeError: It has no method ``interpolate``.
        """
        if self.select in FROM_REAL and not callable(getattr(vae, "interpolate", None)):
            raise TypeError(
                f"Expected a generator with the method `interpolate(x, other, t) -> Tensor` for "
                f"select={self.select!r}, but {type(vae).__name__} has none. Add it, or draw with "
                "select='prior' or 'starved'."
            )

    def __call__(
        self,
        fitter: GeneratorFitter,
        n: int,
        place: Place,
        *,
        module: nn.Module,
        injection: Injection,
        form: BatchForm,
    ) -> Samples:
        """Return n samples (n, *shape), and their classes (n,) from a conditional VAE.

        Args:
            fitter: The generator.
            n: How many.
            place: Which draw of the run this is.
            module: The model, which is asked what it makes of candidates; left as it was.
            injection: How inputs reach the model.
            form: A real batch: real inputs, and the form in which the model takes them.

        Raises:
            GeneratorError: The generator returned a wrong shape or dtype, or NaN.
            TypeError: As :meth:`check`.
            ValueError: The batch holds no real inputs, or no classes for a conditional VAE.
        """
        if self.select in FROM_REAL:
            self.check(fitter.vae)
            return self._from_real(fitter, n, place, form)
        if self.select == "prior":
            return fitter.draw_labelled(n, place.purpose, rank=place.rank, index=place.index)
        return self._starved(fitter, n, place, module, injection, form)

    def _starved(
        self,
        fitter: GeneratorFitter,
        n: int,
        place: Place,
        module: nn.Module,
        injection: Injection,
        form: BatchForm,
    ) -> Samples:
        pool, labels = fitter.draw_labelled(
            self.pool * n, place.purpose, rank=place.rank, index=place.index
        )
        size = max(n, len(form.inputs))  # a chunk is about a batch, so that it fits the memory
        logits = torch.cat(
            [injection.logits(module, form, part) for part in torch.split(pool, size)]
        )
        elbo = None
        if isinstance(fitter.vae, VAE):
            index = fitter.draws[place.purpose] if place.index is None else place.index
            with (
                fitter.isolated(place.purpose, index, place.rank, "elbo"),
                torch.no_grad(),
                evaluating(fitter.vae),
            ):
                parts = zip(torch.split(pool, size), _split(labels, len(pool), size), strict=True)
                elbo = torch.cat([fitter.vae.elbo(x, y) for x, y in parts])
        chosen = self.starved(pool, logits, n, elbo=elbo, likelihood=injection.likelihood)
        with torch.inference_mode(False):
            chosen = chosen.clone().to(pool.device)
            return Samples(pool[chosen], None if labels is None else labels[chosen])

    def _from_real(self, fitter: GeneratorFitter, n: int, place: Place, form: BatchForm) -> Samples:
        index = place.index
        if index is None:  # counted like the fitter's own draws, and with them
            index = fitter.draws[place.purpose] = fitter.draws.get(place.purpose, 0) + 1
        random = torch.Generator().manual_seed(
            derived_seed(fitter.seed, place.purpose, index, place.rank, self.select)
        )
        make = reconstructions if self.select == "reconstructions" else interpolations
        labels = None if fitter.classes is None else _classes_of(form)
        with (
            fitter.isolated(place.purpose, index, place.rank, "noise"),
            torch.no_grad(),
            evaluating(fitter.vae),
        ):
            real = form.inputs.detach().to(fitter.device)
            vae: Any = fitter.vae
            made, classes = make(vae, real.clone(), n, random, labels)
            return Samples(fitter.checked(made, n, call="interpolate(...)"), classes)


def _split(labels: Tensor | None, n: int, size: int) -> Sequence[Tensor | None]:
    return [None] * -(-n // size) if labels is None else torch.split(labels, size)


def _classes_of(form: BatchForm) -> Tensor:
    labels = form.labels
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        found = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(
            "Expected a batch with class indices (N,) as labels, to make inputs of a conditional "
            f"VAE from real ones, but got {found}. Draw with select='prior' or 'starved', or use "
            "an unconditional VAE."
        )
    return labels
