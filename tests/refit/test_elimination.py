"""Prices of weights that leave their row one after another: against each removal solved anew."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_prune import SaliencyPruningCallback, Selection, prune
from lightning_prune.refit import elimination
from lightning_prune.refit.elimination import elimination_costs
from lightning_prune.refit.least_squares import inverse_diagonals
from lightning_prune.refit.obs import obs_prices
from tests.callbacks.pruning_cases import Digits, loaders, same, trainer


def problem(rows: int, size: int, density: float) -> tuple[Tensor, Tensor, Tensor]:
    a = torch.randn(50, size, dtype=torch.float64)
    a[:, 1] = a[:, 0] + 0.1 * a[:, 1]  # neighbours
    gram = a.mT @ a + 0.1 * torch.eye(size, dtype=torch.float64)
    keep = torch.rand(rows, size) < density
    keep[0] = False
    keep[1] = False
    keep[1, 3] = True
    return gram, torch.randn(rows, size, dtype=torch.float64) * keep, keep


def loss_without(gram: Tensor, w: Tensor, alive: list[int], removed: list[int]) -> float:
    """Return the least (v - w)^T H (v - w) over v that is 0 at ``removed``, solved anew."""
    stay = [i for i in alive if i not in removed]
    block = gram[alive][:, alive]
    v = torch.zeros(len(alive), dtype=torch.float64)
    if stay:
        at = [alive.index(i) for i in stay]
        v[at] = torch.linalg.solve(gram[stay][:, stay], gram[stay][:, alive] @ w[alive])
    change = v - w[alive]
    return float(change @ block @ change)


def slow_costs(gram: Tensor, w: Tensor, keep: Tensor) -> Tensor:
    """Take a row apart by trying every removal at every step."""
    alive, removed, highest, before = keep.nonzero()[:, 0].tolist(), [], 0.0, 0.0
    costs = torch.zeros_like(w)
    while len(removed) < len(alive):
        left = [i for i in alive if i not in removed]
        losses = {i: loss_without(gram, w, alive, [*removed, i]) for i in left}
        i = min(losses, key=losses.__getitem__)
        highest = max(highest, losses[i] - before)
        costs[i], before = highest, losses[i]
        highest *= 1 + 1e-6
        removed.append(i)
    return costs


@pytest.mark.parametrize("rows_at_once", [2, 1024])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_each_costs_what_its_step_does(
    density: float, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elimination, "ROWS", rows_at_once)
    gram, w, keep = problem(7, 9, density)
    expected = torch.stack([slow_costs(gram, row, kept) for row, kept in zip(w, keep, strict=True)])
    found = elimination_costs(gram[None], w[None], keep[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_groups_are_taken_apart_at_once_by_their_own_matrices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(elimination, "MOST_SURVIVORS", 5)
    parts = [problem(6, 9, 0.5) for _ in range(3)]
    grams, w, keep = (torch.stack(part) for part in zip(*parts, strict=True))
    alone = [elimination_costs(g[None], v[None], k[None]) for g, v, k in parts]
    torch.testing.assert_close(
        elimination_costs(grams, w, keep), torch.cat(alone), rtol=1e-12, atol=0
    )


def test_float32_keeps_the_order_of_the_turns() -> None:
    """Also where cheaper steps follow a costly one, as among inputs that are much alike."""
    a = torch.randn(50, 1, dtype=torch.float64) + 0.05 * torch.randn(50, 8, dtype=torch.float64)
    gram, w = a.mT @ a, torch.randn(20, 8, dtype=torch.float64)
    keep = torch.ones(20, 8, dtype=torch.bool)
    slow = torch.stack([slow_costs(gram, *row) for row in zip(w, keep, strict=True)])
    found = elimination_costs(gram[None], w[None], keep[None])[0].float()
    assert torch.equal(found.argsort(dim=1), slow.argsort(dim=1))
    assert all(len(row.unique()) == len(row) for row in found)
    rises = slow.sort(dim=1).values
    assert bool((rises[:, 1:] < 1.00001 * rises[:, :-1]).any())  # there were such steps


def test_long_rows_have_each_weights_own_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "MOST_SURVIVORS", 4)
    gram, w, keep = problem(30, 9, 0.5)
    own = torch.where(keep, w.square() / inverse_diagonals(gram, keep), 0.0)
    found, long = elimination_costs(gram[None], w[None], keep[None])[0], keep.sum(1) > 4
    assert 0 < int(long.sum()) < 30
    torch.testing.assert_close(found[long], own[long], rtol=0, atol=0)
    assert bool((found[~long] > own[~long] + 1e-3).any())


def test_inputs_that_repeat_one_another_are_not_all_free() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data.fill_(1.0)
    x = torch.randn(40, 1).expand(40, 3).contiguous()
    own = obs_prices(layer, {}, ["weight"], [x], likelihood="gaussian", ridge=1e-6)["weight"]
    turn = obs_prices(
        layer, {}, ["weight"], [x], likelihood="gaussian", ridge=1e-6, one_by_one=True
    )["weight"]
    lost = 9 * float(x[:, 0].square().sum())  # of the row as a whole
    assert float(own.max()) < 1e-4 * lost
    assert float(turn.max()) == pytest.approx(lost, rel=1e-3)
    assert int((turn < 1e-4 * lost).sum()) == 2


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_prune_and_the_callback_rank_by_them() -> None:
    x, _ = load_digits(return_X_y=True)
    batch = torch.tensor(x[-128:] / 16, dtype=torch.float32)
    torch.manual_seed(1)
    model, again = Digits().eval(), Digits().eval()
    again.load_state_dict(model.state_dict())
    names = ["net.0.weight", "net.3.weight"]
    prices = obs_prices(model, {}, names, [batch], one_by_one=True)
    expected = Selection()(prices, 0.8).masks
    assert not same(Selection()(obs_prices(model, {}, names, [batch]), 0.8).masks, expected)
    assert same(prune(model, [batch], sparsity=0.8, criterion="obc"), expected)

    class NoSteps(Digits):
        def training_step(self, batch: object, batch_idx: int) -> None:
            return None

    torch.manual_seed(1)
    pruner = SaliencyPruningCallback({0: 0.8}, criterion="obc", scoring_loader=[batch])
    trainer(pruner, max_epochs=1).fit(NoSteps(), *loaders())
    assert same(pruner.masks, expected)
