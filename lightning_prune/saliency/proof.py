"""Which parameters have closed forms in this model, proved on two of its samples.

Enters: a model and a batch. Leaves: a :class:`~lightning_prune.saliency.plan.Plan`. Two samples
are run through the model once; plain autograd says what each parameter's squared gradients are, and
only parameters for which the captured calls give the same number take the fast route. So a use of a
parameter that went unseen, a sample axis that is not where it seemed, or samples that mix cannot
end in a wrong score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.passes.batches import batch_size, take_samples, whole_or_part
from lightning_prune.saliency.capture import Call, Capture, backpropagate
from lightning_prune.saliency.head import head_weight
from lightning_prune.saliency.plan import PROBE_SAMPLES, TRIES, Plan, Signature, signature
from lightning_prune.saliency.registry import Layout, Rule, in_score_precision
from lightning_prune.saliency.target import check_finite
from lightning_prune.saliency.uses import Uses

_AGREEMENT = {torch.float64: 1e-6, torch.float32: 2e-3}
"""Largest difference, relative to the largest score, at which a closed form counts as proved."""

PORTIONS = 16
"""Parameters are proved in portions of this part of the work space."""


class Plans:
    """The plans of one model, made as its batches ask for them.

    Args:
        run: batch -> logits.
        parameters: Full name -> parameter.
        workspace: Bytes of work space.

    Attributes:
        reached: Names of the parameters that some output depends on.
    """

    def __init__(
        self, run: Callable[[Any], Tensor], parameters: Mapping[str, Tensor], workspace: int
    ) -> None:
        self._run = run
        self._parameters = parameters
        self._workspace = workspace
        self._plans: dict[Signature, Plan] = {}
        self.reached: set[str] = set()

    @property
    def latest(self) -> Plan:
        """The plan made last."""
        return next(reversed(self._plans.values()))

    @property
    def unreached(self) -> list[str]:
        """The parameters that no output has depended on so far."""
        return [name for name in self._parameters if name not in self.reached]

    def prepare(self, batch: Any) -> None:
        """Make a plan on the first batch; look for missing proof on the next ones."""
        if not self._plans:
            self.make(batch)
            return
        for plan in [plan for plan in self._plans.values() if plan.unproved and plan.tries]:
            plan.tries -= 1
            key, other = make_plan(self._run, batch, self._parameters, self._workspace)
            if self._plans.get(key) is plan:
                plan.confirm(other)

    def make(self, batch: Any) -> None:
        """Make the plan for batches like this one."""
        key, plan = make_plan(self._run, batch, self._parameters, self._workspace)
        self._plans[key] = plan
        self.reached |= plan.closed | plan.generic

    def find(self, capture: Capture, logits: Tensor) -> Plan | None:
        """Return the plan that holds for a captured pass, or None."""
        plan = self._plans.get(signature(capture.calls, capture.opaque))
        return plan if plan is not None and plan.fits(capture.calls, len(logits)) else None

    def settle(self, batch: Any, capture: Capture, logits: Tensor) -> Plan:
        """Return the plan for a captured pass: made now if need be, all generic if none holds."""
        if signature(capture.calls, capture.opaque) not in self._plans:
            self.make(batch)
        plan = self.find(capture, logits)
        if plan is None or (capture.indexed and not isolated(logits, capture.calls, plan.layouts)):
            return Plan.all_generic(capture.calls, self._parameters, logits)
        return plan


def make_plan(
    run: Callable[[Any], Tensor], batch: Any, parameters: Mapping[str, Tensor], workspace: int
) -> tuple[Signature, Plan]:
    """Return the plan for batches like this one, and the signature it belongs to.

    Tries the closed forms on the batch's first and last sample and compares them with autograd.
    """
    size = batch_size(batch)
    pair = take_samples(batch, torch.tensor([0, size - 1]))
    with whole_or_part(run, batch), Capture(parameters) as capture:
        logits = run(pair)
    capture.close()
    if not logits.requires_grad:
        return signature(capture.calls, capture.opaque), Plan.all_generic(capture.calls, (), logits)
    check_finite(logits)
    gradients = _output_gradients(logits, capture.calls)
    layouts = [_find_layout(g, call.rule) for g, call in zip(gradients, capture.calls, strict=True)]
    reached, closed, unproved = set[str](), set[str](), set[str]()
    for portion in _portions(parameters, workspace):
        exact = _exact(logits, portion)
        uses = Uses(capture.calls, layouts, set(exact) - capture.opaque, PROBE_SAMPLES, workspace)
        both = [gradients[i][0] + gradients[i][1] for i in uses.indices]
        agreeing = _agreeing(uses, both, exact, portion)
        reached |= set(exact)
        closed |= agreeing
        unproved |= {name for name in agreeing if not bool(exact[name].any())}
        del exact  # the next portion comes into its place
    plan = Plan(layouts, closed, reached - closed, logits.shape[1:])
    plan.shapes = [call.shape for call in capture.calls]
    plan.unproved = unproved
    plan.tries = TRIES
    plan.work = sum(capture.work[1:]) // PROBE_SAMPLES
    plan.head = not plan.generic and _head_agrees(capture, logits, plan, parameters, workspace)
    return signature(capture.calls, capture.opaque), plan


def _head_agrees(
    capture: Capture,
    logits: Tensor,
    plan: Plan,
    parameters: Mapping[str, Tensor],
    workspace: int,
) -> bool:
    """Tell whether a linear layer ends the model and squares alone can be followed below it.

    Tried with the squares of a single direction, whose signs are lost on the way.
    """
    weight, below = head_weight(capture, logits), capture.last_input
    if weight is None or below is None:
        return False
    calls, layouts = capture.calls[:-1], plan.layouts[:-1]
    names = plan.closed - set(capture.calls[-1].names.values())
    direction = (_direction(logits) @ weight).abs()
    squared = {name: parameter for name, parameter in parameters.items() if name in names}
    for portion in _portions(squared, workspace):
        uses = Uses(calls, layouts, set(portion), PROBE_SAMPLES, workspace)
        found = backpropagate(below, uses.edges, direction, keep=True)
        if _agreeing(uses, found, _exact(logits, portion), portion) != set(portion):
            return False
    return True


def _agreeing(
    uses: Uses,
    gradients: Sequence[Tensor | None],
    exact: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
) -> set[str]:
    """Return the names for which the closed forms give what is exact."""
    found = {name: torch.zeros_like(exact[name]) for name in uses.names}
    uses.add(gradients, found)
    uses.finish(found)
    agreeing = set()
    for name, total in found.items():
        loose = _AGREEMENT.get(parameters[name].dtype, 0.1)
        if bool(total.sub_(exact[name]).abs_().max() <= loose * exact[name].max()):
            agreeing.add(name)
    return agreeing


def _direction(logits: Tensor) -> Tensor:
    """Return a direction without structure, drawn without random numbers."""
    return (
        torch.arange(logits.numel(), device=logits.device)
        .mul(1.7)
        .cos()
        .reshape(logits.shape)
        .to(logits.dtype)
    )


def _alone(logits: Tensor) -> list[Tensor]:
    """Return a direction for each of two samples by itself."""
    direction = _direction(logits)
    first, second = torch.zeros_like(direction), torch.zeros_like(direction)
    first[0], second[1] = direction[0], direction[1]
    return [first, second]


def _output_gradients(logits: Tensor, calls: Sequence[Call]) -> list[list[Tensor]]:
    """Return, for each call, the gradients at its output, from each sample by itself."""
    gradients: list[list[Tensor]] = [[] for _ in calls]
    edges = [call.edge for call in calls]
    for alone in _alone(logits) if calls else ():
        found = backpropagate(logits, edges, alone, keep=True)
        for into, call, gradient in zip(gradients, calls, found, strict=True):
            into.append(logits.new_zeros(call.shape) if gradient is None else gradient)
    return gradients


def _portions(parameters: Mapping[str, Tensor], workspace: int) -> Iterator[dict[str, Tensor]]:
    """Cut parameters into portions with a small part of the work space, one parameter at least.

    Proof takes two copies of what it looks at, in the scores' precision.
    """
    portion: dict[str, Tensor] = {}
    left = workspace // PORTIONS
    for name, parameter in parameters.items():
        left -= parameter.numel() * parameter.element_size()
        if left < 0 and portion:
            yield portion
            portion = {}
            left = workspace // PORTIONS - parameter.numel() * parameter.element_size()
        portion[name] = parameter
    if portion:
        yield portion


def _exact(logits: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the exact sum of squares, by autograd, of each parameter that is reached.

    From the same directions as :func:`_output_gradients`.
    """
    exact: dict[str, Tensor] = {}
    for alone in _alone(logits):
        _add_squares(
            exact, parameters, backpropagate(logits, [*parameters.values()], alone, keep=True)
        )
    return exact


