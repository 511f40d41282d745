"""The Triton kernels of attention, decoding and Newton-Schulz: under the interpreter on a CPU, as compiled on a GPU."""

import math
import os
import subprocess
import sys

import pytest
import torch

import ghostvis_kernels as gk
from ghostvis_kernels.attention import attention_reference
from ghostvis_kernels.attention_decode import _op as decode_op
from ghostvis_kernels.attention_fused import _backward_op, _forward_op, packed_fused
from ghostvis_kernels.newton_schulz import _op as newton_schulz_op

START = """
import math, os, torch
torch.manual_seed({seed})
def error(found, truth):
    return (torch.linalg.vector_norm(found.double() - truth) / torch.linalg.vector_norm(truth)).item()
"""

PACKED = """
from ghostvis_kernels import attention_packed_triton as kernels
from ghostvis_kernels.attention import attention_reference
kernels.SINGLE = kernels.Tile(16, 32, 4, 1)
lengths = (13, 1, 0, 1, 30)
ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
for causal, window, softcap, size, tma in (
    (True, 0, 0.0, 16, True), (False, 20, 2.0, 16, False), (True, 20, 0.0, 24, True)
):
    kernels._has_tma = lambda device, tma=tma: tma
    mixed = torch.randn(sum(lengths), 8, size)
    q, k, v = mixed.split([4, 2, 2], 1)  # views of one projection
    grad = torch.randn(sum(lengths), 4, size)
    found = kernels.forward(q, k, v, ends, causal, window, softcap, 0.3)
    grads = kernels.backward(grad, q, k, v, ends, *found, causal, window, softcap, 0.3)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    truth = attention_reference(*leaves, causal, window or None, ends, softcap, 0.3)
    wanted = [truth, *torch.autograd.grad(truth, leaves, grad.double())]
    for name, a, b in zip(("out", "dq", "dk", "dv"), (found[0], *grads), wanted):
        assert error(a, b.detach()) < 2e-6, (name, causal, window, softcap, size, tma, error(a, b.detach()))
print("packed")
"""

DECODE = """
from ghostvis_kernels import attention_decode_triton as kernels
from ghostvis_kernels.attention_decode import decode_reference
kernels.PIECE, kernels.LONGEST, kernels.CUT = 16, 64, 32
for rows, new, heads, kv_heads, size, room, window, multiprocessors in (
    (3, 1, 4, 2, 16, 150, 0, 2),  # more rows than multiprocessors, of different length: long ones are cut
    (2, 1, 4, 2, 16, 150, 0, 2),  # of equal length: left whole
    (2, 3, 6, 2, 24, 97, 5, 9), (1, 1, 4, 1, 16, 150, 0, 9), (2, 17, 3, 3, 16, 60, 0, 9)
):
    kernels._multiprocessors = lambda device: multiprocessors
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        q, k, v = (torch.randn(rows, new, n, size).to(dtype) for n in (heads, kv_heads, kv_heads))
        lengths = torch.randint(0, room - new, (rows,))
        lengths[0] = 0 if rows == 3 else room - new - 1
        lengths[1:] = lengths[0] if multiprocessors == 2 and rows == 2 else lengths[1:]
        caches = [torch.full((rows, room, kv_heads, size), math.nan, dtype=dtype) for _ in range(2)]
        for row, length in enumerate(lengths.tolist()):
            for cache in caches:
                cache[row, :length] = torch.randn(length, kv_heads, size).to(dtype)
        before = [cache.clone() for cache in caches]
        found = kernels.decode(q, *caches, lengths, k, v, window, 0.3)
        again = kernels.decode(q, *caches, lengths, None, None, window, 0.3)
        assert error(found, again.double()) < bound, "keys already in the cache"
        place = lengths[:, None] + torch.arange(new)
        for cache, old, fresh in zip(caches, before, (k, v)):
            old[torch.arange(rows)[:, None], place] = fresh
            assert torch.equal(cache.nan_to_num(9.0), old.nan_to_num(9.0)), "the new tokens and no others"
        plain = [cache.nan_to_num().double() for cache in caches]
        truth = decode_reference(q.double(), *plain, lengths, None, None, window, 0.3)
        assert error(found, truth) < bound, (rows, new, window, dtype, error(found, truth))
print("decode")
"""

