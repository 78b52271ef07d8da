"""What one trace cannot show: a forward that takes another way for other data.

Enters: a model and several inputs of the same shapes. Leaves: the other ways it takes by asking its
tensors yes or no, each as the answers that lead there; or an error that names the module whose
forward depends on the numbers in its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.removal.calls import copied
from lightning_prune.removal.probes import telling
from lightning_prune.removal.proof import RemovalError, disagreement
from lightning_prune.removal.running import READS, Answered, Questions, Run

WAYS = 8
"""A forward may take so many ways; one with more is refused."""

_Answers = tuple[bool, ...]

_Step = tuple[str, str]
"""A module, and an operation of its forward."""

_SHRINK_AROUND = "Shrink the modules around it one by one."


def ways_through(model: nn.Module, inputs: Sequence[Any], run: Run) -> list[_Answers]:
    """Return the ways that a forward takes by what it asks its tensors, but for the first input's.

    A question is one that is answered by yes or no: ``if (mask == 0).any():``. On each way the
    model has to do the same, in the same order, for all inputs.

    Args:
        model: The model.
        inputs: Several of the same shapes.
        run: How it is run.

    Returns:
        The answers that lead to each of the other ways; nothing, if the model asks nothing.

    Raises:
        RemovalError: A module's forward reads a number out of a tensor, takes another way for other
            inputs without asking, fails on a way or takes more than ``WAYS``, or draws random
            numbers in eval mode.
    """
    steps: dict[_Answers, list[_Step]] = {}
    for each in inputs:
        for answers, found in _traces(model, each, run).items():
            _compare(steps.setdefault(answers, found), found)
    _, *others = steps
    for each in (inputs[0], *(Answered(inputs[0], answers) for answers in others)):
        # On its own way the same model twice: it may keep a state.
        one, two = (model, model) if each is inputs[0] else (copied(model), copied(model))
        off, where = disagreement(run(one, each), run(two, each))
        if off:
            raise RemovalError(
                "Expected the same output from the same input twice in eval mode, but "
                f"{where} differed by {off:.1e}: the model draws random numbers or keeps a state."
            )
    return others


def _traces(model: nn.Module, inputs: Any, run: Run) -> dict[_Answers, list[_Step]]:
    """Return the steps of each way by the answers that lead there, the inputs' own way first."""
    found: dict[_Answers, list[_Step]] = {}
    ahead: list[_Answers] = [()]
    while ahead:
        told = ahead.pop()
        # A way that these inputs do not take may leave behind what they never would.
        steps, answers = _trace(copied(model) if told else model, inputs, told, run)
        found[answers] = steps
        if len(found) > WAYS:
            raise _too_many(_asked(steps)[-1])
        ahead += [
            (*answers[:place], not answers[place]) for place in range(len(told), len(answers))
        ]
    return found


def _too_many(module: str) -> RemovalError:
    return RemovalError(
        f"Expected a forward of at most {WAYS} ways, but {module} asks its tensors more often "
        f"(`if tensor:`, `while tensor:`). {_SHRINK_AROUND}"
    )


def _asked(steps: list[_Step]) -> list[str]:
    return [module for module, operation in steps if operation in READS]


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
        f"other), so no trace shows what it needs. {_SHRINK_AROUND}"
    )


def _trace(model: nn.Module, inputs: Any, told: _Answers, run: Run) -> tuple[list[_Step], _Answers]:
    """Run the model; return its steps, and all answers that it was given."""
    recorder, questions = _Recorder(), Questions(told)
    handles = []
    for name, module in model.named_modules():
        label = f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__}"
        handles.append(module.register_forward_pre_hook(recorder.entering(label)))
        handles.append(module.register_forward_hook(recorder.leave))
    try:
        with recorder, questions:
            outputs = run(model, inputs)
    except (RemovalError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not told:
            raise
        raise _failed(recorder.steps, told, f"{type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if told and not telling(outputs):
        raise _failed(recorder.steps, told, "it returns NaN, or nothing finite")
    return recorder.steps, questions.answers


def _failed(steps: list[_Step], told: _Answers, fault: str) -> RemovalError:
    return RemovalError(
        f"Expected a forward that is the same for all data, but {_asked(steps)[len(told) - 1]} "
        "asks its tensors (`if tensor:`), and where the answer is another one the model fails: "
        f"{fault}. {_SHRINK_AROUND}"
    )


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of a pass, each with the innermost module that called it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
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
        module, operation = self.inside[-1], str(func._schema.name)
        self.steps.append((module, operation))
        result = func(*args, **(kwargs or {}))
        if operation in READS:
            if type(result) is not bool:
                raise RemovalError(
                    f"Expected a forward that is the same for all data, but {module} reads a "
                    f"number out of a tensor ({operation}; `float(tensor)` or `.item()` do so), "
                    f"and what it does then no trace shows. {_SHRINK_AROUND}"
                )
            if len(_asked(self.steps)) >= WAYS:  # each of so many questions has another way
                raise _too_many(module)
        return result
