"""What scores cannot know of look-up tables: the rows that no scored sample has read.

Enters: scores, and masks before and after an event. Leaves: what to warn of.
"""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune._types import Masks, Scores


def unread_rows(model: nn.Module, saliency: Scores, before: Masks, after: Masks) -> dict[str, str]:
    """Return what to warn of, by table: rows that went with R = 0.

    R of a row that no scored sample reads is 0, whatever it is worth: of a vocabulary few words are
    in a validation set.

    Args:
        model: The model; its ``nn.Embedding`` and ``nn.EmbeddingBag`` are looked at.
        saliency: R by name.
        before: The masks before the event; a parameter without one is complete.
        after: Those after it.

    Example:
        >>> table = nn.Embedding(4, 2)
        >>> r = {"weight": torch.tensor([[0.0, 0.1], [0.0, 0.0], [0.0, 0.0], [0.2, 0.3]])}
        >>> after = {"weight": torch.tensor([True, True, False, True])[:, None].expand(4, 2)}
        >>> unread_rows(table, r, {}, after)["weight"].split(", as ")[0]
        'weight: 2 of 4 rows have R = 0'
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
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
        unread &= alive
        if gone := int((unread & ~after[name].any(1)).sum()):
            found[name] = (
                f"{name}: {int(unread.sum()):,} of {len(unread):,} rows have R = 0, as no scored "
                "sample reads them (or none whose prediction is in doubt). Such rows are the first "
                f"to go: {gone:,} of them with this event. Inputs with them (other words, later "
                "positions) read zeros. Score more samples, or leave the table out: "
                f"exclude=[{name!r}]."
            )
    return found
