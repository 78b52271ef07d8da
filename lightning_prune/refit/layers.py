"""Which pruned parameters belong to a layer that least squares can read, and what runs through it.

Enters: a model, names of parameters, a batch. Leaves: :class:`Layer` objects in the order in which
they run, and for every other name the reason; and for one layer what it was called with and what it
gave back, with the forward pass ended there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_prune.passes.isolation import own_randomness
from lightning_prune.refit.borrowing import device_of
from lightning_prune.refit.columns import LINEAR, Linear, as_rows, chunks

Run = Callable[[], object]
"""A forward pass, complete or up to where it is ended."""

Call = tuple[Tensor, Tensor]
"""What a layer was called with and what it returned."""


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution whose output is its columns times its weight.

    Args:
        name: Full name of the weight.
        module: The layer.
        weight: Its weight.
        bias: Its bias, if it has one.
        calls: How often one forward pass calls it.
    """

    name: str
    module: Linear
    weight: nn.Parameter
    bias: nn.Parameter | None
    calls: int = 1

    @property
    def bias_name(self) -> str:
        """The full name that the bias has or would have."""
        return self.name.removesuffix("weight") + "bias"


UNCALLED = "its layer was not called in a forward pass"
"""The reason for a layer that other inputs may yet call."""


class _Enough(BaseException):
    """Ends a forward pass; no Exception, so that no one on the way takes it for a fault."""


