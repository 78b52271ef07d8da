"""Passes that leave no trace: random numbers of our own, and a model borrowed in eval mode.

Enters: a key that names a draw, or a module. Leaves: a context inside which one may draw or run a
forward pass; on exit, also after an exception, everything is as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

WITHOUT_OWN_STATE = ("cpu", "mps", "meta")
"""Device types beside which only the CPU's random state has to be kept (or can be: MPS has one
state for all devices and no way to name it by device)."""

LOGGING = ("log", "log_dict")
"""Methods by which a LightningModule writes down numbers."""

_UNDER_WAY: list[None] = []
"""One entry for each pass of ours. Of the process and not of a thread, since on a GPU a
checkpointed forward pass is repeated in a thread of autograd's."""


def ours() -> bool:
    """Whether a pass of ours is under way, which is none of the user's steps.

    So it is inside of :func:`evaluating` and of :func:`unlogged`, through one of which all of them
    go. Who watches a step asks it: callbacks run their passes between any two hooks of another.
    """
    return bool(_UNDER_WAY)


@contextmanager
def _our_pass() -> Iterator[None]:
    _UNDER_WAY.append(None)
    try:
        yield
    finally:
        _UNDER_WAY.pop()


def derived_seed(*key: int | str) -> int:
    """Return a seed for the draw that ``key`` names, e.g. ``(seed, "fit", step, rank)``.

    A draw that is a function of its name needs no generator state in a checkpoint, and two draws
    with different names are independent whatever happened in between.

    Example:
        >>> derived_seed(0, "fit", 1) == derived_seed(0, "fit", 1)
        True
        >>> derived_seed(0, "fit", 1) == derived_seed(0, "fit", 2)
        False
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the global random state back after a block: torch's on the CPU and that of ``device``.

    Only the CPU's where torch keeps none by device (MPS, XLA).

    Example:
        >>> before = torch.get_rng_state()
        >>> with random_state_kept(torch.device("cpu")):
        ...     _ = torch.rand(3)
        >>> bool(torch.equal(before, torch.get_rng_state()))
        True
    """
    if _accelerator(device) is None:
        with torch.random.fork_rng(devices=[]):
            yield
        return
    with torch.random.fork_rng(devices=[_index_of(device)], device_type=device.type):
        yield


@contextmanager
def own_randomness(device: torch.device, *key: int | str) -> Iterator[None]:
    """Run a block on random numbers fixed by ``key``; the global random state is put back after it.

    Works for code that knows no ``generator=`` argument, such as a user's ``loss`` and ``sample``.
    Covers torch's CPU generator and that of ``device`` (not MPS).

    Example:
        >>> before = torch.get_rng_state()
        >>> with own_randomness(torch.device("cpu"), 0, "draw", 7):
        ...     first = torch.rand(3)
        >>> with own_randomness(torch.device("cpu"), 0, "draw", 7):
        ...     bool(torch.equal(first, torch.rand(3)))
        True
        >>> bool(torch.equal(before, torch.get_rng_state()))
        True
    """
    seed = derived_seed(*key)
    with random_state_kept(device):
        # Not torch.manual_seed: it would reseed every device, and only this one is put back.
        torch.default_generator.manual_seed(seed)
        if (accelerator := _accelerator(device)) is not None:
            with accelerator.device(_index_of(device)):
                accelerator.manual_seed(seed)
        yield


def _accelerator(device: torch.device) -> Any:
    """Return torch's module for a device with a random state of its own, None for others."""
    module = None if device.type in WITHOUT_OWN_STATE else getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") else None


def _index_of(device: torch.device) -> int:
    """Return the number of an accelerator; without one of its own it is the current one."""
    index: Any = device.index  # torch's annotation leaves out None
    return int(_accelerator(device).current_device() if index is None else index)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch from running an encoder layer as one operation, and on nested (unpadded) tensors.

    In eval mode without gradients it does so, and submodules then see inputs that have no shape, or
    are not called at all.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def evaluating(module: nn.Module, *, differentiable: bool = False) -> Iterator[None]:
    """Put every submodule in eval mode for a block; each gets its own mode back after it.

    Flags are set one by one instead of through ``module.eval()``, so that a frozen submodule stays
    as the user left it and an overridden ``train`` is not called.

    Args:
        module: The model to borrow.
        differentiable: Leave recurrent layers in their mode, since cuDNN differentiates them in
            training mode only.
    """
    changed = [
        submodule
        for submodule in module.modules()
        if submodule.training and not (differentiable and isinstance(submodule, nn.RNNBase))
    ]
    for submodule in changed:
        submodule.training = False
    try:
        with _our_pass():
            yield
    finally:
        for submodule in changed:
            submodule.training = True


@contextmanager
def unlogged(model: nn.Module, among: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Have ``self.log`` and ``self.log_dict`` of a LightningModule do nothing in a block.

    What a ``forward`` logs belongs to the steps of the user's. In a pass of ours it would mix with
    that, and outside of a fit's steps Lightning refuses it: also after the fit, which leaves its
    Trainer on the module.

    Args:
        model: Any module; LightningModules in it are quiet as well, others with a method ``log``
            (a logarithm, say) keep it.
        among: Those of its modules to look at, where somebody knows that these are enough.
    """
    modules = model.modules() if among is None else among
    held = [vars(module) for module in modules if _logs(module)]
    before = [{name: own[name] for name in LOGGING if name in own} for own in held]
    for own in held:
        own.update(dict.fromkeys(LOGGING, _nothing))
    try:
        with _our_pass():
            yield
    finally:
        for own, kept in zip(held, before, strict=True):
            for name in LOGGING:
                own.pop(name, None)
            own.update(kept)


def _logs(module: nn.Module) -> bool:
    """Whether it is a LightningModule, as far as this room, which knows no Lightning, can tell."""
    return all(callable(getattr(type(module), name, None)) for name in (*LOGGING, "training_step"))


def _nothing(*args: Any, **kwargs: Any) -> None: ...


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules as they were written.

    A graph that was captured before knows nothing of hooks that came later and of function modes.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None:  # older torch has no switch for it
        yield
        return
    with set_stance("force_eager"):
        yield
