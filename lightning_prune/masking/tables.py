"""What scores cannot know of look-up tables: the rows that no scored sample has read.

Enters: scores, and masks before and after an event. Leaves: what to warn of.
"""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune._types import Masks, Scores


def unread_rows(model: nn.Module, saliency: Scores, before: Masks, after: Masks) -> str | None:
    """Return what to warn of: rows that went because no scored sample has read them.

    R of such a row is 0, whatever it is worth: of a vocabulary few words are in a validation set.
    Said of a table when the first of them go.

    Args:
        model: The model; its ``nn.Embedding`` and ``nn.EmbeddingBag`` are looked at.
        saliency: R by name.
        before: The masks before the event; a parameter without one is complete.
        after: Those after it.

    Example:
        >>> table = nn.Embedding(3, 2)
        >>> r = {"weight": torch.tensor([[0.0, 0.1], [0.0, 0.0], [0.2, 0.3]])}
        >>> kept = torch.ones(3, 2, dtype=torch.bool)
        >>> print(unread_rows(table, r, {"weight": kept}, {"weight": r["weight"] > 0}))
        weight: 1 of 3 rows took part in no scored sample: their R is 0, and 1 of them is gone now.
        Inputs with them (other words, later positions) read zeros.
        Score samples that have them, or leave the table out: exclude=['weight'].
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    lines = []
    for module in model.modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        name = names.get(id(module.weight), "")
        if name not in saliency:
            continue
        unread = (saliency[name] == 0).all(1)
        if module.padding_idx is not None:
            unread[module.padding_idx] = False  # has no gradient by its nature
        alive = before[name].any(1) if name in before else torch.ones_like(unread)
        gone = int((unread & alive & ~after[name].any(1)).sum())
        if not gone or bool((unread & ~alive).any()):  # nothing new, or said before
            continue
        lines += [
            f"{name}: {int(unread.sum()):,} of {len(unread):,} rows took part in no scored sample: "
            f"their R is 0, and {gone:,} of them {'is' if gone == 1 else 'are'} gone now.",
            "Inputs with them (other words, later positions) read zeros.",
            f"Score samples that have them, or leave the table out: exclude=[{name!r}].",
        ]
    return "\n".join(lines) or None
