"""One forward pass -> which torch functions take which parameters.

Enters: a function that runs the model. Leaves: a list of :class:`Call`, in order, each with where
its output gradient arrives, and the names of parameters that were used in a way no rule covers. A
``TorchFunctionMode`` sees every call of a torch function on the Python side, whichever module,
subclass or closure it comes from; nothing is attached to the model, and the mode ends with the
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_prune.exceptions import SaliencyError
from lightning_prune.saliency import rules as _rules  # noqa: F401  (importing the rules registers them)
from lightning_prune.saliency.registry import Rule, lookup


@dataclass(frozen=True)
class Call:
    """One use of one or more parameters by a function with a rule.

    Attributes:
        rule: The class that knows the function.
        arguments: The call's arguments by name.
        names: Role (argument name) -> full name of the parameter passed there.
        edge: Where autograd delivers the gradient at the output, unaffected by later changes in
            place.
        shape: The output's shape.
    """

    rule: type[Rule]
    arguments: Mapping[str, Any]
    names: Mapping[str, str]
    edge: GradientEdge
    shape: torch.Size

    @property
    def signature(self) -> tuple[Any, ...]:
        """What has to be alike for a layout found on one batch to hold on another."""
        return (self.rule, tuple(self.names.items()), len(self.shape))


def backpropagate(
    outputs: Tensor, inputs: Sequence[Any], direction: Tensor, *, keep: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients at tensors or edges for one direction, None where there is no path.

    ``keep`` leaves the graph in place for another direction.

    Raises:
        SaliencyError: The model uses activation checkpoints of a kind that cannot be asked for
            gradients.
    """
    try:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            outputs, inputs, direction, retain_graph=keep, allow_unused=True
        )
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise SaliencyError(
            "Expected a model whose activations autograd can be asked for, but it calls "
            "torch.utils.checkpoint with use_reentrant=True, also in eval mode. Call it with "
            "use_reentrant=False, or only `if self.training`."
        ) from error
    return found


class Capture(TorchFunctionMode):
    """Record the calls that take one of ``parameters`` while the mode is active.

    Args:
        parameters: Full name -> parameter, all of them requiring gradients.

    Attributes:
        calls: The captured calls, in order.
        opaque: Names of parameters that have (also) been used where no rule applies.
        indexed: Whether activations were picked by an index tensor or a mask.
        last_input: The input of the last captured call, with its history.
        work: Multiply-accumulates of each call with a matrix or kernel, whosever it is.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.last_input: Tensor | None = None
        self._versions: list[tuple[Tensor, int, tuple[str, ...]]] = []
        self.calls: list[Call] = []
        self.opaque: set[str] = set()
        self.indexed = False
        self.work: list[int] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **kwargs)
        if func is F.batch_norm:
            _refuse_batch_statistics(args, kwargs)
        if func in _INDEXING and _carries_gradient(args) and _has_tensor(args[1:]):
            self.indexed = True
        used = self._parameters_in((*args, *kwargs.values()))
        output = func(*args, **kwargs)
        rule = lookup(func)
        if rule is not None and "weight" in rule.signature and isinstance(output, Tensor):
            place = rule.signature.index("weight")
            weights = args[place : place + 1]
            self.work += [output.numel() * w.shape[1:].numel() for w in weights if _is_matrix(w)]
        if used and _carries_gradient(output):
            self._record(func, args, kwargs, output, used)
        return output

    def _parameters_in(self, values: Iterable[Any]) -> set[str]:
        found = set()
        for value in values:
            if isinstance(value, (list, tuple)):
                found |= self._parameters_in(value)
            elif id(value) in self._names:
                found.add(self._names[id(value)])
        return found

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        used: set[str],
    ) -> None:
        rule = lookup(func)
        # expand(2, 3) spells its sizes out; only the first argument matters there.
        if rule is None or (
            rule.signature[-1] != "sizes"
            and (not isinstance(output, Tensor) or len(args) > len(rule.signature))
        ):
            self.opaque |= used
            return
        arguments = {**dict(zip(rule.signature, args, strict=False)), **kwargs}
        names = {
            role: self._names[id(arguments[role])]
            for role in rule.roles
            if id(arguments.get(role)) in self._names
        }
        if (
            len(names) < len(used)
            or len(set(names.values())) < len(names)
            or not rule.accepts(arguments)
        ):
            self.opaque |= used
            return
        for role in rule.inputs:
            if isinstance(value := arguments[role], Tensor):
                self._versions.append((value, value._version, tuple(used)))
        self.last_input = arguments[rule.inputs[0]]
        arguments = _detached(arguments)
        self.calls.append(Call(rule, arguments, names, get_gradient_edge(output), output.shape))

    def close(self) -> None:
        """Send parameters whose inputs were changed in place to the generic route.

        That is, in place after the call.
        """
        for value, version, names in self._versions:
            if value._version != version:
                self.opaque.update(names)
        self._versions.clear()


_INDEXING = frozenset(
    {
        torch.Tensor.__getitem__,
        torch.Tensor.__setitem__,
        torch.Tensor.index_select,
        torch.index_select,
        torch.Tensor.gather,
        torch.gather,
        torch.Tensor.masked_select,
        torch.masked_select,
        torch.Tensor.index_add,
        torch.Tensor.index_add_,
        torch.index_add,
        torch.Tensor.scatter,
        torch.scatter,
        torch.Tensor.index_put,
        torch.take_along_dim,
    }
)


def _has_tensor(values: Iterable[Any]) -> bool:
    return any(
        _has_tensor(v) if isinstance(v, (list, tuple)) else isinstance(v, Tensor) for v in values
    )


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


def _detached(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def _carries_gradient(output: Any) -> bool:
    if isinstance(output, (list, tuple)):
        return any(_carries_gradient(value) for value in output)
    return isinstance(output, Tensor) and output.requires_grad


def _refuse_batch_statistics(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    if training:
        raise SaliencyError(
            "Expected batch norm to use its running statistics, but F.batch_norm was called with "
            "training=True: it mixes the samples of a batch, so that P(y|x) of one sample is not "
            "defined. Call model.eval(), and give every batch norm layer track_running_stats=True."
        )


def _without_dispatch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a Python-level torch function that runs its body under a function mode.

    The original hands itself to the mode again as its first act, which would never end; the
    functions called in its body still reach the mode.
    """
    if not isinstance(function, FunctionType):
        raise TypeError(f"Expected a Python function but got {function!r}.")
    namespace = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_ATTENTION = _without_dispatch(F.multi_head_attention_forward)
