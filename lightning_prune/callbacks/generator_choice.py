"""Which generator is trained: the arguments that choose it, a file that has one, a first batch.

Enters: what the user said, and the first batch. Leaves: a generator with its optimizer, or an error
that says what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_prune.augment.fitting import GeneratorFitter, build_vae, require_generator
from lightning_prune.augment.settings import argument_faults, settings_for
from lightning_prune.augment.vae import VAE

KINDS = ("dense", "conv")
"""The VAEs of our own."""

FILE = "lightning_prune.generator"
"""What a file of :func:`save_generator` says it is."""


@dataclass(frozen=True)
class GeneratorChoice:
    """The generator as the user described it.

    Attributes:
        vae: The user's generator, or the kind of our own; None for ``"dense"``.
        classes: K of a conditional VAE of our own.
        encoder: Whether the network's features take the place of its encoder.
        learning_rate: Of Adam.
        seed: What all random numbers follow from.
        autocast: See :class:`GeneratorFitter`.
        name: What to call it in messages.

    Raises:
        TypeError: ``vae`` lacks ``loss`` or ``sample``.
        ValueError: Arguments that do not go together; one message names them all.
    """

    vae: nn.Module | str | None
    classes: int | None
    encoder: bool
    learning_rate: float
    seed: int
    autocast: torch.dtype | None
    name: str

    def __post_init__(self) -> None:
        """Refuse what no generator can be built from."""
        faults = argument_faults({"classes": self.classes})
        if isinstance(self.vae, str) or self.vae is None:
            if self.vae not in (None, *KINDS):
                faults.append(
                    f"`vae`: expected a module, None or one of {KINDS}, but got {self.vae!r}"
                )
        else:
            require_generator(self.vae)
            own = self.vae.classes if isinstance(self.vae, VAE) else None
            if self.classes not in (None, own):
                faults.append(
                    f"`classes`: expected None or that of the `vae` given, {own}, but got "
                    f"{self.classes!r}. Build the VAE with `classes=`"
                )
            if self.encoder:
                faults.append(
                    "`encoder`: expected no `vae` of your own beside it, since it makes the "
                    f"encoder of a default VAE, but got a {type(self.vae).__name__}"
                )
        if faults:
            raise ValueError("\n- ".join(["VAEAugmentCallback cannot use its arguments:", *faults]))

    @property
    def given(self) -> nn.Module | None:
        """The user's own generator."""
        return self.vae if isinstance(self.vae, nn.Module) else None

    def build(self, trainer: Trainer, x: Tensor, features: Tensor | None) -> GeneratorFitter:
        """Return a new generator for inputs like the batch (N, *shape), the same on all processes.

        Args:
            trainer: Of the fit.
            x: The first batch.
            features: The network's features of some inputs, where these take the encoder's place.

        Raises:
            MisconfigurationException: The inputs are none that a default VAE can learn.
        """
        vae = self.given
        if vae is None:
            if not x.is_floating_point():
                raise MisconfigurationException(
                    f"{self.name}: expected floating-point inputs, but got {x.dtype}; the default "
                    "VAE has no likelihood for them. There are two ways out: `encode=` a function "
                    "from these inputs to a float tensor (N, ...), such as an embedding, in whose "
                    "space the VAE then learns; or a generator of your own that has a likelihood "
                    "for them: `vae=` a module with `loss(x) -> scalar` and `sample(n) -> Tensor`."
                )
            # The first process's batch decides for all.
            settings: dict[str, Any] = trainer.strategy.broadcast(settings_for(x))
            settings |= {"kind": self.vae or "dense", "classes": self.classes}
            if features is not None:
                settings["features"] = features[:1].numel()
            try:
                vae = build_vae(settings, x.dtype, seed=self.seed)
            except ValueError as error:
                raise MisconfigurationException(
                    f"{self.name}: inputs of shape {tuple(x.shape[1:])} fit no default VAE of kind "
                    f"{settings['kind']!r}. {error}"
                ) from error
        elif trainer.world_size > 1:  # each process has initialised its own
            vae.load_state_dict(trainer.strategy.broadcast(vae.state_dict()))
        return GeneratorFitter(
            vae,
            x.shape[1:],
            x.dtype,
            x.device,
            learning_rate=self.learning_rate,
            seed=self.seed,
            autocast=self.autocast,
        )

    def restored(self, state: dict[str, Any]) -> GeneratorFitter:
        """Return a generator that goes on from a saved state.

        Raises:
            ValueError: The state is that of another generator.
        """
        return GeneratorFitter.from_state(
            state,
            self.given,
            learning_rate=self.learning_rate,
            seed=self.seed,
            autocast=self.autocast,
        )

    def reused(self, path: str | Path, state_key: str) -> GeneratorFitter:
        """Return a generator from a file, with an optimizer and draws of its own.

        Args:
            path: Of a Lightning checkpoint, or of a file by :func:`save_generator`.
            state_key: Of the callback, under which a checkpoint has its state.

        Raises:
            ValueError: The file has no generator, or one that does not fit; the message says which.
        """
        state = read_generator(path, state_key)
        fresh = {"batches": 0, "skipped": 0, "draws": {}, "optimizer": None}
        if self.given is None and state["settings"] is not None:
            saved = {"kind": "dense", "classes": None, "features": None, **state["settings"]}
            for argument, wanted, found in (
                ("vae", self.vae, saved["kind"]),
                ("classes", self.classes, saved["classes"]),
            ):
                if wanted not in (None, found):
                    raise ValueError(
                        f"Expected {path} to hold a generator with {argument}={wanted!r}, but it "
                        f"has {found!r}. Leave `{argument}` out to take it as it is."
                    )
            if self.encoder != (saved["features"] is not None):
                raise ValueError(
                    f"Expected {path} to hold a generator that was trained "
                    f"{'with' if self.encoder else 'without'} `encoder=`, but it was trained "
                    f"{'without' if self.encoder else 'with'}. Give the same arguments."
                )
        try:
            return self.restored(state | fresh)
        except ValueError as error:
            raise ValueError(f"The generator in {path} cannot be used. {error}") from error


def save_generator(fitter: GeneratorFitter, path: str | Path) -> None:
    """Write a generator's settings and weights, as ``torch.load(weights_only=True)`` reads them."""
    state = fitter.state_dict()
    kept = {name: state[name] for name in ("shape", "dtype", "settings", "vae")}
    torch.save({"format": FILE, "generator": kept}, path)


def read_generator(path: str | Path, state_key: str) -> dict[str, Any]:
    """Return the state of a generator from a file of either kind.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no generator of this name.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"Expected `checkpoint` to be a file that torch.load(weights_only=True) reads, but "
            f"{path} is not: {error}. Write one by `callback.save_generator(path)`."
        ) from error
    if isinstance(content, dict) and content.get("format") == FILE:
        state: dict[str, Any] = content["generator"]
        return state
    callbacks = content.get("callbacks", {}) if isinstance(content, dict) else {}
    if state_key not in callbacks:
        others = [key for key in callbacks if key.startswith("VAEAugmentCallback")]
        raise ValueError(
            f"Expected {path} to be a file by `callback.save_generator`, or a Lightning checkpoint "
            f"with the state of {state_key}, but it has "
            f"{f'that of {others}; `name` tells which' if others else 'none'}."
        )
    found: dict[str, Any] | None = callbacks[state_key]["generator"]
    if found is None:
        raise ValueError(
            f"Expected the checkpoint {path} to hold a generator, but it was written before the "
            "first training batch. Take a later one."
        )
    return found
