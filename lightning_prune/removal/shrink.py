"""A smaller model that computes what the masked one does.

Round after round: find the coupled units, read what arrives where, plan what falls, cut, compare.
A round whose outputs differ is undone and its groups are tried one by one; what can't be cut is
kept whole and reported.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_prune._types import Masks
from lightning_prune.passes.isolation import eager, own_randomness, plain_attention
from lightning_prune.removal import attention, layers
from lightning_prune.removal.calls import copied
from lightning_prune.removal.constants import observe
from lightning_prune.removal.control_flow import ways_through
from lightning_prune.removal.dead_units import Plan, plan
from lightning_prune.removal.graph import Graph, Group, load_torch_pruning
from lightning_prune.removal.other_ways import by_layer, obstacle_on
from lightning_prune.removal.outcome import RemovalReport
from lightning_prune.removal.probes import probes, variants
from lightning_prune.removal.proof import COARSE, EXACT, RemovalError, check_rounding, disagreement
from lightning_prune.removal.running import Answered, Run, answering, floats_as, left_alone, runner
from lightning_prune.removal.surgery import Patient, masked_copy


def shrink(
    model: nn.Module,
    *,
    example_inputs: Any,
    masks: Masks | None = None,
    round_to: int = 1,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> nn.Module:
    """Return a copy of the model that computes the same with fewer numbers.

    Units (rows of a Linear, channels of a convolution, with everything they are coupled with) fall
    if all their outgoing weights are zero, or all their incoming ones: such a unit is a constant
    and goes into the biases behind it. That is repeated until nothing more falls. The outputs are
    compared with the masked model's in eval mode; a model that fails is not returned. The model
    that is given stays as it is.

    Args:
        model: Any module; a LightningModule stays one (the copy has no trainer, and is to be
            compiled anew where ``module.compile()`` was called).
        example_inputs: What the model takes, two samples or more: a tensor for ``model(x)``, a
            tuple or list for ``model(*inputs)``, a mapping for ``model(**inputs)``.
        masks: ``True`` = kept, by parameter name, applied to the copy first. By default exact zeros
            in the weights are read.
        round_to: Widths are rounded up to a multiple of this by sparing dead units.
        forward: ``forward(model, example_inputs)``, for a model that is called otherwise.

    Returns:
        A module of the same classes. :func:`shrink_with_report` also says what fell, and what was
        kept whole. Its widths travel by :func:`~lightning_prune.removal.save_shrunk`.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: A mask fits no parameter, or ``round_to`` is not 1 or more.
        RemovalError: The forward depends on the data in a way that no trace shows, a copy of the
            model runs the original's layers, or the outputs differ.

    Warns:
        UserWarning: Nothing could be removed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = nn.init.zeros_(model[2].weight[:, :5])
        >>> shrink(model, example_inputs=torch.randn(3, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    small, report = shrink_with_report(
        model, example_inputs=example_inputs, masks=masks, round_to=round_to, forward=forward
    )
    if report.parameters_after >= report.parameters_before:
        warnings.warn(f"Nothing was removed. {report}", UserWarning, stacklevel=2)
    return small


def shrink_with_report(
    model: nn.Module,
    *,
    example_inputs: Any,
    masks: Masks | None = None,
    round_to: int = 1,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> tuple[nn.Module, RemovalReport]:
    """Return what :func:`shrink` returns, and the report; warn of nothing."""
    load_torch_pruning()
    if isinstance(model, torch.jit.ScriptModule):
        raise RemovalError(
            "Expected a module of Python, but got a ScriptModule, whose layers cannot be cut. "
            "Shrink the model that it was made of, and script or trace the result."
        )
    if round_to < 1 or round_to != int(round_to):
        raise ValueError(f"Expected argument `round_to` to be an int >= 1, but got {round_to!r}.")
    run = runner(forward)
    with _undisturbed():
        masked = masked_copy(model, masks)
        with torch.no_grad(), left_alone(model):
            run(masked, floats_as(example_inputs, None))
        exact = _runs_in_double(masked, example_inputs, run)
        patient = Patient(masked, double=exact)
        own = floats_as(example_inputs, None)
        example = floats_as(own, torch.float64) if exact else own
        given = probes(example)
        with torch.no_grad():
            ways = ways_through(patient.model, given, run)
            unlike = variants(example, patient.model, run)
        report = RemovalReport(parameters_before=_size(model), exact=exact)
        patient = _Shrinking(patient, given, unlike, ways, run, round_to, report).result()
        small = patient.finished(model)
        _check_own_dtype(masked, small, own, ways, run, exact)
        _note_result(model, small, patient, report)
    return small, report


class _Shrinking:
    """The rounds."""

    def __init__(
        self,
        patient: Patient,
        given: Sequence[Any],
        unlike: Sequence[Any],
        ways: Sequence[tuple[bool, ...]],
        run: Run,
        round_to: int,
        report: RemovalReport,
    ) -> None:
        self.patient = patient
        self.given = given
        self.unlike = [*unlike, *(Answered(each, way) for way in ways for each in given)]
        self.ways = ways
        self.run = run
        self.round_to = round_to
        self.report = report
        self.refused: dict[str, str] = {}
        self.expected = self._outputs(patient.model)
        own = next((t.dtype for t in self.expected[0] if t.is_floating_point()), torch.float64)
        self.tolerance = EXACT if report.exact else COARSE * torch.finfo(own).eps

    def result(self) -> Patient:
        """Cut until nothing more falls."""
        attentions = self._heads()
        while True:
            plans = self._plans(None)
            if not plans:
                self.report.whole.update(attentions)
                return self.patient
            before = self.patient.copy()
            why = self._try(plans)
            if why is None:
                self.report.rounds += 1
                continue
            self.patient = before
            self._one_by_one([each.group.root for each in plans], why)

    def _heads(self) -> dict[str, str]:
        """Cut the heads that are not needed; return why the other attentions keep all of theirs."""
        model, kept, fell = self.patient.model, {}, False
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        for name, module in list(model.named_modules()):
            if not isinstance(module, nn.MultiheadAttention):
                continue
            why = attention.obstacle(module, any(uses[id(p)] > 1 for p in module.parameters()))
            if why is None and bool(attention.unneeded(module)[0].any()):
                before = self.patient.copy()
                self.patient.behead(name)
                fault = self._fault()
                if fault is None:
                    fell = True
                    continue
                self.patient, why = before, f"a cut model is not the same: {fault}"
            kind = type(module).__name__
            kept[name] = why or f"a {kind} loses whole heads only, and needs all of its own"
        self.report.rounds += fell
        return kept

    def _one_by_one(self, roots: Sequence[str], why: str) -> None:
        fell = 0
        for root in roots:
            plans = self._plans(root)
            if not plans:
                continue
            before = self.patient.copy()
            why_not = self._try(plans)
            if why_not is not None:
                self.patient = before
                self.refused[root] = f"a cut model is not the same: {why_not}"
            fell += why_not is None
        self.report.rounds += bool(fell)
        if not any(root in self.refused for root in roots) and not fell:
            raise RemovalError(
                f"Cutting changed the model's outputs ({why}); no model is returned."
            )

    def _plans(self, only: str | None) -> list[Plan]:
        model = self.patient.model
        try:
            graph = Graph(model, self.given[0], self.run, {})
            others = [self._groups_on(way) for way in self.ways]
        except Exception as error:  # noqa: BLE001 (torch-pruning fails in many ways)
            self.report.whole["the model"] = f"its layers' coupling could not be traced: {error!r}"
            return []
        arriving = observe(model, self.given, self.unlike, self.run)
        found = []
        for group in graph.groups():
            elsewhere = (obstacle_on(way, group) for way in others)
            obstacle = group.obstacle or next(filter(None, elsewhere), None)
            obstacle = obstacle or self.refused.get(group.root)
            if obstacle is not None:
                made = [link.name for link in group.links if link.side == "outputs"]
                self.report.whole.update(dict.fromkeys(made or [group.root], obstacle))
                continue
            if only is not None and group.root != only:
                continue
            each = plan(group, arriving, self.round_to)
            self.report.notes.pop(group.root, None)
            if each.notes:
                self.report.notes[group.root] = each.notes
            if not each.cut.numel():
                continue
            if not graph.closed(group, each.cut):
                self.refused[group.root] = "some of its units are coupled with others of them"
                self.report.whole[group.root] = self.refused[group.root]
                continue
            found.append(each)
        return found

    def _groups_on(self, way: tuple[bool, ...]) -> dict[str, Group]:
        """Return the groups of another way, on a copy: it may leave behind what none else does."""
        run = answering(self.run, way)
        return by_layer(Graph(copied(self.patient.model), self.given[0], run, {}).groups())

    def _try(self, plans: Sequence[Plan]) -> str | None:
        """Cut, and return what then is wrong."""
        try:
            self.patient.operate(plans)
        except Exception as error:  # noqa: BLE001 (whatever a model's layers may be)
            return f"{type(error).__name__}: {error}"
        return self._fault()

    def _fault(self) -> str | None:
        """Return what is wrong with the model as it is now."""
        try:
            got = self._outputs(self.patient.model)
        except Exception as error:  # noqa: BLE001 (a reshape to a fixed width, for one)
            return f"{type(error).__name__}: {error}"
        for expected, outputs in zip(self.expected, got, strict=True):
            off, where = disagreement(expected, outputs)
            if not off <= self.tolerance:
                return f"{where} differs by {off:.1e}"
        return None

    def _outputs(self, model: nn.Module) -> list[list[Tensor]]:
        with torch.no_grad():
            found = [self.run(model, each) for each in self.given]
            return found + [self.run(copied(model), each) for each in self.unlike]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Run a block outside of the caller's inference mode, autocast, graphs and random numbers."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        eager(),
        plain_attention(),
        own_randomness(torch.device("cpu"), 0, "shrink"),
    ):
        yield


def _runs_in_double(masked: nn.Module, inputs: Any, run: Run) -> bool:
    try:
        with torch.no_grad():
            run(Patient(masked, double=True).model, floats_as(inputs, torch.float64))
    except (RuntimeError, TypeError):  # a dtype in the forward, or a device without float64
        return False
    return True


def _check_own_dtype(
    masked: nn.Module,
    small: nn.Module,
    inputs: Any,
    ways: Sequence[tuple[bool, ...]],
    run: Run,
    exact: bool,
) -> None:
    twin = masked_copy(small, None)
    double = Patient(masked, double=True).model if exact else None
    reference, want, got = [], [], []
    with torch.no_grad():
        # The inputs' own answers first: another way may leave behind what it never would.
        for each in [*probes(inputs), *(Answered(inputs, way) for way in ways)]:
            want += run(masked, each)
            got += run(twin, each)
            if double is not None:
                reference += run(double, floats_as(each, torch.float64))
    if exact:
        check_rounding(reference, want, got)
    else:
        check_rounding(want, want, got, units=COARSE)


def _note_result(
    model: nn.Module, small: nn.Module, patient: Patient, report: RemovalReport
) -> None:
    report.parameters_after = _size(small)
    report.origins = patient.origins
    report.new_biases = tuple(patient.new_biases)
    after = dict(small.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, layers.KNOWN):
            widths = layers.width(module, "outputs"), layers.width(after[name], "outputs")
            if widths[0] != widths[1]:
                report.widths[name] = widths
        elif isinstance(module, nn.MultiheadAttention):
            heads = module.num_heads, cast(nn.MultiheadAttention, after[name]).num_heads
            if heads[0] != heads[1]:
                report.heads[name] = heads
                report.whole.pop(name, None)
        elif any(True for _ in module.parameters(recurse=False)):
            report.whole[name or "the model itself"] = f"a {type(module).__name__} is not cut"


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
