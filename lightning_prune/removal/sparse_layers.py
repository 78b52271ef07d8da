"""Layers that stay sparse: stored without their zeros where that is measured to be faster.

Enters: a model with zeros, example inputs. Leaves: a copy in which some linear layers hold their
weight as compressed sparse rows (on the CPU), or in the 2:4 form of NVIDIA's tensor cores, and the
measurements by which they were chosen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.passes.isolation import evaluating, plain_attention
from lightning_prune.removal.calls import Model, answer, copied
from lightning_prune.removal.latency import Latency, interleaved
from lightning_prune.removal.report import agreement, outputs

FASTER = 0.95
"""A sparse layer has to take less than this share of the dense one's time: 5 % is more than two
measurements of the same layer differ by."""
DENSEST = 0.5
"""Above this density nothing is measured: sparse products lose long before."""
READ = 0.75
"""Inputs are picked out if at most this share of them is read."""
MANY = 32
"""Rows of input from which on the product is taken as weighted sums. Of 1,024 x 1,024 weights at a
density of 5 %: 287 instead of 482 us with 64 rows, 160 instead of 143 with 16, 284 instead of 64
with one."""
_DTYPES = (torch.float32, torch.float64)  # what the sparse product of torch's CPU build knows


class SparseLinear(nn.Module):
    """A linear layer whose weight is stored as compressed sparse rows.

    Computes what ``nn.Linear`` does. Its numbers are plain tensors, so that it moves, saves, loads
    and copies as any module; the surviving weights can be trained further. Where a quarter of the
    inputs or more are read by no weight, the others are picked out first: the product then has
    less to bring into the order in which it works.

    Args:
        dense: The layer to take the weights from.

    Example:
        >>> dense = nn.Linear(4, 2)
        >>> _ = dense.weight.data[:, :3].zero_()
        >>> layer = SparseLinear(dense)
        >>> layer, bool(torch.allclose(layer(torch.ones(1, 4)), dense(torch.ones(1, 4))))
        (SparseLinear(in_features=4, out_features=2, nonzeros=2, bias=True), True)
    """

    rows: Tensor
    columns: Tensor
    inputs: Tensor | None

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        _quiet_beta()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        read = (dense.weight.detach() != 0).any(0).nonzero()[:, 0]
        self.register_buffer("inputs", read if len(read) <= READ * dense.in_features else None)
        weight = dense.weight.detach()
        weight = (weight if self.inputs is None else weight[:, read]).to_sparse_csr()
        # 32 bits, as the product of Intel's library has it: others would be converted at each call.
        self.register_buffer("rows", weight.crow_indices().int())
        self.register_buffer("columns", weight.col_indices().int())
        self.values = nn.Parameter(weight.values().clone(), dense.weight.requires_grad)
        bias: Tensor | None = dense.bias
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        )
        self.training = dense.training

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) to (..., D_out)."""
        _quiet_beta()
        flat = x.reshape(-1, self.in_features)
        flat = (flat if self.inputs is None else flat.index_select(1, self.inputs)).t()
        bias = None if self.bias is None else self.bias[:, None]
        if flat.shape[1] >= MANY and flat.device.type == "cpu":
            # Row by row of the output a weighted sum of the input's: here twice as fast.
            # (The function below torch.nn.functional's, whose checks take a tenth of the time.)
            out = torch.embedding_bag(
                flat.contiguous(), self.columns, self.rows, False, 0, False, self.values, True
            )[0]
            out = out if bias is None else out + bias
        else:
            size = (self.out_features, len(flat))
            weight = torch.sparse_csr_tensor(self.rows, self.columns, self.values, size=size)
            out = weight @ flat if bias is None else torch.addmm(bias, weight, flat)
        # Contiguous, as a user's `view` expects it of a linear layer's output.
        return out.t().contiguous().view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Say how large the layer is and how many weights are left."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"nonzeros={len(self.values)}, bias={self.bias is not None}"
        )


@dataclass(frozen=True)
class Conversion:
    """What became of one linear layer; without a name and a shape, of the whole model.

    Attributes:
        name: Full name of the layer.
        shape: Of its weight, (D_out, D_in).
        density: Share of weights that are not zero.
        samples: Rows of input in the measurement.
        dense: Seconds for a call as it was; None if not measured.
        sparse: Seconds for a call with the sparse weight; None if not measured.
        converted: Whether the copy has the sparse layer.
        reason: Why, in words.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    samples: int
    dense: Latency | None
    sparse: Latency | None
    converted: bool
    reason: str

    @property
    def ratio(self) -> float | None:
        """Time of the sparse layer over that of the dense one: the median of the rounds' ratios."""
        return self.sparse.ratio(self.dense) if self.sparse and self.dense else None


