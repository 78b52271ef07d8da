"""Which parameters of a model are pruned, and why the others are not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

NORMS = (
    nn.modules.batchnorm._NormBase,  # batch norm and instance norm of any dimension
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Prunable:
    """The outcome of :func:`find_prunable`.

    Args:
        parameters: The parameters to prune, by full name, in the model's order.
        left_out: Name -> why the parameter is not among them.
    """

    parameters: dict[str, nn.Parameter]
    left_out: dict[str, str]


def find_prunable(model: nn.Module, names: Iterable[str] | None = None) -> Prunable:
    """Decide which parameters are pruned.

    By default the weights of all layers: parameters with two or more axes (matrices, kernels,
    embeddings), except biases and the weights of normalisation layers. Frozen parameters are
    included, and pruning does not thaw them. A tied parameter counts once, under the first of its
    names.

    Args:
        model: Any module.
        names: Prune exactly these instead, whatever they are; full ``named_parameters()`` names.

    Raises:
        TypeError: ``names`` is a single string.
        ValueError: A name is unknown (the message shows close ones) or given for a parameter that
            cannot be pruned, or nothing is left to prune. All faults are in one message.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
        >>> prunable = find_prunable(model)
        >>> list(prunable.parameters)
        ['0.weight', '2.weight']
        >>> prunable.left_out["0.bias"], prunable.left_out["1.weight"]
        ('a bias', 'part of a BatchNorm2d')
    """
    owners = _owners(model)
    present = dict(model.named_parameters())
    if names is None:
        reasons = {
            name: _why_not(name, parameter, owners[name]) for name, parameter in present.items()
        }
        chosen = {name: p for name, p in present.items() if reasons[name] is None}
        if not chosen:
            raise ValueError(
                f"Expected a model with weights to prune, but {type(model).__name__} has none: "
                f"{reasons or 'no parameters at all'}."
            )
        return Prunable(chosen, {name: reason for name, reason in reasons.items() if reason})
    wanted = _checked_names(names, present)
    others = {name: "not named" for name in present if name not in wanted}
    return Prunable({name: p for name, p in present.items() if name in wanted}, others)


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{prefix}.{leaf}" if prefix else leaf: module
        for prefix, module in model.named_modules()
        for leaf in module._parameters
    }


def _why_not(name: str, parameter: Tensor, owner: nn.Module) -> str | None:
    """Return why a parameter is not pruned by default, ``None`` if it is."""
    if (reason := _why_impossible(parameter)) is not None:
        return reason
    if "bias" in name.rpartition(".")[2].split("_"):
        return "a bias"
    if isinstance(owner, NORMS):
        return f"part of a {type(owner).__name__}"
    if isinstance(owner, ParametrizationList):
        return "parametrised: a zero in it is no zero in the weight"
    if parameter.ndim < 2:
        return "a vector, not a matrix or a kernel"
    return None


def _why_impossible(parameter: Tensor) -> str | None:
    if isinstance(parameter, UninitializedParameter):
        return "not initialised yet (a lazy module: run one batch through the model first)"
    if not parameter.is_floating_point():
        return f"of dtype {parameter.dtype}"
    return None


def _checked_names(names: Iterable[str], present: dict[str, nn.Parameter]) -> set[str]:
    if isinstance(names, str):
        raise TypeError(f"Expected argument `parameters` to be a list of names, but got {names!r}.")
    wanted = list(names)
    faults = [] if wanted else ["the list is empty"]
    for name in wanted:
        if name not in present:
            close = difflib.get_close_matches(str(name), present, n=3)
            hint = (
                f"did you mean {' or '.join(map(repr, close))}?"
                if close
                else f"there are {list(present)}"
            )
            faults.append(f"{name!r}: no parameter has this name; {hint}")
        elif (reason := _why_impossible(present[name])) is not None:
            faults.append(f"{name!r}: {reason}")
    if faults:
        raise ValueError(
            "\n- ".join(
                ["Expected argument `parameters` to name parameters of the model:", *faults]
            )
        )
    return set(wanted)
