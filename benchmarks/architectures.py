"""Do scores, refits and removal hold for architectures that we have not written?

    pip install "transformers<5"     # into an environment of its own; no extra of the package
    python benchmarks/architectures.py > benchmarks/results/architectures.md

Tiny random networks of Hugging Face's classes, six samples; texts are padded but for language
models, which have three of five words; pictures to be segmented are two.

- *R off by*: R of every weight against one backward pass of plain autograd a sample and output,
  both in float64; the largest difference, relative to the largest R of its parameter. Networks that
  compute in float32 in places whatever their weights are (LLaMA, Mamba) agree to that.
- *no refit, layers, outputs*: half of the weights of linear layers and convolutions removed in two
  stages by "obc"; the divergence from the dense network, in nats, on the samples fitted to. Weights
  are eight times as large as drawn: outputs would hardly hang on inputs. ResNet's and
  RegNet's logits are 2e4 and 3e9 then and their softmax all or nothing: there a refit by outputs
  has no slope to follow, and one by layers, which is checked layer by layer, can end further off.
  ConvNeXt's and MobileNetV2's outputs hang on nothing all the same, so theirs say nothing here.
  "-": no layer of its own that a refit knows.
- *shrink*: every second row of each linear layer and convolution zeroed; parameters before and
  after, and the largest difference of the outputs, relative to the largest output. GPT-2 and Mamba
  have layers of their own making, which are left as they are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_prune import prune, squared_gradients
from lightning_prune.masking import find_prunable
from lightning_prune.passes.teacher import Teacher
from lightning_prune.refit import Calibration
from lightning_prune.refit.divergence import divergence
from lightning_prune.removal import shrink_with_report

WORDS, CLASSES = 60, 3
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
BODY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "num_labels": CLASSES,
}
TEXT = {**BODY, "vocab_size": WORDS, "max_position_embeddings": 20, "pad_token_id": 1}
GPT2 = {"vocab_size": WORDS, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 20}

Batch = dict[str, Tensor]


def text(samples: int = 6, length: int = 9) -> Batch:
    """Return tokens; every second sample is padded."""
    tokens = torch.randint(3, WORDS, (samples, length))
    mask = torch.ones_like(tokens)
    mask[::2, -3:] = 0
    return {"input_ids": torch.where(mask == 1, tokens, 1), "attention_mask": mask}


def pictures(samples: int = 6) -> Batch:
    """Return pictures."""
    return {"pixel_values": torch.randn(samples, 3, 32, 32)}


def sound(samples: int = 6) -> Batch:
    """Return waves."""
    return {"input_values": torch.randn(samples, 400)}


def tokens_alone() -> Batch:
    """Return tokens without padding, fewer: each of them predicts all words."""
    return {"input_ids": text(3, 5)["input_ids"]}


Case = tuple[str, str, dict[str, Any], Callable[[], Batch]]

CASES: list[Case] = [
    ("BertForSequenceClassification", "BertConfig", TEXT, text),
    ("RobertaForSequenceClassification", "RobertaConfig", TEXT, text),
    ("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 12}, text),
    ("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 12}, text),
    (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {**TEXT, "dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 40},
        text,
    ),
    (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p"]},
        text,
    ),
    ("LlamaForSequenceClassification", "LlamaConfig", {**TEXT, "num_key_value_heads": 1}, text),
    ("GPT2ForSequenceClassification", "GPT2Config", {**GPT2, "pad_token_id": 1}, text),
    ("GPT2LMHeadModel", "GPT2Config", GPT2, tokens_alone),
    (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": WORDS, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4},
        tokens_alone,
    ),
    (
        "ViTForImageClassification",
        "ViTConfig",
        {**BODY, "image_size": 32, "patch_size": 8},
        pictures,
    ),
    (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 32,
            "embed_dim": 12,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "num_labels": CLASSES,
        },
        pictures,
    ),
    (
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 8,
            "hidden_sizes": [16, 24],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": CLASSES,
        },
        pictures,
    ),
    (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "num_labels": CLASSES},
        pictures,
    ),
    (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25, "image_size": 32, "num_labels": CLASSES},
        pictures,
    ),
    (
        "RegNetForImageClassification",
        "RegNetConfig",
        {
            "embedding_size": 8,
            "hidden_sizes": [16, 24, 24, 24],
            "depths": [1, 1, 1, 1],
            "groups_width": 8,
            "num_labels": CLASSES,
        },
        pictures,
    ),
    (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 12, 16, 20],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
            "num_labels": 2,
        },
        lambda: pictures(2),
    ),
    (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {
            **BODY,
            "conv_dim": (8, 8),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 12,
        },
        sound,
    ),
]


def logits(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return (N, C) or (N, C, ...)."""
    found: Tensor = module(**batch).logits
    return found.transpose(1, 2) if found.ndim == 3 else found


