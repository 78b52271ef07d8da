"""The quality benchmark's bookkeeping: rows, resumption, pairs, the page; no experiment is run."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import quality, quality_arms, quality_report, quality_structured, quality_trainers
from benchmarks import quality_networks as subjects
from benchmarks.quality_statistics import Table, difference, estimate
from lightning_prune.masking import sparsity

NETWORK = "digits-8x8-convnet"


def row(arm, seed, accuracy, share=0.9, family="fine-tuned", **more):
    return {
        "family": family,
        "network": NETWORK,
        "arm": arm,
        "sparsity": share,
        "seed": seed,
        "accuracy": accuracy,
        "dense": 95.0 + seed,
        "start": f"dense-{seed}",
        "reached": share,
        "seconds": 1.0,
        **more,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def untrained(monkeypatch):
    """Networks of no training, so that a unit takes a moment; counts how many are asked for."""
    asked = []

    def dense(name, seed, cache):
        asked.append((name, seed))
        torch.manual_seed(seed)
        return subjects.SUBJECTS[name].build().eval()

    monkeypatch.setattr(subjects, "dense", dense)
    return asked


def test_a_second_run_measures_nothing_and_a_third_what_is_missing(tmp_path, untrained):
    path = tmp_path / "rows.jsonl"
    unit = quality.Unit(NETWORK, 0, "no-retraining", "magnitude-global")
    run = partial(quality.run, path=path, cache=tmp_path, shares=(0.8, 0.95), threads=1)
    assert "2 new rows" in run(unit)
    first = path.read_text()
    rows = list(quality.read_rows(path).values())
    assert [r["sparsity"] for r in rows] == [0.8, 0.95]
    assert all(r["reached"] == pytest.approx(r["sparsity"], abs=1e-3) for r in rows)
    assert "0 new rows" in run(unit)
    assert path.read_text() == first
    path.write_text(first.splitlines()[1] + "\n")
    assert "1 new rows" in run(unit)
    restored = quality.read_rows(path)
    for r in rows:  # the same figures again, but for the time
        again = restored[quality.key(r)]
        assert {**again, "seconds": 0} == {**r, "seconds": 0}


def test_an_unfinished_line_is_measured_again_and_breaks_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, [row("taylor", 0, 90.0)])
    path.write_text(path.read_text() + '{"family": "fine-tu')
    assert len(quality.read_rows(path)) == 1
    quality.append(path, row("taylor", 1, 91.0))
    assert [r["seed"] for r in quality.read_rows(path).values()] == [0, 1]


def test_an_arm_that_fails_is_reported_and_writes_nothing(tmp_path, untrained):
    unit = quality.Unit(NETWORK, 0, "no-retraining", "tailor")
    path = tmp_path / "rows.jsonl"
    said = quality.run(unit, path=path, cache=tmp_path, shares=(0.8,), threads=1)
    assert said.startswith("FAILED")
    assert "tailor" in said
    assert not path.exists()


def test_the_rate_is_chosen_by_accuracy_then_loss():
    cases = [(1e-3, 90, 0.3), (1e-3, 80, 0.5), (3e-3, 88, 0.2), (3e-3, 82, 0.5), (1e-2, 85, 0.1)]
    rows = [{"lr": lr, "accuracy": a, "loss": loss} for lr, a, loss in [*cases, (1e-2, 84, 0.1)]]
    assert quality.best_rate(rows) == 3e-3  # 170 as for 1e-3, but 0.7 against 0.8


def test_tuning_reads_the_validation_part_and_is_done_once(tmp_path, untrained, monkeypatch):
    trained = []

    def train(unit, dense, share, lr, cache):
        trained.append((unit.seed, share, lr))
        return dense, 0.0

    monkeypatch.setattr(quality, "train", train)
    path = tmp_path / "rows.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(subjects, "test_part", lambda name: pytest.fail("the test part was read"))
        unit = quality.Unit(NETWORK, 0, "fine-tuned", "taylor")
        rate = quality.tuned_rate(unit, path, tmp_path)
        assert rate == quality.tuned_rate(unit, path, tmp_path)
    assert len(trained) == len(quality.RATES) * len(quality.TUNED_AT) * 2
    assert {seed for seed, _, _ in trained} == set(quality.TUNING_SEEDS)
    shares = (0.9,)
    quality.run(unit, path=path, cache=tmp_path, shares=shares, threads=1)
    assert trained[-1] == (0, 0.9, rate)


def test_rows_of_another_dense_network_or_rate_are_measured_again(tmp_path, untrained, monkeypatch):
    path = tmp_path / "rows.jsonl"
    unit = quality.Unit(NETWORK, 0, "no-retraining", "magnitude-global")
    run = partial(quality.run, path=path, cache=tmp_path, shares=(0.8, 0.95), threads=1)
    run(unit)
    rows = list(quality.read_rows(path).values())
    write(path, [{**rows[0], "start": "another"}, rows[1]])
    assert "1 new rows" in run(unit)
    assert [r["start"] for r in quality.read_rows(path).values()] == [rows[1]["start"]] * 2
    monkeypatch.setattr(quality, "train", lambda unit, dense, *_: (dense, 0.0))
    monkeypatch.setattr(quality, "tuned_rate", lambda *_: 1e-2)
    unit = quality.Unit(NETWORK, 0, "fine-tuned", "taylor")
    assert "2 new rows" in run(unit)
    assert "0 new rows" in run(unit)
    monkeypatch.setattr(quality, "tuned_rate", lambda *_: 2e-2)
    assert "2 new rows" in run(unit)
    assert all(r["lr"] == 2e-2 for r in quality.read_rows(path).values() if "lr" in r)


def test_the_arm_that_loses_nothing_is_trained_as_long_and_measured_once(tmp_path, untrained):
    unit = quality.Unit(NETWORK, 0, "fine-tuned", quality.NO_PRUNING)
    assert quality.shares_of(unit) == quality.tuned_at(unit) == (0.0,)
    dense = subjects.dense(NETWORK, 0, tmp_path)
    net, _ = quality.train(unit, dense, 0.0, 1e-2, tmp_path)
    assert quality.reached(net) == 0
    validation = subjects.validation_part(NETWORK)
    assert subjects.accuracy(net, validation) > subjects.accuracy(dense, validation) + 30


def test_the_parts_do_not_overlap():
    for name in (NETWORK, "784-40-20-10"):
        parts = [f(name)[0] for f in (subjects.train_part, subjects.validation_part)]
        parts.append(subjects.test_part(name)[0])
        storages = [p.storage_offset() for p in parts]
        ends = [start + p.numel() for start, p in zip(storages, parts, strict=True)]
        assert storages[1:] == ends[:-1]


def test_all_arms_see_the_same_batches():
    a, b, c = (subjects.Batches("784-40-20-10", seed) for seed in (1, 1, 2))
    for _ in range(2):  # two epochs: the second is shuffled anew, alike in both
        first = [y for _, y in a]
        assert all(torch.equal(y, z) for y, (_, z) in zip(first, b, strict=True))
    assert any(not torch.equal(y, z) for y, (_, z) in zip(first, c, strict=True))


def test_stages_hold_all_targets_and_the_path_reaches_them():
    stages = quality_arms.stages()
    assert set(quality_arms.TARGETS) <= set(stages)
    assert stages == sorted(stages)
    assert stages[-1] == quality_arms.TARGETS[-1]
    shares = [quality_arms.event_share(k, 0.95) for k in range(quality_arms.EVENTS)]
    kept = [1.0, *(1 - s for s in shares)]
    rates = [b / a for a, b in itertools.pairwise(kept)]
    assert rates == pytest.approx([rates[0]] * len(rates))


@pytest.mark.parametrize("criterion", quality_arms.CRITERIA_NAMES)
def test_every_criterion_prunes_to_its_target(criterion):
    torch.manual_seed(0)
    net = subjects.SUBJECTS[NETWORK].build().eval()
    descent = quality_arms.Descent(net, NETWORK, quality_arms.Arm.named(criterion), seed=0)
    masks = descent(0.6)
    assert sparsity(masks) == pytest.approx(0.6, abs=1e-3)
    assert quality.reached(net) == pytest.approx(0.6, abs=1e-3)


def test_snip_is_weight_times_gradient():
    torch.manual_seed(0)
    net = subjects.SUBJECTS[NETWORK].build().eval()
    scores = quality_arms.Descent(net, NETWORK, quality_arms.Arm("snip"), seed=0).scores()
    x, y = subjects.train_part(NETWORK)
    torch.nn.functional.cross_entropy(net(x), y, reduction="sum").backward()
    for name, score in scores.items():
        weight = net.get_parameter(name)
        expected = (weight * weight.grad).abs().detach()
        torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-4)


def test_intervals_and_pairs():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.half == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)  # t(0.975, 2) = 4.303
    assert not estimate([5.0]).above_zero  # one seed shows nothing
    # Networks of different worth, one arm always 1 below the other: the pairs show it.
    a, b = {0: 90.0, 1: 80.0, 2: 70.0, 7: 10.0}, {0: 91.0, 1: 81.0, 2: 71.1}
    gap = difference(a, b)
    assert gap.seeds == 3
    assert gap.below_zero


def test_the_page_shows_every_cell_and_marks_the_losers(tmp_path):
    rows = [row("taylor", s, 90.0 + 2 * s, lr=1e-3) for s in range(3)]
    rows += [row("random", s, 80.0 + 2 * s + 0.1 * (s == 1), lr=1e-3) for s in range(3)]
    rows += [row("snip", 0, 99.0, lr=1e-3)]  # a single lucky seed is not the best arm
    rows += [row("obs+layers", s, 90.0, share=0.95, family="no-retraining") for s in range(2)]
    page = tmp_path / "quality.md"
    quality_report.write(rows, page)
    text = page.read_text()
    assert "| w² R | **92.0 ± 5.0** | 1.0 | 0.001 |" in text
    assert "| random | 82.0 ± 5.0 ▽ | 1.0 | 0.001 |" in text
    assert "| \\|w g\\| (SNIP's) | 99.0 <sub>(1)</sub> |" in text
    assert "| OBS + layers | **90.0 ± 0.0** |" in text
    assert "not measured" in text
    assert (tmp_path / "images" / f"quality-{NETWORK}.png").stat().st_size > 1000


def test_the_recipe_has_its_parts_and_its_betters_listed(tmp_path):
    rows = [row("recipe", s, 90.0 + s, lr=1e-3) for s in range(3)]
    rows += [row("recipe-distill", s, 88.0 + s, lr=1e-3) for s in range(3)]
    rows += [row("taylor", s, 92.0 + s, lr=1e-3) for s in range(3)]
    rows += [row("snip", s, 92.0 + 5 * s, lr=1e-3) for s in range(3)]  # better, but not surely
    page = tmp_path / "quality.md"
    quality_report.write(rows, page)
    text = page.read_text()
    losses = text.split("## Where the recipe loses")[1].split("\n## ")[0]
    assert f"| {NETWORK} |  | w² R +2.0 ± 0.0 |  |" in losses
    assert "w g" not in losses
    assert f"| {NETWORK}: recipe + distillation |  | -2.0 ± 0.0 ▽ |" in text
    assert "the outcome of 3 comparisons" in losses


def test_the_recipe_by_another_ranking_is_the_plain_loop_where_there_is_no_batch_norm(tmp_path):
    for network, expected in (("784-128-10", True), (NETWORK, False)):
        rows = [row("recipe", s, 90.0 + s, lr=1e-3) for s in range(3)]
        rows += [row("obs", s, 88.0 + s, lr=1e-3) for s in range(3)]
        page = tmp_path / "quality.md"
        quality_report.write([{**one, "network": network} for one in rows], page)
        line = f"| {network}: recipe by OBS |  | -2.0 ± 0.0 ▽ |"
        assert (line in page.read_text()) == expected
        work = {unit.arm for unit in quality.units([network], 1, ["fine-tuned"], ["*"])}
        assert ("recipe-obs" not in work) == expected


def test_losses_without_retraining_and_of_whole_units_are_listed(tmp_path):
    rows = [row("recipe", s, 90.0 + s, lr=1e-3) for s in range(3)]
    rows += [row("obs+outputs", s, 93.0 + s, family="no-retraining") for s in range(3)]
    structured = partial(row, family="structured", share=0.5, lr=1e-3, parameters=100)
    rows += [structured("unit-taylor", s, 90.0 + s) for s in range(3)]
    rows += [structured("torch-pruning-taylor", s, 91.5 + s) for s in range(3)]
    page = tmp_path / "quality.md"
    quality_report.write(rows, page)
    losses = page.read_text().split("## Where the recipe loses")[1].split("\n## ")[0]
    assert f"| {NETWORK} |  | OBS + outputs, no retraining +3.0 ± 0.0 |  |" in losses
    assert f"| {NETWORK}: w² R, units | -1.5 ± 0.0 ▽ |  |" in losses


def test_a_plain_loop_and_a_trainer_come_to_the_same_weights():
    torch.manual_seed(0)
    dense = subjects.SUBJECTS[NETWORK].build().eval()
    how = {"target": 0.9, "lr": 1e-2, "seed": 3}
    arm = quality_arms.Arm.named("obc")
    loop = quality_arms.fine_tuned(dense, NETWORK, arm, **how)
    fit = quality_trainers.in_trainer(dense, NETWORK, "recipe-no-batch-norm", **how)
    assert quality.reached(loop) == pytest.approx(0.9, abs=1e-3)
    for name, value in loop.state_dict().items():
        assert torch.equal(fit.state_dict()[name], value), name


def test_rows_of_different_dense_networks_are_no_pairs(tmp_path):
    rows = [row("recipe", s, 90.0, lr=1e-3) for s in range(3)]
    rows += [{**row("taylor", s, 95.0, lr=1e-3), "start": "another"} for s in range(2)]
    rows += [row("taylor", 2, 91.0, lr=1e-3)]
    table = Table.of(rows, "fine-tuned", NETWORK)
    gap = table.against("taylor", 0.9, "recipe")
    assert (gap.mean, gap.seeds) == (1.0, 1)


def test_the_dense_network_trained_on_is_no_arm_and_is_compared_with(tmp_path):
    rows = [row("recipe", s, 90.0 + s, lr=1e-3) for s in range(3)]
    rows += [row("no-pruning", s, 96.0 + s, share=0.0, lr=2e-2) for s in range(3)]
    page = tmp_path / "quality.md"
    quality_report.write(rows, page)
    text = page.read_text()
    assert "after 12 more epochs with nothing removed 97.0 ± 2.5 (rate 0.02)." in text
    differences = text.split("Paired differences to the dense network trained on")[1]
    assert "| recipe | -6.0 ± 0.0 ▽ |" in differences.split("</details>")[0]


def test_a_table_compares_with_the_dense_network_of_the_same_seed():
    table = Table.of([row("taylor", s, 94.0 + s) for s in range(3)], "fine-tuned", NETWORK)
    gap = table.against("taylor", 0.9, "dense")
    assert (gap.mean, gap.half) == (-1.0, 0.0)


@pytest.fixture
def brief(monkeypatch):
    """Structured arms with two events and one batch an epoch."""
    monkeypatch.setattr(quality_structured, "EPOCHS", 3)
    monkeypatch.setattr(quality_structured, "EVENTS", 2)
    rate = partial(quality_arms.event_share, events=2)
    monkeypatch.setattr(quality_structured, "event_share", lambda k, target, _=2: rate(k, target))
    monkeypatch.setattr(quality_structured.Batches, "__len__", lambda self: 1)

    def one(self):
        index = torch.randperm(len(self.x), generator=self.generator)[:64]
        yield self.x[index], self.y[index]

    monkeypatch.setattr(quality_structured.Batches, "__iter__", one)


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        *((NETWORK, arm) for arm in quality_structured.ARMS),
        ("LeNet-5", "unit-magnitude"),  # by Taylor it takes long before it is trained
        ("LeNet-5", "torch-pruning-magnitude"),
    ],
)
def test_structured_arms_reach_the_same_widths(name, arm, brief):
    if arm.startswith("torch-pruning"):
        pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    dense = subjects.SUBJECTS[name].build().eval()
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    net = quality_structured.structured(dense, name, arm, target=0.7, lr=1e-2, seed=0)
    hidden = {NETWORK: [4, 9, 19, 10], "LeNet-5": [1, 4, 36, 25, 10]}[name]
    assert quality_structured.widths(net) == hidden
    full = quality_structured.widths(dense)[:-1]
    found = quality_structured.facts(net, dense)
    assert found["reached"] == pytest.approx(1 - sum(hidden[:-1]) / sum(full))
    if arm.startswith("torch-pruning"):  # what is counted for the masked ones, seen
        assert found["parameters"] == sum(p.numel() for p in net.parameters())
    assert all(torch.equal(dense.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", [NETWORK, "LeNet-300-100"])
def test_a_masked_unit_says_nothing(name, brief):
    torch.manual_seed(0)
    dense = subjects.SUBJECTS[name].build().eval()
    net = quality_structured.structured(dense, name, "unit-taylor", target=0.5, lr=1e-2, seed=0)
    x = subjects.train_part(name)[0][:100]
    expected = net.eval()(x)
    for layer, after in itertools.pairwise(quality_structured.layers(net)):
        gone = ~net.get_parameter(layer.weight).flatten(1).any(1)
        outgoing = net.get_parameter(after.weight).data
        per_unit = outgoing.shape[1] // len(gone)
        outgoing[:, gone.repeat_interleave(per_unit)] = 1e3
    torch.testing.assert_close(net(x), expected)


def test_structured_rows_say_how_much_is_left(tmp_path, untrained, brief, monkeypatch):
    unit = quality.Unit(NETWORK, 0, "structured", "unit-magnitude")
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(quality, "RATES", (1e-2,))
    said = quality.run(unit, path=path, cache=tmp_path, shares=None, threads=1)
    assert "2 new rows" in said
    rows = list(quality.read_rows(path).values())
    tuned = [r for r in rows if r["family"] == "tuning"]
    assert sorted((r["seed"], r["sparsity"]) for r in tuned) == [
        (seed, share) for seed in quality.TUNING_SEEDS for share in quality_structured.SHARES
    ]
    measured = {r["sparsity"]: r for r in rows if r["family"] == "structured"}
    assert {share: r["parameters"] for share, r in measured.items()} == {0.5: 3706, 0.7: 1302}
    assert measured[0.5]["reached"] == 0.5
    quality_report.write(rows, tmp_path / "quality.md")  # no other family: no curves, but a table
    text = (tmp_path / "quality.md").read_text()
    assert "| \\|w\\|, units |" in text
    assert "13,802 in the dense network: 50 %: 50 % of the hidden units gone, 3,706 left" in text


def test_only_some_networks_lose_units():
    work = quality.units(subjects.SUBJECTS, 1, ["structured"], ["*"])
    assert {unit.network for unit in work} == set(quality_structured.NETWORKS)


def test_the_batch_norm_part_is_switched_off_where_there_is_one():
    work = quality.units(subjects.SUBJECTS, 1, ["fine-tuned"], ["recipe-no-batch-norm"])
    networks = {name: subject.build() for name, subject in subjects.SUBJECTS.items()}
    assert {unit.network for unit in work} == {
        name
        for name, net in networks.items()
        if any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    }


def test_refits_of_the_outputs_are_where_they_are_affordable():
    work = list(quality.units(subjects.SUBJECTS, 1, ["fine-tuned"], ["ob*"]))
    arms = {n: {u.arm for u in work if u.network == n} for n in ("784-128-10", "LeNet-5")}
    assert arms["784-128-10"] - arms["LeNet-5"] == {"obs+outputs+first"}
    assert {"obs", "obs+layers+distill", "obs+layers+first"} < arms["LeNet-5"]


def test_arms_have_names():
    arm = quality_arms.Arm.named("obs+layers+distill")
    assert vars(arm) == vars(quality_arms.Arm("obs", layers=True, distill=True))
    with pytest.raises(ValueError, match=r"obs\+layer'"):
        quality_arms.Arm.named("obs+layer")
    known = SimpleNamespace(**quality._orders())
    assert vars(known)["no-retraining"][0] == "taylor"
