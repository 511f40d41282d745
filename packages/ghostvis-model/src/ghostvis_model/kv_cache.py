"""Keys and values of what has been read: rows that grow, prompts read in packed, rows copied for more samples.

Shape letters: L layers, B rows, S room of a row in tokens, N packed tokens, H query heads, K key/value heads, h head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ghostvis_kernels import attention, attention_decode
from ghostvis_model.config import TextConfig


class Cache(Protocol):
    """What a decoder layer needs of a cache: where its tokens stand, and attention that also keeps their keys."""

    def position_ids(self, tokens: int) -> Tensor:
        """int64 positions of `tokens` new tokens of each row."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v, then let q see them and all that its row holds; q's shape."""
        ...


class KVCache:
    """Keys and values of every layer for sequences of different length; new tokens are appended to each row."""

    def __init__(
        self, config: TextConfig, batch: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        """[L, B, S, K, h], like the keys."""
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)
        """int64 [B]: tokens held of each row; what lies behind is overwritten by the next."""

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row."""
        return self.keys.shape[2]

    def position_ids(self, tokens: int) -> Tensor:
        """int64 [B, tokens]: the places right behind what each row holds."""
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k, v [B, T, K, h] to each row (`lengths` stay: the caller adds T); q and result [B, T, H, h]."""
        return attention_decode(q, self.keys[layer], self.values[layer], self.lengths, k=k, v=v)

    def rows(self, start: int, stop: int) -> KVCache:
        """A view of neighbouring rows: what it writes, this cache holds."""
        view = KVCache.__new__(KVCache)
        view.keys, view.values = self.keys[:, start:stop], self.values[:, start:stop]
        view.lengths = self.lengths[start:stop]
        return view

    def resized(self, batch: int, capacity: int) -> KVCache:
        """A copy with room for `batch` rows of `capacity` tokens, neither less than now; rows keep their tokens."""
        layers, rows, room, kv_heads, size = self.keys.shape
        if batch < rows or capacity < room:
            raise ValueError(f"cannot shrink a cache of {rows} rows x {room} tokens to {batch} x {capacity}")
        grown = KVCache.__new__(KVCache)
        grown.keys = self.keys.new_zeros(layers, batch, capacity, kv_heads, size)
        grown.values = torch.zeros_like(grown.keys)
        grown.lengths = self.lengths.new_zeros(batch)
        grown.keys[:, :rows, :room] = self.keys
        grown.values[:, :rows, :room] = self.values
        grown.lengths[:rows] = self.lengths
        return grown

    def copy_row(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens of a row into other rows, and that length."""
        where = torch.tensor(list(targets), device=self.keys.device)
        for held in (self.keys, self.values):
            held[:, where, :length] = held[:, source : source + 1, :length]
        self.lengths[where] = length


class Prefill:
    """Reads prompts, packed one after another in one row of N tokens, into empty rows of a cache."""

    def __init__(self, cache: KVCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Prompt i, `lengths[i]` tokens long, goes to row `rows[i]`, whose length is set."""
        device, room = cache.keys.device, cache.capacity
        if max(lengths) > room or min(lengths) < 1:
            raise ValueError(f"prompts of {min(lengths)} to {max(lengths)} tokens for rows of {room}")
        ends = torch.tensor([0, *lengths]).cumsum(0)
        position = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(torch.tensor(lengths))
        place = torch.tensor(rows).repeat_interleave(torch.tensor(lengths)) * room + position
        self._cache = cache
        self._positions = position.to(device)[None]
        self._place = place.to(device)
        self._cu_seqlens = ends.to(device, torch.int32)
        self._max_seqlen = max(lengths)
        self.last = (ends[1:] - 1).to(device)
        """int64 [prompts]: place of each prompt's last token among the N."""
        cache.lengths[torch.tensor(rows, device=device)] = torch.tensor(lengths, device=device)

    def position_ids(self, tokens: int) -> Tensor:
        """int64 [1, N], from 0 in every prompt."""
        assert tokens == self._positions.shape[1]
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v [1, N, K, h] to their rows and let every prompt see itself; q, result [1, N, H, h]."""
        for held, fresh in ((self._cache.keys[layer], k), (self._cache.values[layer], v)):
            held.flatten(0, 1)[self._place] = fresh[0].to(held.dtype)
        seen = attention(q[0], k[0], v[0], cu_seqlens=self._cu_seqlens, max_seqlen=self._max_seqlen)
        return seen[None]
