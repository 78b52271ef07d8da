"""Whether a user's step feeds the first layer what a pass of ours over the same batch does.

Enters: a model, in a step of the user's and in a pass of ours. Leaves: whether the two agree. What
counts is the first layer's input, which depends on no weight and no mode: it shows a preparation in
the step (``self(x / 255)``) whether that calls the model, or a part of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.passes.batches import batch_size, take_samples
from lightning_prune.passes.isolation import ours

Call = tuple[nn.Module, Tensor]
"""A layer, and what it was called with."""

MOST_CALLS = 8
"""Of a layer that a step calls again and again, no more calls than this are kept."""


def first_call(module: nn.Module, run: Callable[[Any], Any], batch: Any) -> Call | None:
    """Run a pass and return its first layer that is fed the batch, with the tensor that went in.

    It is the innermost of the modules that are called first. One that is fed a constant, such as
    positions, says nothing about the batch: it is told by another pass, over the same samples in
    reverse order, in which its input stays.

    Args:
        module: The model.
        run: ``run(batch)`` runs it.
        batch: As it is; only ``run`` may fail on it.

    Returns:
        ``None`` if there is no such call; or none could be seen, as in a compiled model; or there
        is one sample only, so that the order says nothing.
    """
    reverse: dict[tuple[nn.Module, int], Tensor] = {}
    with suppress(Exception):  # after an error of this pass, what it did not come to is not known
        turned = take_samples(batch, torch.arange(batch_size(batch)).flip(0))
        with _calls(module, lambda layer, n, fed: reverse.update({(layer, n): _checksum(fed)})):
            run(turned)
    found: Call | None = None
    entered: set[nn.Module] = set()
    returned = False

    def before(layer: nn.Module, n: int, fed: Tensor) -> None:
        nonlocal found
        other = None if returned else reverse.get((layer, n))
        if other is not None and not torch.equal(other, _checksum(fed)):
            entered.add(layer)
            found = layer, fed.detach().clone()

    def after(layer: nn.Module) -> None:
        nonlocal returned
        returned |= layer in entered

    with _calls(module, before, after):
        run(batch)
    return found


@contextmanager
def _calls(
    module: nn.Module,
    before: Callable[[nn.Module, int, Tensor], object],
    after: Callable[[nn.Module], object] = lambda layer: None,
) -> Iterator[None]:
    """Have all calls of the parts of a model reported, with a number for each call of a part."""
    numbers: Counter[nn.Module] = Counter()

    def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # traced, where nothing may be kept
            return
        if (fed := _tensor_of(args, kwargs)) is not None:
            before(layer, numbers[layer], fed)
            numbers[layer] += 1

    def leave(layer: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            after(layer)

    handles = _hook(module, enter, leave)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    module: nn.Module, before: Callable[..., None], after: Callable[..., None] | None = None
) -> list[RemovableHandle]:
    """Hook the parts of a model that can be; a scripted one refuses, and is not seen."""
    handles = []
    for part in module.modules():
        with suppress(RuntimeError):
            handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
            if after is not None:
                handles.append(part.register_forward_hook(after))
    return handles


def _checksum(fed: Tensor) -> Tensor:
    """Return one number that depends on the values and on their order."""
    values = fed.detach().reshape(-1).float()
    return values @ torch.arange(1.0, len(values) + 1, device=values.device).sqrt()


class InputCheck:
    """Watch a step, and compare it with a pass.

    Of each call one sample is kept, the largest: a sample of zeros would look the same whatever it
    is divided by.

    Attributes:
        agrees: Whether a step has been seen to feed what a pass feeds; nothing is watched then.
    """

    def __init__(self, agrees: bool) -> None:
        self.agrees = agrees
        self._expected: Call | None = None
        self._rows: dict[nn.Module, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def watching(self) -> bool:
        """Whether there is something to compare."""
        return bool(self._handles)

    def expect(self, call: Call | None) -> None:
        """Take the first call of a pass over the step's batch, before the step or after it."""
        self._expected = call

    def watch(self, module: nn.Module) -> None:
        """Keep what the parts of a model are called with from here on, if there is any doubt."""
        if not self.agrees:
            self._handles = _hook(module, self._keep)

    def _keep(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        # Traced, where nothing may be kept; or another callback's pass, which is not the step's.
        if torch.compiler.is_compiling() or ours():
            return
        rows = self._rows.setdefault(layer, [])
        if len(rows) < MOST_CALLS and (fed := _tensor_of(args, kwargs)) is not None:
            with suppress(Exception):  # in the user's own step, whatever tensor this may be
                fed = fed.detach()
                largest = fed.reshape(len(fed), -1).abs().sum(1).argmax()
                rows.append(fed[largest].clone())

    def let_go(self) -> None:
        """Take the hooks off the model; what they have seen stays."""
        for handle in self._handles:
            handle.remove()

    def compare(self) -> None:
        """End a watch: agree if a call of the expected layer had one of its samples."""
        if self.watching and self._expected is not None:
            layer, fed = self._expected
            with suppress(Exception):  # what cannot be compared does not agree
                self.agrees = any(_holds(fed, row) for row in self._rows.get(layer, ()))
        self.let_go()
        self._handles, self._rows, self._expected = [], {}, None

    def __getstate__(self) -> dict[str, Any]:
        # A copy watches no model.
        return {**self.__dict__, "_handles": [], "_rows": {}, "_expected": None}


_READABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_READABLE |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def _tensor_of(args: Any, kwargs: Any) -> Tensor | None:
    """Return the first tensor among the arguments, if it has samples that can be compared."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            plain = value.layout is torch.strided and not value.is_nested
            plain = plain and value.dtype in _READABLE
            return value if plain and value.dim() and value.numel() else None
    return None


def _holds(fed: Tensor, row: Tensor) -> bool:
    if fed.shape[1:] != row.shape or fed.device != row.device or not row.any():
        return False
    precise = torch.promote_types(torch.promote_types(fed.dtype, row.dtype), torch.float32)
    rows, one = fed.to(precise).reshape(len(fed), -1), row.to(precise).reshape(-1)
    near = torch.isclose(rows, one, rtol=1e-3, atol=1e-3 * float(one.abs().max()), equal_nan=True)
    return bool(near.all(1).any())
