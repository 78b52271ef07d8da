"""The pruned network learns from the dense one it was, on the user's own batches.

Enters: Lightning's hooks. Leaves: a dense network that is kept, and training steps whose logits are
listened to while their loss is Lightning's to backpropagate; what happens there is
:mod:`logit_term`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune._targets import is_number
from lightning_prune._types import Likelihood
from lightning_prune.callbacks.batch_sources import callbacks_of
from lightning_prune.callbacks.dense_weights import DenseWeights, Moment, called, source_fault
from lightning_prune.callbacks.logit_term import LogitTerm
from lightning_prune.callbacks.preflight import PruningSetupError, refuse_trainer
from lightning_prune.callbacks.reporting import give_back, without_lent
from lightning_prune.callbacks.running_means import RunningMeans
from lightning_prune.callbacks.saliency_pruning import pruners_of
from lightning_prune.passes.batches import read_labels
from lightning_prune.passes.teacher import Teacher


class DistillationCallback(Callback):
    """Learn from the dense copy of the network, beside the labels.

    The weights before the first pruning event are kept, or those that ``teacher`` says; from then
    on each training step minimises ``(1 - weight) * loss + weight * T^2 KL(dense || pruned)``, both
    at temperature T (Hinton, Vinyals and Dean, 2015, "Distilling the knowledge in a neural
    network"). It costs one forward pass of the dense network a step: there is no second pass of the
    student, as the mixture is made where the user's loss comes back to the logits.
    ``training_step`` stays as it is. What part of the loss does not come back through the logits (a
    penalty on weights, a loss on activations) keeps its full weight, and each call of the network
    in a step has a term of its own.

    The dense network answers on the model's own modules, before the student does: your forward
    hooks and counters see two passes, of which the student's is the last. What ``forward`` logs
    by ``self.log`` is the student's only.

    The divergence is the mean over the predictions of a call, without positions whose labels in the
    batch are -100, so it stands beside a loss that is a mean too, as torch's are by default. With
    ``accumulate_grad_batches``, mixed precision and DDP it is divided, scaled and averaged as
    Lightning does it with the loss. With manual optimization it joins what goes through
    ``self.manual_backward``, and a loss that is divided by hand has a term that is not.

    Without a pruner in the Trainer the dense network is the model at the start of the fit. Once the
    model is pruned, later fits with this callback keep the dense network that they have; as long as
    it is not, the next fit with a pruner (any, with ``"fit_start"``) takes it anew, and so does a
    fit of another model.

    Args:
        weight: The share of the distance from the dense network, in [0, 1]; the loss has the rest.
        temperature: T: softens both distributions, so that the dense network's smaller
            probabilities count for more. Without effect on a ``gaussian`` likelihood.
        module: The name of the submodule whose output the loss is computed from, such as ``"net"``,
            where ``training_step`` calls that instead of ``self(...)``. A call of it within
            ``torch.utils.checkpoint.checkpoint`` needs ``use_reentrant=False``.
        likelihood: How the output is read: ``"categorical"`` logits over classes (last axis of
            (N, C), axis 1 of (N, C, ...)), ``"bernoulli"`` logits, or a ``"gaussian"`` regression.
        teacher: Where the dense weights come from. ``"before_pruning"``: from the moment before the
            first event, right where the fit itself trains the dense network. ``"fit_start"``: from
            the start of the fit, right where the network is trained already, as the epochs before
            the first event, at a learning rate that starts anew, may have made it worse. A state
            dict (name to tensor, of the model, or of ``module`` by its own names): these, in each
            fit; for a network that is pruned before the fit, as :func:`~lightning_prune.prune` does
            it: ``copy.deepcopy(model.state_dict())`` from before. The latter two are learnt from in
            the first epoch already. In a resumed run the dense weights are the checkpoint's; a
            state dict given again comes before them.

    Raises:
        ValueError: Arguments out of range; one message names them all.
        PruningSetupError: In a fit: a state dict of other names or shapes, or that is the model's
            own tensors instead of copies; there is no such submodule, a training step never calls
            it, or its output is neither logits nor has an attribute ``logits``.

    Logs ``distill/loss``, the divergence in nats without its weight, once an epoch. The kept
    weights are in every checkpoint.

    Example:
        >>> DistillationCallback(weight=0.7, temperature=4.0).weight
        0.7
    """

    inject: tuple[str, ...] = ()  # told of events as sources of generated batches are; has none

    def __init__(
        self,
        weight: float = 0.5,
        temperature: float = 1.0,
        *,
        module: str | None = None,
        likelihood: Likelihood = "categorical",
        teacher: Moment | Mapping[str, Tensor] = "before_pruning",
    ) -> None:
        super().__init__()
        _check_arguments(weight, temperature, likelihood, teacher)
        self.weight, self.temperature = weight, temperature
        self.module, self.likelihood = module, likelihood
        self._dense = DenseWeights(teacher)
        self._term = LogitTerm(weight, temperature, likelihood, self._dense)
        self._terms = RunningMeans()
        self._passed = self._warned = False
        self._joined = True

    # ------------------------------------------------------------------ the dense network

    @property
    def _teacher(self) -> Teacher | None:
        return self._dense.teacher

    def scoring_batches(
        self, trainer: Trainer, pl_module: LightningModule, samples: int
    ) -> Iterator[Any]:
        """Yield nothing: there are no generated batches here."""
        return iter(())

    def before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights as the teacher, if there is none yet. Called before masks change."""
        self._dense.keep(self._target(pl_module))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_trainer(trainer)
            self._dense.set_up(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A checkpoint has been restored by now: the teacher may have come with it, on the CPU.
        self._dense.begin(self._target(pl_module), pruners_of(trainer), self.module)

    def _target(self, pl_module: LightningModule) -> nn.Module:
        if self.module is None:
            return pl_module
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            names = [name for name, _ in pl_module.named_children()]
            raise PruningSetupError(
                f"DistillationCallback: expected `module` to name a submodule, but there is no "
                f"{self.module!r}. The model's own are {names}."
            ) from None

    # ------------------------------------------------------------------ training steps

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target = self._target(pl_module)
        # DDP hands training_step over in the disguise of a call of the whole model.
        disguised = target is pl_module and trainer.strategy.model is not pl_module
        level = int(disguised)
        self._term.attach(target, called(self.module), self._took_part, pl_module, level)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._terms.finish()
        self._joined = self._teacher is None  # nothing is missed where there is none

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._term.listen(read_labels(batch))

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        automatic = pl_module.automatic_optimization
        self._term.factor = scale / (trainer.accumulate_grad_batches if automatic else 1)
        self._passed = True
        # In manual optimization the step may go on to call the model for its next loss.
        self._term.listening = not automatic

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._term.factor = None

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self._term.listening = True  # LBFGS asks for the training step again

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._term.end_step()
        if self._passed and not self._term.called:
            children = [name for name, _ in pl_module.named_children()]
            raise PruningSetupError(
                f"DistillationCallback: expected training_step to call {called(self.module)}, but "
                f"it did not, so there are no logits to compare. Name the submodule that it calls: "
                f"`module=` one of {children}, or deeper ones. Where it does within "
                "torch.utils.checkpoint.checkpoint, pass that `use_reentrant=False`, or leave "
                "`module` out (`module=None`)."
            )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        means = self._terms.finish()
        if not (self._joined or self._warned):
            self._warned = True
            rank_zero_warn(
                "DistillationCallback: nothing was learnt from the dense network in this epoch: no "
                f"loss came back to the output of {called(self.module)}. With manual optimization "
                "call `self.manual_backward(loss)`; otherwise name the submodule whose output the "
                "loss is computed from: `module=`."
            )
        # One call an epoch: Lightning's own epoch mean would cost as much as the term.
        others = [c for c in callbacks_of(trainer) if isinstance(c, DistillationCallback)]
        index = others.index(self) + 1
        prefix = "distill" if index == 1 else f"distill_{index}"
        logged = {f"{prefix}/{name}": mean for name, mean in means.items()}
        if logged and not trainer.barebones:
            pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    # ------------------------------------------------------------------ the end, and checkpoints

    def _let_go(self) -> None:
        """Leave nothing behind on the model; the dense weights stay."""
        self._term.detach()
        self._passed = False

    def _took_part(self, loss: Tensor) -> None:
        self._terms.add({"loss": loss}, 1)
        self._joined = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._let_go()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()
        give_back(self)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._dense.pack()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._dense.unpack(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return without_lent(self)


def _check_arguments(weight: float, temperature: float, likelihood: str, teacher: Any) -> None:
    faults = [
        f"`{argument}`: expected it to be {wanted}, but got {value!r}"
        for argument, value, fine, wanted in (
            ("weight", weight, is_number(weight) and 0 <= weight <= 1, "in [0, 1]"),
            (
                "temperature",
                temperature,
                is_number(temperature) and 0 < temperature < float("inf"),
                "above 0",
            ),
            (
                "likelihood",
                likelihood,
                likelihood in get_args(Likelihood),
                f"one of {get_args(Likelihood)}",
            ),
        )
        if not fine
    ]
    if fault := source_fault(teacher):
        faults.append(fault)
    if faults:
        raise ValueError("\n- ".join(["DistillationCallback cannot use its arguments:", *faults]))
