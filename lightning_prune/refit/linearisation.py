"""The network's output as a function of its survivors, and its Jacobian, by products only.

Enters: a model, its survivors and batches. Leaves: at a vector of survivors' values, the divergence
from the dense network, its gradient, and products with its Gauss-Newton matrix

    G = sum over batches of J^T H J,

J the Jacobian of the logits and H the curvature of the divergence at the logits (Schraudolph 2002,
"Fast curvature matrix-vector products for second-order gradient descent"). ``J^T u`` is a backward
pass. It is linear in u, so ``J v`` is the backward pass of that backward pass, with respect to u
(Townsend 2017, "A new trick for calculating Jacobian vector products"). Forward mode gives the
same numbers, but repeats the forward pass for each product: twice the time for a product with G,
measured on 784-40-20-10.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.passes.batches import batch_size
from lightning_prune.passes.teacher import logits_with
from lightning_prune.refit.calibration import Calibration
from lightning_prune.refit.divergence import Output, precise
from lightning_prune.refit.merging import AT_MOST, merge_batches
from lightning_prune.refit.survivors import Survivors

AGREEMENT = 1e-2
"""Relative difference up to which two ways to the same number agree in low precision."""
KEPT_BYTES = 2**30
"""What autograd may keep of all batches while a step is computed; the rest is computed anew."""


class NotDifferentiableError(RuntimeError):
    """Autograd has no second derivative for an operation of the model; the message names it."""


class Linearised:
    """A batch's logits at some parameters, with products of their Jacobian.

    Args:
        logits: Of the batch, with a graph that leads to ``parameters``.
        parameters: What the Jacobian is with respect to.

    Raises:
        NotDifferentiableError: An operation can't be differentiated twice, here or in a product.

    Example:
        >>> w = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> batch = Linearised(w**2, [w])
        >>> batch.push([torch.tensor([1.0, 1.0])]), batch.pull(torch.tensor([1.0, 0.0]))
        (tensor([4., 6.]), (tensor([4., 0.]),))
    """

    def __init__(self, logits: Tensor, parameters: Sequence[Tensor]) -> None:
        if not logits.requires_grad:
            raise NotDifferentiableError("the output does not depend on the surviving weights")
        self.logits = logits.detach()
        self._logits = logits
        self._parameters = parameters
        self._u = torch.zeros_like(logits, requires_grad=True)
        with self._named():
            self._pulled: tuple[Tensor | None, ...] = torch.autograd.grad(
                logits, parameters, self._u, create_graph=True, allow_unused=True
            )

    def push(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return J v, in the shape of the logits; ``vectors`` are shaped like the parameters."""
        pairs = [
            (p, v)
            for p, v in zip(self._pulled, vectors, strict=True)
            if p is not None and p.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(self.logits)
        outputs, weights = zip(*pairs, strict=True)
        with self._named():
            (image,) = torch.autograd.grad(
                outputs, self._u, weights, retain_graph=True, materialize_grads=True
            )
        return image

    def pull(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return J^T u, shaped like the parameters; ``u`` has the shape of the logits."""
        with self._named():
            return torch.autograd.grad(
                self._logits, self._parameters, u, retain_graph=True, materialize_grads=True
            )

    def check(self) -> None:
        """Compare ``u^T (J v)`` with ``(J^T u)^T v`` for one pair of vectors.

        They differ where an operation cuts the graph instead of raising: that is what autograd does
        with functions that are marked as differentiable once.

        Raises:
            NotDifferentiableError: They differ.
        """
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(self.logits.shape, generator=generator).to(self.logits)
        pulled = self.pull(u)
        # Each parameter pushed along its own gradient: nothing cancels, none is too small to see.
        expected = sum(float(precise(p).norm()) for p in pulled)
        pushed = self.push([p / p.norm().clamp_min(torch.finfo(p.dtype).tiny) for p in pulled])
        found = float((precise(pushed) * precise(u)).sum())
        if abs(found - expected) > AGREEMENT * expected:
            with self._named():
                raise RuntimeError("an operation gives a first derivative, but not a second one")

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            own = ", ".join(_custom_functions(self._logits.grad_fn))
            raise NotDifferentiableError(f"{error}{f' (among {own})' if own else ''}") from error


class Objective:
    """The mean divergence from the dense network over a set of samples, of the survivors' values.

    Args:
        model: The masked model, borrowed: its own parameters are not touched, but replaced for
            each call.
        calibration: The dense network, how to run it, and how its output is read.
        survivors: What varies.
        batches: Samples, at least one.
        temperature: Softens both outputs.
        at_most: Samples to which small batches are put together.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        survivors: Survivors,
        batches: Iterable[Any],
        temperature: float,
        at_most: int = AT_MOST,
    ) -> None:
        self._model, self._forward = model, calibration.forward
        self._likelihood, self._survivors = calibration.likelihood, survivors
        self._output = Output(calibration.likelihood, temperature)
        # Copies, since some layers write to their buffers even in eval mode.
        self._fixed = {n: b.detach().clone() for n, b in model.named_buffers()}
        self._fixed |= {n: p.detach() for n, p in model.named_parameters()}
        self._batches = list(merge_batches(batches, at_most))
        self._dense = [calibration.dense.logits(model, b, self._forward) for b in self._batches]
        self.samples = sum(map(batch_size, self._batches))
        self._kept: dict[int, Linearised] = {}

    def value(self, vector: Tensor, temperature: float | None = None) -> float:
        """Return the mean divergence at these values of the survivors, in nats a sample."""
        output = Output(self._likelihood, temperature) if temperature else self._output
        weights, total = self._survivors.spread(vector), 0.0
        with torch.no_grad():
            for batch, dense in zip(self._batches, self._dense, strict=True):
                total += output.divergence(self._logits(weights, batch), dense).item()
        return total / self.samples

    def linearise(self, vector: Tensor) -> Tensor:
        """Move to these values, where :meth:`product` is taken; return the gradient there, (K,)."""
        self._kept.clear()
        self._weights = self._survivors.spread(vector)
        self._leaves = {n: self._weights[n].requires_grad_() for n in self._survivors.names}
        total, left = torch.zeros_like(vector), KEPT_BYTES
        self.graph_bytes = 0
        for i, (batch, dense) in enumerate(zip(self._batches, self._dense, strict=True)):
            with _counting() as used:
                linearised = self._linearised(batch)
            u = self._output.gradient(linearised.logits, dense)
            total += self._gathered(linearised.pull(u))
            size = sum(used.values())
            self.graph_bytes += size
            if size <= left:
                self._kept[i] = linearised
                left -= size
        return total / self.samples

    def check(self) -> None:
        """Raise :class:`NotDifferentiableError` if J v and J^T u are not of one Jacobian."""
        for i, batch in enumerate(self._batches):
            kept = self._kept.get(i)
            (self._linearised(batch) if kept is None else kept).check()

    def product(self, vector: Tensor) -> Tensor:
        """Return G times ``vector``, (K,), where G is the Gauss-Newton matrix of the mean."""
        spread = self._survivors.spread(vector)
        directions = [spread[name] for name in self._leaves]
        total = torch.zeros_like(vector)
        for i, batch in enumerate(self._batches):
            kept = self._kept.get(i)
            linearised = self._linearised(batch) if kept is None else kept
            bent = self._output.curvature(linearised.logits, linearised.push(directions))
            total += self._gathered(linearised.pull(bent))
        return total / self.samples

    def _linearised(self, batch: Any) -> Linearised:
        return Linearised(self._logits(self._weights, batch), list(self._leaves.values()))

    def _logits(self, weights: dict[str, Tensor], batch: Any) -> Tensor:
        return logits_with({**self._fixed, **weights}, self._model, batch, self._forward)

    def _gathered(self, tensors: Sequence[Tensor]) -> Tensor:
        return self._survivors.gather(dict(zip(self._leaves, tensors, strict=True)))


@contextmanager
def _counting() -> Iterator[dict[int, int]]:
    """Collect the bytes that autograd keeps inside, by where they are."""
    used: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        used[storage.data_ptr()] = storage.nbytes()
        # Without its graph, which autograd ties on again: an operation that keeps its own output
        # would hold on to itself for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield used


def _custom_functions(node: Any) -> list[str]:
    """Name the user's own autograd functions in the graph that ends in ``node``."""
    found: dict[str, None] = {}
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found[type(node).__name__.removesuffix("Backward")] = None
        new = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(new)
        waiting.extend(new)
    return list(found)
