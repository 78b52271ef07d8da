"""The generative benchmark's bookkeeping: draws, controls, resumption, the page."""

from __future__ import annotations

import itertools
import re
from functools import partial

import pytest
import torch

from benchmarks import generative, generative_arms, generative_report
from benchmarks import quality_networks as subjects
from benchmarks.generative import RATES
from benchmarks.generative_calibration import check_start
from benchmarks.quality import TUNING_SEEDS, key, read_rows
from lightning_prune.augment.vae import DenseVAE

FAMILY = "pretrained, 200 real"


def row(arm, seed, accuracy, share=0.98, family=FAMILY, **more):
    return {
        "family": family, "network": generative.NETWORK, "arm": arm, "sparsity": share,
        "seed": seed, "accuracy": accuracy, "loss": 0.5, "dense": 93.0, "reached": share,
        "seconds": 2.0, "vae_seconds": 0.0, "lr": 3e-3, **more,
    }  # fmt: skip


@pytest.fixture
def brief(monkeypatch):
    """Untrained networks and VAEs, two epochs of two steps."""

    def dense(regime, few, n, seed, cache):
        torch.manual_seed(seed)
        return subjects.SUBJECTS[generative.NETWORK].build().eval()

    def vae(few, n, seed, cache):
        torch.manual_seed(seed)
        made = DenseVAE((1, 28, 28))
        made.loss(few.train[0])  # the range of the inputs
        return made.eval().requires_grad_(False), 7.0

    for module, name, value in (
        (generative, "dense", dense), (generative, "fitted_vae", vae),
        (generative_arms, "EPOCH", 2), (generative_arms, "EPOCHS", 2),
        (generative_arms, "EVENTS", 1),
        (generative_arms, "event_share", lambda event, target: target),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def test_a_draw_is_split_and_the_fewer_are_among_the_more():
    few, more = (generative_arms.Few.of(n, 3) for n in (100, 200))
    assert [len(part[1]) for part in (few.train, few.held_out)] == [90, 10]
    seen = {
        n: {x.numpy().tobytes() for part in (d.train, d.held_out) for x in part[0]}
        for n, d in ((100, few), (200, more))
    }
    assert len(seen[100]) == 100
    assert seen[100] < seen[200]
    pictures, _ = subjects.test_part(generative.NETWORK, generative.SPLIT)
    test = {x.numpy().tobytes() for x in pictures}
    every = generative_arms.Few.of(4000, 0)
    assert not test & {x.numpy().tobytes() for x in torch.cat([every.train[0], every.held_out[0]])}
    with pytest.raises(ValueError, match="at most 4000 digits"):
        generative_arms.Few.of(4001, 0)


def test_batches_go_through_all_digits_before_any_comes_again():
    data = torch.arange(90.0), torch.arange(90)
    batches = list(itertools.islice(generative_arms.endless(data, 0), 45))
    assert {len(y) for _, y in batches} == {64}
    rounds = torch.cat([y for _, y in batches]).reshape(-1, 90)
    assert (rounds.sort(1).values == torch.arange(90)).all()
    assert not torch.equal(rounds[0], rounds[1])
    again = itertools.islice(generative_arms.endless(data, 0), 45)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("name", generative_arms.ARMS)
def test_every_arm_prunes_and_sees_what_it_says(name, brief, monkeypatch, tmp_path):
    arm = generative_arms.ARMS[name]
    steps, terms, joined, scored = [], [], [], []
    step, gradients = generative_arms._step, generative_arms.Injection.gradients
    squares = generative_arms.squared_gradients

    def count_step(net, optimizer, batch, extra, *more):
        steps.append(extra)
        return step(net, optimizer, batch, extra, *more)

    def count_term(self, module, parameters, batch, *more, **options):
        terms.append(len(batch[0]))
        return gradients(self, module, parameters, batch, *more, **options)

    def count_scored(net, batches, **options):
        scored.append(sum(len(x) for x, _ in batches))
        return squares(net, batches, **options)

    monkeypatch.setattr(generative_arms, "gap_share", lambda *losses: (1.0, 0.01))
    monkeypatch.setattr(generative_arms, "_step", count_step)
    monkeypatch.setattr(generative_arms.Injection, "gradients", count_term)
    monkeypatch.setattr(generative_arms, "squared_gradients", count_scored)
    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        generative_arms.F,
        "cross_entropy",
        lambda z, y, **k: joined.append(len(y)) or cross_entropy(z, y, **k),
    )
    draw = generative.Draw("pretrained", 100, 0, (0.98,), (name,))
    net, dense, _, seconds = generative.trained(draw, arm, 0.98, 1e-2, tmp_path)
    assert generative.reached(net) == pytest.approx(0.98, abs=1e-3)
    assert generative.reached(dense) < 1e-3  # the teacher is left as it was
    assert len(steps) == (8 if name == "real-equal" else 4)
    adaptive = ("adaptive", "adaptive-equal")
    assert scored == [180 if name in ("score", "both", "selected", *adaptive) else 90]
    with_term = ["train", "both", "selected", *adaptive, "shifts", "noise", "real-distill"]
    assert terms == [64] * (4 if name in with_term else 0)
    if name not in adaptive:  # whose comparison takes the loss of other digits
        assert set(joined) == {128 if name == "train-batch" else 64}
    assert seconds[1] == (7.0 if arm.second == "vae" else 0.0)


