"""The knife: a working copy of a model, its tensors cut, and where their entries came from.

Enters: a model and masks. Leaves: a copy with fewer numbers, in the dtypes, modes and gradient
flags of the original, which is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_prune._types import Masks
from lightning_prune.masking.apply import zero_removed
from lightning_prune.removal import attention, layers
from lightning_prune.removal.calls import copied
from lightning_prune.removal.constants import fold, merge
from lightning_prune.removal.dead_units import Plan


def masked_copy(model: nn.Module, masks: Masks | None) -> nn.Module:
    """Return a copy of the model with its masks applied, in eval mode and without its trainer.

    Raises:
        ValueError: A mask fits no parameter.
    """
    twin = copied(model)
    if masks is not None:
        zero_removed(dict(twin.named_parameters()), masks)
    for module in twin.modules():
        module.training = False
    return twin


class Patient:
    """A model being cut.

    Args:
        model: A copy of our own, in eval mode.
        double: Whether to work in float64.
    """

    def __init__(self, model: nn.Module, *, double: bool) -> None:
        self.model = copied(model)
        self.origins: dict[str, Tensor] = {}
        self.new_biases: list[str] = []
        self._marks = {name: (t.dtype, t.requires_grad) for name, t in _tensors(model)}
        for _, tensor in _tensors(self.model):
            if double and tensor.is_floating_point():
                tensor.data = tensor.data.double()
        self._open()

    def copy(self) -> Patient:
        """Return a twin to go back to."""
        twin = copy.copy(self)
        twin.model = copied(self.model)
        twin.origins, twin.new_biases = dict(self.origins), list(self.new_biases)
        return twin

    def operate(self, plans: Sequence[Plan]) -> None:
        """Do what the plans say: constants into biases first, since the indices are of before."""
        names = {id(module): name for name, module in self.model.named_modules()}
        with torch.no_grad():
            for plan in plans:
                for each in plan.folds:
                    if fold(each.layer, each.inputs, each.values):
                        self.new_biases.append(f"{names[id(each.layer)]}.bias".lstrip("."))
                for one in plan.merges:
                    merge(one.layer, one.inputs, one.into, one.factors)
            for plan in plans:
                for link in plan.group.links:
                    gone = torch.unique(link.indices[torch.isin(link.roots, plan.cut)])
                    scalar = isinstance(link.layer, nn.PReLU) and link.layer.num_parameters == 1
                    if link.layer is not None and link.side is not None and not scalar:
                        self._cut(link.layer, link.name, link.side, gone)
        self._open()

    def behead(self, name: str) -> bool:
        """Cut the heads that an attention does not need; return whether there were any."""
        module = self.model.get_submodule(name)
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"Expected an attention, but got a {type(module).__name__}.")
        gone, added = attention.unneeded(module)
        if not bool(gone.any()):
            return False
        with torch.no_grad():
            if module.out_proj.bias is not None:
                module.out_proj.bias.add_(added)
            for local, rows in attention.rows_left(module, gone).items():
                places = torch.arange(getattr(module, local).numel())
                kept = places.view(getattr(module, local).shape)[rows]
                self._replace(module, name, local, kept)
            columns = gone.repeat_interleave(module.head_dim).nonzero()[:, 0]
            self._cut(module.out_proj, f"{name}.out_proj".lstrip("."), "inputs", columns)
        before: list[int] = getattr(module, "heads", list(range(module.num_heads)))
        dense = getattr(module, "dense_heads", module.num_heads)
        stay = [head for head, falls in zip(before, gone.tolist(), strict=True) if not falls]
        attention.keep_heads(module, stay, dense)
        attention.without_nesting(self.model)
        self._open()
        return True

    def finished(self, like: nn.Module) -> nn.Module:
        """Return the model in the dtypes, modes and gradient flags of the original ``like``."""
        modes = {name: module.training for name, module in like.named_modules()}
        was = dict(_tensors(like))
        flags = {name: parameter.requires_grad for name, parameter in like.named_parameters()}
        result = copied(self.model)
        for name, module in result.named_modules():
            module.training = modes[name]
        for name, tensor in _tensors(result):
            twin = name if name in self._marks else name.removesuffix("bias") + "weight"
            tensor.data = _laid_out(tensor.data.to(self._marks[twin][0]), was.get(name))
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(flags[twin])
        return result

    def _cut(self, layer: nn.Module, name: str, side: layers.Side, gone: Tensor) -> None:
        sizes: dict[str, int] = {}
        for local, kept, new_sizes in layers.cut(layer, side, gone):
            sizes.update(new_sizes)
            self._replace(layer, name, local, kept)
        for attribute, size in sizes.items():
            setattr(layer, attribute, size)

    def _replace(self, layer: nn.Module, name: str, local: str, kept: Tensor) -> None:
        """Give a layer the entries of a tensor that stay, and note where they were."""
        old = getattr(layer, local)
        new = old.detach().flatten()[kept.to(old.device)]
        full = f"{name}.{local}".lstrip(".")
        if isinstance(old, nn.Parameter):
            setattr(layer, local, nn.Parameter(new))
        else:
            layer._buffers[local] = new
        if full not in self.new_biases:
            past = self.origins.get(full)
            self.origins[full] = kept if past is None else past.flatten()[kept]

    def _open(self) -> None:
        """Let gradients reach every parameter: the graph is read from autograd."""
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)


def _laid_out(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return a tensor in another's memory format, if that is channels last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if like is None or last is None or like.is_contiguous():
        return tensor
    kept = like.is_contiguous(memory_format=last)
    return tensor.contiguous(memory_format=last) if kept else tensor


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
