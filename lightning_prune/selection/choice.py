"""What is removed at a pruning event: of which size, measured over what, and what is spared."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_prune._targets import Target, Threshold, is_epoch, is_number, target_fault
from lightning_prune._types import Masks, Scores
from lightning_prune.selection.checks import check_masks, check_saliency, check_scores
from lightning_prune.selection.n_m import is_limit, is_n_m, parse_pattern, select_n_m
from lightning_prune.selection.ranking import complete_masks
from lightning_prune.selection.regrowth import regrow
from lightning_prune.selection.structured import (
    Grouping,
    Pool,
    fits,
    grouping_of,
    select_groups,
)
from lightning_prune.selection.unstructured import select_weights

Scope = Literal["global", "layer"]

GRANULARITIES = ("weight", "unit", "channel", "head")


@dataclass(frozen=True)
class Selected:
    """What a :class:`Selection` has decided.

    Args:
        masks: One bool mask for each score, ``True`` where the weight is kept.
        guarded: The parameters that would have lost more but for the guard, in the order of the
            scores. If the target was beyond what the guard allows, these hold more than it asks.
        regrown: How many weights came back.
    """

    masks: Masks
    guarded: list[str]
    regrown: int = 0


@dataclass(frozen=True)
class Selection:
    """From scores and a target to masks.

    Removed stays removed, except by ``regrow``. Of equal scores the earlier weight (parameters in
    the order of the scores, then by index) is kept, so all machines decide alike. With single
    weights exactly ``round(share * total)`` weights are removed, whatever the guard spares: what
    one parameter does not give the others do.

    The guard is always on: every parameter keeps at least one weight or group, and ``min_density``
    of its weights. A parameter that earlier masks have emptied stays as it is. Under a
    :class:`~lightning_prune.Threshold` it keeps the best weights of a parameter that would fall
    short, and no other parameter gives anything for it.

    Args:
        granularity: What is kept or removed as one piece. Axes are those of the tensor, so for
            transposed convolutions 0 is the input and 1 the output.

            - ``"weight"``: single weights.
            - ``"N:M"``, such as ``"2:4"``: at most N of each M consecutive weights of a row of the
              weight read as (out, in * kernel); at the end of a row, of r < M, at most min(N, r).
              Targets go up to ``1 - N/M``, where every group is pruned; below it the groups go
              first that cost least, in whole groups. No thresholds.
            - ``"unit"``: axis 0, the rows of a linear layer, the output channels of a convolution.
              A classifier's last layer would lose classes: leave it out of what is pruned.
            - ``"channel"``: axis 1, the input channels.
            - ``"head"``: the rows of an attention head, along axis 0; of ``in_proj_weight`` those
              of its query, key and value together.

            Of units, channels and heads, the weakest go one after another up to the first that
            would make it more than the share; never more than asked.
        scope: Whether a share is meant over all weights together (``"global"``) or in each
            parameter by itself (``"layer"``; rounded so that the sum is exact).
        min_density: The share of each parameter that is kept in any case, in [0, 1).
        regrow: Up to this share of the kept weights, in [0, 1), is swapped at an event for weights
            that earlier events removed and whose R is larger. Only for single weights.
        pool: How the score of a unit, channel or head comes from those of its weights.
        heads: Parameter name or pattern (``"encoder.*.in_proj_weight"``) -> number of heads.

    Raises:
        ValueError: All that is wrong with the arguments, in one message.

    Example:
        >>> import torch
        >>> scores = {"a": torch.tensor([[4.0, 3.0, 2.0, 1.0]]), "b": torch.tensor([[0.1, 0.2]])}
        >>> selected = Selection()(scores, 0.5)
        >>> selected.masks["b"], selected.guarded
        (tensor([[False,  True]]), ['b'])
        >>> Selection("1:2")(scores, 0.5).masks["a"]
        tensor([[ True, False,  True, False]])
    """

    granularity: str = "weight"
    scope: Scope = "global"
    min_density: float = 0.0
    regrow: float = 0.0
    pool: Pool = "sum"
    heads: dict[str, int] | None = None

    def __post_init__(self) -> None:
        """Refuse arguments that cannot be used, all in one message."""
        faults = [*_granularity_faults(self), *_option_faults(self)]
        if faults:
            raise ValueError("\n- ".join(["The selection cannot be used:", *faults]))

    def __call__(
        self,
        scores: Scores,
        target: Target,
        *,
        masks: Masks | None = None,
        saliency: Scores | None = None,
    ) -> Selected:
        """Return the masks that ``target`` asks for.

        Args:
            scores: One score per weight, by parameter name; larger is more important.
            target: A share of all weights to be removed by now, in [0, 1), those removed earlier
                included; or a :class:`~lightning_prune.Threshold` on the score (of a group: on the
                pooled score).
            masks: The masks in force. A parameter without one is complete.
            saliency: R of every weight, also of removed ones; needed for ``regrow`` only.

        Raises:
            NonFiniteScoresError: A score is NaN or infinite; the message names the parameter.
            ValueError: No scores, masks or saliency that do not fit them, or a target or a
                parameter that this selection cannot serve (:meth:`faults`).
        """
        check_scores(scores)
        check_masks(masks, scores)
        faults = self.faults(scores, [target])
        if faults:
            raise ValueError("\n- ".join(["The selection does not fit:", *faults]))
        if self.regrow > 0:
            saliency = check_saliency(saliency, scores)
        earlier = complete_masks(scores, masks)
        selected, guarded = self._select(scores, target, earlier)
        if self.regrow == 0 or saliency is None:
            return Selected(selected, guarded)
        selected, count = regrow(
            saliency,
            selected,
            earlier,
            share=self.regrow,
            by_layer=self.scope == "layer",
            min_density=self.min_density,
        )
        return Selected(selected, guarded, count)

    def reaches(self, masks: Masks, share: float) -> bool:
        """Tell whether masks remove a share, as nearly as whole pieces of this size come to it.

        Example:
            >>> import torch
            >>> kept = torch.tensor([[True, True, True], [False, False, False]])
            >>> [Selection(kind).reaches({"weight": kept}, 0.6) for kind in ("weight", "unit")]
            [False, True]
        """
        total = sum(mask.numel() for mask in masks.values())
        missing = round(share * total) - sum(int((~mask).sum()) for mask in masks.values())
        if missing <= 0 or self.granularity == "weight":
            return missing <= 0
        pattern = parse_pattern(self.granularity)
        if pattern is not None and is_limit(share, *pattern):  # rows may end with a part of a group
            return all(is_n_m(mask, *pattern) for mask in masks.values())
        pieces = [self._largest(name, mask) for name, mask in masks.items()]
        return missing < (sum(pieces) if self.scope == "layer" else max(pieces))

    def _largest(self, name: str, mask: Tensor) -> int:
        """Return how many weights the largest piece that is left of a parameter takes along."""
        pattern = parse_pattern(self.granularity)
        if pattern is not None:
            return pattern[1] - pattern[0]
        grouping = grouping_of(name, mask.shape, self.granularity, self.heads)
        return int(grouping.rows(mask).sum(1).max()) if isinstance(grouping, Grouping) else 0

    def faults(self, parameters: Mapping[str, Tensor], targets: Iterable[Target] = ()) -> list[str]:
        """List what about parameters and targets this selection cannot serve; empty if all is fine.

        For a check before the work: nothing but the names and shapes of ``parameters`` is read.

        Example:
            >>> import torch
            >>> Selection("2:4").faults({"weight": torch.ones(2, 4)}, [0.5, 0.6])
            ["target 0.6: expected at most 0.5, the share that '2:4' removes"]
        """
        found = []
        pattern = parse_pattern(self.granularity)
        for target in targets:
            if (fault := target_fault(target)) is not None:
                found.append(f"target: {fault}")
            elif pattern is not None and (fault := _n_m_fault(target, *pattern)) is not None:
                found.append(fault)
        return [*found, *self._parameter_faults(parameters)]

    def _parameter_faults(self, parameters: Mapping[str, Tensor]) -> list[str]:
        if self.granularity == "weight":
            return []
        found = []
        for name, parameter in parameters.items():
            grouping = grouping_of(name, parameter.shape, self.granularity, self.heads)
            if isinstance(grouping, str):
                found.append(grouping)
        unused = [p for p in self.heads or {} if not any(fits(name, p) for name in parameters)]
        if unused:
            found.append(f"heads: expected names or patterns of parameters, but {unused} fit none")
        return found

    def _select(self, scores: Scores, target: Target, masks: Masks) -> tuple[Masks, list[str]]:
        by_layer = self.scope == "layer"
        if self.granularity == "weight":
            return select_weights(
                scores, target, masks, by_layer=by_layer, min_density=self.min_density
            )
        pattern = parse_pattern(self.granularity)
        if pattern is not None and not isinstance(target, Threshold):
            n, m = pattern
            return select_n_m(scores, target, masks, n=n, m=m, by_layer=by_layer), []
        groupings = {
            name: grouping
            for name, score in scores.items()
            if isinstance(
                grouping := grouping_of(name, score.shape, self.granularity, self.heads), Grouping
            )
        }
        return select_groups(
            scores,
            target,
            masks,
            groupings,
            pool=self.pool,
            by_layer=by_layer,
            min_density=self.min_density,
        )


def _n_m_fault(target: Target, n: int, m: int) -> str | None:
    if isinstance(target, Threshold):
        return f"{target}: expected a share for granularity '{n}:{m}', which fixes what is kept"
    if target > 1 - n / m and not is_limit(target, n, m):
        limit = f"{1 - n / m:g}, the share that '{n}:{m}' removes"
        return f"target {target}: expected at most {limit}"
    return None


def _granularity_faults(selection: Selection) -> list[str]:
    """List what is wrong with the granularity, and what it cannot be combined with."""
    granularity: Any = selection.granularity
    pattern = parse_pattern(granularity) if isinstance(granularity, str) else None
    faults = []
    if granularity not in GRANULARITIES and pattern is None:
        close = difflib.get_close_matches(str(granularity), GRANULARITIES, n=1)
        faults.append(
            f"granularity: expected one of {', '.join(map(repr, GRANULARITIES))} or 'N:M' with "
            f"1 <= N < M, but got {granularity!r}" + (f"; '{close[0]}'?" if close else "")
        )
    if granularity != "weight" and is_number(selection.regrow) and selection.regrow > 0:
        faults.append(
            f"regrow: expected 0 unless granularity is 'weight', but got {selection.regrow!r} with "
            f"{granularity!r}"
        )
    if pattern is not None and is_number(selection.min_density):
        n, m = pattern
        if selection.min_density > n / m:
            faults.append(
                f"min_density: expected at most {n / m:g}, what {granularity!r} keeps, but got "
                f"{selection.min_density!r}"
            )
    if granularity == "head" and not selection.heads:
        faults.append(
            "heads: expected a mapping of parameter name or pattern to number of heads for "
            "granularity 'head', but got none"
        )
    if granularity != "head" and selection.heads:
        faults.append(f"heads: expected none unless granularity is 'head', not {granularity!r}")
    return faults


def _option_faults(selection: Selection) -> list[str]:
    """List the arguments that are out of their range by themselves."""
    faults = []
    for name, allowed in (("scope", get_args(Scope)), ("pool", get_args(Pool))):
        if getattr(selection, name) not in allowed:
            names = ", ".join(map(repr, allowed))
            faults.append(f"{name}: expected one of {names}, but got {getattr(selection, name)!r}")
    for name in ("min_density", "regrow"):
        value = getattr(selection, name)
        if not is_number(value) or not 0 <= value < 1:
            faults.append(f"{name}: expected a share in [0, 1), but got {value!r}")
    heads: Any = selection.heads
    if heads is not None and not isinstance(heads, Mapping):
        faults.append(f"heads: expected a mapping name -> number of heads, but got {heads!r}")
    elif heads:
        faults += [
            f"heads[{name!r}]: expected a whole number >= 1, but got {number!r}"
            for name, number in heads.items()
            if not is_epoch(number) or number == 0
        ]
    return faults
