"""A validation step that feeds the model something else than its batch is noticed."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from tests.callbacks.pruning_cases import Digits, fit, loaders, trainer

SAID = "validation_step calls the model with another tensor"


class Prepared(Digits):
    """Does something to its input before it calls the model."""

    def __init__(self, prepare: Any, called: str = "self") -> None:
        torch.manual_seed(1)
        super().__init__()
        self.prepare, self.called = prepare, called

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        net = self if self.called == "self" else self.net
        net(self.prepare(batch[0]))


def said(model: Digits, pruner: SaliencyPruningCallback, **kwargs: Any) -> list[str]:
    """Return what a fit has said about the step's inputs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(pruner, model=model, **kwargs)
    return [str(w.message) for w in caught if "validation_step calls" in str(w.message)]


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("criterion", ["taylor", "obc"])
def test_a_step_that_scales_its_input_is_warned_of_once(criterion: str, sanity: int) -> None:
    model = Prepared(lambda x: (x - 0.3) / 0.4)
    pruner = SaliencyPruningCallback({1: 0.5}, criterion=criterion)
    assert len(said(model, pruner, num_sanity_val_steps=sanity)) == 1
    assert not model._forward_pre_hooks
    assert len(said(model, SaliencyPruningCallback({1: 0.5}))) == 1  # another fit


def test_other_shapes_are_named() -> None:
    class Turned(Prepared):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1))

    (message,) = said(Turned(lambda x: x.reshape(-1, 8, 8)), SaliencyPruningCallback({1: 0.5}))
    assert "(50, 8, 8) than the batch's input (50, 64)" in message


@pytest.mark.parametrize(
    ("model", "pruner"),
    [
        (lambda: Prepared(lambda x: x), {}),
        (lambda: Prepared(lambda x: x.double().float()), {}),
        (lambda: Prepared(lambda x: x[:10]), {}),  # some of its samples
        (lambda: Prepared(lambda x: x + 1.0), {"scoring_loader": list(loaders()[1])}),
        (lambda: Prepared(lambda x: x + 1.0, called="net"), {}),  # not known, so nothing is said
        (lambda: Prepared(lambda x: x + 1.0), {"forward": lambda m, b: m(b[0] + 1.0)}),
        (lambda: Prepared(lambda x: x + 1.0), {"criterion": "magnitude"}),  # reads no batch
        (lambda: Prepared(lambda x: x + 1.0), {"schedule": {}}),
    ],
)
def test_nothing_is_said_where_there_is_nothing_to_say(model: Any, pruner: Any) -> None:
    assert said(model(), SaliencyPruningCallback(**{"schedule": {1: 0.5}, **pruner})) == []


def test_a_step_that_calls_the_model_twice_is_right_once() -> None:
    class Twice(Prepared):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0] + 1.0)
            self(batch[0])

    assert said(Twice(None), SaliencyPruningCallback({1: 0.5})) == []


@pytest.mark.parametrize("kind", ["sparse", "nan", "keyword"])
def test_inputs_that_are_hard_to_compare_are_no_fault(kind: str) -> None:
    class Odd(Prepared):
        def forward(self, x: Tensor, labels: Any = None) -> Tensor:
            x = x.to_dense() if x.is_sparse else x
            return super().forward(x.nan_to_num())

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(labels=batch[1], x=batch[0]) if kind == "keyword" else self(batch[0])

    def collate(rows: list[Any]) -> Any:
        x, y = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        x = torch.where(x == 0, torch.nan, x) if kind == "nan" else x
        return (x.to_sparse() if kind == "sparse" else x), y

    train, val = (DataLoader(part.dataset, 50, collate_fn=collate) for part in loaders())
    model, pruner = Odd(None), SaliencyPruningCallback({1: 0.5})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(pruner).fit(model, train, val)
    assert not [w for w in caught if "validation_step calls" in str(w.message)]
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_failing_step_leaves_no_hook_and_a_copy_takes_none_along() -> None:
    class Failing(Prepared):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.copied = copy.deepcopy(pruner)
            raise RuntimeError("the step fails")

    model, pruner = Failing(None), SaliencyPruningCallback({1: 0.5})
    with pytest.raises(RuntimeError, match="the step fails"):
        trainer(pruner).fit(model, *loaders())
    assert not model._forward_pre_hooks
    assert said(Prepared(lambda x: x + 1.0), model.copied)


