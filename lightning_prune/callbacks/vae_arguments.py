"""The arguments of VAEAugmentCallback, checked: one message names all that is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from lightning_prune.callbacks.generator_training import GeneratorTraining
from lightning_prune.callbacks.training_injection import TrainBy

PLACES = ("saliency", "train")
"""Where generated inputs can go."""


def check_arguments(inject: tuple[str, ...], arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError that names all arguments out of range, if there are any.

    Args:
        inject: The places asked for.
        arguments: ``share``, ``learning_rate``, ``warmup`` and ``name`` as the user gave them.
    """
    share, rate = arguments["share"], arguments["learning_rate"]
    checks = {
        "share": (0 < share < float("inf"), "above 0"),
        "learning_rate": (0 < rate < float("inf"), "above 0"),
        "warmup": (arguments["warmup"] >= 0, "a number of steps, 0 or more"),
        "name": (bool(arguments["name"]), "not empty"),
    }
    raise_faults(
        [
            f"`inject`: expected places among {PLACES}, but got {place!r}"
            for place in inject
            if place not in PLACES
        ]
        + [
            f"`{argument}`: expected it to be {wanted}, but got {arguments[argument]!r}"
            for argument, (fine, wanted) in checks.items()
            if not fine
        ]
    )


def check_together(
    inject: tuple[str, ...],
    *,
    encode: object,
    encoder: object,
    forward: object,
    training: GeneratorTraining,
    warmup: int,
    train_by: str,
) -> None:
    """Raise a ValueError that names all arguments that do not go together, if there are any."""
    faults = []
    if train_by not in get_args(TrainBy):
        faults.append(f"`train_by`: expected one of {get_args(TrainBy)}, but got {train_by!r}")
    if encode is not None and "train" in inject and train_by == "batch":
        faults.append(
            "`encode`, `train_by`: expected train_by='distill' with encode, since samples in its "
            "space cannot stand behind real inputs, but got 'batch'"
        )
    if encode is not None and inject and forward is None:
        faults.append(
            "`encode`: samples are in the space that it leads to, so that the model needs a way to "
            "take them: give `forward=lambda module, batch: logits` for batches of encoded inputs, "
            "or `inject=()`"
        )
    if encode is not None and encoder is not None:
        faults.append("`encode`, `encoder`: expected one of them, but got both")
    if inject and training.max_steps is not None and training.max_steps < warmup:
        faults.append(
            f"`training`: expected max_steps to be at least `warmup`, {warmup}, for samples to be "
            f"used, but got {training.max_steps}"
        )
    raise_faults(faults)


def raise_faults(faults: list[str]) -> None:
    """Raise one ValueError for all faults, if there are any."""
    if faults:
        raise ValueError("\n- ".join(["VAEAugmentCallback cannot use its arguments:", *faults]))
