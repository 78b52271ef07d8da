"""Which parameters of a model are pruned, and why the others are not."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

NORMS = (
    nn.modules.batchnorm._NormBase,  # batch norm and instance norm of any dimension
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
"""Layers whose weights are matrices or kernels in whatever shape, (1, k) too."""


PARAMETRISED = "parametrised: the layer's weight is computed from it"


@dataclass(frozen=True)
class Prunable:
    """The outcome of :func:`find_prunable`.

    Args:
        parameters: The parameters to prune, by full name, in the model's order.
        left_out: Name -> why the parameter is not among them.
    """

    parameters: dict[str, nn.Parameter]
    left_out: dict[str, str]


def find_prunable(
    model: nn.Module,
    names: Iterable[str] | None = None,
    *,
    exclude: Iterable[str] | None = None,
    held: Iterable[str] = (),
) -> Prunable:
    """Decide which parameters are pruned.

    By default the weights of all layers: parameters with two or more axes (matrices, kernels,
    embeddings), except biases and the weights of normalisation layers. A bare parameter with one
    axis longer than 1 (a scale (1, C, 1, 1), a class token (1, 1, D)) is a vector and left out.
    Frozen parameters are included, and pruning does not thaw them. A tied parameter counts once,
    under the first of its names, and can be given by any of them.

    Args:
        model: Any module.
        names: Prune these instead: full ``named_parameters()`` names, whatever they are, or
            patterns of :mod:`fnmatch` (``"features.*"``). A pattern takes, of the parameters that
            it matches, those that are prunable by default: never a bias or a norm by accident.
        exclude: Names or patterns of parameters that are not pruned, however they were chosen.
        held: Names of parameters that have masks already, by an earlier default say. Those that
            ``names`` (or a pattern in it) covers count as given by name, others as ever.

    Raises:
        TypeError: ``names`` or ``exclude`` is a single string.
        ValueError: A name or a pattern fits nothing (the message shows close ones) or nothing that
            can be pruned, or nothing is left to prune. All faults are in one message.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
        >>> prunable = find_prunable(model)
        >>> list(prunable.parameters)
        ['0.weight', '2.weight']
        >>> prunable.left_out["0.bias"], prunable.left_out["1.weight"]
        ('a bias', 'part of a BatchNorm2d')
        >>> find_prunable(model, exclude=["2.*"]).left_out["2.weight"]
        "excluded by '2.*'"
    """
    owners = _owners(model)
    present = dict(model.named_parameters())
    first_names = _first_names(model)
    masked = {name for name in held if name in present and _why_impossible(present[name]) is None}
    reasons = {
        name: None if name in masked else _why_not(name, p, owners[name])
        for name, p in present.items()
    }
    faults: dict[str, list[str]] = {"parameters": [], "exclude": []}
    if names is not None:
        reasons = _named(
            _as_list("parameters", names), present, first_names, reasons, faults["parameters"]
        )
    before = [name for name, reason in reasons.items() if reason is None]
    if exclude is not None:
        reasons = _without(_as_list("exclude", exclude), first_names, reasons, faults["exclude"])
    _raise_faults(faults)
    chosen = {name: p for name, p in present.items() if reasons[name] is None}
    if not chosen:
        way_out = " Exclude less." if before else ""
        raise ValueError(
            f"Expected a model with weights to prune, but {type(model).__name__} has none: "
            f"{reasons or 'no parameters at all'}.{way_out}"
        )
    return Prunable(chosen, {name: reason for name, reason in reasons.items() if reason})


def layers_left_out(left_out: Mapping[str, str]) -> str | None:
    """Return what to warn of: layers that nobody has left out, and that stay as they are.

    Args:
        left_out: Name -> why a parameter is not pruned, of :class:`Prunable`.
    """
    names = [name for name, reason in left_out.items() if reason == PARAMETRISED]
    if not names:
        return None
    return (
        "Layers whose weights are computed from parameters (weight norm, spectral norm, ...) are "
        f"not pruned: {names}. Sparsities are shares of the other layers' weights. Take the "
        "parametrisation off before; or, of a spectral norm, where a zero in the parameter is one "
        "in the weight, give the full name in `parameters`; or `exclude` them, if that is meant."
    )


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{prefix}.{leaf}" if prefix else leaf: module
        for prefix, module in model.named_modules()
        # Asked for, as the parameters of a ScriptModule are no dictionary.
        for leaf, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return every name of a parameter, those of tied ones too -> the one it is known by."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: known[id(parameter)] for name, parameter in named}


def _why_not(name: str, parameter: Tensor, owner: nn.Module) -> str | None:
    """Return why a parameter is not pruned by default, ``None`` if it is."""
    if (reason := _why_impossible(parameter)) is not None:
        return reason
    if "bias" in name.rpartition(".")[2].split("_"):
        return "a bias"
    if isinstance(owner, NORMS):
        return f"part of a {type(owner).__name__}"
    if isinstance(owner, ParametrizationList) or _is_normed(name, owner):
        return PARAMETRISED
    if parameter.ndim < 2:
        return "a vector, not a matrix or a kernel"
    # Of a layer it is a matrix or kernel all the same, with one input or output.
    if sum(size > 1 for size in parameter.shape) < 2 and not isinstance(owner, LAYERS):
        return f"a vector in the shape {tuple(parameter.shape)}, not a matrix or a kernel"
    return None


def _is_normed(name: str, owner: nn.Module) -> bool:
    """Whether a weight is made of this parameter before each forward pass, in the older way.

    A row of zeros in such a parameter is divided by its length of 0.
    """
    hooks = owner._forward_pre_hooks.values()
    norms = [hook.name for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))]
    leaf = name.rpartition(".")[2]
    return leaf in {f"{norm}_{part}" for norm in norms for part in ("g", "v", "orig")}


def _why_impossible(parameter: Tensor) -> str | None:
    if isinstance(parameter, UninitializedParameter):
        return "not initialised yet (a lazy module: run one batch through the model first)"
    if not parameter.is_floating_point():
        return f"of dtype {parameter.dtype}"
    return None


def _named(
    names: list[str],
    present: Mapping[str, Tensor],
    first_names: Mapping[str, str],
    reasons: Mapping[str, str | None],
    faults: list[str],
) -> dict[str, str | None]:
    """Return name -> why it is left out (``None``: it is pruned), once a user has named some."""
    if not names:
        faults.append("the list is empty")
    named: dict[str, str | None] = dict.fromkeys(present, "not named")
    for name in names:
        if name in first_names:  # asked for by its own name: only the impossible is refused
            known = first_names[name]
            if (reason := _why_impossible(present[known])) is not None:
                faults.append(f"{name!r}: {reason}")
            named[known] = None
            continue
        matched = _matches(name, first_names, faults)
        taken = [match for match in matched if reasons[match] is None]
        if matched and not taken:
            why = ", ".join(f"{match!r} ({reasons[match]})" for match in matched[:3])
            more = ", ..." if len(matched) > 3 else ""
            faults.append(
                f"{name!r}: nothing that it matches is pruned unless given by its full name: "
                f"{why}{more}"
            )
        named |= {match: reasons[match] for match in matched if named[match] is not None}
    return named


def _without(
    patterns: list[str],
    first_names: Mapping[str, str],
    reasons: Mapping[str, str | None],
    faults: list[str],
) -> dict[str, str | None]:
    """Return name -> why it is left out, with what ``patterns`` take away."""
    left = dict(reasons)
    for pattern in patterns:
        single = first_names.get(pattern)
        for name in _matches(pattern, first_names, faults) if single is None else [single]:
            if left[name] in (None, PARAMETRISED):
                left[name] = f"excluded by {pattern!r}"
    return left


def _matches(pattern: str, first_names: Mapping[str, str], faults: list[str]) -> list[str]:
    """Return the parameters that a pattern fits; none is a fault, told with close names."""
    fitting = [name for name in first_names if fnmatch.fnmatchcase(name, str(pattern))]
    matched = list(dict.fromkeys(first_names[name] for name in fitting))
    if not matched:
        prefixes = {name.rpartition(".")[0] for name in first_names} - {""}
        kind = "parameter has this name"
        candidates = list(first_names)
        if any(sign in str(pattern) for sign in "*?["):
            kind = "parameter fits this pattern"
            candidates += [f"{prefix}.*" for prefix in sorted(prefixes)]
        close = difflib.get_close_matches(str(pattern), candidates, n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else f"there are {[*first_names]}"
        )
        faults.append(f"{pattern!r}: no {kind}; {hint}")
    return matched


def _as_list(argument: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"Expected argument `{argument}` to be a list of names, but got {names!r}.")
    return list(names)


def _raise_faults(faults: Mapping[str, list[str]]) -> None:
    """Raise one error for all arguments with faults."""
    found = [
        "\n- ".join([f"Expected argument `{argument}` to name parameters of the model:", *lines])
        for argument, lines in faults.items()
        if lines
    ]
    if found:
        raise ValueError("\n".join(found))
