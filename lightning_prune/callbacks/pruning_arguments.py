"""The pruner's arguments as a user gives them, checked where no model is needed for it."""

from __future__ import annotations

from numbers import Integral

from lightning_prune.callbacks.rewinding import Rewind
from lightning_prune.selection import Selection


def check_types(*, selection: object, rewind: object, seed: object) -> None:
    """Raise TypeError for arguments of a wrong type, all of them in one message."""
    faults = [
        f"Expected `{name}` to be {wanted}, but got {value!r}."
        for name, value, wanted, right in (
            (
                "selection",
                selection,
                "a Selection, such as Selection('2:4'), or None",
                selection is None or isinstance(selection, Selection),
            ),
            (
                "rewind",
                rewind,
                "a Rewind, such as Rewind('weights', epoch=1), or None",
                rewind is None or isinstance(rewind, Rewind),
            ),
            ("seed", seed, "a whole number", _is_whole(seed)),
        )
        if not right
    ]
    if faults:
        raise TypeError(" ".join(faults))


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_names(**arguments: list[str] | None) -> tuple[list[str] | None, ...]:
    """Return arguments that list names; a lone name is refused, its letters would be names."""
    for name, value in arguments.items():
        if isinstance(value, str):
            raise TypeError(f"Expected `{name}` to be a list of names, but got {value!r}.")
    return tuple(None if value is None else list(value) for value in arguments.values())
