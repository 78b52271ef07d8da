"""The callbacks that make the best sparse network we know to make, put together.

Enters: how sparse, and in how many epochs. Leaves: a list for ``Trainer(callbacks=...)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback

from lightning_prune._targets import Threshold, count_faults, target_faults
from lightning_prune.callbacks.batch_norm_statistics import BatchNormStatistics
from lightning_prune.callbacks.distillation import DistillationCallback
from lightning_prune.callbacks.learning_rate_decay import LearningRateDecay
from lightning_prune.callbacks.preflight import as_masks
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from lightning_prune.refit import Refit, refit_method
from lightning_prune.schedules.explicit import EpochSchedule
from lightning_prune.selection import Selection, resolve_criterion

ENOUGH_LEFT = 1 / 3
"""The share that a stage has to keep for OBC: its prices hold near the network they are of. On
784-40-20-10 at 98 % it was above w^2 R by 4 points in four stages (38 % kept in each), and below it
by 12 in three, 46 in two and 65 in one, where the first layer lost nearly all."""


def best(
    sparsity: float,
    epochs: int,
    *,
    stages: int | None = None,
    criterion: Any = None,
    refit: bool | Refit = False,
    distill: bool | float | DistillationCallback = False,
    decay: bool = True,
    batch_norm: bool = True,
    **pruner: Any,
) -> list[Callback]:
    """Return the callbacks that prune a trained network and fine-tune it.

    In the first two thirds of the epochs the network is pruned in ``stages`` events, one at the end
    of an epoch, each scored anew and each removing the same share of the weights still there. Then
    the masks stay, and the learning rate falls to 0. At the end batch norms get their statistics
    anew. Each part can be switched off; ``refit``, and ``distill``, learning from the dense network
    beside the labels, can be switched on. They are not by default, as docs/quality.md says. The
    optimizer is the user's: its learning rate should be that of a training from scratch or above,
    not the small one of a fine-tuning.

    Args:
        sparsity: The share of all prunable weights removed in the end, in (0, 1).
        epochs: ``max_epochs`` of the Trainer, at least 2; a fit that is seen to have another number
            of them, also by ``max_steps``, warns.
        stages: Pruning events; by default one in each of the first two thirds of the epochs.
        criterion: As for :class:`SaliencyPruningCallback`. By default ``"obc"``, which has prices
            for linear layers and convolutions (with others in the model exclude them, or choose
            ``"taylor"``); and ``"taylor"`` where there are so few stages that one removes more than
            two thirds of what is left.
        refit: As for :class:`SaliencyPruningCallback`.
        distill: The weight of the distillation from the network that the fit begins with, False or
            0 for none, True for 0.5; or a :class:`DistillationCallback`, for instance with
            ``module=`` where ``training_step`` calls a submodule, or with ``teacher=`` the dense
            weights where ``masks`` are given.
        decay: Let the learning rate fall at the end; for a module without schedulers of its own.
        batch_norm: Estimate batch norm statistics at the end.
        **pruner: Further arguments of :class:`SaliencyPruningCallback`, such as ``selection``;
            ``likelihood`` goes to the distillation as well, ``forward`` to the batch norm part.
            With ``masks`` of a network that :func:`~lightning_prune.prune` has brought to
            ``sparsity`` before (as nearly as whole units, channels or heads come to it), there
            are no stages: it is trained under them (a fit in which others have no masks warns).

    Raises:
        ValueError: Arguments out of range; one message names them all.

    Example:
        >>> for callback in best(0.95, epochs=12):
        ...     print(type(callback).__name__)
        SaliencyPruningCallback
        LearningRateDecay
        BatchNormStatistics
        >>> best(0.875, epochs=6, stages=3)[0].schedule
        EpochSchedule(targets={0: 0.5, 1: 0.75, 3: 0.875})
    """
    if "every_n_train_steps" in pruner:
        _raise(
            [
                "every_n_train_steps: its events are at the ends of epochs. Put the callbacks "
                "together by hand to count steps"
            ]
        )
    faults = [
        *stage_faults(sparsity, epochs, stages),
        *_faults_of(lambda: resolve_criterion("obc" if criterion is None else criterion)),
        *_faults_of(lambda: refit_method(refit)),
        *_faults_of(lambda: SaliencyPruningCallback({}, **pruner)),
    ]
    if distill and not isinstance(distill, (bool, DistillationCallback)):
        faults += _faults_of(lambda: DistillationCallback(distill))
    _raise(faults)
    schedule = stages_of(sparsity, epochs, stages)
    if _are_enough(pruner.get("masks"), sparsity, pruner.get("selection")):
        schedule = EpochSchedule({}, epochs, reached=sparsity)
    if criterion is None:
        count = pruning_epochs(epochs) if stages is None else stages
        criterion = "obc" if (1 - sparsity) ** (1 / count) >= ENOUGH_LEFT else "taylor"
    callbacks: list[Callback] = [
        SaliencyPruningCallback(schedule, criterion=criterion, refit=refit, **pruner)
    ]
    if isinstance(distill, DistillationCallback):
        callbacks.append(distill)
    elif distill:
        likelihood = pruner.get("likelihood", "categorical")
        weight = 0.5 if distill is True else distill
        # What comes is trained: its best moment is now, not after an epoch at a rate that restarts.
        callbacks.append(DistillationCallback(weight, likelihood=likelihood, teacher="fit_start"))
    if decay:
        callbacks.append(LearningRateDecay(pruning_epochs(epochs)))
    if batch_norm:
        callbacks.append(BatchNormStatistics(forward=pruner.get("forward")))
    return callbacks


def _are_enough(masks: Any, sparsity: float, selection: Any) -> bool:
    """Whether masks are there, and as sparse as whole units, channels or heads come to."""
    given = as_masks(masks)
    chosen = selection if isinstance(selection, Selection) else Selection()
    return bool(given) and chosen.reaches(given or {}, sparsity)


def _faults_of(make: Callable[[], Any]) -> list[str]:
    try:
        make()
    except ValueError as error:
        return [str(error)]
    return []


def pruning_epochs(epochs: int) -> int:
    """Return how many of the epochs belong to pruning; in the next one all masks are in force.

    Example:
        >>> [pruning_epochs(epochs) for epochs in (2, 3, 4, 12)]
        [1, 2, 3, 8]
    """
    return max(1, min(epochs - 1, round(2 * epochs / 3)))


def stages_of(sparsity: float, epochs: int, stages: int | None = None) -> EpochSchedule:
    """Return events at a constant rate, spread evenly over the first two thirds of the epochs.

    After stage k of K the share ``1 - (1 - sparsity)^(k / K)`` is removed.

    Raises:
        ValueError: Arguments out of range; one message names them all.

    Example:
        >>> stages_of(0.9, epochs=3).targets
        {0: 0.6837722339831621, 1: 0.9}
    """
    _raise(stage_faults(sparsity, epochs, stages))
    room = pruning_epochs(epochs)
    count = room if stages is None else stages
    kept = 1 - sparsity
    shares = [1 - kept ** ((k + 1) / count) for k in range(count - 1)] + [sparsity]
    when = [(k + 1) * room // count - 1 for k in range(count)]
    return EpochSchedule(dict(zip(when, shares, strict=True)), epochs)


def stage_faults(sparsity: Any, epochs: Any, stages: Any) -> list[str]:
    """Say what :func:`stages_of` cannot use."""
    faults = count_faults(epochs=epochs)
    if not faults and epochs < 2:
        faults.append(f"epochs: expected at least 2, to prune and to fine-tune, but got {epochs}")
    known = not faults
    if isinstance(sparsity, Threshold) or target_faults({"sparsity": sparsity}) or not sparsity:
        faults.append(f"sparsity: expected a share in (0, 1), but got {sparsity!r}")
    wrong = [] if stages is None else count_faults(stages=stages)
    if known and stages is not None and not wrong and stages > (room := pruning_epochs(epochs)):
        wrong.append(
            f"stages: expected at most {room}, one in each of the first two thirds of {epochs} "
            f"epochs, but got {stages}"
        )
    return faults + wrong


def _raise(faults: list[str]) -> None:
    if faults:
        raise ValueError("\n- ".join(["A recipe cannot use its arguments:", *faults]))
