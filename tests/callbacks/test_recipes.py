"""All parts together in real fits: the sparsity asked for, zeros kept, each part felt, resumed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prune import Selection, prune, sparsity
from lightning_prune.callbacks import recipes
from lightning_prune.callbacks.batch_norm_statistics import BatchNormStatistics
from lightning_prune.callbacks.distillation import DistillationCallback
from lightning_prune.callbacks.learning_rate_decay import LearningRateDecay
from lightning_prune.callbacks.saliency_pruning import SaliencyPruningCallback
from tests.callbacks.pruning_cases import (
    WEIGHTS,
    Witness,
    digits,
    fit,
    loaders,
    make_model,
    trainer,
    weights,
)
from tests.two_processes import join_group

EPOCHS = 6


def test_the_list_has_each_part_that_is_not_switched_off() -> None:
    kinds = [
        SaliencyPruningCallback,
        DistillationCallback,
        LearningRateDecay,
        BatchNormStatistics,
    ]
    assert [type(c) for c in recipes.best(0.9, 12, distill=True)] == kinds
    assert [type(c) for c in recipes.best(0.9, 12)] == [*kinds[:1], *kinds[2:]]
    assert recipes.best(0.9, 12)[0]._pruner.criterion.name == "obc"
    assert recipes.best(0.99, 12)[0]._pruner.criterion.name == "obc"
    for off, kind in zip(("distill", "decay", "batch_norm"), kinds[1:], strict=True):
        left = [type(c) for c in recipes.best(0.9, 12, **{"distill": True, off: False})]
        assert left == [k for k in kinds if k is not kind]
    mine = DistillationCallback(0.1, module="net")
    assert recipes.best(0.9, 12, distill=mine)[1] is mine
    assert recipes.best(0.9, 12, distill=True)[1].weight == 0.5  # not 1: the labels would be out


def test_few_large_stages_are_ranked_by_taylor():
    def ranking(*args, **options):
        return recipes.best(*args, **options)[0]._pruner.criterion.name

    assert ranking(0.98, 2) == ranking(0.98, 12, stages=1) == "taylor"
    assert ranking(0.98, 12, stages=3) == "taylor"  # keeps 27 % in each
    assert ranking(0.98, 12, stages=4) == "obc"  # 38 %
    assert ranking(0.5, 2) == "obc"
    assert ranking(0.98, 2, criterion="obc") == "obc"  # asked for


def test_arguments_reach_their_parts() -> None:
    def forward(module: Any, batch: Any) -> torch.Tensor:
        return module(batch[0])

    pruner, learning, decay, norms = recipes.best(
        0.9, 9, criterion="magnitude", distill=0.8, likelihood="bernoulli", forward=forward
    )
    assert pruner._pruner.criterion.name == "magnitude"
    assert (learning.weight, learning.likelihood) == (0.8, "bernoulli")
    assert decay.start == 6
    assert norms.forward is forward


@pytest.mark.parametrize("epochs", [2, 3, 5, 12, 90])
@pytest.mark.parametrize("stages", [None, 1, 2])
def test_the_last_third_has_the_last_masks(epochs, stages) -> None:
    if stages == 2 and epochs == 2:
        return
    schedule = recipes.stages_of(0.96, epochs, stages)
    room = recipes.pruning_epochs(epochs)
    shares = list(schedule.targets.values())
    assert schedule.last_epoch == room - 1  # in force from epoch `room` on
    assert abs(room - 2 * epochs / 3) <= 0.5
    assert len(shares) == (stages or room)
    assert shares[-1] == 0.96
    left = [1.0, *(1 - share for share in shares)]
    rates = [after / before for before, after in pairwise(left)]
    assert rates == pytest.approx([rates[0]] * len(rates))


def test_a_fit_reaches_the_sparsity_keeps_its_zeros_and_ends_well() -> None:
    dense = fit(max_epochs=12)
    callbacks = recipes.best(0.9, EPOCHS, distill=True)
    pruner = callbacks[0]
    witness = Witness(pruner)
    model = fit(*callbacks, witness, model=dense, max_epochs=EPOCHS)
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    assert [record["epoch"] for record in pruner.history] == [0, 1, 2, 3]
    assert witness.steps_checked > 0
    for name in WEIGHTS:
        assert not model.get_parameter(name)[~pruner.masks[name]].any()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert model.net[1].momentum == 0.1
    x, y = digits()
    model.eval()
    assert (model(x[-128:]).argmax(1) == y[-128:]).float().mean() > 0.75


def test_each_part_makes_a_difference_and_nothing_random_does() -> None:
    ends = [
        fit(*recipes.best(0.9, EPOCHS, **off), max_epochs=EPOCHS).state_dict()
        for off in ({}, {}, {"distill": 0.5}, {"decay": False}, {"batch_norm": False})
    ]
    same = [all(torch.equal(a, end[n]) for n, a in ends[0].items()) for end in ends]
    assert same == [True, True, False, False, False]


@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_a_resumed_run_ends_the_same(tmp_path, epoch) -> None:
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == epoch:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    whole = fit(*recipes.best(0.9, EPOCHS, distill=True), Save(), max_epochs=EPOCHS)
    torch.load(tmp_path / "c.ckpt", weights_only=True)
    resumed = make_model()
    trainer(*recipes.best(0.9, EPOCHS, distill=True), max_epochs=EPOCHS).fit(
        resumed, *loaders(), ckpt_path=tmp_path / "c.ckpt"
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert sum(int((w == 0).sum()) for w in weights(resumed).values()) >= 1598


def test_survivors_are_refitted_where_asked_for() -> None:
    plain, refitted = (
        fit(*recipes.best(0.9, EPOCHS, refit=refit), max_epochs=EPOCHS) for refit in (False, True)
    )
    assert int((refitted.net[0].weight == 0).sum()) > 1000
    assert not torch.equal(plain.net[3].weight, refitted.net[3].weight)


def test_two_processes_end_with_the_same_network(tmp_path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    assert first["loss"] == second["loss"] > 0
    assert int((first["model"]["net.0.weight"] == 0).sum()) > 1000
    # The statistics are those of both processes' batches, of which each has seen its own half.
    twin = make_model()
    twin.load_state_dict(first["model"])
    x, _ = digits()
    z = twin.net[0](x[:256]).detach()
    halves = [z[i::2] for i in range(2)]
    batches = [batch for half in halves for batch in half.split(64)]
    mean = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(twin.net[1].running_mean, mean, rtol=1e-4, atol=1e-5)


def _process(rank: int, folder: str) -> None:
    strategy = join_group(rank, f"{folder}/s")
    model = make_model()
    run = trainer(*recipes.best(0.9, 3, distill=True), max_epochs=3, devices=2, strategy=strategy)
    run.fit(model, *loaders(train=256))
    loss = float(run.callback_metrics["distill/loss"])
    torch.save({"model": model.state_dict(), "loss": loss}, f"{folder}/{rank}.pt")


def test_a_short_trial_runs() -> None:
    pruner, *others = recipes.best(0.9, EPOCHS, distill=True)
    model = fit(pruner, *others, fast_dev_run=True)
    assert model.steps == 1
    assert pruner.sparsity == pytest.approx(1 - 0.1 ** (1 / 4), abs=1e-3)  # the first of 4 stages


def test_arguments_out_of_range_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"(?s)epochs.*sparsity"):
        recipes.best(1.0, 1)
    with pytest.raises(ValueError, match="at most 4"):
        recipes.best(0.9, 6, stages=5)


def test_steps_are_no_unit_of_a_recipe() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps"):
        recipes.best(0.9, 6, every_n_train_steps=100)


def test_faults_of_all_parts_are_named_together() -> None:
    with pytest.raises(ValueError, match="A recipe cannot use") as caught:
        recipes.best(2.0, 1, refit="foo", criterion="bar", distill=7, tolerance=3)
    for name in ("epochs", "sparsity", "refit", "criterion", "weight", "tolerance"):
        assert f"`{name}`" in str(caught.value) or f"- {name}:" in str(caught.value), name


@pytest.mark.parametrize(
    ("selection", "share", "more"),
    [
        (Selection("unit"), 0.5, 0.6),
        (Selection("channel"), 0.4, 0.6),
        (Selection("unit", scope="layer"), 0.45, 0.6),
        (Selection("2:4"), 0.3, 0.5),
        (Selection("2:3"), 1 / 3, 0.5),  # the end of a row keeps its one weight
        (Selection(), 0.5, 0.501),
    ],
)
def test_masks_as_sparse_as_whole_pieces_come_to_it_make_no_stages(selection, share, more) -> None:
    model = make_model()
    options = {"sparsity": share, "selection": selection, "stages": 2}
    masks = prune(model, [digits()[0][:128]], **options)
    assert abs(sparsity(masks) - share) < 0.05
    best = recipes.best(share, 3, masks=masks, selection=selection)
    assert best[0].schedule.targets == {}
    assert recipes.best(more, 3, masks=masks, selection=selection)[0].schedule.targets


def test_what_is_no_mask_is_told_as_the_pruner_tells_it() -> None:
    with pytest.raises(TypeError, match="bool tensors"):
        recipes.best(0.5, 3, masks={"net.0.weight": torch.ones(2)})
