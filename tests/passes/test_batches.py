"""Parts of a batch: what has an entry a sample goes along with its samples."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.exceptions import BatchFormatError
from lightning_prune.passes.batches import batch_size, take_samples

Size = namedtuple("Size", "height width")
CHOSEN = torch.tensor([1, 0, 1])


@dataclass
class Texts:
    texts: list[str]
    labels: Tensor


@pytest.mark.parametrize(
    ("entries", "taken"),
    [
        (["a", "b"], ["b", "a", "b"]),
        (("a", "b"), ("b", "a", "b")),  # torch's collate function makes tuples of texts
        ([7, 9], [9, 7, 9]),
        ([[1, 2], [3]], [[3], [1, 2], [3]]),
        ([(480, 640), (512, 512)], [(512, 512), (480, 640), (512, 512)]),
        (([0, 1], ("a", "b")), ([1, 0, 1], ("b", "a", "b"))),
        ([{"id": 0}, {"id": 1}], [{"id": 1}, {"id": 0}, {"id": 1}]),
    ],
)
@pytest.mark.parametrize("place", [lambda e: (e, 0, 0), lambda e: {"meta": {"e": e}}])
def test_lists_go_along_with_their_samples(entries: Any, taken: Any, place: Any) -> None:
    x = torch.tensor([[0.0], [1.0]])
    found = take_samples([place(entries), x], CHOSEN)
    assert found[0] == place(taken)
    assert torch.equal(found[1], x[CHOSEN])


@pytest.mark.parametrize(
    "constant",
    [(224, 224), Size("tall", "wide"), torch.Size([3, 5]), "ab", ["a", "b", "c"], (None, None)],
)
def test_other_parts_are_passed_on(constant: Any) -> None:
    found = take_samples({"x": torch.ones(2, 3), "constant": constant}, CHOSEN)
    assert found["constant"] == constant
    assert type(found["constant"]) is type(constant)


def test_a_list_of_tensors_is_a_list_of_fields() -> None:
    fields = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    assert [part.tolist() for part in take_samples(fields, CHOSEN)] == [[1, 0, 1], [3, 2, 3]]
    pair = take_samples(Size(*fields), CHOSEN)
    assert isinstance(pair, Size)
    assert pair.width.tolist() == [3, 2, 3]


def test_a_dataclass_with_texts() -> None:
    found = take_samples(Texts(["a", "b"], torch.tensor([0, 1])), CHOSEN)
    assert (found.texts, found.labels.tolist()) == (["b", "a", "b"], [1, 0, 1])


def test_an_opaque_object_is_not_sent_to_the_argument_that_was_given() -> None:
    # A batch of graphs of another library: `forward=` runs it, but nothing can take samples of it.
    with pytest.raises(BatchFormatError, match=r"but got a object.*along axis 0") as caught:
        batch_size(object())
    assert "Pass `forward=" not in str(caught.value)
    assert "scoring_loader=" in str(caught.value)
