"""What no trace can show: a forward that takes another way for other data.

Enters: a model and several inputs of the same shapes. Leaves: nothing, or an error that names the
module whose forward depends on the numbers in its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.removal.proof import RemovalError, disagreement
from lightning_prune.removal.running import Run

_READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")


def check_control_flow(model: nn.Module, inputs: Sequence[Any], run: Run) -> None:
    """Check that the model does the same, in the same order, for all inputs.

    Raises:
        RemovalError: A module's forward reads a number out of a tensor, takes another way for other
            inputs, or draws random numbers in eval mode.
    """
    traces = [_trace(model, each, run) for each in inputs]
    for steps in traces:
        for module, operation in steps:
            if operation in _READS:
                raise RemovalError(
                    f"Expected a forward that is the same for all data, but {module} reads a "
                    f"number out of a tensor ({operation}; `if tensor:`, `float(tensor)` or "
                    "`.item()` do so), and what it does then no trace shows. Shrink the modules "
                    "around it one by one."
                )
    first = traces[0]
    for steps in traces[1:]:
        if steps != first:
            at = next(
                (i for i, (a, b) in enumerate(zip(first, steps, strict=False)) if a != b),
                min(len(first), len(steps)) - 1,
            )
            raise RemovalError(
                f"Expected a forward that is the same for all data, but {first[at][0]} took "
                f"another way for another input of the same shape ({first[at][1]} in one, "
                f"{steps[at][1]} in the other), so no trace shows what it needs. Shrink the "
                "modules around it one by one."
            )
    off, where = disagreement(run(model, inputs[0]), run(model, inputs[0]))
    if off:
        raise RemovalError(
            f"Expected the same output from the same input twice in eval mode, but {where} differed"
            f" by {off:.1e}: the model draws random numbers or keeps a state."
        )


def _trace(model: nn.Module, inputs: Any, run: Run) -> list[tuple[str, str]]:
    recorder = _Recorder()
    handles = []
    for name, module in model.named_modules():
        label = f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__}"
        handles.append(module.register_forward_pre_hook(recorder.entering(label)))
        handles.append(module.register_forward_hook(recorder.leave))
    try:
        with recorder:
            run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.steps


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of a pass, each with the innermost module that called it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[str, str]] = []
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
        self.steps.append((self.inside[-1], str(func._schema.name)))
        return func(*args, **(kwargs or {}))
