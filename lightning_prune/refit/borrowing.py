"""A model borrowed for a refit: run with nothing random, rounded or recorded beyond what is asked.

Enters: a model. Leaves: a context in which its passes are what the refit has to compute with; on
exit everything is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_prune.passes.isolation import eager, evaluating, own_randomness, plain_attention


@contextmanager
def borrowed(model: nn.Module, *, derivatives: Literal[0, 1, 2] = 0) -> Iterator[None]:
    """Run a block on the model in eval mode, in full precision and with random numbers of its own.

    Compiled modules run as they were written.

    Args:
        model: The model.
        derivatives: How often its passes will be differentiated. For 1, recurrent layers stay in
            their mode (see :func:`evaluating`); for 2, attention is computed in its plain form, the
            only one that can be.
    """
    device = device_of(model)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model, differentiable=derivatives == 1))
        stack.enter_context(own_randomness(device, "refit"))
        stack.enter_context(eager())
        stack.enter_context(plain_attention())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(derivatives > 0))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if derivatives > 1:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
