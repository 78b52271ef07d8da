"""A smaller model on disk: its widths beside its weights, and the loader that rebuilds it.

A ``state_dict`` of a smaller model does not load into a freshly built one, since the widths differ.
Here they travel along. Nothing is pickled but tensors, names and numbers.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.removal import attention, layers
from lightning_prune.removal.proof import RemovalError

_FORMAT = "lightning_prune.removal"
_VERSION = 1


def save_shrunk(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a smaller model's weights and widths to a file.

    Args:
        model: What :func:`~lightning_prune.removal.shrink` returned, perhaps trained on.
        path: Where to.
    """
    sizes = {
        name: layers.sizes(module)
        for name, module in model.named_modules()
        if isinstance(module, layers.KNOWN)
    }
    heads = {
        name: {"heads": list(module.heads), "dense_heads": module.dense_heads}
        for name, module in model.named_modules()
        if isinstance(module, attention.FewerHeads)
    }
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "sizes": sizes,
        "heads": heads,
        "state": model.state_dict(),
    }
    torch.save(content, path)


def load_shrunk(path: str | PathLike[str], model: nn.Module) -> nn.Module:
    """Read a file of :func:`save_shrunk` into a freshly built dense model.

    Args:
        path: The file. It is read with ``weights_only=True``.
        model: The model as it was before it was shrunk; its weights do not matter. It is changed in
            place: its layers are given the saved widths, then the saved weights.

    Returns:
        The same ``model``.

    Raises:
        RemovalError: The file is of another kind, or of another model as far as names and shapes
            tell: every width has to be at least the saved one.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> small = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_shrunk(small, Path(folder) / "small.pt")
        ...     load_shrunk(Path(folder) / "small.pt", dense)[0]
        Linear(in_features=4, out_features=3, bias=True)
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise RemovalError(f"Expected a file written by save_shrunk, but got {path}.")
    if content["version"] != _VERSION:
        raise RemovalError(
            f"Expected a file of version {_VERSION}, but {path} has version {content['version']}."
        )
    state: dict[str, Tensor] = content["state"]
    heads = content.get("heads", {})  # files from before any could fall have none
    _check_names(model, content["sizes"], heads, state)
    _drop_heads(model, heads)
    for name, sizes in content["sizes"].items():
        _resize(model.get_submodule(name), sizes, name, state)
    model.load_state_dict(state)
    return model


def _drop_heads(model: nn.Module, kept: dict[str, dict[str, Any]]) -> None:
    """Give a dense model's attentions the heads that were saved."""
    for name, each in kept.items():
        module: Any = model.get_submodule(name)
        gone = torch.ones(module.num_heads, dtype=torch.bool)
        gone[each["heads"]] = False
        for local, rows in attention.rows_left(module, gone).items():
            old = getattr(module, local)
            setattr(module, local, nn.Parameter(old.detach()[rows], old.requires_grad))
        attention.keep_heads(module, each["heads"], each["dense_heads"])
    if kept:
        attention.without_nesting(model)


def _check_names(
    model: nn.Module,
    sizes: dict[str, Any],
    heads: dict[str, dict[str, Any]],
    state: dict[str, Tensor],
) -> None:
    modules = dict(model.named_modules())
    own = {name for name, module in model.named_modules() if isinstance(module, layers.KNOWN)}
    faults = [f"the model has no layer {name!r}" for name in sizes if name not in own]
    faults += [f"the file has no layer {name!r}" for name in sorted(own - set(sizes))]
    faults += [
        f"the model has no attention of {each['dense_heads']} heads {name!r}"
        for name, each in heads.items()
        if getattr(modules.get(name), "num_heads", None) != each["dense_heads"]
    ]
    faults += [
        f"{name!r} is a {type(modules[name]).__name__} in the model, another layer in the file"
        for name, saved in sizes.items()
        if name in own and saved.keys() != layers.sizes(modules[name]).keys()
    ]
    faults += [
        f"{name!r} has {attribute} {size} in the file, but {getattr(modules[name], attribute)} in "
        "the model, which should be the larger one"
        for name, saved in sizes.items()
        if name in own
        for attribute, size in saved.items()
        if attribute != "groups" and size > getattr(modules[name], attribute, size)
    ]
    inside = tuple(f"{name}.".lstrip(".") for name in (*sizes, *heads))
    for name, tensor in model.state_dict().items():
        if name not in state:
            faults.append(f"the file has no {name!r}")
        elif not name.startswith(inside) and state[name].shape != tensor.shape:
            faults.append(
                f"{name!r} is {tuple(tensor.shape)} in the model, {tuple(state[name].shape)} "
                "in the file"
            )
    if faults:
        listed = "\n- ".join(["Expected a model built like the one that was saved:", *faults])
        raise RemovalError(listed)


def _resize(module: nn.Module, sizes: dict[str, int], name: str, state: dict[str, Tensor]) -> None:
    for attribute, size in sizes.items():
        setattr(module, attribute, size)
    for local in ("weight", "bias", "running_mean", "running_var"):
        saved = state.get(f"{name}.{local}".lstrip("."))
        current = getattr(module, local, None)
        if saved is None:
            continue
        if current is None:  # a bias that took constants in
            weight: Any = module._parameters["weight"]
            new = torch.empty(saved.shape, dtype=weight.dtype, device=weight.device)
            setattr(module, local, nn.Parameter(new, requires_grad=weight.requires_grad))
        elif current.shape != saved.shape:
            new = torch.empty(saved.shape, dtype=current.dtype, device=current.device)
            if isinstance(current, nn.Parameter):
                setattr(module, local, nn.Parameter(new, requires_grad=current.requires_grad))
            else:
                module._buffers[local] = new
