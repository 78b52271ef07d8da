"""Train a generator beside a model, one batch at a time, and draw from it.

Enters: the model's input batches. Leaves: a fitted generator and checked samples. The user's
gradients, modes and random state are never touched, and every draw is a function of the seed and of
its place in the run, so that a run continued from a checkpoint draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.augment.conv_vae import ConvVAE, recipe_of, vae_from
from lightning_prune.augment.feature_encoder import use_features
from lightning_prune.augment.protocol import (
    Generator,
    GeneratorError,
    Samples,
    checked_labels,
    checked_loss,
    checked_sample,
    require_generator,
)
from lightning_prune.augment.vae import VAE, DenseVAE
from lightning_prune.passes.isolation import evaluating, own_randomness

__all__ = [
    "Generator",
    "GeneratorError",
    "GeneratorFitter",
    "Samples",
    "all_finite",
    "average_in_place",
    "build_vae",
    "require_generator",
]


class GeneratorFitter:
    """A generator, its Adam, and its place in the run.

    Args:
        vae: The generator; a module with the methods of :class:`Generator`.
        shape: Shape of one input.
        dtype: Dtype of the inputs, and of what is drawn.
        device: Where the generator lives.
        learning_rate: Of Adam.
        seed: What all random numbers follow from.
        autocast: Half precision of the training step's forward pass; None for the generator's own
            precision, whatever that of the model beside it.
    """

    def __init__(
        self,
        vae: nn.Module,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        *,
        learning_rate: float,
        seed: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.vae = vae.to(device)
        self.autocast = autocast
        self.shape, self.dtype, self.device, self.seed = shape, dtype, device, seed
        self.parameters = [p for p in vae.parameters() if p.requires_grad]
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        self.optimizer: torch.optim.Adam | None = None
        if self.parameters:
            self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, fused=fused)
        self.batches = 0
        self.skipped = 0
        self.draws: dict[str, int] = {}

    @property
    def trained(self) -> float:
        """Training steps taken; infinite for a generator that has nothing to train."""
        return self.batches - self.skipped if self.parameters else float("inf")

    @property
    def classes(self) -> int | None:
        """K of a conditional VAE of ours; None for any other generator."""
        return self.vae.classes if isinstance(self.vae, VAE) else None

    def step(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        rank: int = 0,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Take one training step on a batch (N, *shape).

        Args:
            x: The inputs; any device's or mode's tensor, never written to.
            y: Labels (N,), for a conditional VAE; others never see them.
            rank: This process's number: processes draw different noise.
            average: The mean of a tensor over processes, keeping their generators the same.

        Returns:
            Detached scalars: ``loss``, and for our own VAEs ``reconstruction`` and ``kl``, in nats
            per sample. Empty where loss or gradients were not finite: such a step is skipped, the
            generator keeps its last good weights, and ``skipped`` counts up.

        Raises:
            GeneratorError: If ``loss`` returns no scalar or does not depend on the parameters.
            ValueError: A conditional VAE got no labels, or such that are no class indices.
        """
        self.batches += 1
        if self.optimizer is None:
            return {}
        with self.isolated("fit", self.batches, rank), torch.enable_grad():
            terms = self._terms(_ordinary(x), None if y is None else _ordinary(y))
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                terms["loss"], self.parameters, allow_unused=True
            )
        terms = {name: term.detach() for name, term in terms.items()}
        used = [(p, g) for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        if average is not None:
            buffers = [b for b in self.vae.buffers() if b.is_floating_point()]
            average_in_place([g for _, g in used] + buffers + [terms["loss"]], average)
        if not all_finite([terms["loss"], *(g for _, g in used)]):
            self.skipped += 1
            return {}
        for parameter, gradient in used:
            parameter.grad = gradient
        self.optimizer.step()
        for parameter, _ in used:
            parameter.grad = None
        return terms

    def draw(self, n: int, purpose: str, *, rank: int = 0, index: int | None = None) -> Tensor:
        """Return ``n`` checked samples (n, *shape), detached.

        Args:
            n: How many.
            purpose: Draws with different purposes do not disturb one another.
            rank: This process's number.
            index: Repeat a certain draw; None is the next one.

        Raises:
            GeneratorError: If ``sample`` returns no tensor, the wrong shape, a kind of dtype other
                than the inputs', or NaN or infinity.
        """
        return self.draw_labelled(n, purpose, rank=rank, index=index).inputs

    def draw_labelled(
        self, n: int, purpose: str, *, rank: int = 0, index: int | None = None
    ) -> Samples:
        """Return ``n`` checked samples, and from a conditional VAE of ours their classes.

        Args and errors are those of :meth:`draw`, whose samples are the same.
        """
        if index is None:
            index = self.draws[purpose] = self.draws.get(purpose, 0) + 1
        name, labels = type(self.vae).__name__, None
        with self.isolated(purpose, index, rank), torch.no_grad(), evaluating(self.vae):
            if isinstance(self.vae, VAE) and self.vae.classes is not None:
                sample, labels = self.vae.sample_labelled(n)
                labels = checked_labels(
                    labels, n, self.vae.classes, self.device, call=f"{name}.sample_labelled({n})"
                )
            else:
                sample = self.vae.sample(n)  # type: ignore[operator]
            inputs = self.checked(sample, n, call=f"sample({n})")
        return Samples(inputs, labels)

    def checked(self, sample: Any, n: int, *, call: str) -> Tensor:
        """Return what a call of the generator gave as ``n`` inputs, detached.

        Raises:
            GeneratorError: It is something else.
        """
        return checked_sample(
            sample,
            (n, *self.shape),
            self.dtype,
            self.device,
            call=f"{type(self.vae).__name__}.{call}",
            trained=self.trained,
        )

    def accepts(self, x: Tensor) -> bool:
        """Whether a batch has the shape and the kind of dtype the generator was made for."""
        return x.shape[1:] == self.shape and x.is_floating_point() == self.dtype.is_floating_point

    def to(self, device: torch.device) -> None:
        """Move the generator and its optimizer's state."""
        if device == self.device:
            return
        self.device = device
        self.vae.to(device)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(self.optimizer.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything the run depends on, as tensors and plain containers."""
        return {
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "settings": recipe_of(self.vae),
            "batches": self.batches,
            "skipped": self.skipped,
            "draws": dict(self.draws),
            "vae": dict(self.vae.state_dict()),
            "optimizer": {} if self.optimizer is None else self.optimizer.state_dict(),
        }

    @classmethod
    def from_state(
        cls,
        state: dict[str, Any],
        vae: nn.Module | None,
        *,
        learning_rate: float,
        seed: int,
        autocast: torch.dtype | None = None,
    ) -> GeneratorFitter:
        """Return a fitter, on the CPU, that continues from the state of another.

        Args:
            state: What :meth:`state_dict` returned.
            vae: The generator the state belongs to; None builds our own again.
            learning_rate: Of Adam, unless the state has one.
            seed: The same as before, or the run will differ.
            autocast: As before.

        Raises:
            ValueError: If the state is that of another generator.
        """
        dtype = getattr(torch, state["dtype"])
        if vae is None:
            if state["settings"] is None:
                raise ValueError(
                    "Expected the saved state of a default VAE, but it is that of a generator of "
                    "your own. Give that again as `vae`."
                )
            vae = build_vae(state["settings"], dtype, seed=seed)
        fitter = cls(
            vae,
            torch.Size(state["shape"]),
            dtype,
            torch.device("cpu"),
            learning_rate=learning_rate,
            seed=seed,
            autocast=autocast,
        )
        fitter._load(state)
        return fitter

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self.vae.load_state_dict(state["vae"])
            if self.optimizer is not None and state["optimizer"] is not None:
                # Adam keeps the tensors it is given, and they may be another optimizer's.
                self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"Expected the saved state of a {type(self.vae).__name__} like this one, but it "
                f"does not fit: {error}. Give the generator that the checkpoint was written with."
            ) from error
        self.batches, self.skipped = state["batches"], state["skipped"]
        self.draws = dict(state["draws"])

    @contextmanager
    def isolated(self, *key: int | str) -> Iterator[None]:
        """Run a block outside inference mode and autocast, on random numbers that follow a key."""
        with (
            torch.inference_mode(False),
            torch.autocast(self.device.type, enabled=False),
            own_randomness(self.device, self.seed, *key),
        ):
            yield

    def _terms(self, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        with torch.autocast(
            self.device.type,
            dtype=self.autocast,
            enabled=self.autocast is not None,
            cache_enabled=False,  # casts kept under an outer autocast would outlive the step
        ):
            if isinstance(self.vae, VAE):
                return self.vae.terms(x, y)._asdict()
            loss = self.vae.loss(x)  # type: ignore[operator]
        return {"loss": checked_loss(loss, type(self.vae).__name__)}


def _ordinary(x: Tensor) -> Tensor:
    """Return a tensor without a graph, and with one it may enter."""
    return x.detach().clone() if x.is_inference() else x.detach()


def build_vae(settings: dict[str, Any], dtype: torch.dtype, *, seed: int) -> DenseVAE | ConvVAE:
    """Return a VAE of ours for inputs of a dtype: in float64 for those, else in float32.

    Settings are a recipe (:func:`vae_from`), and may say how many ``"features"`` of the network
    take the place of an encoder.
    """
    recipe = {name: value for name, value in settings.items() if name != "features"}
    with own_randomness(torch.device("cpu"), seed, "init"):
        vae = vae_from(recipe)
        if settings.get("features") is not None:
            use_features(vae, settings["features"])
            vae.settings["features"] = settings["features"]
    return vae.double() if dtype == torch.float64 else vae


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no element is NaN or infinite; asks the device once."""
    return not tensors or bool(torch.stack([t.sum() for t in tensors]).isfinite().all())


def average_in_place(tensors: list[Tensor], average: Callable[[Tensor], Tensor]) -> None:
    """Replace tensors by their mean over processes, in one exchange."""
    flat = average(torch.cat([t.detach().reshape(-1) for t in tensors]))
    for tensor, mean in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(mean.view_as(tensor))
