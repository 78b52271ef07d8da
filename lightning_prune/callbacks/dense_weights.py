"""Which weights are the dense network's, over one fit and the next.

Enters: when a fit begins, and when it is about to prune. Leaves: the weights to learn from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from lightning_prune.passes.teacher import Teacher

Moment: TypeAlias = Literal["before_pruning", "fit_start"]

_EXTRA = "_extra_state"  # what ends the name of something in a state dict that may be no tensor


class DenseWeights:
    """The dense weights of a model, taken at a moment or given.

    Args:
        source: The moment to take them at, or a state dict.

    Attributes:
        teacher: The dense network; ``None`` until its moment has come.
    """

    def __init__(self, source: Moment | Mapping[str, Tensor]) -> None:
        self.source = source
        self.teacher: Teacher | None = None
        self._of_a_start = False  # taken when a fit began, and nothing has been pruned since
        self._resumed = False
        self._student: Callable[[], nn.Module | None] | None = None

    def set_up(self, module: nn.Module) -> None:
        """Forget the weights of another model; look whether given ones are a copy.

        Raises:
            PruningSetupError: They are the model's own tensors.
        """
        if self._student is not None and self._student() is not module:
            self.teacher, self._of_a_start = None, False
        self._student = weakref.ref(module)
        if not isinstance(self.source, Mapping):
            return
        # Before the model moves to another device, which would part it from what it shares.
        own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())} - {0}
        shared = [
            name
            for name, tensor in self.source.items()
            if not name.endswith(_EXTRA) and tensor.data_ptr() in own
        ]
        if shared:
            raise PruningSetupError(
                "DistillationCallback: expected `teacher` to hold weights of an earlier moment, "
                f"but {shared[0]!r} is the model's own tensor, which pruning and training change "
                "(`state_dict()` does not copy). Take `copy.deepcopy(model.state_dict())` before "
                "the model is pruned."
            )

    def begin(
        self, target: nn.Module, pruners: Collection[SaliencyPruningCallback], module: str | None
    ) -> None:
        """Have the weights that a fit begins with: given, kept, or those of ``target`` now.

        Args:
            target: What is learnt from, its checkpoint restored.
            pruners: Those of the Trainer.
            module: The name of ``target`` in the model, ``None`` for the model itself.

        Raises:
            PruningSetupError: Given or restored weights do not fit ``target``.
        """
        resumed, self._resumed = self._resumed, False
        if isinstance(self.source, Mapping):
            self.teacher, self._of_a_start = _given(self.source, target, module), False
            return
        pruned = any(pruner.sparsity > 0 for pruner in pruners)
        again = bool(pruners) or self.source == "fit_start"
        if self._of_a_start and again and not (pruned or resumed):
            self.teacher = None  # it has learnt since, and is dense still
        if self.teacher is not None:
            if not self.teacher.fits(target):
                raise PruningSetupError(
                    "DistillationCallback: expected the dense weights from the checkpoint to fit "
                    f"{called(module)}, but names or shapes differ. Resume with the model that was "
                    "pruned and the same `module`, or use a new DistillationCallback."
                )
            self.teacher = self.teacher.like(target)
        elif pruned or not pruners or self.source == "fit_start":
            if pruned and self._holds_masks(pruners):
                rank_zero_warn(_PRUNED)
            self.teacher, self._of_a_start = Teacher.of(target), not pruned

    def _holds_masks(self, pruners: Collection[SaliencyPruningCallback]) -> bool:
        """Whether the masks are in the weights yet: a pruner further down the list puts them in."""
        model = None if self._student is None else self._student()
        weights = {} if model is None else dict(model.named_parameters())
        # Masks that are not this model's are the pruner's to refuse, wherever it stands.
        return all(
            name in weights
            and weights[name].shape == mask.shape
            and not weights[name][~mask.to(weights[name].device)].any()
            for pruner in pruners
            for name, mask in pruner._pruner.keeper.in_force.items()
        )

    def keep(self, target: nn.Module) -> None:
        """Keep the weights before they are pruned, if none are kept yet."""
        if self.teacher is None:
            self.teacher = Teacher.of(target)
        self._of_a_start = False

    def pack(self) -> dict[str, Any]:
        """Return what a resumed run has to know."""
        weights = None if self.teacher is None else dict(self.teacher.weights)
        return {"teacher": weights, "of_a_start": self._of_a_start}

    def unpack(self, state: Mapping[str, Any]) -> None:
        """Go on with the run that ``state`` is from."""
        weights = state["teacher"]
        self.teacher = None if weights is None else Teacher(weights)
        self._of_a_start, self._resumed = state.get("of_a_start", False), True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_student": None}  # a weak reference cannot be pickled


_PRUNED = (
    "DistillationCallback: the model is pruned already (its pruner has masks: given, of a "
    "checkpoint or of an earlier fit), and no weights of this model from before are kept. It "
    "learns from the pruned model as it is now. To learn from the dense one give its weights: "
    "`teacher=copy.deepcopy(model.state_dict())`, taken before the pruning."
)


def called(module: str | None) -> str:
    """Return what to call the target in messages."""
    return "the model" if module is None else f"{module!r}"


def source_fault(source: Any) -> str | None:
    """Say what of the argument ``teacher`` is neither a moment nor a state dict."""
    if isinstance(source, str) and source in get_args(Moment):
        return None
    if isinstance(source, Mapping):
        odd = [
            f"{name!r} is a {type(value).__name__}"
            for name, value in source.items()
            if not (isinstance(value, Tensor) or str(name).endswith(_EXTRA))
        ]
        if source and not odd:
            return None
        got = f"a mapping where {odd[0]}" if odd else "an empty mapping"
    else:
        got = f"{source!r:.100}"
    return (
        f"`teacher`: expected it to be one of {get_args(Moment)} or a state dict (names to "
        f"tensors), but got {got}"
    )


def _given(weights: Mapping[str, Tensor], target: nn.Module, module: str | None) -> Teacher:
    """Return given weights as a teacher, by the target's own names or by the whole model's."""
    prefix = f"{module}."
    inner = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    fault = ""
    for named in (weights, inner):
        if named:
            try:
                return Teacher.given(target, named)
            except ValueError as error:
                fault = str(error)
    raise PruningSetupError(
        f"DistillationCallback: expected `teacher` to be a state dict of {called(module)}, "
        f"but {fault}. Take it from the same model: `copy.deepcopy(model.state_dict())`, or "
        "`torch.load(path)['state_dict']` of a Lightning checkpoint."
    )
