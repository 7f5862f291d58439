"""``nn.MultiheadAttention`` whose projections are adapted: its own forward pass reads their weights and calls none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parameter import TCURParameter


class TCURMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that computes its projections by their layers, in training and in eval alike.

    Any of ``in_proj_weight`` (or ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``) and ``out_proj`` may be
    adapted. The attention between them is that of ``nn.MultiheadAttention`` with its slow path.
    :func:`tcurlora_ext.inject` makes a plain module one of these, and :func:`tcurlora_ext.remove` makes it plain again.
    """

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
        """As ``nn.MultiheadAttention``.

        Args:
            query: (L, N, embed_dim), (N, L, embed_dim) with ``batch_first``, or (L, embed_dim) without a batch.
            key: As the query with S in place of L and ``kdim`` features.
            value: As the key with ``vdim`` features.
            key_padding_mask: (N, S), or (S,) without a batch: True, or the number added, for keys to leave out.
            need_weights: Whether the attention weights are returned.
            attn_mask: (L, S) or (N*num_heads, L, S): True, or the number added, where not to attend.
            average_attn_weights: Whether these weights are averaged over the heads.
            is_causal: That ``attn_mask`` is the causal mask.

        Returns:
            The output in the form of the query; and the weights (N, L, S), (N, num_heads, L, S) without an average, or
            None; without N where there is no batch.

        Raises:
            RuntimeError: Shapes do not fit, or ``is_causal`` without ``attn_mask``.
            ValueError: An input is a nested tensor.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("found a nested tensor, expected a padded one with key_padding_mask: it is adapted")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is given, expected attn_mask with it")
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            found = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise RuntimeError(f"query, key and value have shapes {found}, expected all of 3 dimensions, or all of 2")
        kind = F._none_or_dtype(attn_mask)
        padding = F._canonical_mask(key_padding_mask, "key_padding_mask", kind, "attn_mask", query.dtype)
        attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            padding = None if padding is None else padding.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        causal = is_causal and padding is None and not need_weights
        k, v, mask = self._beside(k, v, None if causal else attn_mask, padding, q.shape[1])
        heads, weights = self._attended(self._heads(q), self._heads(k), self._heads(v), mask, causal, need_weights)
        result = heads.transpose(1, 2).flatten(2)
        if batched and not self.batch_first:
            result = result.transpose(0, 1)
        result = self.out_proj(result)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            given = zip((query, key, value), weights, biases, strict=True)
            q, k, v = (_project(weight, x, bias) for x, weight, bias in given)
            return q, k, v
        if query is key and key is value:
            q, k, v = self._parts(query, 0, 3)
        elif key is value:
            (q,), (k, v) = self._parts(query, 0, 1), self._parts(key, 1, 2)
        else:
            (q,), (k,), (v,) = (self._parts(x, at, 1) for at, x in enumerate((query, key, value)))
        return q, k, v

    def _parts(self, x: Tensor, first: int, number: int) -> tuple[Tensor, ...]:
        """The projections of x by some of the three parts of ``in_proj_weight``."""
        rows, bias = slice(first * self.embed_dim, (first + number) * self.embed_dim), self.in_proj_bias
        weight = self.in_proj_weight if isinstance(self.in_proj_weight, TCURParameter) else self.in_proj_weight[rows]
        return _project(weight, x, None if bias is None else bias[rows], first, number).chunk(number, -1)

    def _heads(self, x: Tensor) -> Tensor:
        """(N, T, embed_dim) -> (N, num_heads, T, head_dim)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _beside(
        self, k: Tensor, v: Tensor, mask: Tensor | None, padding: Tensor | None, queries: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with those that the module adds, and the mask of all that is added to their scores."""
        (batch, keys, _), more = k.shape, 0
        if self.bias_k is not None and self.bias_v is not None:
            added = ((k, self.bias_k), (v, self.bias_v))
            k, v = (torch.cat([x, b.to(x.dtype).expand(batch, -1, -1)], 1) for x, b in added)
            more += 1
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            more += 1
        if mask is not None:
            heads = batch * self.num_heads
            _require("attn_mask", mask, (queries, keys) if mask.dim() == 2 else (heads, queries, keys))
            mask = F.pad(mask if mask.dim() == 2 else mask.unflatten(0, (batch, self.num_heads)), (0, more))
        if padding is not None:
            _require("key_padding_mask", padding, (batch, keys))
            padding = F.pad(padding, (0, more))[:, None, None]
            mask = padding if mask is None else mask + padding
        return k, v, mask

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The values attended to (N, num_heads, L, head_dim), and the weights (N, num_heads, L, S) where needed."""
        dropout = self.dropout if self.training else 0.0
        mask = None if mask is None else mask.to(q.dtype)
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, dropout) if dropout > 0 else weights
        return weights @ v, weights


def _project(weight: Any, x: Tensor, bias: Tensor | None, first: int = 0, number: int = 1) -> Tensor:
    """The projection of x by a plain weight, or by some slices of an adapted one."""
    if isinstance(weight, TCURParameter):
        return weight.project(x, bias, first, number)
    return F.linear(x, weight, bias)


def _require(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.shape != shape:
        raise RuntimeError(f"{name} has shape {tuple(mask.shape)}, expected {shape}")