NEWTON_SCHULZ = """
from ghostvis_kernels import newton_schulz_triton as kernels
kernels.BY_TMA, kernels.BY_POINTER, kernels.BLOCK = kernels.Tile(32, 16, 4, 3), kernels.Tile(16, 16, 4, 3), 512
for shape in ((2, 40, 72), (1, 72, 40), (1, 33, 47), (1, 47, 33)):
    tall = shape[1] > shape[2]
    x = torch.randn(shape)
    truth = (x.mT @ x if tall else x @ x.mT).double()
    out = torch.empty_like(truth, dtype=torch.float32)
    kernels.symmetric_product(x, None, out, tall)
    torch.testing.assert_close(out, out.mT, rtol=1e-6, atol=1e-5)
    assert error(out, truth) < 1e-6
    again = torch.empty_like(out)
    kernels.symmetric_product(out, out, again, False, 0.5, 2.0, 3.0)
    wanted = 0.5 * truth @ truth + 2 * truth + 3 * torch.eye(truth.shape[1]).double()
    assert error(again, wanted) < 1e-6
    norm = torch.linalg.vector_norm(x.double(), dim=(1, 2), keepdim=True)
    assert error(kernels._normalised(x), x.double() / (norm * 1.02)) < 6e-3  # the interpreter truncates to bf16
g = torch.randn(2, 24, 40)
from ghostvis_kernels.newton_schulz import newton_schulz_reference
assert error(kernels.newton_schulz(g, 5), newton_schulz_reference(g.double(), 5, torch.float64)) < 2e-2
print("newton_schulz")
"""


@pytest.mark.usefixtures("interpreter")
def test_kernels_match_float64_under_the_interpreter(rng):
    code = START.format(seed=rng.initial_seed()) + PACKED + DECODE + NEWTON_SCHULZ  # one process: torch takes seconds
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["packed", "decode", "newton_schulz"], found.stderr


def test_the_operators_pass_opcheck(normal):
    checks = ("test_schema", "test_faketensor")
    q, k, v = (normal(9, n, 8, grad=False) for n in (4, 2, 2))
    ends = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    options = (True, 3, 2.0, 0.5)
    torch.library.opcheck(_forward_op, (q, k, v, ends, *options), test_utils=checks)
    found = _forward_op(q, k, v, ends, *options)
    torch.library.opcheck(_backward_op, (q, q, k, v, ends, *found, *options), test_utils=checks)
    caches = [torch.zeros(2, 6, 2, 8) for _ in range(2)]
    new = [normal(2, 1, n, 8, grad=False) for n in (4, 2, 2)]
    inputs = (new[0], *caches, torch.tensor([0, 3]), *new[1:], 0, 0.5)
    torch.library.opcheck(decode_op, inputs, test_utils=checks)
    torch.library.opcheck(newton_schulz_op, (normal(2, 7, 5, grad=False), 5), test_utils=checks)


