"""What one trace cannot show: a forward that takes another way for other data.

Enters: a model and several inputs of the same shapes. Leaves: the other ways it takes by asking its
tensors yes or no, each as inputs with answers; or an error that names the module whose forward
depends on the numbers in its tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.removal.proof import RemovalError, disagreement
from lightning_prune.removal.running import READS, Answered, Questions, Run

WAYS = 8
"""A forward may take so many ways; one with more is refused."""


def ways_through(model: nn.Module, inputs: Sequence[Any], run: Run) -> list[Answered]:
    """Return all ways that a forward takes by what it asks its tensors, but for the one it takes.

    A question is one that is answered by yes or no: ``if (mask == 0).any():``. On each way the
    model has to do the same, in the same order, for all inputs.

    Args:
        model: The model.
        inputs: Several of the same shapes.
        run: How it is run.

    Returns:
        Each of the inputs with each row of answers that they do not give themselves; nothing, if
        the model asks nothing.

    Raises:
        RemovalError: A module's forward reads a number out of a tensor, takes another way for other
            inputs without asking, fails on a way or takes more than ``WAYS``, or draws random
            numbers in eval mode.
    """
    first: dict[tuple[bool, ...], list[_Step]] = {}
    others = []
    for each in inputs:
        for answers, (steps, natural) in _traces(model, each, run).items():
            _compare(first.setdefault(answers, steps), steps)
            if not natural:
                others.append(Answered(each, answers))
    off, where = disagreement(run(model, inputs[0]), run(model, inputs[0]))
    if off:
        raise RemovalError(
            f"Expected the same output from the same input twice in eval mode, but {where} differed"
            f" by {off:.1e}: the model draws random numbers or keeps a state."
        )
    return others


_Step = tuple[str, str]
"""A module, and an operation of its forward."""


def _traces(
    model: nn.Module, inputs: Any, run: Run
) -> dict[tuple[bool, ...], tuple[list[_Step], bool]]:
    """Return answers -> the steps of that way, and whether these are the inputs' own answers."""
    found: dict[tuple[bool, ...], tuple[list[_Step], bool]] = {}
    ahead: list[tuple[bool, ...]] = [()]
    while ahead:
        told = ahead.pop()
        # A way that these inputs do not take may leave behind what they never would.
        steps, answers = _trace(copy.deepcopy(model) if told else model, inputs, told, run)
        found[answers] = steps, not told
        if len(found) > WAYS:
            raise RemovalError(
                f"Expected a forward of at most {WAYS} ways, but {_asking(steps)} asks its tensors "
                "more often (`if tensor:`, `while tensor:`). Shrink the modules around it one by "
                "one."
            )
        ahead += [
            (*answers[:place], not answers[place]) for place in range(len(told), len(answers))
        ]
    return found


def _compare(first: list[_Step], steps: list[_Step]) -> None:
    if steps == first:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(first, steps, strict=False)) if a != b),
        min(len(first), len(steps)) - 1,
    )
    raise RemovalError(
        f"Expected a forward that is the same for all data, but {first[at][0]} took another way "
        f"for another input of the same shape ({first[at][1]} in one, {steps[at][1]} in the "
        "other), so no trace shows what it needs. Shrink the modules around it one by one."
    )


def _asking(steps: list[_Step]) -> str:
    return next((module for module, operation in steps if operation in READS), "the model")


def _trace(
    model: nn.Module, inputs: Any, told: tuple[bool, ...], run: Run
) -> tuple[list[_Step], tuple[bool, ...]]:
    """Run the model; return its steps, and all answers that it was given."""
    recorder, questions = _Recorder(), Questions(told)
    handles = []
    for name, module in model.named_modules():
        label = f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__}"
        handles.append(module.register_forward_pre_hook(recorder.entering(label)))
        handles.append(module.register_forward_hook(recorder.leave))
    fault, cause = None, None
    try:
        with recorder, questions:
            outputs = run(model, inputs)
        if any(bool(output.isnan().any()) for output in outputs):
            fault = "it returns NaN"  # with which everything would agree
    except Exception as error:
        if not told:
            raise
        fault, cause = f"{type(error).__name__}: {error}", error
    finally:
        for handle in handles:
            handle.remove()
    if recorder.number is not None:
        module, operation = recorder.number
        raise RemovalError(
            f"Expected a forward that is the same for all data, but {module} reads a number out of "
            f"a tensor ({operation}; `float(tensor)` or `.item()` do so), and what it does then no "
            "trace shows. Shrink the modules around it one by one."
        )
    if told and fault is not None:
        raise RemovalError(
            f"Expected a forward that is the same for all data, but {_asking(recorder.steps)} asks "
            f"its tensors (`if tensor:`), and where the answer is another one the model fails: "
            f"{fault}. Shrink the modules around it one by one."
        ) from cause
    return recorder.steps, questions.answers


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of a pass, each with the innermost module that called it.

    Attributes:
        steps: All of them.
        number: The first that read a number out of a tensor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
        self.number: _Step | None = None
        self.inside = ["the model"]

    def entering(self, label: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self.inside.append(label)

        return enter

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inside.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func._schema.name)
        self.steps.append((self.inside[-1], name))
        result = func(*args, **(kwargs or {}))
        if name in READS and type(result) is not bool and self.number is None:
            self.number = self.steps[-1]
        return result
