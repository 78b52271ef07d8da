"""How a model is run to be proved right, and what comes out of it.

Enters: a model, example inputs, perhaps a ``forward``. Leaves: tensors, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.passes.batches import outside_inference_mode
from lightning_prune.removal.proof import RemovalError

Run: TypeAlias = Callable[[nn.Module, Any], list[Tensor]]
"""``run(model, inputs)``: the tensors in the model's output."""


READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")
"""Operations that hand a number or a truth value of a tensor to Python."""


@dataclass(frozen=True, eq=False)
class Answered:
    """Inputs, and what a forward that asks its tensors yes or no is told when run on them.

    Args:
        inputs: What the model takes.
        answers: In the order of the questions. Later ones are answered by the tensors.
    """

    inputs: Any
    answers: tuple[bool, ...]


class Questions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers the questions that a forward asks its tensors (``if tensor.any():``), as told.

    Attributes:
        answers: Those given so far.
    """

    def __init__(self, told: Sequence[bool] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._told = tuple(told)
        self.answers: tuple[bool, ...] = ()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func._schema.name) not in READS or type(result) is not bool:
            return result
        if len(self.answers) < len(self._told):
            result = self._told[len(self.answers)]
        self.answers += (result,)
        return result


def answering(run: Run, answers: tuple[bool, ...]) -> Run:
    """Return ``run`` with these answers to what the forward asks."""
    return lambda model, inputs: run(model, Answered(inputs, answers))


def runner(forward: Callable[[nn.Module, Any], Any] | None) -> Run:
    """Return the function that runs a model on inputs and lists the tensors of its output.

    It takes :class:`Answered` inputs, too.

    Args:
        forward: ``forward(model, inputs)``; by default a tensor is the model's one argument, a
            tuple or list its positional ones, and a mapping its keyword arguments.
    """

    def run(model: nn.Module, inputs: Any) -> list[Tensor]:
        if isinstance(inputs, Answered):
            with Questions(inputs.answers):
                return run(model, inputs.inputs)
        if forward is not None:
            output = forward(model, inputs)
        elif isinstance(inputs, Mapping):
            output = model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            output = model(*inputs)
        else:
            output = model(inputs)
        return tensors_in(output, model)

    return run


def tensors_in(output: Any, model: nn.Module) -> list[Tensor]:
    """List the tensors in a nested output, in a fixed order.

    Raises:
        RemovalError: There is none.
    """
    found = list(_nested(output))
    if not found:
        raise RemovalError(
            f"Expected {type(model).__name__} to return tensors, nested in any way, but got a "
            f"{type(output).__name__} without any. Pass `forward=lambda model, inputs: tensor`."
        )
    return found


def _nested(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers that torch knows, in other mappings and in objects."""
    seen: dict[int, Any] = {}  # an object may hold itself; kept, so that no id is used again
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, Tensor):
            yield each
            continue
        inner = pytree.tree_leaves(each)
        if len(inner) == 1 and inner[0] is each:
            if id(each) in seen or isinstance(each, _NO_OUTPUTS):
                continue
            seen[id(each)] = each
            inner = _held(each)
        stack += reversed(inner)


_NO_OUTPUTS = (nn.Module, type, ModuleType, FunctionType, MethodType)
"""Through these the walk would leave the output."""


def _held(holder: Any) -> list[Any]:
    """Return what an object holds: its items, its attributes, its slots."""
    inner = [*holder.values()] if isinstance(holder, Mapping) else []
    inner += [*holder] if isinstance(holder, (list, tuple)) else []
    inner += [*getattr(holder, "__dict__", {}).values()]
    slots = [getattr(each, "__slots__", ()) for each in type(holder).__mro__]
    names = [name for each in slots for name in ([each] if isinstance(each, str) else each)]
    return inner + [getattr(holder, name) for name in names if hasattr(holder, name)]


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Refuse, for a block that runs a copy of a model, that a module of the model itself runs.

    A function that was hung on a module and holds on to it (a decorated ``forward``, a lambda over
    ``self``) is not copied along, and whatever is proved of such a copy is proved of the original.

    Raises:
        RemovalError: One does.
    """

    def refuse(module: nn.Module, args: Any) -> None:
        raise RemovalError(
            f"Expected a copy of {type(model).__name__} to run its own layers, but it called a "
            f"{type(module).__name__} of the original: a function set as an attribute of a module, "
            "such as a decorated `forward` or a lambda over `self`, holds on to it. Make it a "
            "method of the class."
        )

    handles = [each.register_forward_pre_hook(refuse) for each in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def floats_as(inputs: Any, dtype: torch.dtype | None) -> Any:
    """Return the inputs as tensors of our own, the floating-point ones in ``dtype`` if given."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        own = leaf.detach().clone()
        return own.to(dtype) if dtype is not None and own.is_floating_point() else own

    if isinstance(inputs, Answered):
        return Answered(floats_as(inputs.inputs, dtype), inputs.answers)
    return pytree.tree_map(cast, outside_inference_mode(inputs))
