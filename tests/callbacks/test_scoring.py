"""The scoring pass makes use of what the validation step has computed, and of nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from lightning_prune import RandomSigns, SaliencyPruningCallback
from lightning_prune.callbacks.scoring import ScoringOptions, ScoringPass
from lightning_prune.callbacks.shards import unrepeated
from lightning_prune.saliency import SaliencyAccumulator, squared_gradients
from tests import reference
from tests.callbacks.pruning_cases import Digits, fit


class Counting(nn.Sequential):
    """Counts the samples it runs on; costly enough for rows to be chosen from logits."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Flatten()]
        super().__init__(*layers, nn.Linear(64 * 16, 10))
        with torch.no_grad():
            self[5].weight.mul_(20.0)  # sure of itself: most samples carry nothing
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().forward(x)


def autocast(model: Counting, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


def changed(model: Counting, x: Tensor) -> Tensor:
    # As a step does that masks classes: most samples would look sure, and carry nothing.
    return model(x)[:].masked_fill_(torch.arange(10) > 0, -1e4)


def unread(model: Counting, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return changed(model, x)


STEPS: dict[str, tuple[Callable[[Counting, Tensor], Any], bool]] = {
    "calls the model once": (lambda model, x: model(x), True),
    "calls it twice": (lambda model, x: (model(x), model(x.flip(-1))), False),
    "calls a part of it": (lambda model, x: nn.Sequential(*model)(x), False),
    "in half precision": (autocast, False),
    "changes the logits in place": (changed, False),
    "changes them in inference mode": (unread, False),
}


@pytest.mark.parametrize("step", STEPS)
def test_logits_of_the_step_are_used_where_they_can_be(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    update = SaliencyAccumulator.update
    monkeypatch.setattr(
        SaliencyAccumulator,
        "update",
        lambda self, batch, logits=None: (
            given.append(logits is not None),
            update(self, batch, logits),
        ),
    )
    model, x = Counting().eval(), torch.randn(64, 1, 8, 8)
    names = [name for name, _ in model.named_parameters()]
    scoring = ScoringPass(model, names, ScoringOptions(tolerance=1e-3))
    run, reused = STEPS[step]
    for part in x.split(32):
        with torch.no_grad():
            run(model, part)
        scoring.add(part)
    scoring.score_pool()
    scoring.close()
    assert given == ([True] if reused else [False, False])  # known logits: both batches as one
    assert not model._forward_hooks
    monkeypatch.undo()
    expected = squared_gradients(model, [x] if reused else x.split(32), tolerance=1e-3)
    assert reference.largest_error(scoring._accumulator.compute(), expected) < 1e-5


def test_a_forward_pass_is_saved() -> None:
    model, x = Counting().eval(), torch.randn(64, 1, 8, 8)
    seen = {}
    for reuse in (True, False):
        options = ScoringOptions(forward=None if reuse else lambda module, batch: module(batch))
        scoring = ScoringPass(model, ["0.weight"], options)
        with torch.no_grad():
            model(x)
        model.seen = 0
        scoring.add(x)
        scoring.score_pool()
        scoring.close()
        seen[reuse] = model.seen
    assert seen[False] - seen[True] == 64


# Each sample once


def fit_of(*loaders: Any, processes: int = 1) -> Any:
    """A stand-in for a Trainer; where it has two processes, both have the same sums."""
    reduce = lambda tensor, reduce_op: {"sum": processes}[reduce_op] * tensor  # noqa: E731
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce)
    return SimpleNamespace(val_dataloaders=loaders, world_size=processes, strategy=strategy)


def shard(x: Tensor, rank: int, processes: int, **kwargs: Any) -> DataLoader:
    data = TensorDataset(x)
    sampler = DistributedSampler(data, processes, rank, shuffle=True, **kwargs)
    return DataLoader(data, batch_size=20, sampler=sampler)


@pytest.mark.parametrize("processes", [2, 3, 100])
def test_samples_repeated_to_make_shards_even_are_left_out(processes: int) -> None:
    model = Counting().eval()
    first, second = torch.randn(65, 1, 8, 8), torch.randn(97, 1, 8, 8)
    passes = []
    for rank in range(processes):
        loaders = [shard(x, rank, processes) for x in (first, second)]
        trainer = fit_of(*loaders)
        scoring = ScoringPass(model, ["0.weight", "5.weight"], ScoringOptions(tolerance=1e-3))
        for dataloader_idx, loader in enumerate(loaders):
            for (x,) in loader:
                with torch.no_grad():
                    model(x)  # whose logits are cut with the batch
                scoring.add((x,), trainer, dataloader_idx)
        scoring.score_pool()
        scoring.close()
        passes.append(scoring._accumulator)
    expected = squared_gradients(model, [first, second], tolerance=1e-3, parameters=passes[0].names)
    assert sum(accumulator.samples for accumulator in passes) == 65 + 97
    total = {name: sum(part.sums[name] for part in passes) for name in expected}
    assert reference.largest_error(total, expected) < 2e-3


def test_only_what_is_known_to_repeat_is_left_out() -> None:
    x = torch.zeros(7, 2)
    assert unrepeated(shard(x, 1, 2)) == 3
    assert unrepeated(shard(x, 0, 2)) == 4
    everything = float("inf")
    assert unrepeated(shard(x, 1, 2, drop_last=True)) == everything  # repeats nothing
    assert unrepeated(DataLoader(TensorDataset(x))) == everything
    assert unrepeated([x]) == everything

    class Reordered(BatchSampler):
        """Where the repeated sample is last is not known."""

    sampler = Reordered(DistributedSampler(TensorDataset(x), 2, 1), 2, drop_last=False)
    assert unrepeated(DataLoader(TensorDataset(x), batch_sampler=sampler)) == everything


def test_a_batch_without_a_trainer_is_scored_as_it_is() -> None:
    model, x = Counting().eval(), torch.randn(8, 1, 8, 8)
    scoring = ScoringPass(model, ["5.weight"], ScoringOptions())
    scoring.add(x)
    scoring.add(x)
    assert scoring.finish(fit_of()).samples == 16


def test_sums_of_all_processes_decide() -> None:
    model, x = Counting().eval(), torch.randn(64, 1, 8, 8)
    results = []
    for processes in (1, 2):
        scoring = ScoringPass(model, ["0.weight"], ScoringOptions(tolerance=1e-1))
        scoring.add(x)
        results.append(scoring.finish(fit_of(processes=processes)))
    alone, both = results
    assert (alone.samples, both.samples) == (64, 128)
    assert 0 < alone.dropped_energy == both.dropped_energy <= 1e-1
    assert torch.equal(both.scores["0.weight"], 2 * alone.scores["0.weight"])


def test_a_process_without_samples_takes_part() -> None:
    model = Counting().eval()
    scoring = ScoringPass(model, ["0.weight"], ScoringOptions())
    scoring.add((torch.randn(4, 1, 8, 8),), fit_of(shard(torch.zeros(1, 2), 1, 2)))
    assert scoring.finish(fit_of()) is None  # nor had the others any
    scoring = ScoringPass(model, ["0.weight"], ScoringOptions())
    trainer = fit_of(processes=2)
    trainer.strategy.reduce = lambda tensor, reduce_op: tensor + 1
    assert torch.equal(scoring.finish(trainer).scores["0.weight"], torch.ones(8, 1, 3, 3))


def test_random_signs_are_those_of_a_pass_without_a_trainer() -> None:
    model, x, signs = Counting().eval(), torch.randn(32, 1, 8, 8), RandomSigns(draws=3, seed=5)
    scoring = ScoringPass(model, ["0.weight"], ScoringOptions(signs=signs))
    with torch.no_grad():
        model(x)
    scoring.add(x)
    found = scoring.finish(fit_of()).scores["0.weight"]
    expected = squared_gradients(model, [x], parameters=["0.weight"], signs=signs)["0.weight"]
    assert torch.equal(found, expected)
    exact = squared_gradients(model, [x], parameters=["0.weight"])["0.weight"]
    assert not torch.allclose(found, exact, rtol=1e-3)


# In the middle of a validation


def test_sums_survive_a_checkpoint_in_the_middle_of_a_validation() -> None:
    model = Counting().eval()
    batches = torch.randn(96, 1, 8, 8).split(32)
    options, names = ScoringOptions(tolerance=1e-1), ["0.weight", "5.weight"]
    trainer = fit_of()

    def run(scoring: ScoringPass, which: range) -> None:
        for i in which:
            scoring.add(batches[i], trainer, 0, i)

    whole, first, second = (ScoringPass(model, names, options) for _ in range(3))
    run(whole, range(3))
    run(first, range(2))
    file = io.BytesIO()
    torch.save(first.state(), file)
    run(first, range(2, 3))  # a state is no view of what goes on
    file.seek(0)
    second.load_state(torch.load(file, weights_only=True))
    run(second, range(3))  # what was scored before is not scored again
    expected, found = whole.finish(trainer), second.finish(trainer)
    assert found.samples == expected.samples == 96
    assert found.dropped_energy == expected.dropped_energy > 0
    for name in names:
        assert torch.equal(found.scores[name], expected.scores[name])


def test_a_pass_that_was_complete_in_the_checkpoint_needs_no_batch() -> None:
    model, x = Counting().eval(), torch.randn(32, 1, 8, 8)
    first, second = (ScoringPass(model, ["0.weight"], ScoringOptions()) for _ in range(2))
    first.add(x, fit_of(), 0, 0)
    second.load_state(first.state())
    scores = second.finish(fit_of()).scores["0.weight"]
    assert torch.equal(scores, first.finish(fit_of()).scores["0.weight"])


class MaskedClasses(Digits):
    """Its validation allows some samples some classes only, by writing into the logits."""

    def __init__(self, fill: float, in_place: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
        self.net.append(nn.Linear(512, 10))  # costly enough for rows to be chosen from logits
        self.fill, self.in_place = fill, in_place

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self(batch[0])
        forbidden = (batch[1] > 4)[:, None] & (torch.arange(10) > 2)
        how = logits.masked_fill_ if self.in_place else logits.masked_fill
        self.log("best", how(forbidden, self.fill).argmax(-1).float().mean())


@pytest.mark.parametrize("fill", [-1e4, float("-inf")])
def test_a_step_that_writes_into_its_logits_changes_no_score(fill: float) -> None:
    found = []
    for in_place in (False, True):
        torch.manual_seed(1)
        pruner = SaliencyPruningCallback({0: 0.5}, tolerance=0.0)
        fit(pruner, model=MaskedClasses(fill, in_place), max_epochs=1)
        found.append(pruner)
    expected, scores = (pruner.scores for pruner in found)
    assert reference.largest_error(scores, expected) < 1e-4
    assert max(int((found[0].masks[k] != found[1].masks[k]).sum()) for k in scores) < 100