class Conversions(list[Conversion]):
    """One :class:`Conversion` a layer; ``str()`` is a table of them."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "weight", "density", "rows", "dense", "sparse", "ratio", "")
        ]
        for one in self:
            ratio = "-" if one.ratio is None else f"{one.ratio:.2f}"
            times = [_micro(latency) for latency in (one.dense, one.sparse)]
            name, shape = one.name or "(whole model)", "x".join(map(str, one.shape)) or "-"
            density, samples = (f"{one.density:.1%}", str(one.samples)) if one.shape else ("-", "-")
            rows.append((name, shape, density, samples, *times, ratio, one.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(7)]
        return "\n".join("  ".join([*map(str.ljust, row, widths), row[7]]).rstrip() for row in rows)


def sparsify(
    model: Model, example_inputs: Any, *, measure: bool = True, rounds: int = 21
) -> tuple[Model | SparseLinear, Conversions]:
    """Return a copy whose linear layers are sparse where that is faster here, and why.

    Each ``nn.Linear`` with at least half of its weights zero is timed on the input that it gets
    when the model runs on ``example_inputs``, with its weight dense and sparse in turns. It is
    converted if the sparse one takes less than 0.95 of the time. Which side wins depends on the
    machine, the number of threads and the batch, so measure where and as the model will run. The
    last entry of the measurements is the whole model.

    Args:
        model: The model; it is left as it was.
        example_inputs: What ``model(...)`` takes, at the batch size that the model will see: a
            tensor, a tuple of arguments, or a dict of keywords.
        measure: False converts every layer that can be, whatever its speed here.
        rounds: How often each layer is timed.

    Raises:
        TypeError: The example inputs hold no tensor.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> _ = layer.weight.data[:, :3].zero_()
        >>> small, found = sparsify(layer, torch.ones(1, 4), measure=False)
        >>> small, found[0].reason
        (SparseLinear(...), 'converted without a measurement')
    """
    small: Any = copied(model)
    inputs = _layer_inputs(small, example_inputs)
    tied = _tied(small)
    dense_outputs = cache(partial(outputs, model, example_inputs))  # once, if any layer is tried
    found = Conversions()
    for name, layer in list(small.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        density = float((layer.weight != 0).double().mean()) if layer.weight.numel() else 1.0
        x = inputs.get(layer)
        reason = _why_not(layer, density, x, tied)
        samples = 0 if x is None else x.numel() // max(1, layer.in_features)
        dense = sparse = None
        taken = False
        if reason is None:
            candidate = SparseLinear(layer)
            if measure:
                dense, sparse = _timed(layer, candidate, x, rounds)
            reason, taken, small = _decide(
                dense_outputs, small, layer, candidate, example_inputs, dense, sparse
            )
        shape = tuple(layer.weight.shape)
        found.append(Conversion(name, shape, density, samples, dense, sparse, taken, reason))
    if measure and any(one.converted for one in found):
        dense, sparse = _timed(model, small, example_inputs, rounds)
        found.append(Conversion("", (), 1.0, 0, dense, sparse, True, "as a whole"))
    return small, found


def _decide(
    dense_outputs: Callable[[], list[Tensor]],
    small: nn.Module,
    layer: nn.Linear,
    candidate: SparseLinear,
    example_inputs: Any,
    dense: Latency | None,
    sparse: Latency | None,
) -> tuple[str, bool, nn.Module]:
    """Return what to say of a layer, whether it is sparse from now on, and the model with it."""
    if dense and sparse and not (ratio := sparse.ratio(dense)) < FASTER:
        return f"left: {ratio:.2f} times the dense layer's time", False, small
    changed = _replaced(small, layer, candidate)
    fault = _fault(dense_outputs, changed, example_inputs, layer.weight.dtype)
    if fault is not None:
        return f"left: {fault}", False, _replaced(changed, candidate, layer)
    return ("converted" if dense else "converted without a measurement"), True, changed


def _why_not(layer: nn.Linear, density: float, x: Any, tied: set[nn.Module]) -> str | None:
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    reasons = {
        "left: not called on the example inputs": x is None,
        "left: its weight is used elsewhere too": layer in tied,
        "left: it has hooks": bool(hooks),
        f"left: no sparse product for {layer.weight.dtype}": layer.weight.dtype not in _DTYPES,
        f"left: {density:.0%} of the weights are not zero": density > DENSEST,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _layer_inputs(model: nn.Module, example_inputs: Any) -> dict[nn.Module, Tensor]:
    """Run the model and return the first input of each of its linear layers."""
    inputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(keywords.values()), None)
        if isinstance(x, Tensor):
            inputs.setdefault(module, x)

    layers = [module for module in model.modules() if type(module) is nn.Linear]
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad(), evaluating(model), plain_attention():
            answer(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _tied(model: nn.Module) -> set[nn.Module]:
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(module)
    return {module for group in owners.values() if len(group) > 1 for module in group}


def _timed(
    dense: nn.Module, sparse: nn.Module, example_inputs: Any, rounds: int
) -> tuple[Latency, Latency]:
    with torch.no_grad(), evaluating(dense), evaluating(sparse):
        calls: dict[str, Callable[[], Any]] = {
            "dense": partial(answer, dense, example_inputs),
            "sparse": partial(answer, sparse, example_inputs),
        }
        found = interleaved(calls, rounds=rounds)
    return found["dense"], found["sparse"]


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` is, and return the model."""
    if model is old:
        return new
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return model


def _fault(
    dense_outputs: Callable[[], list[Tensor]],
    after: nn.Module,
    example_inputs: Any,
    dtype: torch.dtype,
) -> str | None:
    """Say what is wrong with the model after a conversion: some modules read a layer's weight."""
    try:
        with torch.no_grad(), evaluating(after):
            answer(after, example_inputs)  # as it will be called, by torch's fused ways too
        apart = agreement(dense_outputs(), outputs(after, example_inputs)).relative
    except Exception as error:  # noqa: BLE001 - whatever the surrounding module does without it
        return f"the model needs it dense ({type(error).__name__}: {error})"
    # Sums of the same products in another order, layer after layer.
    return None if apart < 1e3 * torch.finfo(dtype).eps else f"outputs differ by {apart:.2g}"


@cache
def _quiet_beta() -> None:
    """Let torch say once, to nobody, that these tensors are in beta and not checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start, column = torch.tensor([0, 1]), torch.tensor([0])
        torch.sparse_csr_tensor(start, column, torch.ones(1), size=(1, 1))


def _micro(latency: Latency | None) -> str:
    return "-" if latency is None else f"{latency.median * 1e6:.1f} us"
