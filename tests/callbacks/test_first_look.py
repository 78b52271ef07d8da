"""What a look at two samples of each loader tells before the first training step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import SaliencyPruningCallback, Selection, prune
from lightning_prune.callbacks.preflight import PruningSetupError
from lightning_prune.exceptions import BatchFormatError, SaliencyError
from tests.callbacks.pruning_cases import (
    Digits,
    digits,
    fit,
    loaders,
    make_model,
    same,
    trainer,
)

SANITY = [{}, {"num_sanity_val_steps": 0}]


def said(run: Any) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return " ".join(str(w.message) for w in caught if "num_workers" not in str(w.message))


# Iterators


@pytest.mark.parametrize("form", ["iterator", "generator"])
@pytest.mark.parametrize("how", [{}, {"every_n_train_steps": 2}])
def test_batches_that_are_gone_after_one_event_are_refused(form: str, how: Any) -> None:
    batches = list(loaders()[1])
    once = iter(batches) if form == "iterator" else (batch for batch in batches)
    pruner = SaliencyPruningCallback({0: 0.3, 1: 0.5}, scoring_loader=once, **how)
    with pytest.raises(PruningSetupError, match="gone through at every event"):
        fit(pruner)
    assert len(list(once)) == len(batches)


def test_a_loader_that_begins_anew_may_be_its_own_iterator() -> None:
    loader = CombinedLoader([loaders()[1]], "sequential")
    assert iter(loader) is loader
    pruner = SaliencyPruningCallback(
        {0: 0.3, 1: 0.5}, scoring_loader=loader, forward=lambda module, batch: module(batch[0][0])
    )
    fit(pruner)
    assert [record["samples"] for record in pruner.history] == [128, 128]


def test_a_method_may_return_a_generator() -> None:
    class Owner(Digits):
        def some(self) -> Iterator[Any]:
            yield from loaders()[1]

    pruner = SaliencyPruningCallback({0: 0.3, 1: 0.5}, scoring_loader="some")
    fit(pruner, model=Owner())
    assert [record["samples"] for record in pruner.history] == [128, 128]


# Each loader


class SecondForm(Digits):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0] if dataloader_idx == 0 else batch["a"]["img"])


def nested() -> DataLoader[Any]:
    x, _ = digits()
    return DataLoader([{"a": {"img": image}} for image in x[:20]], batch_size=5)


@pytest.mark.parametrize("sanity", SANITY)
def test_the_second_loader_is_looked_into_too(sanity: Any) -> None:
    model = SecondForm()
    t = trainer(SaliencyPruningCallback({2: 0.5}), **sanity)
    train, val = loaders()
    with pytest.raises(BatchFormatError, match="dict batch"):
        t.fit(model, train, [val, nested()])
    assert t.global_step == 0


@pytest.mark.parametrize("sanity", SANITY)
def test_a_loader_that_is_one_part_of_the_batches_is_not_looked_into_alone(sanity: Any) -> None:
    class Joined(Digits):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0][0] + batch[1][0])

    pruner = SaliencyPruningCallback(
        {0: 0.5}, forward=lambda module, batch: module(batch[0][0] + batch[1][0])
    )
    val = CombinedLoader([loaders()[1], loaders()[1]], "max_size")
    trainer(pruner, max_epochs=1, **sanity).fit(Joined(), loaders()[0], val)
    assert pruner.sparsity == 0.5


class TwoHeads(Digits):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x) if x.shape[1] == 32 else super().forward(x)


@pytest.mark.parametrize("sanity", SANITY)
@pytest.mark.parametrize("both", [True, False])
def test_what_another_loader_reaches_is_not_called_unreached(sanity: Any, both: bool) -> None:
    x, y = digits()
    more = DataLoader(TensorDataset(x[:20, :32], y[:20]), batch_size=5)
    train, val = loaders()
    t = trainer(SaliencyPruningCallback({0: 0.5}), max_epochs=1, **sanity)

    def run() -> None:
        with nullcontext() if both else pytest.raises(SaliencyError, match="gradient path"):
            t.fit(TwoHeads(), train, [val, more] if both else val)

    line = said(run)
    assert ("No gradient path" in line) != both


# The axis of the classes


class Words(L.LightningModule):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.table, self.head, self.turned = nn.Embedding(12, 8), nn.Linear(8, 5), turned

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.table(x))
        return logits.transpose(1, 2) if self.turned else logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        logits = logits if self.turned else logits.transpose(1, 2)
        return nn.functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("sanity", SANITY)
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(
    "arguments", [{}, {"criterion": "obs"}, {"forward": lambda module, batch: module(batch[0])}]
)
def test_classes_on_the_last_axis_are_warned_of(sanity: Any, turned: bool, arguments: Any) -> None:
    words = DataLoader(
        TensorDataset(torch.randint(0, 12, (32, 7)), torch.randint(0, 5, (32, 7))), batch_size=8
    )
    pruner = SaliencyPruningCallback({0: 0.5}, parameters=["head.weight"], **arguments)
    t = trainer(pruner, max_epochs=1, **sanity)
    line = said(lambda: t.fit(Words(turned), words, words))
    expected = "logits of a batch of N are (N, 7, 5), and its labels (N, 7)"
    assert (expected in line) != turned


# Outputs that are no classes


class Bits(L.LightningModule):
    """Three logits a sample, each for itself, and a loss that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1].float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


