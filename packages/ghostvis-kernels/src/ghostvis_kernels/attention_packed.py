"""Packed attention on CPU: documents of like length share a padded batch.

Padding repeats the last token of the same document. A causal query never sees it (it stands after every real token),
so causal buckets run without a mask, and nothing of one document, not even a NaN, reaches another. The cost is within
about 1 / FILL of the sum of squared lengths.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FILL = 0.75  # a document joins a bucket while it fills at least this share of it
SHORT = 32  # documents up to this length share a bucket: a call costs more than the padding
# Up to this length scores are written out: 37 x 2 heads x 112 x 64 takes 4.0 ms forward and backward in bf16 where the
# flash kernel takes 17.3 (two EPYC cores, torch 2.15; fp32 8.8 against 9.4). Beyond it memory would grow with T^2.
WRITTEN_OUT = 512


class _Bucket(NamedTuple):
    start: int  # first of its padded rows
    lengths: tuple[int, ...]  # tokens of its documents, longest first

    @property
    def width(self) -> int:
        return self.lengths[0]

    @property
    def rows(self) -> int:
        return len(self.lengths) * self.width


class _Plan(NamedTuple):
    buckets: tuple[_Bucket, ...]
    source: Tensor  # [padded rows] the packed token in each padded row
    slot: Tensor  # [N] the padded row of each packed token


class _Pad(torch.autograd.Function):
    # index_select alone would add rows up in backward. Padding has no gradient, so a token's gradient is its row's.
    @staticmethod
    def forward(ctx, tokens: Tensor, plan: _Plan) -> Tensor:
        ctx.plan = plan
        return tokens.index_select(0, plan.source)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.plan.slot), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, plan: _Plan) -> Tensor:
        ctx.plan = plan
        return rows.index_select(0, plan.slot)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        padded = grad.new_zeros(ctx.plan.source.shape[0], *grad.shape[1:])
        return padded.index_copy_(0, ctx.plan.slot, grad), None


def packed_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int | None, scale: float
) -> Tensor:
    """Attention within each document of packed q [N, H, h] and k, v [N, K, h]; arguments as in `attention`."""
    plan = _plan(tuple(cu_seqlens.tolist()), q.shape[0])
    if not plan.buckets:
        return q + k.sum() + v.sum()  # no tokens: empty, and still part of the graph
    even = len(plan.buckets) == 1 and plan.source.shape[0] == q.shape[0]  # one length: nothing to move
    query, key, value = (q, k, v) if even else (_Pad.apply(t, plan) for t in (q, k, v))
    out = []
    for bucket in plan.buckets:
        rows, shape = slice(bucket.start, bucket.start + bucket.rows), (len(bucket.lengths), bucket.width)
        parts = (t[rows].unflatten(0, shape).transpose(1, 2) for t in (query, key, value))
        mask = _mask(bucket, causal, window)
        if mask is None and causal and bucket.width <= WRITTEN_OUT:
            mixed = written_out(*parts, causal, scale)
        else:
            mixed = F.scaled_dot_product_attention(
                *parts,
                attn_mask=mask,
                is_causal=causal and mask is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        out.append(mixed.transpose(1, 2).flatten(0, 1))
    padded = out[0] if len(out) == 1 else torch.cat(out)
    return padded if even else _Unpad.apply(padded, plan)


def written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Attention of q [B, H, T, h] on k, v [B, K, S, h] by two matrix products; causal needs S = T.

    The H / K query heads that share a key head are one matrix.
    """
    batch, heads, tokens, size = q.shape
    kv_heads, keys = k.shape[1:3]
    rows = (q * scale).reshape(batch * kv_heads, heads // kv_heads * tokens, size)
    columns = k.reshape(-1, keys, size).mT
    if causal:
        hidden = torch.full((tokens, tokens), float("-inf"), dtype=q.dtype).triu_(1)
        hidden = hidden.repeat(heads // kv_heads, 1).expand(batch * kv_heads, -1, -1)
        scores = torch.baddbmm(hidden, rows, columns)
    else:
        scores = torch.bmm(rows, columns)
    return torch.bmm(scores.softmax(-1), v.reshape(-1, keys, size)).view(batch, heads, tokens, size)


@lru_cache(maxsize=16)  # every layer of a step asks for the same packing
def _plan(ends: tuple[int, ...], tokens: int) -> _Plan:
    lengths = [stop - start for start, stop in pairwise(ends)]
    if not ends or ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"attention: cu_seqlens runs {ends[:3]} .. {ends[-2:]} over N={tokens} tokens; "
            f"expected ascending ends from 0 to N "
            "(give padding at the end its own document)"
        )
    order = sorted((d for d, length in enumerate(lengths) if length), key=lambda d: -lengths[d])
    groups: list[list[int]] = []
    for document in order:
        width = lengths[groups[-1][0]] if groups else 0
        if width and (lengths[document] >= FILL * width or width <= SHORT):
            groups[-1].append(document)
        else:
            groups.append([document])
    even = len(groups) == 1 and min(lengths[d] for d in order) == lengths[order[0]]
    if even:  # keep the order of the documents: then nothing moves
        groups[0].sort()
    source, slot, buckets = [], torch.empty(tokens, dtype=torch.int64), []
    start = 0
    for group in groups:
        width = lengths[group[0]]
        buckets.append(_Bucket(start, tuple(lengths[d] for d in group)))
        for document in group:
            token = torch.arange(lengths[document])
            source.append(ends[document] + torch.arange(width).clamp_max_(lengths[document] - 1))
            slot[ends[document] : ends[document + 1]] = start + token
            start += width
    return _Plan(tuple(buckets), torch.cat(source) if source else slot, slot)


def _mask(bucket: _Bucket, causal: bool, window: int | None) -> Tensor | None:
    """[documents or 1, 1, width, width] bool, or None where causality alone hides the padding."""
    padded = bucket.lengths[-1] != bucket.width
    if window is None and (causal or not padded):
        return None
    position = torch.arange(bucket.width)
    distance = position.unsqueeze(1) - position
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        mask = mask & (distance.abs() < window)
    mask = mask[None, None]
    if not causal and padded:
        real = position < torch.tensor(bucket.lengths).unsqueeze(1)
        # A padded query keeps one key of its own, itself: a row that sees nothing would be NaN.
        mask = mask & (real[:, None, None, :] | torch.eye(bucket.width, dtype=torch.bool))
    return mask
