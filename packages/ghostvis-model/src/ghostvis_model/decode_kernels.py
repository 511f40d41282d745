"""Triton kernels of one decoding step for one row: five launches a layer, none of them waiting for weights.

A step of one row reads every weight once and computes next to nothing, so all that counts is that the memory never
rests. A program asks for all of its weights at once and holds them in registers; each kernel may be launched as soon
as the one before has started (programmatic dependent launch, sm_90), and waits for its input only when its weights are
under way. The registers of the chip hold half a layer in that way. Weights are bfloat16, float16 or float32, or int8
with a scale per output row.

A tile is W rows at a time, R times, each row in pieces of BK columns; with W = warps and BK = 32 * 16 bytes a row is a
warp's own.

Shape letters: D model width, F MLP width, H query heads, K key/value heads, h head size, V vocabulary, S room of the
cache.
"""

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _launch_next(PDL: tl.constexpr):
    """Programs of the next kernel may start; what they must not read early they wait for."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """Until the kernel before, and so every one before that, is done."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _arrived(tile):
    """Wait until a tile of 16-byte loads of 2-byte weights is there, for its sake alone."""
    # Nothing short of an instruction with an effect makes the assembler keep a use of the registers.
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.u32 p, $4, 0x7fff7fff; @p nanosleep.u32 1; "
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }",
        "=r,=r,=r,=r,r,r,r,r", [tile], dtype=tile.dtype, is_pure=False, pack=8,
    )  # fmt: skip


