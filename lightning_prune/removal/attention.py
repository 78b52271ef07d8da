"""Heads of an attention that fall, and the attention that goes on without them.

Enters: a ``torch.nn.MultiheadAttention``. Leaves: which of its heads are not needed, and the same
module with fewer of them. A head is not needed if nothing of the output projection takes what it
says; or if its values have no weights: then it says the same at every position, whatever it
attends to, since what it averages is one number, and that goes into the output's bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FewerHeads(nn.MultiheadAttention):
    """A ``nn.MultiheadAttention`` that has lost some of its heads, see :func:`keep_heads`.

    It is called as before, and its parameters have the names they had; ``embed_dim`` and
    ``head_dim`` stay, ``num_heads`` times ``head_dim`` is no longer the one of the other. Attention
    weights, where they are asked for, are those of the heads that are left.

    Attributes:
        heads: The heads that are left, counted as in the dense module.
        dense_heads: How many there were.
    """

    heads: list[int]
    dense_heads: int

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as ``nn.MultiheadAttention`` does; ``is_causal`` is a hint only there, too."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        inputs = [x if batched else x.unsqueeze(1 - self.batch_first) for x in (query, key, value)]
        if not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = (
            self._apart(F.linear(x, weight, bias))
            for x, weight, bias in zip(inputs, *self._projections(), strict=True)
        )
        mask = self._mask(q, attn_mask, key_padding_mask)
        dropped = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropped)
            said = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            said = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
        output = self.out_proj(said.transpose(1, 2).flatten(-2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        return (output if batched else output.squeeze(1 - self.batch_first)), weights

    def _apart(self, projected: Tensor) -> Tensor:
        """(N, T, heads * head_dim) to (N, heads, T, head_dim)."""
        return projected.view(*projected.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _projections(self) -> tuple[list[Any], list[Any]]:
        """Return the weights and biases that make q, k and v."""
        fused: Any = self.in_proj_weight
        bias: Any = self.in_proj_bias
        parts: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = list(parts if fused is None else fused.chunk(3))
        return weights, [None] * 3 if bias is None else list(bias.chunk(3))

    def _mask(self, q: Tensor, attend: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Return what is added to the scores, broadcast to (N, heads, L, S)."""
        mask = None
        if attend is not None:
            mask = _additive(attend, q.dtype)
            if mask.dim() == 3:  # one for each sample and dense head
                mask = mask.view(-1, self.dense_heads, *mask.shape[1:])[:, self.heads]
        if padding is not None:
            padded = _additive(padding, q.dtype).reshape(len(q), 1, 1, -1)
            mask = padded if mask is None else mask + padded
        return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add: a bool one forbids where it is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


def obstacle(module: nn.MultiheadAttention, shared: bool) -> str | None:
    """Return why no head of an attention can be cut, ``None`` if they can.

    Args:
        module: The attention.
        shared: Whether other modules have parameters of it, too.
    """
    if type(module) not in (nn.MultiheadAttention, FewerHeads):
        return f"{type(module).__name__} may have a forward of its own"
    inside = (module, module.out_proj)
    if any(one._forward_hooks or one._forward_pre_hooks for one in inside):
        return "it has forward hooks, which may change what goes through it"
    if module.bias_k is not None or module.add_zero_attn:
        return "it attends to a key of its own"
    own = ("in_proj_weight", "q_proj_weight")
    if all(module._parameters.get(name) is None for name in own) or shared:
        return "its weights are shared, or computed from other parameters"
    return None


def unneeded(module: nn.MultiheadAttention) -> tuple[Tensor, Tensor]:
    """Return which heads fall (heads,), on the CPU, and what goes into the output's bias (D_out,).

    One head stays in any case. A query that may attend to nothing at all is not thought of.
    """
    fused: Any = module.in_proj_weight
    heads, size = module.num_heads, module.head_dim
    values: Any = module.v_proj_weight if fused is None else fused.chunk(3)[2]
    takes = module.out_proj.weight.detach().view(-1, heads, size)
    unheard = (takes == 0).all(2).all(0)
    constant = (values.detach() == 0).view(heads, -1).all(1)
    gone = unheard | constant
    if bool(gone.all()):
        gone[0] = False
    added = torch.zeros_like(module.out_proj.weight[:, 0].detach())
    bias: Any = module.in_proj_bias
    if bias is not None:
        said = bias.detach().chunk(3)[2].view(heads, size) * gone[:, None]
        added = torch.einsum("ohd,hd->o", takes, said)
    return gone.cpu(), added


def rows_left(module: nn.MultiheadAttention, gone: Tensor) -> dict[str, Tensor]:
    """Return, by name, which entries along axis 0 of a tensor belong to heads that stay."""
    stays = (~gone).repeat_interleave(module.head_dim)
    found = dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), stays)
    found |= {name: stays.repeat(3) for name in ("in_proj_weight", "in_proj_bias")}
    present = {name for name, tensor in module._parameters.items() if tensor is not None}
    return {name: rows.nonzero()[:, 0] for name, rows in found.items() if name in present}


def keep_heads(module: nn.MultiheadAttention, heads: list[int], dense_heads: int) -> None:
    """Make an attention one of fewer heads, in place; its tensors have to be cut as well.

    Args:
        module: The attention, dense or one that has lost heads before.
        heads: The heads that stay, counted as in the dense module.
        dense_heads: How many heads that had.
    """
    changed: Any = module
    changed.__class__ = FewerHeads
    changed.num_heads, changed.heads, changed.dense_heads = len(heads), heads, dense_heads
    # torch's fused kernels for encoder layers read the weights themselves, as of a dense module.
    changed._qkv_same_embed_dim = False


def without_nesting(model: nn.Module) -> None:
    """Have encoders leave padded batches as they are: nested ones are for torch's own attention."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
            module.enable_nested_tensor = False
