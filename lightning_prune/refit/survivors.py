"""The numbers that a refit may change, as one vector.

Enters: a model and its masks. Leaves: the surviving weights of the masked parameters and the
biases of the modules that own them, each once, as a vector; and back. What was removed is no part
of the vector, so that nothing can bring it back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_prune._types import Masks
from lightning_prune.refit.divergence import precise


class Survivors:
    """Where the surviving weights of a model are.

    Args:
        model: The masked model. A parameter that is tied, or belongs to a module that is called
            twice, counts once.
        masks: ``True`` = kept, by ``named_parameters()`` name.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> survivors = Survivors(layer, {"weight": torch.tensor([[True, False]])})
        >>> survivors.names, len(survivors.read())
        (['weight', 'bias'], 2)
        >>> survivors.spread(torch.tensor([3.0, 4.0]))["weight"].tolist()
        [[3.0, 0.0]]
    """

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        parameters = dict(model.named_parameters())
        self._index: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for name in (*masks, *_biases(model, masks, parameters)):
            p = parameters[name]
            kept = masks.get(name, torch.ones(p.shape, dtype=torch.bool)).to(p.device)
            self._index[name] = kept.reshape(-1).nonzero()[:, 0]
            self._parameters[name] = p

    @property
    def names(self) -> list[str]:
        """The parameters with an entry in the vector, in its order."""
        return [name for name, index in self._index.items() if len(index)]

    def read(self) -> Tensor:
        """Return the survivors' values, (K,), in float64 where the device has it."""
        return self.gather(self._parameters)

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the entries of tensors shaped like the parameters, (K,)."""
        parts = [precise(tensors[n].detach().reshape(-1)[self._index[n]]) for n in self.names]
        return torch.cat([part.to(parts[0].device) for part in parts]) if parts else torch.zeros(0)

    def spread(self, vector: Tensor) -> dict[str, Tensor]:
        """Return tensors like the parameters with the vector's entries, zero where removed."""
        parts = iter(torch.split(vector, [len(self._index[name]) for name in self.names]))
        tensors = {}
        for name, p in self._parameters.items():
            flat = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
            if len(self._index[name]):
                flat[self._index[name]] = next(parts).to(flat)
            tensors[name] = flat.view(p.shape)
        return tensors

    def write(self, vector: Tensor) -> None:
        """Give the model the values of the vector, in place; flags and gradients stay."""
        values = self.spread(vector)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])


def _biases(model: nn.Module, masks: Masks, parameters: Mapping[str, Tensor]) -> list[str]:
    """Name the biases without a mask of the modules that own a masked parameter."""
    name_of = {id(p): name for name, p in parameters.items()}
    found: dict[str, None] = {}
    for module in model.modules():
        own = {key: name_of[id(p)] for key, p in module._parameters.items() if p is not None}
        if any(name in masks for name in own.values()):
            found.update(dict.fromkeys(n for k, n in own.items() if "bias" in k and n not in masks))
    return list(found)