LABELS = {
    "several at once": (torch.tensor([[1.0, 1.0, 0.0]]), "'bernoulli'"),
    "as integers": (torch.tensor([[1, 0, 1]]), "'bernoulli'"),
    "targets of a regression": (torch.tensor([[1.5, -2.0, 0.3]]), "'gaussian'"),
    "probabilities": (torch.tensor([[0.2, 0.5, 0.3]]), None),
    "one of them": (torch.tensor([[0, 1, 0]]), None),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("arguments", [{}, {"criterion": "obs"}, {"likelihood": "bernoulli"}])
def test_labels_that_are_no_classes_are_warned_of(case: str, arguments: Any) -> None:
    row, likelihood = LABELS[case]
    data = DataLoader(TensorDataset(torch.randn(32, 6), row.expand(32, 3)), batch_size=8)
    t = trainer(SaliencyPruningCallback({0: 0.5}, **arguments), max_epochs=1)
    line = said(lambda: t.fit(Bits(), data, data))
    assert ("The labels have the logits' shape" in line) == (
        likelihood is not None and "likelihood" not in arguments
    )
    assert "likelihood" in arguments or likelihood is None or f"likelihood={likelihood}" in line
    offline = said(lambda: prune(Bits(), list(data), sparsity=0.5, **arguments))
    assert ("The labels have the logits' shape" in offline) == (
        "The labels have the logits' shape" in line
    )


# Layers that are left out


def test_parametrised_layers_that_stay_as_they_are_are_warned_of() -> None:
    def made() -> Digits:
        model = make_model()
        model.net[0] = nn.utils.parametrizations.weight_norm(model.net[0])
        return model

    def lines(**arguments: Any) -> list[str]:
        def run() -> None:
            trainer(SaliencyPruningCallback({0: 0.5}, **arguments)).fit(made(), *loaders())

        batches = list(loaders()[1])
        return [said(run), said(lambda: prune(made(), batches, sparsity=0.5, **arguments))]

    for line in lines():
        assert "are not pruned: ['net.0.parametrizations.weight.original0', " in line
    for line in lines(exclude=["net.0.*"]) + lines(parameters=["net.3.weight"]):
        assert "are not pruned" not in line


# Whole units of the output


UNITS: dict[str, tuple[dict[str, Any], bool]] = {
    "by default": ({}, True),
    "by magnitude": ({"criterion": "magnitude"}, True),
    "by a pattern": ({"parameters": ["net.*"]}, True),
    "by its name": ({"parameters": ["net.0.weight", "net.3.weight"]}, False),
    "excluded": ({"exclude": ["net.3.weight"]}, False),
    "channels": ({"selection": Selection("channel")}, False),
}


@pytest.mark.parametrize("sanity", SANITY)
@pytest.mark.parametrize("case", UNITS)
def test_units_of_the_output_layer_are_classes(case: str, sanity: Any) -> None:
    arguments, warned = UNITS[case]
    pruner = SaliencyPruningCallback({0: 0.3}, **{"selection": Selection("unit"), **arguments})
    line = said(lambda: fit(pruner, max_epochs=1, **sanity))
    assert ("may remove rows of ['net.3.weight']" in line) == warned
    assert line.count("may remove rows") == int(warned)
    assert pruner.sparsity > 0.2


def test_a_batch_that_magnitude_has_no_use_for_is_no_error() -> None:
    class Nested(Digits):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch["a"]["img"])

    pruner = SaliencyPruningCallback({0: 0.3}, criterion="magnitude", selection=Selection("unit"))
    t = trainer(pruner, max_epochs=1)
    said(lambda: t.fit(Nested(), loaders()[0], nested()))
    assert pruner.sparsity > 0.2


