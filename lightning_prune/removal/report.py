"""Before and after: what a smaller model saves, and whether it still says the same.

Enters: two models and example inputs. Leaves: numbers side by side, as an object, as a table and as
a dict for a logger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.passes.isolation import evaluating, own_randomness, plain_attention, unlogged
from lightning_prune.removal.calls import answer, resized
from lightning_prune.removal.costs import Costs, measure_costs
from lightning_prune.removal.latency import Latency, interleaved
from lightning_prune.removal.running import tensors_in

BATCH_SIZES = (1, 64)
"""One sample, as a service answers, and a batch, as a job works."""


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of two models are apart on the same inputs.

    Attributes:
        absolute: The largest difference.
        relative: That, as a share of the largest output of the model before.
        same_argmax: Share of samples with the same largest output; None if no output is (N, C).
    """

    absolute: float
    relative: float
    same_argmax: float | None


@dataclass(frozen=True)
class Comparison:
    """Two models side by side; ``str()`` is a table of it.

    Attributes:
        before: What the model before costs.
        after: What the model after costs.
        latency: By batch size: seconds for a call before and after, measured in the same rounds.
            Empty if nothing was timed.
        agreement: How far the outputs are apart.
        samples: Batch size of the peak memory.
    """

    before: Costs
    after: Costs
    latency: dict[int, tuple[Latency, Latency]]
    agreement: Agreement
    samples: int

    @property
    def log(self) -> dict[str, float]:
        """All numbers under names for a logger: ``removal/macs_before``, ``removal/macs_after``.

        ``removal/speedup_64`` is how many times as fast the model after is at batch 64, the median
        over the rounds.
        """
        numbers: dict[str, float] = {}
        costs_before, costs_after = asdict(self.before), asdict(self.after)
        for name in costs_before:
            numbers[f"removal/{name}_before"] = float(costs_before[name])
            numbers[f"removal/{name}_after"] = float(costs_after[name])
        for size, (before, after) in self.latency.items():
            numbers[f"removal/latency_{size}_before"] = before.median
            numbers[f"removal/latency_{size}_after"] = after.median
            numbers[f"removal/speedup_{size}"] = before.ratio(after)
        numbers["removal/difference"] = self.agreement.absolute
        numbers["removal/relative_difference"] = self.agreement.relative
        if self.agreement.same_argmax is not None:
            numbers["removal/same_argmax"] = self.agreement.same_argmax
        return numbers

    def __str__(self) -> str:
        rows = [("", "before", "after", "after / before"), *self._cost_rows()]
        for size, (before, after) in self.latency.items():
            share = f"{after.ratio(before):.3f}"
            rows.append((f"latency, batch {size}", _time(before), _time(after), share))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        same = self.agreement.same_argmax
        lines.append(
            f"outputs differ by at most {self.agreement.absolute:.2g} "
            f"({self.agreement.relative:.2g} of the largest)"
            + ("" if same is None else f"; the same class for {same:.2%} of the samples")
        )
        return "\n".join(lines)

    def _cost_rows(self) -> list[tuple[str, str, str, str]]:
        labels: dict[str, tuple[str, Callable[[float], str]]] = {
            "parameters": ("parameters", _count),
            "nonzeros": ("  not zero", _count),
            "macs": ("multiply-accumulates, 1 sample", _count),
            "nonzero_macs": ("  without zero weights", _count),
            "file_bytes": ("bytes on disk", _count),
            "peak_bytes": (f"peak bytes of tensors, batch {self.samples}", _count),
        }
        before, after = asdict(self.before), asdict(self.after)
        return [
            (label, show(before[name]), show(after[name]), _share(after[name], before[name]))
            for name, (label, show) in labels.items()
        ]


