"""All class rows at once, where a linear layer ends the model.

With logits z = W h + b, row k of a categorical target is ``weight_k (e_k - p)`` in the space of the
logits and ``weight_k (W_k - m)``, m = p^T W, in that of h. Its squares, summed over all classes,

    sum_k weight_k^2 (W_kh - m_h)^2,

take three matrix products, and no backward pass a class. If nothing but elementwise functions lie
between h and an earlier linear layer, the square root of this sum can be backpropagated instead of
the rows: squares of gradients are all that such a layer's score needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F

from lightning_prune.saliency.capture import Capture
from lightning_prune.saliency.preparation import prepared
from lightning_prune.saliency.registry import lookup
from lightning_prune.saliency.softmax import Softmax
from lightning_prune.saliency.target import Target

_FUNCTIONS = """
    Relu Tanh Sigmoid LeakyRelu Elu Celu Gelu Silu Softplus Hardtanh Hardsigmoid Hardswish Mish
    LogSigmoid Threshold Softsign Abs Exp Clone Alias
"""

ELEMENTWISE = frozenset(f"{name}Backward0" for name in _FUNCTIONS.split())
"""Autograd's names for functions that act on each number by itself."""

_VIEWS = "View UnsafeView Transpose Permute Squeeze Unsqueeze Clone Softmax LogSoftmax"

_PASSED = frozenset(_VIEWS.split())
"""Autograd's names for functions behind which an output is still that of its layer."""


def head_weight(capture: Capture, logits: Tensor) -> Tensor | None:
    """Return the weight (C, H) of a linear layer at whose output the class rows may be summed.

    It has to end the model, and what else was captured has to be one linear layer with one position
    a sample, which elementwise functions lead from to its input; None otherwise.
    """
    linear = lookup(F.linear)
    calls = capture.calls
    if not 1 <= len(calls) <= 2 or logits.ndim != 2 or capture.opaque:
        return None
    if any(call.rule is not linear or call.arguments["input"].ndim != 2 for call in calls):
        return None
    head, below = calls[-1], capture.last_input
    if head.edge.node is not logits.grad_fn or "weight" not in head.names or below is None:
        return None
    if len(calls) == 2:
        shared = set(head.names.values()) & set(calls[0].names.values())
        if shared or not _elementwise(below.grad_fn, calls[0].edge.node):
            return None
    weight: Tensor = head.arguments["weight"]
    return weight


def output_parameters(
    model: nn.Module, parameters: Mapping[str, Tensor], run: Callable[[], Tensor]
) -> set[str]:
    """Return the names of the parameters at whose call the model ends, views and a softmax apart.

    Args:
        model: Is left as it was.
        parameters: Full name -> parameter, of those that are asked about.
        run: Runs the model; returns its output.
    """
    with prepared(model, parameters), Capture(parameters) as capture:
        output = run()
    node = output.grad_fn
    while node is not None and node.name().partition("Backward")[0] in _PASSED:
        if any(call.edge.node is node for call in capture.calls):
            break
        node = node.next_functions[0][0]
    calls = [call for call in capture.calls if call.edge.node is node]
    return {name for call in calls for name in call.names.values()}


def _elementwise(node: Node | None, end: Node) -> bool:
    """Tell whether one chain of elementwise functions leads from ``node`` back to ``end``."""
    while node is not None and node is not end:
        if node.name() not in ELEMENTWISE:
            return False
        inputs = [function for function, _ in node.next_functions if function is not None]
        node = inputs[0] if len(inputs) == 1 else None
    return node is end


def row_squares(logits: Tensor, target: Target) -> tuple[Softmax, Tensor]:
    """Return the softmax and the sum over all rows of their squares, (N, C); logits (N, C)."""
    softmax = Softmax.of(logits)
    p = softmax.p
    if target == "fisher":
        return softmax, p * (1.0 - p).scatter(1, softmax.top, softmax.rest)
    # J = diag(p) - p p^T is symmetric: the squares of its columns are those of its rows.
    return softmax, p.square().mul_(softmax.squared_norms())


def squares_below(softmax: Softmax, weight: Tensor, target: Target, workspace: int) -> Tensor:
    """Return the sum over all rows of their squares at the head's input, (N, H); weight (C, H).

    The likeliest class is taken apart from the others: everything else is then small with 1 - p,
    and nothing cancels.
    """
    small = softmax.p.scatter(1, softmax.top, 0.0)
    factor = small if target == "fisher" else small.square()
    top_factor = softmax.p_top if target == "fisher" else softmax.p_top.square()
    weight_top = weight[softmax.top.squeeze(1)]
    mean_rest = small @ weight
    first = mean_rest if target == "fisher" else factor @ weight
    mean = torch.addcmul(mean_rest, softmax.p_top, weight_top)
    top = torch.addcmul(mean_rest, softmax.rest, weight_top, value=-1.0)
    squares = (mean * first).mul_(-2.0)
    classes = max(1, workspace // (4 * weight.shape[1] * weight.element_size()))
    for f, w in zip(torch.split(factor, classes, 1), torch.split(weight, classes), strict=True):
        squares.addmm_(f, w.square())
    squares.addcmul_(factor.sum(1, keepdim=True), mean.square_())
    squares.addcmul_(top_factor, top.square_())
    return squares.clamp_min_(0.0)