@pytest.mark.parametrize("sanity", SANITY)
def test_batches_of_any_form_do_where_nothing_reads_them(sanity: Any) -> None:
    """Objects without a tensor, and labels of several axes beside a forward of two arguments."""

    class Graph:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Pairs(Digits):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x) * scale

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self(x, torch.ones(())), y)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x = batch.x if isinstance(batch, Graph) else batch[0]
            self(x, torch.ones(()))

    x, _ = digits()
    dense = torch.zeros(8, 4, 4).long()
    for form in (lambda rows: Graph(torch.stack(rows)), lambda rows: (torch.stack(rows), dense)):
        val = DataLoader(list(x[-32:]), batch_size=8, collate_fn=form)
        pruner = SaliencyPruningCallback(
            {0: 0.3}, criterion="magnitude", selection=Selection("unit"), exclude=["net.3.*"]
        )
        trainer(pruner, max_epochs=1, **sanity).fit(Pairs(), loaders()[0], val)
        assert pruner.sparsity > 0.2


# Steps that take their batch apart


class Popping(Digits):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        y = batch.pop("labels") if isinstance(batch, dict) else batch.pop(1)
        x = batch.pop("x") if isinstance(batch, dict) else batch.pop(0)
        self.log("accuracy", (self(x).argmax(-1) == y).float().mean(), batch_size=len(y))


@pytest.mark.parametrize("sanity", SANITY)
@pytest.mark.parametrize("form", ["dict", "list"])
@pytest.mark.parametrize("target", ["probability", "label_probability"])
def test_what_a_step_takes_out_of_its_batch_is_scored(form: str, sanity: Any, target: Any) -> None:
    def collate(samples: Any) -> Any:
        x, y = (torch.stack(part) for part in zip(*samples, strict=True))
        return {"x": x, "labels": y} if form == "dict" else [x, y]

    x, y = digits()
    val = DataLoader(TensorDataset(x[-128:], y[-128:]), batch_size=50, collate_fn=collate)
    popped, plain = (SaliencyPruningCallback({0: 0.5}, target=target) for _ in range(2))
    torch.manual_seed(1)
    trainer(popped, max_epochs=1, **sanity).fit(Popping(), loaders()[0], val)
    fit(plain, model=make_model(), max_epochs=1, **sanity)
    assert same(popped.masks, plain.masks)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"selection": "2:4"}, r"Expected `selection` to be a Selection.*'2:4'"),
        ({"rewind": "weights"}, r"Expected `rewind` to be a Rewind.*'weights'"),
        ({"seed": "a"}, r"Expected `seed` to be a whole number, but got 'a'"),
        ({"seed": 1.0, "rewind": 1}, r"`rewind`.*but got 1\. Expected `seed`.*got 1\.0"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused_at_once(arguments: Any, expected: str) -> None:
    with pytest.raises(TypeError, match=expected):
        SaliencyPruningCallback({1: 0.5}, **arguments)
