"""Selection as a user writes it: what is refused, what a configuration file can say."""

from __future__ import annotations

import jsonargparse
import pytest
import torch

from lightning_prune._targets import Threshold
from lightning_prune.exceptions import NonFiniteScoresError
from lightning_prune.selection import Selection, keep_largest
from tests.selection.examples import assert_equal, digits_scores


def test_all_faults_come_in_one_message() -> None:
    with pytest.raises(ValueError, match="cannot be used") as error:
        Selection("unnit", scope="all", min_density=1.0, regrow=-0.1, pool="min", heads={"a": 0})
    message = str(error.value)
    for part in ("'unnit'; 'unit'?", "scope", "min_density", "regrow", "pool", "heads['a']"):
        assert part in message


@pytest.mark.parametrize("granularity", ["4:4", "0:4", "2:", "row", 2, None])
def test_granularities_that_mean_nothing(granularity) -> None:
    with pytest.raises(ValueError, match="granularity: expected one of 'weight'"):
        Selection(granularity)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"granularity": "unit", "regrow": 0.1}, "regrow: expected 0 unless"),
        ({"granularity": "2:4", "regrow": 0.1}, "regrow: expected 0 unless"),
        ({"granularity": "1:4", "min_density": 0.3}, "min_density: expected at most 0.25"),
        ({"granularity": "head"}, "heads: expected a mapping"),
        ({"granularity": "head", "heads": 4}, "heads: expected a mapping"),
        ({"heads": {"a": 2}}, "heads: expected none unless"),
        ({"regrow": True}, r"regrow: expected a share in \[0, 1\), but got True"),
        ({"min_density": "0.1"}, "min_density: expected a share"),
        ({"granularity": "head", "heads": {"a": 2.0}}, "whole number >= 1, but got 2.0"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        Selection(**arguments)


def test_it_can_be_written_in_a_configuration_file() -> None:
    def take(selection: Selection = Selection()) -> Selection:  # noqa: B008
        return selection

    run = getattr(jsonargparse, "auto_cli", None) or jsonargparse.CLI  # renamed in 4.35
    words = ["--selection.granularity=head", "--selection.scope=layer", "--selection.pool=max"]
    found = run(take, args=[*words, '--selection.heads={"a*": 2}'])
    assert found == Selection("head", scope="layer", pool="max", heads={"a*": 2})
    assert run(take, args=["--selection.regrow=0.1"]) == Selection(regrow=0.1)


def test_it_cannot_be_changed_and_shows_what_it_does() -> None:
    with pytest.raises(AttributeError):
        Selection().granularity = "unit"
    assert "granularity='2:4'" in repr(Selection("2:4"))


@pytest.mark.parametrize("choose", [Selection(), Selection("unit"), Selection("2:4")])
def test_what_cannot_be_ranked_is_refused(choose) -> None:
    scores = {"w": torch.rand(4, 4)}
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        choose(scores, 1.0)
    with pytest.raises(NonFiniteScoresError, match="'w'"):
        choose({"w": torch.full((4, 4), torch.nan)}, 0.5)
    with pytest.raises(ValueError, match="'v'"):
        choose(scores, 0.5, masks={"v": torch.ones(4, 4).bool()})
    with pytest.raises(ValueError, match="got none"):
        choose({}, 0.5)


def test_faults_are_known_before_there_are_scores() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    parameters = dict(layers.named_parameters())
    faults = Selection("2:4").faults(parameters, [0.25, 0.75, Threshold(0.1), 2.0])
    assert [fault.split(":")[0] for fault in faults] == [
        "target 0.75", "Threshold(value=0.1)", "target", "'0.bias'", "'1.bias'",
    ]  # fmt: skip
    assert Selection().faults(parameters, [0.9, Threshold(1.0)]) == []


@pytest.mark.parametrize(
    "choose", [Selection(), Selection(scope="layer"), Selection("unit"), Selection("2:4")]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_scores_of_any_type_and_memory_order(choose, dtype) -> None:
    scores = {name: (s / s.max() * 1000).round().to(dtype) for name, s in digits_scores().items()}
    wide = {name: score.double() for name, score in scores.items()}
    shuffled = {
        name: score.transpose(0, 1)
        .contiguous()
        .transpose(0, 1)
        .requires_grad_(score.is_floating_point())
        for name, score in scores.items()
    }
    assert_equal(choose(shuffled, 0.4).masks, choose(wide, 0.4).masks)


def test_the_default_is_the_plain_global_ranking() -> None:
    scores = digits_scores()
    masks = keep_largest(scores, 0.3)
    assert_equal(
        Selection()(scores, 0.6, masks=masks).masks, keep_largest(scores, 0.6, masks=masks)
    )
