"""What one model costs: numbers, multiply-accumulates, bytes.

Enters: a model and example inputs. Leaves: counts that are the same on every machine, since nothing
here is timed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.passes.isolation import eager, evaluating, plain_attention
from lightning_prune.removal.calls import answer, resized


@dataclass(frozen=True)
class Costs:
    """What a model costs.

    Attributes:
        parameters: Numbers in the parameters; tied ones count once.
        nonzeros: Those that are not zero.
        macs: Multiply-accumulates of one sample, as executed: zeros in a dense matrix count.
        nonzero_macs: Those among them with no weight that is zero.
        file_bytes: What ``torch.save`` writes for the state dict.
        peak_bytes: Parameters, buffers and the tensors that are alive at the same time at the worst
            moment of a forward pass without gradients; see :func:`peak_bytes`.
    """

    parameters: int
    nonzeros: int
    macs: int
    nonzero_macs: int
    file_bytes: int
    peak_bytes: int


def measure_costs(model: nn.Module, example_inputs: Any, *, samples: int = 64) -> Costs:
    """Return what a model costs: its multiply-accumulates for one sample, its memory for many.

    The model runs in eval mode and is left as it was.

    Args:
        model: The model.
        example_inputs: What it is called with, as for :func:`~lightning_prune.removal.compare`.
        samples: Batch size for the peak memory.

    Example:
        >>> costs = measure_costs(nn.Linear(10, 4), torch.ones(2, 10), samples=8)
        >>> costs.parameters, costs.macs, costs.peak_bytes == 4 * (44 + 8 * 10 + 8 * 4)
        (44, 40, True)
    """
    parameters = list(model.parameters())
    macs, nonzero_macs = count_macs(model, example_inputs)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return Costs(
        parameters=sum(parameter.numel() for parameter in parameters),
        nonzeros=sum(_nonzeros(parameter) for parameter in parameters),
        macs=macs,
        nonzero_macs=nonzero_macs,
        file_bytes=file.getbuffer().nbytes,
        peak_bytes=peak_bytes(model, resized(example_inputs, samples)),
    )


def count_macs(model: nn.Module, example_inputs: Any) -> tuple[int, int]:
    """Return the multiply-accumulates of one sample: as executed, and those without a zero weight.

    Executed are those of matrix products, convolutions and attention, half of what torch's flop
    counter says; what it has no formula for (activations, norms, pooling, look-ups) counts as
    nothing. Of each product with parameters the share that their zeros make superfluous is left out
    of the second number, exactly so but for the border of padded convolutions, where a kernel's
    inner entries are used more often than its outer ones.

    Example:
        >>> layer = nn.Linear(10, 4)
        >>> _ = layer.weight.data[:, :5].zero_()
        >>> count_macs(layer, torch.ones(2, 10))
        (40, 20)
    """
    counter = _MacCounter(model.parameters())
    with torch.no_grad(), evaluating(model), eager(), _every_product_visible(), counter:
        answer(model, resized(example_inputs, 1))
    return round(counter.macs), round(counter.nonzero_macs)


def peak_bytes(model: nn.Module, example_inputs: Any) -> int:
    """Return the bytes of the model and of the tensors alive at the worst moment of a forward pass.

    Counted after every operation, from the sizes of the storages that are still referenced: inputs,
    parameters, buffers and intermediate results. Scratch memory inside an operation (a convolution
    that unfolds its input) and what an allocator holds in reserve are not in it, so that the number
    is the same everywhere and a lower bound of what a process needs.
    """
    tracker = _MemoryTracker([*model.parameters(), *model.buffers()], example_inputs)
    with torch.no_grad(), evaluating(model), eager(), tracker:
        answer(model, example_inputs)
    return tracker.peak


def _nonzeros(tensor: Tensor) -> int:
    values = tensor.detach()
    return int(values.count_nonzero() if values.layout == torch.strided else values._nnz())


def _density(tensor: Tensor) -> float:
    return _nonzeros(tensor) / max(1, tensor.numel())


@contextmanager
def _every_product_visible() -> Iterator[None]:
    """Keep torch from fusing attention and encoder layers into operations that nobody can count."""
    with plain_attention(), sdpa_kernel(SDPBackend.MATH):
        yield


class _MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sum the multiply-accumulates of every operation, and their share without zero weights."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = self.nonzero_macs = 0.0
        self._storages = {
            parameter.untyped_storage()._cdata
            for parameter in parameters
            if parameter.layout == torch.strided
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = func(*args, **(kwargs or {}))
        operands = [leaf for leaf in args if isinstance(leaf, Tensor)]
        if (
            func.name() == "aten::mkldnn_rnn_layer"
        ):  # a recurrent layer in one; torch has no formula
            x, *weights = operands[:3]
            steps = x.numel() // x.shape[-1]
            self.macs += steps * sum(weight.numel() for weight in weights)
            self.nonzero_macs += steps * sum(_nonzeros(weight) for weight in weights)
            return out
        if func.name().startswith("aten::_embedding_bag") and args[6:7] and args[6] is not None:
            macs = args[1].numel() * args[0].shape[1]  # a weighted sum of rows; no formula either
            self.macs += macs
            self.nonzero_macs += macs
            return out
        macs = counter.get_total_flops() / 2
        if macs:
            # A sparse matrix is multiplied by its values only; a dense one by its zeros too.
            sparse = [one for one in operands if one.layout != torch.strided]
            weights = [one for one in operands if one.ndim > 1 and self._is_weight(one)]
            self.macs += macs * math.prod(map(_density, sparse))
            self.nonzero_macs += macs * math.prod(map(_density, [*sparse, *weights]))
        return out

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._storages


class _MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow which storages are alive after every operation; ``peak`` is the largest sum."""

    def __init__(self, resident: list[Tensor], inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._resident: set[int] = set()
        self._resident_bytes = 0
        for tensor in resident:
            for part in _dense_parts(tensor):
                storage = part.untyped_storage()
                if storage._cdata not in self._resident:
                    self._resident.add(storage._cdata)
                    self._resident_bytes += storage.nbytes()
        self._note(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._note(out)
        return out

    def _note(self, values: Any) -> None:
        for leaf in pytree.tree_leaves(values):
            for part in _dense_parts(leaf) if isinstance(leaf, Tensor) else ():
                storage = part.untyped_storage()
                if storage._cdata not in self._resident:
                    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._alive[storage._cdata] = reference, storage.nbytes()
        gone = [
            key
            for key, (reference, _) in self._alive.items()
            if reference.expired()  # type: ignore[no-untyped-call]
        ]
        for key in gone:
            del self._alive[key]
        held = self._resident_bytes + sum(size for _, size in self._alive.values())
        self.peak = max(self.peak, held)


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout == torch.strided:
        return [tensor.detach()]
    if tensor.layout == torch.sparse_csr:
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        return [part.detach() for part in parts]
    return []