@triton.jit
def _load_rows(
    w, first, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + W R of w [*, D], as a tuple of R cdiv(D, BK) tensors [W, BK]; zeros behind the end.

    MOST: at most so many and one of these tensors are under way at a time; 0 for no limit.
    """
    row, column = first + tl.arange(0, W), tl.arange(0, BK)
    tiles = ()
    for r in tl.static_range(R):
        there = w + (row + r * W).to(tl.int64)[:, None] * D + column[None, :]
        for start in tl.static_range(0, D, BK):
            if start + BK <= D:
                tile = tl.load(there + start, eviction_policy="evict_first")
            else:
                inside = (column < D - start)[None, :]
                tile = tl.load(there + start, mask=inside, other=0, eviction_policy="evict_first")
            tiles += (tile,)
            if MOST > 0 and tile.dtype.primitive_bitwidth == 16 and len(tiles) > MOST:
                _arrived(tiles[len(tiles) - 1 - MOST])
    return tiles


@triton.jit
def _dots(
    tiles, x, norm, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """What `_load_rows` found times x [D]: a tuple of R float32 [W]; and [W] times the sum of squares of x.

    With NORM x is scaled by the norm's weight; the norm's root is one number and is left to the caller.
    """
    column, row = tl.arange(0, BK), tl.zeros((W, 1), tl.int32)
    count: tl.constexpr = (D + BK - 1) // BK
    totals = ()
    for _ in tl.static_range(R):
        totals += (tl.zeros((W, BK), tl.float32),)
    square = tl.zeros((W, BK), tl.float32)
    for part in tl.static_range(count):
        # Addresses as wide as the tile: so x comes in the tile's layout, not through shared memory.
        place = row + (part * BK + column)[None, :]
        inside = place < D
        if part * BK + BK <= D:
            value = tl.load(x + place).to(tl.float32)
        else:
            value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        square += value * value
        if NORM:
            if part * BK + BK <= D:
                value *= tl.load(norm + place).to(tl.float32)
            else:
                value *= tl.load(norm + place, mask=inside, other=0.0).to(tl.float32)
        added = ()
        for r in tl.static_range(R):
            added += (totals[r] + tiles[r * count + part].to(tl.float32) * value,)
        totals = added
    sums = ()
    for r in tl.static_range(R):
        sums += (tl.sum(totals[r], 1),)
    return sums, tl.sum(square, 1)


@triton.jit
def embed_kernel(
    tokens, table, x, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [D] = the embedding of the token, normalised where NORM.

    The next kernels start only when the step before is done: they read lengths and weights without waiting.
    """
    _wait(PDL)
    _launch_next(PDL)
    column = tl.arange(0, BLOCK)
    token = tl.load(tokens)
    value = tl.load(table + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    if NORM:
        value = value * tl.rsqrt(tl.sum(value * value, 0) / D + tl.full((), eps, tl.float32))
    tl.store(x + column, value.to(x.dtype.element_ty), mask=column < D)


@triton.jit
def qkv_kernel(
    x, norm, wq, wk, wv, bq, bk, bv, sq, sk, sv, out, eps,
    D: tl.constexpr, NQ: tl.constexpr, NK: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    MOST: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out float32 [NQ + 2 NK] = q, k and v of the normalised x."""
    _launch_next(PDL)
    place = tl.program_id(0) * (W * R)
    w, bias, scale, first = wq, bq, sq, place
    if place >= NQ + NK:
        w, bias, scale, first = wv, bv, sv, place - NQ - NK
    elif place >= NQ:
        w, bias, scale, first = wk, bk, sk, place - NQ
    tiles = _load_rows(w, first, D, W, R, BK, MOST)
    _wait(PDL)
    sums, square = _dots(tiles, x, norm, D, W, R, BK, NORM)
    root = tl.rsqrt(square / D + tl.full((), eps, tl.float32))
    for r in tl.static_range(R):
        row = r * W + tl.arange(0, W)
        y = sums[r] * root
        if INT8:
            y = y * tl.load(scale + first + row)
        if BIAS:
            y += tl.load(bias + first + row).to(tl.float32)
        tl.store(out + place + row, y)


@triton.jit
def _pieces(position, SPLITS: tl.constexpr, BS: tl.constexpr):
    """Tokens in each piece of the cache, a multiple of BS, and how many of SPLITS pieces have any."""
    share = tl.maximum((tl.cdiv(position, SPLITS) + BS - 1) // BS, 1) * BS
    return share, tl.cdiv(position, share)


@triton.jit
def _load_tokens(
    k_cache, v_cache, at, stop, stride, here, BS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Keys and values of BS tokens of one head, each in two halves [BS, HALF]; zeros from `stop` on."""
    token = at + tl.arange(0, BS)
    inside = (token < stop)[:, None]
    rows = token.to(tl.int64)[:, None] * stride + here[None, :]
    key1 = tl.load(k_cache + rows, mask=inside, other=0.0)
    key2 = tl.load(k_cache + rows + HALF, mask=inside, other=0.0)
    value1 = tl.load(v_cache + rows, mask=inside, other=0.0)
    value2 = tl.load(v_cache + rows + HALF, mask=inside, other=0.0)
    return key1, key2, value1, value2


@triton.jit
def _attend(q1, q2, tokens, at, stop, heat, best, total, mixed1, mixed2, BS: tl.constexpr):
    """The softmax so far (its largest score, sum, mixed values) with these tokens in it."""
    key1, key2, value1, value2 = tokens
    if _INTERPRETED:  # it multiplies the bit patterns of bf16
        key1, key2 = key1.to(tl.float32), key2.to(tl.float32)
        value1, value2 = value1.to(tl.float32), value2.to(tl.float32)
    inside = at + tl.arange(0, BS) < stop
    score = tl.dot(q1, tl.trans(key1), input_precision="ieee")
    score += tl.dot(q2, tl.trans(key2), input_precision="ieee")
    score = tl.where(inside[None, :], score * heat, float("-inf"))
    higher = tl.maximum(best, tl.max(score, 1))
    weight = tl.exp(score - higher[:, None])
    fade = tl.exp(best - higher)
    total = total * fade + tl.sum(weight, 1)
    weight = weight.to(value1.dtype)
    mixed1 = mixed1 * fade[:, None] + tl.dot(weight, value1, input_precision="ieee")
    mixed2 = mixed2 * fade[:, None] + tl.dot(weight, value2, input_precision="ieee")
    return higher, total, mixed1, mixed2


@triton.jit
def attention_kernel(
    qkv, k_cache, v_cache, lengths, cos, sin, means, masses, eps, scale, stride,
    H: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SPLITS: tl.constexpr,
    BS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One key head, one piece of the row: QK-norm, rotary turn, attention within the piece. Piece 0 is the new token.

    qkv float32 [(H + 2 K) h]; caches [S, K, h] with `stride` between tokens, to which the new token is appended; means
    [1 + SPLITS, H, h]: each piece's mixed values; masses float32 [1 + SPLITS, H]: the logarithm of its softmax's sum.
    `out_kernel` adds the pieces up.
    """
    _launch_next(PDL)
    HALF: tl.constexpr = SIZE // 2
    head, piece = tl.program_id(0), tl.program_id(1)
    half = tl.arange(0, HALF)
    here = head * SIZE + half
    position = tl.load(lengths).to(tl.int32)
    share, pieces = _pieces(position, SPLITS, BS)
    start = tl.where(piece == 0, position, (piece - 1) * share)
    stop = tl.minimum(start + share, position)
    # What earlier steps have written need not be waited for.
    first = _load_tokens(k_cache, v_cache, start, stop, stride, here, BS, HALF)
    c = tl.load(cos + position * HALF + half)
    s = tl.load(sin + position * HALF + half)
    _wait(PDL)
    if piece <= pieces:
        group = tl.arange(0, GP)
        real = group < G
        lines = qkv + (head * G + group)[:, None] * SIZE + half[None, :]
        q1 = tl.load(lines, mask=real[:, None], other=0.0)
        q2 = tl.load(lines + HALF, mask=real[:, None], other=0.0)
        root = tl.full((), eps, tl.float32)
        if NORM:
            factor = tl.rsqrt(tl.sum(q1 * q1 + q2 * q2, 1) / SIZE + root)[:, None]
            q1, q2 = q1 * factor, q2 * factor
        kind = k_cache.dtype.element_ty
        heat = tl.full((), scale, tl.float32)
        q1, q2 = (q1 * c - q2 * s).to(kind), (q2 * c + q1 * s).to(kind)
        part = piece * H + head * G + group
        to = means + part[:, None] * SIZE + half[None, :]
        if piece == 0:
            line = qkv + (H + head) * SIZE + half
            k1, k2 = tl.load(line), tl.load(line + HALF)
            line = qkv + (H + K + head) * SIZE + half
            v1, v2 = tl.load(line).to(kind), tl.load(line + HALF).to(kind)
            if NORM:
                length = tl.rsqrt(tl.sum(k1 * k1 + k2 * k2, 0) / SIZE + root)
                k1, k2 = k1 * length, k2 * length
            k1, k2 = (k1 * c - k2 * s).to(kind), (k2 * c + k1 * s).to(kind)
            into = position.to(tl.int64) * stride + here
            tl.store(k_cache + into, k1)
            tl.store(k_cache + into + HALF, k2)
            tl.store(v_cache + into, v1)
            tl.store(v_cache + into + HALF, v2)
            products = q1.to(tl.float32) * k1.to(tl.float32)[None, :] + q2.to(tl.float32) * k2.to(tl.float32)[None, :]
            every = tl.zeros((GP, 1), tl.float32)
            tl.store(to, (v1.to(tl.float32)[None, :] + every).to(means.dtype.element_ty), mask=real[:, None])
            tl.store(to + HALF, (v2.to(tl.float32)[None, :] + every).to(means.dtype.element_ty), mask=real[:, None])
            tl.store(masses + part, heat * tl.sum(products, 1), mask=real)
        else:
            if _INTERPRETED:  # it multiplies the bit patterns of bf16
                q1, q2 = q1.to(tl.float32), q2.to(tl.float32)
            best = tl.full((GP,), float("-inf"), tl.float32)
            total = tl.zeros((GP,), tl.float32)
            mixed1 = tl.zeros((GP, HALF), tl.float32)
            mixed2 = tl.zeros((GP, HALF), tl.float32)
            best, total, mixed1, mixed2 = _attend(
                q1, q2, first, start, stop, heat, best, total, mixed1, mixed2, BS
            )  # fmt: skip
            for at in range(start + BS, stop, BS):
                tokens = _load_tokens(k_cache, v_cache, at, stop, stride, here, BS, HALF)
                best, total, mixed1, mixed2 = _attend(
                    q1, q2, tokens, at, stop, heat, best, total, mixed1, mixed2, BS
                )  # fmt: skip
            mean = 1 / total[:, None]
            tl.store(to, (mixed1 * mean).to(means.dtype.element_ty), mask=real[:, None])
            tl.store(to + HALF, (mixed2 * mean).to(means.dtype.element_ty), mask=real[:, None])
            tl.store(masses + part, best + tl.log(total), mask=real)


@triton.jit
def out_kernel(
    means, masses, lengths, w, bias, scale, stream,
    H: tl.constexpr, HP: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr, W: tl.constexpr,
    AT_ONCE: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """stream [N] += w [N, H h] a (+ bias), a [H h] being attention's pieces added up, AT_ONCE in one go.

    Every program adds them up for itself, for 0.1 us a layer of d20 and six pieces. A last piece that does it in the
    kernel before needs a fence, a counter and a load, one behind the other while weights keep the memory busy: 4.6 us.
    """
    _launch_next(PDL)
    first = tl.program_id(0) * W
    row = first + tl.arange(0, W)
    head = tl.arange(0, HP)[None, :, None]
    place = head * SIZE + tl.arange(0, SIZE)[None, None, :]
    real = head < H
    there = w + row.to(tl.int64)[:, None, None] * (H * SIZE) + place
    weights = tl.load(there, mask=real, other=0, eviction_policy="evict_first")
    _, pieces = _pieces(tl.load(lengths).to(tl.int32), SPLITS, BS)
    _wait(PDL)
    before = tl.load(stream + row).to(tl.float32)
    high = tl.full((1, HP, 1), float("-inf"), tl.float32)
    total = tl.zeros((1, HP, 1), tl.float32)
    mixed = tl.zeros((1, HP, SIZE), tl.float32)
    for begin in tl.static_range(0, 1 + SPLITS, AT_ONCE):
        if begin <= pieces:
            held = ()
            for piece in tl.static_range(begin, begin + AT_ONCE):
                known = head < tl.where(piece <= pieces, H, 0)
                mass = tl.load(masses + piece * H + head, mask=known, other=float("-inf"))
                held += (mass, tl.load(means + piece * (H * SIZE) + place, mask=known, other=0.0))
            higher = high
            for piece in tl.static_range(AT_ONCE):
                higher = tl.maximum(higher, held[2 * piece])
            higher = tl.where(real, higher, 0.0)
            fade = tl.exp(high - higher)
            total, mixed = total * fade, mixed * fade
            for piece in tl.static_range(AT_ONCE):
                part = tl.exp(held[2 * piece] - higher)
                total += part
                mixed += part * held[2 * piece + 1].to(tl.float32)
            high = higher
    mixed = mixed / tl.where(real, total, 1.0)
    y = tl.sum(tl.sum(weights.to(tl.float32) * mixed, 2), 1)
    if INT8:
        y = y * tl.load(scale + row)
    if BIAS:
        y += tl.load(bias + row).to(tl.float32)
    tl.store(stream + row, (before + y).to(stream.dtype.element_ty))


@triton.jit
def add_linear_kernel(
    x, w, bias, scale, stream,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, MOST: tl.constexpr,
    BIAS: tl.constexpr, INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """stream [N] += w [N, D] x [D] (+ bias)."""
    _launch_next(PDL)
    first = tl.program_id(0) * (W * R)
    tiles = _load_rows(w, first, D, W, R, BK, MOST)
    _wait(PDL)
    before = ()  # asked for together with x
    for r in tl.static_range(R):
        before += (tl.load(stream + first + r * W + tl.arange(0, W)),)
    sums, _ = _dots(tiles, x, x, D, W, R, BK, False)
    for r in tl.static_range(R):
        row = first + r * W + tl.arange(0, W)
        y = sums[r]
        if INT8:
            y = y * tl.load(scale + row)
        if BIAS:
            y += tl.load(bias + row).to(tl.float32)
        tl.store(stream + row, (before[r].to(tl.float32) + y).to(stream.dtype.element_ty))


@triton.jit
def swiglu_kernel(
    x, norm, gate, up, gate_bias, up_bias, gate_scale, up_scale, out, eps,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, MOST: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [F] = silu(gate n) * (up n), n being the normalised x [D]."""
    _launch_next(PDL)
    first = tl.program_id(0) * (W * R)
    tiles = _load_rows(gate, first, D, W, R, BK, MOST) + _load_rows(up, first, D, W, R, BK, MOST)
    _wait(PDL)
    sums, square = _dots(tiles, x, norm, D, W, 2 * R, BK, NORM)
    root = tl.rsqrt(square / D + tl.full((), eps, tl.float32))
    for r in tl.static_range(R):
        row = first + r * W + tl.arange(0, W)
        g, u = sums[r] * root, sums[R + r] * root
        if INT8:
            g = g * tl.load(gate_scale + row)
            u = u * tl.load(up_scale + row)
        if BIAS:
            g += tl.load(gate_bias + row).to(tl.float32)
            u += tl.load(up_bias + row).to(tl.float32)
        tl.store(out + row, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["vocabulary"])
def head_kernel(
    x, norm, w, scale, forbidden, logits, best, where, eps, cap, vocabulary,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, MOST: tl.constexpr,
    NORM: tl.constexpr, CAP: tl.constexpr, INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits float32 [V] of the normalised x, and of each W R the likeliest that is not forbidden (int8 [V])."""
    _launch_next(PDL)
    first = tl.program_id(0) * (W * R)
    first = tl.minimum(first, vocabulary - W * R)  # the last program may do some rows again
    tiles = _load_rows(w, first, D, W, R, BK, MOST)
    _wait(PDL)
    sums, square = _dots(tiles, x, norm, D, W, R, BK, NORM)
    root = tl.rsqrt(square / D + tl.full((), eps, tl.float32))
    high = tl.full((W,), float("-inf"), tl.float32)
    spot = first + tl.arange(0, W)
    for r in tl.static_range(R):
        row = first + r * W + tl.arange(0, W)
        y = sums[r] * root
        if INT8:
            y = y * tl.load(scale + row)
        # Rounded as the head of the plain path rounds it, so that both have the same ties.
        if not _INTERPRETED:
            y = y.to(x.dtype.element_ty).to(tl.float32)
        if CAP:
            limit = tl.full((), cap, tl.float32)
            y = limit * (2 * tl.sigmoid(2 * y / limit) - 1)
        tl.store(logits + row, y)
        y = tl.where(tl.load(forbidden + row) != 0, float("-inf"), y)
        y = tl.where(y == y, y, float("inf"))  # a NaN must not hide
        spot = tl.where(y > high, row, spot)
        high = tl.maximum(high, y)
    top = tl.max(high, 0)
    tl.store(best + tl.program_id(0), top)
    tl.store(where + tl.program_id(0), tl.min(tl.where(high == top, spot, vocabulary), 0))


@triton.jit(do_not_specialize=["count"])
def pick_kernel(
    best, where, tokens, chosen, lengths, produced, active, count,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The likeliest token of all (the first of equals; -1 if it is not finite), and everything one step further."""
    _launch_next(PDL)
    going, length, written = tl.load(active), tl.load(lengths), tl.load(produced)
    _wait(PDL)
    each = tl.arange(0, BLOCK)
    top, entry, at = float("-inf"), 0, 0
    while at < count:
        value = tl.load(best + at + each, mask=at + each < count, other=float("-inf"))
        here = tl.max(value, 0)
        entry = tl.where(here > top, tl.min(tl.where(value == here, at + each, count - 1), 0), entry)
        top = tl.maximum(top, here)
        at += BLOCK
    token = tl.load(where + entry)
    finite = (top < float("inf")) & (top > float("-inf"))
    tl.store(chosen, tl.where(finite, token, -1).to(tl.int64))
    tl.store(tokens, tl.where(finite, token, 0).to(tl.int64))
    tl.store(lengths, length + going)
    tl.store(produced, written + going)
