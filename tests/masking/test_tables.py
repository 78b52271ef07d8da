"""Rows of look-up tables that go because no scored sample has read them are told, once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import SaliencyPruningCallback, prune
from lightning_prune.masking import unread_rows
from tests.callbacks.pruning_cases import Digits, digits, trainer

DARK = 8  # pixels up to this; the table has rows for 17 values and one for padding, at the end


def pictures(highest: int = DARK, samples: int = 96) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return (16 * x[:samples]).long().clamp(max=highest), y[:samples]


class Tokens(Digits):
    def __init__(self, kind: type[nn.Module] = nn.Embedding) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(64 * 4, 10)
        self.table = kind(18, 4, padding_idx=17)
        nn.init.normal_(self.table.weight)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.table, nn.EmbeddingBag):
            return self.net(self.table(x.reshape(-1, 1)).reshape(len(x), -1))
        return self.net(self.table(x).flatten(1))


def told(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "rows have R = 0" in str(w.message)]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_offline_and_that_a_full_vocabulary_is_no_news(kind) -> None:
    share = 0.05  # of 2,632 weights; 32 are in rows that no picture reads
    (message,) = told(lambda: prune(Tokens(kind), [pictures()], sparsity=share, stages=3))
    assert message.startswith("table.weight: 8 of 18 rows")
    assert "exclude=['table.weight']" in message
    for options in ({"exclude": ["table.*"]}, {"criterion": "magnitude"}):
        assert told(lambda o=options: prune(Tokens(kind), [pictures()], sparsity=share, **o)) == []
    assert told(lambda: prune(Tokens(kind), [pictures(16)], sparsity=share)) == []


def test_in_a_fit_once_a_table() -> None:
    loader = DataLoader(TensorDataset(*pictures()), 32)
    model, pruner = Tokens(), SaliencyPruningCallback({0: 14 / 2632, 1: 0.04, 2: 0.5})
    lines = told(lambda: trainer(pruner, max_epochs=4).fit(model, loader, loader))
    assert len(lines) == 1
    # 14 weights from the end: padding, two rows of four and a part of the next.
    assert "Epoch 0: table.weight: 8 of 18 rows" in lines[0]
    assert "the first to go: 2 of them with this event" in lines[0]
    assert not pruner.masks["table.weight"][9:17].any()


def test_a_tied_table_is_known_by_the_name_that_scores_have() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 3, bias=False), "table": nn.Embedding(3, 4)})
    model["table"].weight = model["head"].weight
    scores = {"head.weight": torch.tensor([[1.0], [0.0], [0.0]]).expand(3, 4)}
    kept = {"head.weight": scores["head.weight"] > 0}
    assert "head.weight: 2 of 3 rows" in unread_rows(model, scores, {}, kept)["head.weight"]
    half = {"head.weight": torch.tensor([True, True, False])[:, None].expand(3, 4)}
    assert "go: 1 of them" in unread_rows(model, scores, {}, half)["head.weight"]
    # What went before, for whatever reason, is no news; what goes now is.
    assert "1 of 3 rows" in unread_rows(model, scores, half, kept)["head.weight"]
    assert unread_rows(model, scores, kept, kept) == {}
    assert unread_rows(model, scores, {}, {"head.weight": torch.ones(3, 4).bool()}) == {}
