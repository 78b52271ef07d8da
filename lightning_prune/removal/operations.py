"""Autograd's record of a pass: its operations by name, and which of them leave channels apart."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch import Tensor, nn

_NAMES = """
abs add alias avgpool cat celu clamp clampmax clampmin clone div elu erf exp expand expm1 gelu
hardshrink hardsigmoid hardswish hardtanh leakyrelu log1p logsigmoid maskedfill maximum mean minimum
mish mul neg permute pow prelukernel reflectionpad relu replicationpad reshape reshapealias rsub
selu sigmoid silu sin slice softplus softshrink split splitwithsizes sqrt squeeze sub sum t tanh
threshold tocopy transpose unsafesplit unsafeview unsqueeze upsample view where
"""
CHANNELWISE = frozenset(_NAMES.split())
"""Operations that work channel by channel or move axes (that a cut is right where axes were moved
is seen from the outputs). What a sum over all channels or a softmax does is not among them."""


def operation(node: Any) -> str:
    """Return an autograd node's name without digits and dimensions, in lower case."""
    if node.grad_fn is None or isinstance(node.module, nn.Parameter):
        return "parameter"
    name = str(node.grad_fn.name()).split("Backward")[0].lower()
    for pool in ("maxpool", "avgpool"):
        if pool in name:
            return "avgpool"
    if name.startswith("upsample"):
        return "upsample"
    return re.sub(r"\d+d?$", "", name.replace("_", ""))


def uses_of(outputs: list[Tensor]) -> Counter[int]:
    """Count in how many places of autograd's graph each leaf enters."""
    uses: Counter[int] = Counter()
    pending: list[Any] = [each.grad_fn for each in outputs]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if hasattr(following, "variable"):
                uses[id(following.variable)] += 1
            pending.append(following)
    return uses
