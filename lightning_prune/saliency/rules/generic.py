"""The route for everything without a rule: one sample at a time, by plain autograd.

Exact for any network whose outputs are differentiable (recurrent layers, weights computed from
parameters, custom autograd functions), at the price of one forward pass a sample and one backward
pass a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prune.exceptions import SaliencyError
from lightning_prune.passes.batches import take_samples
from lightning_prune.saliency.registry import in_score_precision


def add_squared_gradients(
    run: Callable[[Any], Tensor],
    batch: Any,
    rows: Tensor,
    expected: Tensor,
    parameters: Mapping[str, Tensor],
    totals: Mapping[str, Tensor],
) -> set[str]:
    """Add sum_k,n (rows[k, n] . dz_n/dw)^2 to ``totals`` for every parameter given.

    Args:
        run: batch -> logits.
        batch: N samples.
        rows: (K, N, ...) gradients of the output.
        expected: (N, ...) the logits of the whole batch.
        parameters: Full name -> parameter.
        totals: Full name -> running sum, changed in place.

    Returns:
        The names of the parameters that some output depends on.

    Raises:
        SaliencyError: If a sample's logits differ from those it has inside the batch: the model
            mixes samples.
    """
    names = list(parameters)
    reached = set()
    # Once for all samples: on a GPU each look at a number waits for all that was queued before it.
    nonzero = rows.unsqueeze(2).flatten(2).any(2).T.tolist()
    largest = expected.detach().abs().unsqueeze(1).flatten(1).amax(1).tolist()
    for n in range(rows.shape[1]):
        logits = run(take_samples(batch, torch.tensor([n])))
        _check_alone(logits, expected[n : n + 1], n, scale=largest[n] + 1e-6)
        active = [k for k, wanted in enumerate(nonzero[n]) if wanted]
        for k in active:
            gradients = torch.autograd.grad(
                logits,
                list(parameters.values()),
                rows[k, n : n + 1].to(logits.dtype),
                retain_graph=k != active[-1],
                allow_unused=True,
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    dense = gradient.to_dense() if gradient.is_sparse else gradient
                    totals[name].add_(in_score_precision(dense).square())
                    reached.add(name)
    return reached


def _check_alone(alone: Tensor, inside: Tensor, sample: int, *, scale: float) -> None:
    loose = 1e-6 if alone.dtype == torch.float64 else 1e-2 if alone.dtype == torch.float32 else 0.2
    if alone.shape != inside.shape or float((alone - inside).detach().abs().amax()) > loose * scale:
        raise SaliencyError(
            f"Expected every sample's output to depend on that sample alone, but sample {sample} "
            f"has other logits by itself than inside its batch (shapes {tuple(alone.shape)} and "
            f"{tuple(inside.shape)}). The model mixes samples, or the batch holds tensors whose "
            "axis 0 does not count samples; P(y|x) of one sample is not defined then."
        )