def test_the_meaning_of_the_packed_operator_is_that_of_attention(normal, assert_as_good_as_torch):
    lengths = (5, 0, 12, 1)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = [normal(sum(lengths), n, 8) for n in (4, 2, 2)]
    for causal, window, softcap in ((True, 0, 0.0), (False, 4, 3.0)):

        def ours(q, k, v, causal=causal, window=window, softcap=softcap):
            return packed_fused(q, k, v, ends, causal, window, softcap, 0.4)

        def reference(q, k, v, causal=causal, window=window, softcap=softcap):
            return attention_reference(q, k, v, causal, window or None, ends, softcap, 0.4)

        assert_as_good_as_torch(ours, reference, reference, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(300, 1, 0, 129, 514), (7,), (256, 256)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 15.0, "window": 70}], ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_packed_attention_on_a_gpu_matches_float64(normal, assert_as_good_as_torch, dtype, lengths, options, size):
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    inputs = [normal(sum(lengths), n, size, device="cuda", dtype=dtype) for n in (6, 2, 2)]
    for causal in (True, False):

        def ours(q, k, v, causal=causal):
            return gk.attention(q, k, v, causal=causal, cu_seqlens=ends, max_seqlen=max(lengths), **options)

        def reference(q, k, v, causal=causal):
            return attention_reference(q, k, v, causal=causal, cu_seqlens=ends, **options)

        def in_its_dtype(q, k, v, causal=causal):  # probabilities rounded to the dtype, as torch does it
            value = v.movedim(1, 0).repeat_interleave(3, 0)
            ones = torch.eye(sum(lengths), device="cuda", dtype=dtype)[:, None].expand(-1, 2, -1)
            scores = attention_reference(q.float(), k.float(), ones.float(), causal=causal, cu_seqlens=ends, **options)
            return (scores.movedim(1, 0).to(dtype) @ value).movedim(0, 1)

        assert_as_good_as_torch(ours, reference, in_its_dtype, inputs)


@pytest.mark.gpu
def test_dense_attention_with_window_and_softcap_runs_in_our_kernels(normal, error):
    q, k, v = (normal(2, 700, n, 64, device="cuda", dtype=torch.bfloat16, grad=False) for n in (4, 2, 2))
    for options in ({"window": 33}, {"softcap": 20.0}, {"window": 50, "softcap": 5.0}):
        found = gk.attention(q, k, v, **options)
        assert torch.equal(found, gk.attention(q, k, v, backend="triton", **options))
        assert error(found, attention_reference(q.double(), k.double(), v.double(), **options)) < 5e-3