def compare(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any,
    *,
    latency: bool = True,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = 21,
) -> Comparison:
    """Measure two models on the same inputs: what they cost, how fast they are, what they say.

    Both run in eval mode without gradients and are left as they were, on the device and with as
    many threads as torch has now. The latencies are medians over rounds in which both models take
    turns, after a warm-up.

    Args:
        before: The model as it was.
        after: The smaller model.
        example_inputs: What ``model(...)`` takes: a tensor, a tuple of arguments, or a dict of
            keywords. Axis 0 of every tensor that counts samples is repeated or cut to the batch
            sizes; the outputs are compared on the inputs as they are.
        latency: Whether to time the models, which takes about a second for small ones.
        batch_sizes: Batch sizes to time; the largest is that of the peak memory.
        rounds: How often each is timed.

    Raises:
        TypeError: The example inputs hold no tensor.
        ValueError: The example inputs hold no sample, a batch size is below 1, or the outputs of
            the models have different forms.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> print(compare(layer, layer, torch.ones(2, 4), latency=False))
                                            before  after  after / before
        parameters                              15     15           1.000
          not zero                              15     15           1.000
        multiply-accumulates, 1 sample          12     12           1.000
          without zero weights                  12     12           1.000
        bytes on disk                        ...
        peak bytes of tensors, batch 64      1,852  1,852           1.000
        outputs differ by at most 0 (0 of the largest); the same class for 100.00% of the samples
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(
            f"Expected argument `batch_sizes` to be positive numbers, but got {[*batch_sizes]}."
        )
    samples = max(batch_sizes)
    with unlogged(before), unlogged(after):
        found = agree(before, after, example_inputs)
        return Comparison(
            before=measure_costs(before, example_inputs, samples=samples),
            after=measure_costs(after, example_inputs, samples=samples),
            latency=_latencies(before, after, example_inputs, batch_sizes, rounds)
            if latency
            else {},
            agreement=found,
            samples=samples,
        )


def agree(before: nn.Module, after: nn.Module, example_inputs: Any) -> Agreement:
    """Return how far the outputs of two models are apart; models that draw, draw the same.

    NaN agrees with NaN, and infinity with the same infinity; anything else that is not a finite
    difference is an infinite one.

    Raises:
        ValueError: The outputs have different forms or shapes.
        RemovalError: A model returns no tensor.
    """
    return agreement(outputs(before, example_inputs), outputs(after, example_inputs))


def agreement(one: list[Tensor], other: list[Tensor]) -> Agreement:
    """Return how far outputs are apart, as :func:`agree` does, for who has them already."""
    shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Expected both models to return tensors of the same shapes, but before: {shapes[0]}, "
            f"after: {shapes[1]}."
        )
    absolute = scale = 0.0
    for mine, theirs in zip(one, other, strict=True):
        if mine.numel():
            a, b = mine.double(), theirs.to(mine.device).double()
            same = (a == b) | (a.isnan() & b.isnan())
            difference = (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf)
            difference = difference.masked_fill(same, 0.0)
            absolute = max(absolute, float(difference.max()))
            scale = max(scale, float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    relative = absolute / scale if scale else (math.inf if absolute else 0.0)
    return Agreement(absolute, relative, _same_argmax(one, other))


def outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Return the tensors in a model's output; complex ones as pairs of real numbers.

    Raises:
        RemovalError: The model returns no tensor.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with (
        torch.no_grad(),
        evaluating(model),
        own_randomness(device, "removal", "agreement"),
        plain_attention(),  # torch's fused one puts zeros at padded places, if nothing was changed
    ):
        leaves = tensors_in(answer(model, example_inputs), model)
    return [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]


def _same_argmax(one: list[Tensor], other: list[Tensor]) -> float | None:
    for mine, theirs in zip(one, other, strict=True):
        if mine.ndim == 2 and mine.shape[1] > 1 and len(mine) and mine.is_floating_point():
            same = mine.argmax(1) == theirs.to(mine.device).argmax(1)
            return float(same.double().mean())
    return None


def _latencies(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any,
    batch_sizes: Sequence[int],
    rounds: int,
) -> dict[int, tuple[Latency, Latency]]:
    found = {}
    with torch.no_grad(), evaluating(before), evaluating(after):
        for size in batch_sizes:
            inputs = resized(example_inputs, size)
            calls = {
                "before": partial(answer, before, inputs),
                "after": partial(answer, after, inputs),
            }
            timed = interleaved(calls, rounds=rounds)
            found[size] = timed["before"], timed["after"]
    return found


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _share(after: float, before: float) -> str:
    return f"{after / before:.3f}" if before else "-"


def _time(latency: Latency) -> str:
    first, third = latency.quartiles
    return f"{latency.median * 1e3:.3f} ms ({first * 1e3:.3f} to {third * 1e3:.3f})"
