"""Attention heads: the smaller attention says what the masked one does, however it is called."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import (
    Selection,
    carry_optimizer,
    compare,
    export_onnx,
    export_program,
    load_shrunk,
    save_shrunk,
    shrink,
    shrink_with_report,
    sparsify,
)
from lightning_prune.masking.apply import zero_removed
from lightning_prune.removal.attention import FewerHeads
from lightning_prune.removal.proof import RemovalError
from lightning_prune.removal.surgery import Patient

E, HEADS, SIZE = 12, 4, 3


class Around(nn.Module):
    """An attention with a layer before and behind it, called as a user might."""

    def __init__(self, *, bias: bool = True, batch_first: bool = True, **dims: int) -> None:
        super().__init__()
        self.before = nn.Linear(5, E)
        self.attention = nn.MultiheadAttention(
            E, HEADS, bias=bias, batch_first=batch_first, dropout=0.1, **dims
        )
        self.behind = nn.Linear(E, 3)
        if bias:  # as after some training; torch starts them at 0
            nn.init.normal_(self.attention.in_proj_bias)
            nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, x: Tensor, *others: Tensor, **how: Any) -> Tensor:
        query = self.before(x)
        key, value = others if others else (query, query)
        return self.behind(self.attention(query, key, value, **{"need_weights": False, **how})[0])


def behead(attention: nn.MultiheadAttention, silent: list[int], unheard: list[int]) -> None:
    """Zero all that makes some heads (but their biases), and all that takes what others say."""
    with torch.no_grad():
        for head in silent:
            rows = slice(head * SIZE, (head + 1) * SIZE)
            if attention.in_proj_weight is None:
                for part in "qkv":
                    getattr(attention, f"{part}_proj_weight")[rows] = 0
            else:
                attention.in_proj_weight.view(3, E, E)[:, rows] = 0
        for head in unheard:
            attention.out_proj.weight[:, head * SIZE : (head + 1) * SIZE] = 0


@pytest.fixture
def model() -> Around:
    torch.manual_seed(0)
    model = Around().double()
    behead(model.attention, silent=[1], unheard=[3])
    return model


def x(n: int = 4, length: int = 6) -> Tensor:
    return torch.randn(n, length, 5, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dims", [{}, {"kdim": 7, "vdim": 2}])
def test_heads_that_say_nothing_or_are_not_heard_fall(bias, batch_first, dims) -> None:
    torch.manual_seed(1)
    model = Around(bias=bias, batch_first=batch_first, **dims).double()
    behead(model.attention, silent=[0, 1], unheard=[2])
    inputs: list[Tensor] = [x()]
    if dims:
        inputs += [torch.randn(4, 6, 7).double(), torch.randn(4, 6, 2).double()]
    small, report = shrink_with_report(model, example_inputs=tuple(inputs))
    assert report.heads == {"attention": (4, 1)}
    assert "attention: 4 -> 1 heads" in str(report)
    assert small.attention.out_proj.weight.shape == (E, SIZE)
    taken = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    columns = 3 * E if not dims else E + 7 + 2
    assert taken == 3 * SIZE * (columns + E + 3 * bias)
    torch.testing.assert_close(small.eval()(*inputs), model.eval()(*inputs))


PADDING = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "causal": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True},
    "numbers": {
        "attn_mask": torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    },
    "a head's own": {
        "attn_mask": torch.randn(8, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    },
}
MASKS["both"] = {
    "key_padding_mask": torch.zeros(2, 6).double().masked_fill(PADDING, -torch.inf),
    "attn_mask": MASKS["numbers"]["attn_mask"],
}
MASKS["bool ones"] = {**MASKS["padding"], "attn_mask": MASKS["causal"]["attn_mask"]}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_it_is_called_as_the_dense_one(model, masks, need_weights) -> None:
    small = shrink(model, example_inputs=x()).eval()
    inputs, how = x(2), {**MASKS[masks], "need_weights": need_weights}
    torch.testing.assert_close(small(inputs, **how), model.eval()(inputs, **how))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_without_a_batch_axis(batch_first, need_weights) -> None:
    torch.manual_seed(0)
    model = Around(batch_first=batch_first).double()
    behead(model.attention, [2], [0])
    small = shrink(model, example_inputs=x()).eval()
    how = {"need_weights": need_weights, "attn_mask": MASKS["numbers"]["attn_mask"]}
    torch.testing.assert_close(small(x()[0] * 0 + 1, **how), model.eval()(x()[0] * 0 + 1, **how))


def test_the_weights_of_the_heads_that_are_left(model) -> None:
    small = shrink(model, example_inputs=x()).eval()
    query = torch.randn(2, 6, E, dtype=torch.float64)
    model.eval()
    for average in (True, False):
        _, mine = small.attention(query, query, query, average_attn_weights=average)
        _, theirs = model.attention(query, query, query, average_attn_weights=False)
        expected = theirs[:, [0, 2]]
        torch.testing.assert_close(mine, expected.mean(1) if average else expected)


def test_heads_stay_where_the_model_uses_their_weights() -> None:
    class Looking(Around):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.before(x)
            said, weights = self.attention(h, h, h)
            return self.behind(said), weights

    torch.manual_seed(0)
    model = Looking().double()
    behead(model.attention, [1], [])
    small, report = shrink_with_report(model, example_inputs=x())
    assert type(small.attention) is nn.MultiheadAttention
    assert "differs" in report.whole["attention"]
    assert not report.heads


def test_an_attention_that_needs_all_of_its_heads_says_so() -> None:
    torch.manual_seed(0)
    _, report = shrink_with_report(Around().double(), example_inputs=x())
    assert "MultiheadAttention loses whole heads only" in report.whole["attention"]


def test_a_model_is_copied_where_something_is_cut_only(model, monkeypatch) -> None:
    copies = []
    whole = Patient.copy
    monkeypatch.setattr(Patient, "copy", lambda patient: copies.append(patient) or whole(patient))
    shrink(model, example_inputs=x())
    assert len(copies) == 1  # for the heads that fall
    copies.clear()
    shrink_with_report(Around().double(), example_inputs=x())
    assert not copies


def test_one_head_stays_of_those_that_are_not_needed() -> None:
    torch.manual_seed(0)
    model = Around().double()
    behead(model.attention, [0, 1], [2, 3])
    small, report = shrink_with_report(model, example_inputs=x())
    assert report.heads == {"attention": (4, 1)}
    torch.testing.assert_close(small.eval()(x(2) * 0 + 2), model.eval()(x(2) * 0 + 2))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: setattr(a, "add_zero_attn", True), "a key of its own"),
        (lambda a: a.register_forward_hook(lambda m, i, o: o), "hooks"),
        (lambda a: a.__setattr__("__class__", type("Mine", (nn.MultiheadAttention,), {})), "Mine"),
    ],
)
def test_what_cannot_be_cut_is_kept_whole_and_named(model, change, why) -> None:
    change(model.attention)
    small, report = shrink_with_report(model, example_inputs=x())
    assert not isinstance(small.attention, FewerHeads)
    assert why in report.whole["attention"]
    torch.testing.assert_close(small.eval()(x(2) * 0 + 2), model.eval()(x(2) * 0 + 2))


def test_an_attention_that_shares_its_weights_is_kept_whole() -> None:
    class Two(Around):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.MultiheadAttention(E, HEADS, batch_first=True)
            self.other.in_proj_weight = self.attention.in_proj_weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.before(x)
            return self.behind(self.other(*[self.attention(h, h, h)[0]] * 3)[0])

    torch.manual_seed(0)
    model = Two().double()
    behead(model.attention, [1], [])
    small, report = shrink_with_report(model, example_inputs=x())
    assert "shared" in report.whole["attention"]
    torch.testing.assert_close(small.eval()(x(2) * 0 + 2), model.eval()(x(2) * 0 + 2))


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, HEADS, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning"
)  # the dense one's
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_in_torchs_encoder_with_its_fused_paths(padded, grad) -> None:
    torch.manual_seed(0)
    model = encoder()
    for layer in model.layers:
        nn.init.normal_(layer.self_attn.in_proj_bias)
        behead(layer.self_attn, [0, 3], [])
    inputs = torch.randn(3, 6, E)
    small, report = shrink_with_report(model, example_inputs=inputs)
    assert report.heads == {f"layers.{i}.self_attn": (4, 2) for i in range(2)}
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
    how = {"src_key_padding_mask": mask} if padded else {}
    with torch.set_grad_enabled(grad):
        mine, theirs = small.eval()(inputs, **how), model.eval()(inputs, **how)
    if padded:  # torch's nested path leaves zeros in the padding
        mine, theirs = mine[~mask], theirs[~mask]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_head_granularity_removes_falls() -> None:
    torch.manual_seed(0)
    model = Around().double()
    names = ["attention.in_proj_weight"]
    scores = {n: model.get_parameter(n).detach().square() for n in names}
    selection = Selection(granularity="head", heads={"attention.*": HEADS})
    masks = selection(scores, 0.5).masks
    small, report = shrink_with_report(model, example_inputs=x(), masks=masks)
    assert report.heads == {"attention": (4, 2)}
    masked = copy.deepcopy(model)
    zero_removed(dict(masked.named_parameters()), masks)
    torch.testing.assert_close(small.eval()(x(2) * 0 + 2), masked.eval()(x(2) * 0 + 2))


def test_it_goes_on_training_with_its_optimizers_state(model) -> None:
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    model(x()).square().sum().backward()
    adam.step()
    behead(model.attention, silent=[1], unheard=[3])
    small, report = shrink_with_report(model, example_inputs=x())
    carried = carry_optimizer(adam, model, small, report)
    kept = [row for head in (0, 2) for row in range(head * SIZE, (head + 1) * SIZE)]
    moments = adam.state[model.attention.in_proj_weight]["exp_avg"].view(3, E, E)[:, kept]
    mine = carried.state[small.attention.in_proj_weight]["exp_avg"]
    assert torch.equal(mine, moments.reshape(-1, E))
    before = small.attention.in_proj_weight.detach().clone()
    for need_weights in (True, False):
        carried.zero_grad()
        small.train()(x(), need_weights=need_weights).square().sum().backward()
        carried.step()
    assert not torch.equal(before, small.attention.in_proj_weight)


def test_its_gradients_are_the_dense_ones(model) -> None:
    """Against the dense module in double precision, with dropout off."""
    small = shrink(model, example_inputs=x()).train()
    model.train()
    small.attention.dropout = model.attention.dropout = 0.0
    inputs = x()
    for net, need_weights in itertools.product((model, small), (True, False)):
        net.zero_grad()
        net(inputs, need_weights=need_weights).square().sum().backward()
    kept = [row for head in (0, 2) for row in range(head * SIZE, (head + 1) * SIZE)]
    dense = model.attention.in_proj_weight.grad.view(3, E, E)[:, kept].reshape(-1, E)
    torch.testing.assert_close(small.attention.in_proj_weight.grad, dense)
    torch.testing.assert_close(small.before.weight.grad, model.before.weight.grad)


def test_shrunk_twice(model) -> None:
    small = shrink(model, example_inputs=x())
    behead(small.attention, silent=[], unheard=[1])  # the dense head 2
    smaller, report = shrink_with_report(small, example_inputs=x())
    assert report.heads == {"attention": (2, 1)}
    assert smaller.attention.heads == [0]
    assert smaller.attention.dense_heads == HEADS
    how = MASKS["a head's own"]
    inputs = x(2)
    torch.testing.assert_close(smaller.eval()(inputs, **how), small.eval()(inputs, **how))


@pytest.mark.parametrize("dims", [{}, {"kdim": 12, "vdim": 12, "bias": False}])
def test_saved_and_loaded_into_a_dense_model(tmp_path, dims) -> None:
    torch.manual_seed(0)
    model = Around(**dims).double()
    behead(model.attention, [1], [3])
    small = shrink(model, example_inputs=x()).eval()
    save_shrunk(small, tmp_path / "small.pt")
    loaded = load_shrunk(tmp_path / "small.pt", Around(**dims).double()).eval()
    assert loaded.attention.heads == [0, 2]
    inputs = x(2)
    assert torch.equal(loaded(inputs), small(inputs))
    other = Around(**dims).double()
    other.attention = nn.MultiheadAttention(E, 2, bias=False, batch_first=True).double()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(RemovalError, match="no attention of 4 heads 'attention'"):
        load_shrunk(tmp_path / "small.pt", other)
    another = Around(**dims).double()
    another.more = nn.Linear(2, 2)
    with pytest.raises(RemovalError, match="'more'"):
        load_shrunk(tmp_path / "small.pt", another)
    assert type(another.attention) is nn.MultiheadAttention  # nothing is half-applied
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_exported_for_places_without_the_code(tmp_path) -> None:
    torch.manual_seed(0)
    model = Around()
    behead(model.attention, [1], [3])
    inputs = torch.randn(4, 6, 5)
    small = shrink(model, example_inputs=inputs).eval()
    export_program(small, tmp_path / "small.pt2", inputs)
    export_onnx(small, tmp_path / "small.onnx", inputs)  # compares with onnxruntime itself
    with torch.no_grad():
        found = torch.export.load(tmp_path / "small.pt2").module()(inputs)
        torch.testing.assert_close(found, model.eval()(inputs), rtol=1e-4, atol=1e-5)


class Padded(nn.Module):
    """Takes padding, which torch packs away in eval mode without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = encoder(), nn.Linear(E, 3)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=pad))