def calls_of(layer: Layer, run: Run, index: int) -> list[Call]:
    """Run a forward pass up to a layer's last call and return its calls.

    Args:
        layer: The layer to watch.
        run: The forward pass.
        index: The number of the batch: passes of one number see the same random numbers, should the
            forward pass draw any, and the global random state is left as it was.
    """
    calls: list[Call] = []

    def keep(_: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        # What comes after a call may change its output in place, unless nothing comes after.
        last = len(calls) + 1 >= layer.calls
        calls.append((inputs, outputs) if last else (inputs.clone(), outputs.clone()))
        if last:
            raise _Enough

    device = layer.weight.device
    with own_randomness(device, "refit", index), watching([layer.module], keep), suppress(_Enough):
        run()
    return calls


@contextmanager
def watching(
    modules: Iterable[nn.Module], see: Callable[[nn.Module, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``see(module, inputs, outputs)`` at each call of a module.

    What it returns takes the place of the output, unless it is ``None``.
    """

    def hook(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        return see(module, given, outputs) if given is not None else None

    handles: list[RemovableHandle] = []
    try:
        # First of all hooks: others may change the output.
        handles += [m.register_forward_hook(hook, prepend=True, with_kwargs=True) for m in modules]
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_layers(
    model: nn.Module, names: Sequence[str], runs: Iterable[Run]
) -> tuple[list[Layer], dict[str, str]]:
    """Sort out which of ``names`` are weights of layers that least squares can read.

    Has to be called inside :func:`~lightning_prune.refit.borrowing.borrowed`.

    Args:
        model: The model.
        names: Full names of parameters.
        runs: Forward passes of the model, one a batch; as many are made as it takes for all layers
            to be called (the first alone, unless inputs choose their layers).

    Returns:
        The layers in the order in which they are first called, and name -> why it is not among
        them.
    """
    layers, left = _candidates(model, names)
    called, misfits, elsewhere = _observe(model, layers, runs)
    found = []
    for module in dict.fromkeys([*called, *layers]):
        layer = layers[module]
        kind = type(module).__name__
        if layer.name in elsewhere:
            left[layer.name] = f"its {kind}'s parameters are also used outside of its forward"
        elif module not in called:
            left[layer.name] = UNCALLED
        elif module in misfits:
            left[layer.name] = f"the output of its {kind} is not its inputs times its weight"
        else:
            found.append(replace(layer, calls=called[module]))
    return found, left


def _observe(
    model: nn.Module, layers: dict[nn.Module, Layer], runs: Iterable[Run]
) -> tuple[dict[nn.Module, int], set[nn.Module], set[str]]:
    """Run until all layers were called, and return what was seen of them.

    Returns:
        Module -> how often the first pass that calls it does; the modules whose output is not their
        columns times their weight; the weights that something else reads, too.
    """
    called: dict[nn.Module, int] = {}
    now: dict[nn.Module, int] = {}  # in the present pass
    misfits: set[nn.Module] = set()

    def see(module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        if module not in {**called, **now} and not _fits(layers[module], inputs, outputs):
            misfits.add(module)
        now[module] = now.get(module, 0) + 1

    uses = _Uses({id(p): layer for layer in layers.values() for p in _parameters(layer)})
    with ExitStack() as stack:
        for module in layers:
            stack.callback(module.register_forward_pre_hook(uses.enter).remove)
            stack.callback(module.register_forward_hook(uses.leave).remove)
        stack.enter_context(watching(layers, see))
        stack.enter_context(uses)
        for index, run in enumerate(runs):
            with own_randomness(device_of(model), "refit", index):
                run()
            for module, times in now.items():
                called.setdefault(module, times)
            now.clear()
            if len(called) == len(layers):
                break
    return called, misfits, uses.elsewhere


def _parameters(layer: Layer) -> list[nn.Parameter]:
    return [layer.weight, *([] if layer.bias is None else [layer.bias])]


def _candidates(
    model: nn.Module, names: Sequence[str]
) -> tuple[dict[nn.Module, Layer], dict[str, str]]:
    """Return module -> layer as far as the model's structure tells, and name -> why not."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    layers: dict[nn.Module, Layer] = {}
    left: dict[str, str] = {}
    for name in names:
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        if leaf == "bias" and isinstance(module, LINEAR):
            left[name] = "a bias: corrected only along with a pruned weight"
        elif uses[id(model.get_parameter(name))] > 1:
            left[name] = "shared by several modules (tied)"
        elif leaf != "weight" or not isinstance(module, LINEAR):
            left[name] = f"part of a {type(module).__name__}, no linear layer or convolution"
        elif (bias := module.bias) is None:
            layers[module] = Layer(name, module, model.get_parameter(name), None)
        elif not isinstance(bias, nn.Parameter) or uses.get(id(bias), 0) != 1:
            left[name] = "its layer's bias is shared by several modules, or no parameter"
        else:
            layers[module] = Layer(name, module, model.get_parameter(name), bias)
    return layers, left


def _fits(layer: Layer, inputs: Tensor, outputs: Any) -> bool:
    """Whether the output of a layer is its columns times its weight: measured on two samples."""
    dims = 1 if isinstance(layer.module, nn.Linear) else len(layer.module.kernel_size) + 1
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        return False
    if inputs.ndim > dims:  # with a batch axis
        if len(inputs) != len(outputs):
            return False
        inputs, outputs = inputs[:2], outputs[:2]
    try:
        parts = list(chunks(layer.module, inputs, outputs))
    except RuntimeError:
        return False  # of a shape that no such layer takes
    for a, z in parts:
        w = as_rows(layer.module, layer.weight.detach()).to(a)
        if z is None or z.shape != (a.shape[0], a.shape[1], w.shape[1]):
            return False
        expected, scale = a @ w.mT, a.abs() @ w.abs().mT
        if layer.bias is not None:
            b = as_rows(layer.module, layer.bias.detach()).to(a).mT
            expected, scale = expected + b, scale + b.abs()
        coarsest = max(torch.finfo(v.dtype).eps for v in (layer.weight, outputs))
        tolerance = coarsest**0.5  # of an output that autocast has rounded, that of its dtype
        near = (z - expected).abs() <= tolerance * scale.clamp_min(1e-30)
        if not bool((near | ~torch.isfinite(scale)).all()):  # what is not finite is judged later
            return False
    return True


class _Uses(TorchFunctionMode):
    """Notes which layers' parameters are used by anything but their own forward."""

    def __init__(self, owners: dict[int, Layer]) -> None:
        super().__init__()
        self.owners = owners
        self.running: list[nn.Module] = []
        self.elsewhere: set[str] = set()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before a layer's forward."""
        self.running.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it."""
        self.running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves(output)
        if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
            # Not merely a question for its shape or dtype.
            for value in pytree.tree_leaves((args, kwargs)):
                layer = self.owners.get(id(value))
                if layer is not None and layer.module not in self.running:
                    self.elsewhere.add(layer.name)
        return output