def build(case: Case) -> tuple[nn.Module, Batch]:
    """Return the network in eval mode, and its samples."""
    kind, config, options, samples = case
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    return model.eval(), samples()


def doubled(batch: Batch) -> Batch:
    """Return the batch with its floating-point tensors in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def plain_scores(model: nn.Module, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """Return R by one backward pass a sample and output."""
    parameters = [model.get_parameter(name) for name in names]
    total = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    for sample in range(len(next(iter(batch.values())))):
        one = {name: x[sample : sample + 1] for name, x in batch.items()}
        for probability in logits(model, one).softmax(1).flatten():
            gradients = torch.autograd.grad(
                probability, parameters, retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.square()
    return total


def scores(model: nn.Module, batch: Batch) -> str:
    """Return how far the scores are off."""
    model, batch = copy.deepcopy(model).double(), doubled(batch)
    names = list(find_prunable(model).parameters)
    got = squared_gradients(model, [batch], forward=logits, parameters=names)
    want = plain_scores(model, batch, names)
    off = max(
        float((got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1e-300)) for n in names
    )
    return f"{off:.0e}"


def refits(model: nn.Module, batch: Batch) -> str:
    """Return the divergences, without a refit and by either."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    layers = {id(m.weight) for m in model.modules() if isinstance(m, LAYERS)}
    names = [
        name
        for name, p in find_prunable(model).parameters.items()
        if id(p) in layers and uses.count(id(p)) == 1
    ]
    if not names:
        return "- | - | -"
    found = []
    for refit in (False, "layers", "outputs"):
        pruned = copy.deepcopy(model)
        prune(
            pruned,
            [batch],
            sparsity=0.5,
            stages=2,
            criterion="obc",
            refit=refit,
            forward=logits,
            parameters=names,
        )
        found.append(divergence(pruned, Calibration(Teacher.of(model), [], [batch], logits)))
    return " | ".join(f"{float(each):.0e}" for each in found)


def shrinks(model: nn.Module, batch: Batch) -> str:
    """Return how much smaller the network becomes, and how far its outputs are off."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LAYERS) and len(module.weight) >= 8:
                module.weight[::2] = 0
                if module.bias is not None:
                    module.bias[::2] = 0
        small, report = shrink_with_report(model, example_inputs=batch, forward=logits)
        want = logits(model, batch)
        off = float((logits(small, batch) - want).abs().max() / want.abs().max())
    return f"{report.parameters_before:,} to {report.parameters_after:,} | {off:.0e}"


def row(case: Case) -> str:
    """Return a network's row; what fails is said there."""
    model, batch = build(case)
    cells = [case[0]]
    for measure, columns in ((scores, 1), (refits, 3), (shrinks, 2)):
        try:
            cells.append(measure(model, batch))
        except Exception as error:  # noqa: BLE001, PERF203
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            cells.append(" | ".join([said, *[""] * (columns - 1)]))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the page, a row at a time."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    question, _, rest = str(__doc__).partition("\n")
    print(f"# {question}\n")
    print(rest.split("\n\n", 1)[1])
    print(
        f"Made by `python benchmarks/architectures.py`, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, one thread.\n"
    )
    print("| network | R off by | no refit | layers | outputs | shrink: parameters | off by |")
    print("|---|---:|---:|---:|---:|---|---:|")
    for case in CASES:
        print(row(case), flush=True)


if __name__ == "__main__":
    main()
