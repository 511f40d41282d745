"""Packing: which documents share a row of T tokens. Nothing is split here, nothing is dropped.

Two rules, chosen by how many documents an epoch has:

- `pack`, best fit over a bounded pool, for small epochs: a row starts with the document that has waited longest, then
  takes, again and again, the longest document of the pool that still fits. It keeps almost the order it was given.
- `pack_windows`, best fit decreasing over consecutive windows, for large ones: fuller and ten times as fast, because it
  counts equal lengths together and never looks at a single document. It keeps the order of the windows only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

# Documents looked at together. 64, 256 and 1024 fill 99.6, 99.8 and 99.8 % of rows of 2,048 with log-normal lengths
# (mean 595), but at 1024 the last rows of an epoch hold mostly short documents: the long ones went early.
POOL = 256

WINDOW = 32_768  # documents; measured in BENCHMARKS.md. Half of it packs a third slower and no fuller.


def pack(lengths: Sequence[int] | np.ndarray, row_tokens: int, pool: int = POOL) -> list[list[int]]:
    """Rows of indices into `lengths`; each index stands in exactly one row, no row sums to more than `row_tokens`.

    A set of the lengths in the pool is kept as the bits of one integer, so "the longest that fits" is one mask and one
    bit_length.

    Args:
        lengths: tokens of each document, in reading order; each from 1 to `row_tokens`.
        row_tokens: T, the capacity of a row.
        pool: how many documents are looked at together.
    """
    waiting: dict[int, deque[int]] = {}  # length -> indices, oldest first
    lengths = [int(length) for length in lengths]
    assert all(0 < length <= row_tokens for length in lengths), "split or refuse longer documents first"
    placed = bytearray(len(lengths))
    present = 0  # bit n is set when a document of n tokens waits
    rows: list[list[int]] = []
    oldest = arrived = size = 0
    total = len(lengths)

    while oldest < total:
        free, row = row_tokens, []
        while True:
            while size < pool and arrived < total:
                length = lengths[arrived]
                waiting.setdefault(length, deque()).append(arrived)
                present |= 1 << length
                arrived += 1
                size += 1
            # Of equal lengths the oldest goes first, so the oldest of all is always the head of its queue.
            length = (present & ((2 << free) - 1)).bit_length() - 1 if row else lengths[oldest]
            if length <= 0:
                break
            queue = waiting[length]
            index = queue.popleft()
            if not queue:
                del waiting[length]
                present ^= 1 << length
            row.append(index)
            placed[index] = 1
            free -= length
            size -= 1
            while oldest < total and placed[oldest]:
                oldest += 1
            if not free or oldest == total:
                break
        rows.append(row)
    return rows


def pack_windows(
    lengths: np.ndarray, row_tokens: int, seed: Sequence[int], window: int = WINDOW
) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing inside consecutive windows of documents, the rows of a window in random order.

    Without that order the rows of long documents would come first.

    Args:
        lengths: tokens of each document, integers [documents], each from 1 to `row_tokens`.
        row_tokens: T, the capacity of a row.
        seed: of the order of rows; the number of the window is added to it.
        window: documents looked at together.

    Returns:
        int64 [documents], indices into `lengths` row by row, and int64 [rows + 1]: row r holds
        `order[starts[r] : starts[r + 1]]`.
    """
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= row_tokens, "split or refuse longer ones first"
    orders, counts = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
    for number, first in enumerate(range(0, len(lengths), window)):
        part = lengths[first : first + window]
        by_length, row_of, rows = best_fit_decreasing(part, row_tokens)
        places = np.random.Generator(np.random.PCG64([*seed, number])).permutation(rows)
        row_of = places[row_of]
        orders.append(by_length[np.argsort(row_of, kind="stable")] + first)
        counts.append(np.bincount(row_of, minlength=rows))
    return np.concatenate(orders), np.cumsum(np.concatenate(counts))


def best_fit_decreasing(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The longest document first, each into the fullest row that still has room for it.

    Documents of equal length are placed together: rows with the same room are one stack, the rooms that exist are the
    bits of one integer, so the work is about one step per pair of length and room, not one per document.

    Returns:
        int64 [documents] `order`: longest first, equal ones in the given order; int64 [documents]: the row of document
        `order[i]`; the number of rows.
    """
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    stacks: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # rows by the room that is left in them
    rooms = 0  # bit n is set when stacks[n] is not empty
    row_of: list[int] = []
    rows = 0
    for length, count in zip(reversed(values.tolist()), reversed(counts.tolist()), strict=True):
        while count:
            fitting = rooms >> length
            if not fitting:
                opened = -(-count // (row_tokens // length))
                stacks[row_tokens] = list(range(rows, rows + opened))
                rooms |= 1 << row_tokens
                rows += opened
                fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1
            stack, each = stacks[room], room // length
            whole = min(len(stack), count // each)  # rows that take as many of this length as they hold
            if whole:
                taken = stack[-whole:]
                del stack[-whole:]
                row_of += taken * each
                if left := room - each * length:
                    stacks[left] += taken
                    rooms |= 1 << left
                count -= whole * each
            if stack and 0 < count < each:
                last = stack.pop()
                row_of += [last] * count
                stacks[room - count * length].append(last)
                rooms |= 1 << (room - count * length)
                count = 0
            if not stack:
                rooms ^= 1 << room
    return order, np.array(row_of, np.int64), rows


def fill(lengths: Sequence[int] | np.ndarray, rows: Sequence[Sequence[int]], row_tokens: int) -> float:
    """The share of the rows' tokens that are documents, 0 to 1."""
    return float(sum(int(lengths[i]) for row in rows for i in row)) / (len(rows) * row_tokens) if rows else 1.0