@pytest.mark.parametrize(("name", "second_epoch"), [("adaptive", 2), ("adaptive-equal", 4)])
def test_what_an_epoch_without_the_term_does(name, second_epoch, brief, monkeypatch, tmp_path):
    """The control takes 4 steps an epoch: as many batches as 2 steps with a second one."""
    extras, step = [], generative_arms._step

    def count_step(net, optimizer, batch, extra, arm, injection, teacher, mix):
        extras.append((extra is not None, mix))
        return step(net, optimizer, batch, extra, arm, injection, teacher, mix)

    monkeypatch.setattr(generative_arms, "gap_share", lambda *losses: (0.0, 0.01))
    monkeypatch.setattr(generative_arms, "_step", count_step)
    draw = generative.Draw("pretrained", 100, 0, (0.98,), (name,))
    generative.trained(draw, generative_arms.ARMS[name], 0.98, 1e-2, tmp_path)
    assert extras[:2] == [(True, generative_arms.START)] * 2
    assert [mix for _, mix in extras[2:]] == [0.0] * second_epoch
    if name == "adaptive-equal":
        assert not any(drawn for drawn, _ in extras[2:])


def test_generated_inputs_of_a_run_follow_from_its_seed(brief, tmp_path):
    draw = generative.Draw("pretrained", 100, 0, (0.98,), ("selected",))
    run = partial(generative.trained, draw, generative_arms.ARMS["selected"], 0.98, 1e-2, tmp_path)
    first, second = run()[0].state_dict(), run()[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_are_measured_once_and_tuning_reads_no_test_digit(brief, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    run = partial(generative.run, path=path, cache=tmp_path)
    draw = generative.Draw("pretrained", 100, 0, (0.98, 0.9), ("real",))
    assert "RuntimeError" in run(draw)  # not tuned yet
    with monkeypatch.context() as patch:
        patch.setattr(subjects, "test_part", lambda *args: pytest.fail("the test part was read"))
        for seed in TUNING_SEEDS:
            tuning = generative.Draw("pretrained", 200, seed, (0.98,), ("real",), tuning=True)
            assert f"{len(RATES)} new rows" in run(tuning)
    assert "2 new rows" in run(draw)
    lines = path.read_text().splitlines()
    assert len({key(r) for r in read_rows(path).values()}) == len(lines) == 2 + 2 * len(RATES)
    assert " 0 new rows" in run(draw)
    assert path.read_text().splitlines() == lines


def test_the_rows_there_are_can_be_gone_on_with():
    for arm, real in itertools.product(generative_arms.ARMS, generative.REAL):
        assert generative.tuned_rate(arm, real, generative.ROWS) in RATES


def test_rows_of_another_dense_network_are_not_gone_on_with():
    rows = [row("real", 0, 90.0), row("real", 1, 90.0)]
    check_start(rows, row("train", 0, 90.0))
    check_start(rows, {**row("train", 2, 90.0), "dense": 92.0})
    with pytest.raises(RuntimeError, match=r"93.0 % right.* got 92.0.*--out"):
        check_start(rows, {**row("train", 1, 90.0), "dense": 92.0})


def test_the_order_puts_tuning_before_use_and_covers_every_cell():
    phases = list(generative.phases(8, list(generative.REAL), ["*"]))
    tuned, cells = set(), set()
    for phase in phases:
        for draw in phase:
            for arm in draw.arms:
                if draw.tuning:
                    tuned.add((arm, draw.real))
                else:
                    assert (arm, generative.TUNED_WITH[draw.real]) in tuned
                    cells |= {(draw.regime, draw.real, arm, s, draw.seed) for s in draw.sparsities}
    every = itertools.product(
        ["pretrained"], generative.REAL, generative_arms.ARMS, generative.SPARSITIES, range(8)
    )
    scratch = itertools.product(
        ["scratch"], generative.REAL[:-1], generative.SCRATCH_ARMS, generative.SPARSITIES, range(8)
    )
    assert cells == {*every, *scratch}
    first = phases[1][0]
    assert (first.real, first.sparsities) == (200, (0.98,))


def test_the_page_compares_with_the_controls_and_lists_the_losers(tmp_path):
    rows = []
    for seed in range(3):
        rows += [
            row("real", seed, 80.0 + seed),
            row("real-equal", seed, 78.0 + seed),
            row("score", seed, 80.5 + seed + 0.1 * (seed == 1)),
            row("adaptive", seed, 81.0 + seed + 0.1 * (seed == 1), mix=1.0),
            row("noise", seed, 77.0 + seed),
            row("train", seed, 80.0, family="tuning"),
        ]
    page = tmp_path / "generative.md"
    generative_report.write(rows, page)
    text = page.read_text()
    assert "from the 15 rows of" in text
    shown = "| score, generated | real |  |  | +0.5 ± 0.1 <sub>(3)</sub> ▲ |"
    assert shown in text
    assert (
        "| 200 digits, the same, adaptive | 98 % | +2 | +3.0 ± 0.1 <sub>(3)</sub> | reached |"
        in text
    )
    assert "| 100 digits, the same, adaptive | 98 % | +2 |  | not measured |" in text
    assert re.search(r"\| noise.*\| 2.0 \| 0.003 \|", text.replace("distillation, ", ""))
    losers = text.split("## Where it surely loses")[1].split("##")[0]
    assert "| distillation, noise | pretrained | 200 | 98 % | -1.0 ± 0.0 |" in losers
    assert losers.count("\n| ") == 3  # the head, its rule, one cell
    generative_report.write(rows[:12], page)  # two seeds decide nothing
    assert re.search(r"200 digits, score, generated \| 98 % .* \| open \|", page.read_text())
    assert set(generative_report.LABELS) == set(generative_arms.ARMS)