def _add_squares(
    exact: dict[str, Tensor], names: Iterable[str], gradients: Sequence[Tensor | None]
) -> None:
    # A function of its own, as its gradients are to be gone before there are others.
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            dense = in_score_precision(gradient.to_dense() if gradient.is_sparse else gradient)
            if name in exact:
                exact[name].addcmul_(dense, dense)
            else:
                exact[name] = dense.square()


def isolated(logits: Tensor, calls: Sequence[Call], layouts: Sequence[Layout | None]) -> bool:
    """Tell whether every sample of this batch keeps to its own part of every call.

    Costs one backward pass. The plan was proved on two samples; where a model picks samples or
    positions by index (experts, masks), another batch may be laid out in another way although it
    looks the same.
    """
    known = [i for i, layout in enumerate(layouts) if layout is not None]
    scattered = torch.arange(len(logits), device=logits.device).mul(1.7).sin() > 0
    some = _direction(logits) * scattered.reshape(-1, *[1] * (logits.ndim - 1))
    gradients = backpropagate(logits, [calls[i].edge for i in known], some, keep=True)
    for i, gradient in zip(known, gradients, strict=True):
        layout = layouts[i]
        if gradient is None or layout is None:
            continue
        by_sample = (
            layout.split(gradient, len(logits)).movedim(layout.axis, 0).reshape(len(logits), -1)
        )
        if by_sample[~scattered].any():
            return False
    return True


def _find_layout(gradients: Sequence[Tensor], rule: type[Rule]) -> Layout | None:
    """Return the layout in which each sample's gradient stays in its own part, or None."""
    first, second = gradients
    for layout in rule.layouts:
        axis = 0 if layout is Layout.INTERLEAVED else layout.axis
        if first.ndim <= axis or first.shape[axis] % PROBE_SAMPLES:
            continue
        if layout is Layout.SECOND and first.shape[1] != PROBE_SAMPLES:
            continue
        halves = [layout.split(g, PROBE_SAMPLES).movedim(layout.axis, 0) for g in (first, second)]
        middle = len(halves[0]) // PROBE_SAMPLES
        if not halves[0][middle:].any() and not halves[1][:middle].any():
            return layout
    return None
