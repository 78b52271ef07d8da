"""An optimizer that goes on with the smaller model: its state is cut as the parameters were.

An optimizer made before still holds the dense tensors, and would train a model that nobody uses.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils import _pytree as pytree

from lightning_prune.removal.outcome import RemovalReport

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def carry_optimizer(
    optimizer: AnyOptimizer, model: nn.Module, small: nn.Module, report: RemovalReport
) -> AnyOptimizer:
    """Return an optimizer of the smaller model that continues another's.

    Groups, their settings and the order of the parameters stay. What the optimizer keeps beside a
    parameter in its shape (moments, momentum) is cut as the parameter was; everything else, such as
    step counts, is copied. A bias that took constants in joins its weight's group, without a past.

    Args:
        optimizer: Of the dense model; stays as it is. Learning-rate schedulers are to be made anew.
        model: The dense model.
        small: What :func:`~lightning_prune.removal.shrink_with_report` returned for it.
        report: And the report with it.

    Raises:
        ValueError: The optimizer holds parameters that the model does not have, or it keeps
            something of a cut parameter in another shape than the parameter's (Adafactor), or of
            all parameters together (LBFGS).

    Example:
        >>> import torch
        >>> from lightning_prune.removal.shrink import shrink_with_report
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = nn.init.zeros_(model[2].weight[:, :5])
        >>> adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> small, report = shrink_with_report(model, example_inputs=torch.randn(3, 4))
        >>> carried = carry_optimizer(adam, model, small, report)
        >>> [tuple(p.shape) for p in carried.param_groups[0]["params"]]
        [(3, 4), (3,), (2, 3), (2,)]
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "Expected an optimizer that keeps its state parameter by parameter, but got LBFGS, "
            "whose history is of all parameters together. Make a new one of the smaller model's."
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = sum(id(parameter) not in names for parameter in held)
    if strangers:
        raise ValueError(
            f"Expected an optimizer of the dense model's parameters, but {strangers} of its "
            f"{len(held)} are none of them. Give the model that the optimizer was made for."
        )
    present = dict(small.named_parameters())
    # By the protocol of copies and pickles: hooks stay behind, they belong to the dense model.
    carried = copy.copy(optimizer)
    carried.state = defaultdict(dict)
    carried.param_groups = [
        {**group, "params": _carried_group(group["params"], names, present, report)}
        for group in optimizer.param_groups
    ]
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        if present[name].shape != parameter.shape:
            _refuse_other_shapes(optimizer, parameter, state)
        carried.state[present[name]] = {
            key: _cut(value, parameter, name, report) for key, value in state.items()
        }
    return carried


def _refuse_other_shapes(optimizer: Optimizer, parameter: Tensor, state: dict[str, Any]) -> None:
    for key, value in state.items():
        for leaf in pytree.tree_leaves(value):
            alike = leaf is value and leaf.shape == parameter.shape
            if isinstance(leaf, Tensor) and leaf.numel() > 1 and not alike:
                raise ValueError(
                    "Expected an optimizer that keeps its state in the shape of the parameters, "
                    f"but {type(optimizer).__name__} keeps {key!r} {tuple(leaf.shape)} of one that "
                    f"is {tuple(parameter.shape)} and was cut. Make a new one of the smaller "
                    "model's."
                )


def _carried_group(
    parameters: list[Tensor],
    names: dict[int, str],
    present: dict[str, nn.Parameter],
    report: RemovalReport,
) -> list[nn.Parameter]:
    own = [names[id(parameter)] for parameter in parameters]
    weights = {f"{name.removesuffix('weight')}bias" for name in own if name.endswith("weight")}
    return [present[name] for name in [*own, *(b for b in report.new_biases if b in weights)]]


def _cut(value: Any, parameter: Tensor, name: str, report: RemovalReport) -> Any:
    if isinstance(value, Tensor):
        alike = value.shape == parameter.shape and value.ndim > 0
        return (report.take(name, value) if alike else value).clone()
    return copy.deepcopy(value)