@pytest.mark.gpu
def test_two_packed_backwards_are_equal_bit_for_bit(normal):
    ends = torch.tensor([0, 300, 1000], device="cuda", dtype=torch.int32)
    q, k, v = (normal(1000, n, 128, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
    out = gk.attention(q, k, v, cu_seqlens=ends, max_seqlen=700)
    first, second = (torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Places of queries, places of keys (where others), heads of both, their size, options.
SAME_BITS = {
    "large": ((8, 2048), None, (10, 5), 128, {}),
    "odd": ((3, 777), None, (6, 2), 80, {"causal": False}),
    "short": ((64, 33), None, (4, 4), 64, {}),
    "cross": ((9, 64), (9, 576), (8, 8), 64, {"causal": False}),
    "whole": ((8192,), None, (10, 5), 128, {"lengths": [1024] * 8}),
    "ragged": ((2842,), None, (6, 3), 128, {"lengths": [2000, 1, 0, 777, 64]}),
    "window": ((2, 1500), None, (4, 2), 64, {"window": 100}),
    "softcap": ((2, 700), None, (4, 2), 256, {"softcap": 15.0}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SAME_BITS)
def test_gradients_are_the_same_bits_each_time_where_torch_is_asked_for_that(normal, deterministic, error, case, dtype):
    rows, columns, (heads, kv_heads), size, options = SAME_BITS[case]
    q = normal(*rows, heads, size, device="cuda", dtype=dtype)
    k, v = (normal(*(columns or rows), kv_heads, size, device="cuda", dtype=dtype) for _ in range(2))
    options = dict(options)
    if lengths := options.pop("lengths", None):
        ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        options |= {"cu_seqlens": ends, "max_seqlen": max(lengths)}
    seed = torch.randn_like(q)

    def found():
        out = gk.attention(q, k, v, **options)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), seed)]

    usual = found()
    # Where our kernels fit, also with warn_only, which leaves cuDNN in its place and flash as it is.
    deterministic(warn_only=case != "cross" and dtype != torch.float32)
    first = found()
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(first, found(), strict=True))
    assert all(error(a, b) < 1e-2 for a, b in zip(first, usual, strict=True))


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
def test_long_rows_are_cut_into_full_waves_of_programs(multiprocessors):
    pytest.importorskip("triton")
    from ghostvis_kernels.attention_decode_triton import PIECE, _pieces

    for pairs in (1, 2, 5, 8, 40, 80, 128, 320, 512, 1000):
        pieces = _pieces(pairs, 65536, multiprocessors)
        waves = pairs * pieces / multiprocessors
        assert waves / math.ceil(waves) >= 0.9 or pieces == 128
        for room in (1, 100, 300, 4096):
            assert 1 <= _pieces(pairs, room, multiprocessors) <= max(1, room // PIECE)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(10, 5, 128), (12, 2, 128), (7, 7, 80), (32, 1, 64), (16, 8, 16)], ids=str)
def test_decoding_follows_ragged_lengths_in_one_cuda_graph(normal, error, shape):
    heads, kv_heads, size = shape
    rows, room, steps = 3, 3000, 6
    lengths = torch.tensor([0, 2900, 1234], device="cuda")
    caches = [normal(rows, room, kv_heads, size, device="cuda", dtype=torch.bfloat16, grad=False) for _ in range(2)]
    q, k, v = (
        normal(rows, 1, n, size, device="cuda", dtype=torch.bfloat16, grad=False) for n in (heads, kv_heads, kv_heads)
    )
    gk.attention_decode(q, *caches, lengths, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gk.attention_decode(q, *caches, lengths, k, v)
    for _ in range(steps):
        for tensor in (q, k, v):
            tensor.normal_()
        graph.replay()
        for row, length in enumerate(lengths.tolist()):
            assert torch.equal(caches[0][row, length], k[row, 0])
            keys, values = (c[row, : length + 1].double().repeat_interleave(heads // kv_heads, 1) for c in caches)
            scores = torch.einsum("hd,shd->hs", q[row, 0].double(), keys) / math.sqrt(size)
            truth = torch.einsum("hs,shd->hd", scores.softmax(-1), values)
            assert error(out[row, 0], truth) < 6e-3
        lengths += 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths",
    [[8999] + [40] * 15, [8999] * 16, [600 * n for n in range(15)] + [8999], [599 - n for n in range(64)]],
    ids=["one long", "equal", "spread", "many"],
)
def test_decoding_cuts_long_rows_where_others_are_short(error, lengths):
    rows, room, kv_heads = len(lengths), max(lengths) + 1, 8
    caches = [torch.randn(rows, room, kv_heads, 128, device="cuda").bfloat16() for _ in range(2)]
    q, k, v = (torch.randn(rows, 1, n, 128, device="cuda").bfloat16() for n in (2 * kv_heads, kv_heads, kv_heads))
    out = gk.attention_decode(q, *caches, torch.tensor(lengths, device="cuda"), k, v)
    for row in (0, 1, rows - 1):
        keys, values = (c[row, : lengths[row] + 1].double().repeat_interleave(2, 1) for c in caches)
        assert torch.equal(caches[1][row, lengths[row]], v[row, 0])
        weights = (torch.einsum("hd,shd->hs", q[row, 0].double(), keys) / math.sqrt(128)).softmax(-1)
        assert error(out[row, 0], torch.einsum("hs,shd->hd", weights, values)) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 640, 640), (2, 512, 1280), (2, 1280, 512), (2, 257, 391)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_newton_schulz_on_a_gpu_is_as_exact_as_the_plain_loop(normal, error, shape, dtype):
    # The module's, because `gk.newton_schulz` takes plain torch at such sizes.
    from ghostvis_kernels.newton_schulz import newton_schulz_reference
    from ghostvis_kernels.newton_schulz_triton import newton_schulz

    g = normal(*shape, device="cuda", dtype=dtype, grad=False)
    truth = newton_schulz_reference(g.double(), 5, torch.float64)
    plain = error(newton_schulz_reference(g, 5, torch.bfloat16), truth)
    assert error(newton_schulz(g, 5), truth) < 1.2 * plain
    assert torch.equal(newton_schulz(g, 5), newton_schulz(g, 5))