@pytest.fixture
def padded() -> tuple[Padded, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Padded().eval()
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.linear1.weight[:5] = 0
            layer.linear1.bias.normal_()
        model.head.weight[:, ::2] = 0
    pad = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
    return model, (torch.randn(3, 6, E), pad)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_with_padding_is_shrunk_and_compared(padded) -> None:
    model, (x, pad) = padded
    small, _ = shrink_with_report(model, example_inputs=(x, pad))
    assert small.encoder.layers[0].linear1.weight.shape == (19, E)
    assert compare(model, small, (x, pad), latency=False).agreement.relative < 1e-5
    for mask in (pad, pad & False):
        with torch.no_grad():
            mine, theirs = small.eval()(x, mask), model(x, mask)
        torch.testing.assert_close(mine[~mask], theirs[~mask], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_with_padding_is_exported(padded, tmp_path) -> None:
    model, inputs = padded
    export_program(model, tmp_path / "x.pt2", inputs)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "x.pt2").module()(*inputs)
        expected = model(*inputs)
    real = ~inputs[1]
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("measure", [False, True])
def test_an_encoder_with_padding_gets_sparse_layers_where_it_can(padded, measure) -> None:
    model, inputs = padded
    small, found = sparsify(model, inputs, measure=measure, rounds=1)
    reasons = {one.name: one.reason for one in found}
    if not measure:
        assert reasons["head"] == "converted without a measurement"
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