def as_dicts(rows: list[Any]) -> dict[str, Tensor]:
    x, y = (torch.stack([row[i] for row in rows]) for i in range(2))
    return {"x": x, "y": y}


def said_of(model: Digits, collate: Any, **pruner: Any) -> list[str]:
    """Return what a fit on batches of another form has said about the step's inputs."""
    train, val = (DataLoader(part.dataset, 64, collate_fn=collate) for part in loaders())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(SaliencyPruningCallback({1: 0.5}, **pruner)).fit(model, train, val)
    return [str(w.message) for w in caught if "validation_step calls" in str(w.message)]


class Dicts(Prepared):
    """Its batches are dicts; ``forward`` calls its one parameter as they do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.prepare(batch["x"]), batch["y"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(self.prepare(batch["x"])) if self.called == "self" else self(x=batch["x"])


def test_a_dict_by_the_names_of_forward_is_compared() -> None:
    (message,) = said_of(Dicts(lambda x: (x - 0.3) / 0.4), as_dicts)
    assert SAID in message
    assert "(64, 64) than the batch's input (64, 64)" in message
    assert said_of(Dicts(lambda x: x), as_dicts) == []
    assert said_of(Dicts(lambda x: x, called="by keyword"), as_dicts) == []


def masked(rows: list[Any]) -> tuple[Tensor, ...]:
    x, y = (torch.stack([row[i] for row in rows]) for i in range(2))
    return x, x != 0, y  # which of the pixels there are


class Masked(Digits):
    """Takes a mask beside its input, and can do without."""

    def __init__(self, given: Any) -> None:
        torch.manual_seed(1)
        super().__init__()
        self.given = given

    def forward(self, x: Tensor, mask: Tensor | None = None, y: Any = None) -> Tensor:
        return self.net(x if mask is None else x * mask)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0], batch[-1]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        args, kwargs = self.given(batch)
        self(*args, **kwargs)


@pytest.mark.parametrize(
    "given",
    [
        lambda b: ((b[0], b[1]), {}),
        lambda b: ((b[0],), {"mask": b[1]}),
        lambda b: ((b[0],), {"mask": b[1].float()}),
        lambda b: ((b[0], (b[0] > 0.5).long(), b[2]), {}),  # made by the step
        lambda b: ((b[0], torch.tensor(2.0)), {}),
    ],
)
def test_a_further_tensor_of_the_call_is_named(given: Any) -> None:
    (message,) = said_of(Masked(given), masked)
    assert re.search(r"with `mask` (\(64, 64\)|\(\)) beside the batch's input", message)


@pytest.mark.parametrize(
    "given",
    [
        lambda b: ((b[0],), {}),
        lambda b: ((b[0], None), {}),
        lambda b: ((b[0], None, b[2]), {}),  # labels, for a loss
        lambda b: ((b[0],), {"y": b[2]}),
    ],
)
def test_a_call_with_the_input_alone_is_right(given: Any) -> None:
    assert said_of(Masked(given), masked) == []


def test_a_mask_that_is_said_by_forward_or_by_a_dict_is_none_of_its_business() -> None:
    def forward(module: Any, batch: Any) -> Tensor:
        return module(batch[0], batch[1])

    assert said_of(Masked(lambda b: ((b[0], b[1]), {})), masked, forward=forward) == []

    class Named(Masked):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    def named(rows: list[Any]) -> dict[str, Tensor]:
        return dict(zip(("x", "mask", "y"), masked(rows), strict=True))

    assert said_of(Named(lambda b: ((b["x"], b["mask"]), {})), named) == []
    (message,) = said_of(Named(lambda b: ((b["x"], ~b["mask"]), {})), named)
    assert "`mask` (64, 64) beside" in message
