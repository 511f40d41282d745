"""attention and attention_decode against explicit scores in float64, and packed documents against each alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ghostvis_kernels as gk
from ghostvis_kernels.attention import attention_reference, visible
from ghostvis_kernels.attention_packed import FILL, SHORT, _plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def heads(normal, *lead, query=4, key=2, size=16, device="cpu", dtype=torch.float32):
    return [normal(*lead, n, size, device=device, dtype=dtype) for n in (query, key, key)]


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"scale": 0.5}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_attention_matches_float64(normal, assert_as_good_as_torch, device, dtype, causal, options, packed):
    lengths = (13, 1, 1, 6, 40, 0, 38)
    if packed:
        inputs = heads(normal, sum(lengths), device=device, dtype=dtype)
        where = {"cu_seqlens": boundaries(lengths, device)}
    else:
        inputs = heads(normal, 2, 19, device=device, dtype=dtype)
        where = {}

    def ours(q, k, v):
        return gk.attention(q, k, v, causal=causal, max_seqlen=40 if packed else None, **where, **options)

    def reference(q, k, v):
        return attention_reference(q, k, v, causal=causal, **where, **options)

    def in_its_dtype(q, k, v):  # probabilities rounded to the dtype, as torch does it
        key, value = (t.movedim(-2, -3).repeat_interleave(2, -3) for t in (k, v))
        scores = (q.movedim(-2, -3) @ key.mT).float() * options.get("scale", 0.25)
        if "softcap" in options:
            scores = 2 * torch.tanh(scores / 2)
        mask = visible(q.shape[-3], k.shape[-3], causal, options.get("window"), where.get("cu_seqlens"), q.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1).to(q.dtype) @ value).movedim(-3, -2)

    assert_as_good_as_torch(ours, reference, in_its_dtype, inputs)


def test_cross_attention_over_more_keys_than_queries_matches_float64(normal, assert_as_good_as_torch, device):
    q = normal(2, 5, 6, 8, device=device)
    k, v = (normal(2, 31, 3, 8, device=device) for _ in range(2))

    def reference(q, k, v):
        return attention_reference(q, k, v, causal=False)

    assert_as_good_as_torch(lambda q, k, v: gk.attention(q, k, v, causal=False), reference, reference, [q, k, v])


def test_strided_heads_of_one_projection_equal_contiguous_heads(normal, device):
    packed = normal(2, 9, (4 + 2 + 2) * 16, device=device, grad=False).view(2, 9, 8, 16)
    views = packed.split([4, 2, 2], dim=2)
    torch.testing.assert_close(gk.attention(*views), gk.attention(*(t.contiguous() for t in views)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.one_of(st.integers(0, 6), st.integers(1, 90)), min_size=1, max_size=12), causal=st.booleans()
)
def test_a_packed_document_has_the_values_and_gradients_it_has_alone(normal, outputs_and_gradients, lengths, causal):
    q, k, v = heads(normal, sum(lengths), size=8)
    ends = boundaries(lengths)
    found, (seed,) = outputs_and_gradients(
        lambda q, k, v: gk.attention(q, k, v, causal=causal, cu_seqlens=ends, max_seqlen=max(lengths)), [q, k, v]
    )
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if start == stop:
            continue
        alone = [t.detach()[None, start:stop].requires_grad_() for t in (q, k, v)]
        wanted, _ = outputs_and_gradients(
            lambda q, k, v: gk.attention(q, k, v, causal=causal), alone, [seed[None, start:stop]]
        )
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f[start:stop], w[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_of_a_document_reaches_another_not_even_nan(normal, causal):
    lengths = (5, 33, 50, 49)
    q, k, v = (t.detach() for t in heads(normal, sum(lengths)))
    poisoned = [t.clone() for t in (q, k, v)]
    for t in poisoned:
        t[5:38] = float("nan")
    clean, dirty = (
        gk.attention(*inputs, causal=causal, cu_seqlens=boundaries(lengths), max_seqlen=50)
        for inputs in ((q, k, v), poisoned)
    )
    for part in (slice(0, 5), slice(38, None)):
        torch.testing.assert_close(dirty[part], clean[part], rtol=0, atol=0)


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_padding_keeps_the_cost_near_the_sum_of_squared_lengths(lengths):
    ends = tuple(boundaries(lengths).tolist())
    plan = _plan(ends, ends[-1])
    cost = sum(len(b.lengths) * b.width**2 for b in plan.buckets)
    assert cost <= sum(max(n, SHORT) ** 2 for n in lengths) / FILL**2
    assert torch.equal(plan.source[plan.slot], torch.arange(ends[-1]))


def test_autocast_runs_attention_in_bf16(normal, device):
    with torch.autocast(device, dtype=torch.bfloat16):
        assert gk.attention(*heads(normal, 1, 8, device=device)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_decoding_rows_of_different_length_equals_full_attention(normal, device, dtype, window):
    prompts, steps = [7, 1, 12], [1, 3, 1, 2]
    total = max(prompts) + sum(steps)
    q, k, v = (t.detach() for t in heads(normal, 3, total, device=device, dtype=dtype))
    full = gk.attention(q.float(), k.float(), v.float(), window=window)
    k_cache, v_cache = (torch.full((3, total + 5, 2, 16), 9.0, device=device, dtype=dtype) for _ in range(2))
    for row, length in enumerate(prompts):
        k_cache[row, :length], v_cache[row, :length] = k[row, :length], v[row, :length]
    lengths = torch.tensor(prompts, dtype=torch.int32, device=device)
    for new in steps:
        index = lengths[:, None].long() + torch.arange(new, device=device)
        rows = torch.arange(3, device=device)[:, None]
        out = gk.attention_decode(
            q[rows, index], k_cache, v_cache, lengths, k[rows, index], v[rows, index], window=window
        )
        assert torch.equal(k_cache[rows, index], k[rows, index])
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.float(), full[rows, index], rtol=tolerance, atol=tolerance)
        lengths = lengths + new


def test_decoding_with_keys_already_in_the_cache_equals_writing_them(normal):
    q, k, v = (t.detach() for t in heads(normal, 2, 3))
    caches = [torch.randn(2, 9, 2, 16) for _ in range(2)]
    lengths = torch.tensor([4, 6])
    written = gk.attention_decode(q, *caches, lengths, k, v)
    torch.testing.assert_close(gk.attention_decode(q, *caches, lengths), written, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "causal"),
    [((3, 9, 36, 2, 2, 64), False), ((2, 200, 200, 6, 2, 128), True), ((2, 1024, 1024, 6, 3, 128), True)],
    ids=["small cross", "small", "large"],
)
def test_small_and_large_batches_match_float64_on_a_gpu(normal, assert_as_good_as_torch, error, dtype, shape, causal):
    batch, tokens, keys, query_heads, kv_heads, size = shape
    q = normal(batch, tokens, query_heads, size, device="cuda", dtype=dtype)
    k, v = (normal(batch, keys, kv_heads, size, device="cuda", dtype=dtype) for _ in range(2))

    def reference(q, k, v):
        return attention_reference(q, k, v, causal=causal)

    def in_its_dtype(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    assert_as_good_as_torch(lambda q, k, v: gk.attention(q, k, v, causal=causal), reference, in_its_dtype, [q, k, v])
    with torch.no_grad():
        found = gk.attention(q, k, v, causal=causal)
    assert error(found, reference(q.double(), k.double(), v.double())) < 5e-3


@pytest.mark.gpu
def test_decoding_and_the_head_run_without_waiting_for_the_device(normal, rng):
    q, k, v = (t.detach() for t in heads(normal, 2, 1, device="cuda", dtype=torch.bfloat16))
    caches = [torch.zeros(2, 64, 2, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    lengths = torch.tensor([4, 6], device="cuda")
    x, weight = normal(64, 16, device="cuda"), normal(100, 16, device="cuda")
    target = torch.randint(0, 100, (64,), generator=rng).cuda()
    for _ in range(2):  # the first round loads libraries
        torch.cuda.set_sync_debug_mode("error")
        try:
            gk.attention_decode(q, *caches, lengths, k, v)
            gk.linear_cross_entropy(x, weight, target, softcap=15.0).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_decoding_replays_in_a_cuda_graph(normal):
    q, k, v = (t.detach() for t in heads(normal, 2, 1, device="cuda", dtype=torch.bfloat16))
    caches = [torch.zeros(2, 64, 2, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    lengths = torch.tensor([4, 6], device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gk.attention_decode(q, *caches, lengths, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gk.attention_decode(q, *caches, lengths, k, v)
    lengths.add_(20)
    graph.replay()
    torch.testing.assert_close(out, gk.attention_decode(q, *(c.clone() for c in caches), lengths, k, v))


def test_backends_say_what_runs_and_why():
    found = gk.backends()
    assert "attention" in found
    assert all(isinstance(reason, str) and reason for reason in found.values())


Q = torch.ones(2, 5, 4, 8)
P = torch.ones(6, 4, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gk.attention(Q, Q[:, :, :3], Q[:, :, :3]), r"q has H=4 heads, k has K=3; K must divide H"),
        (lambda: gk.attention(Q, Q[:, :4], Q[:, :4]), r"equally many unless causal=False"),
        (lambda: gk.attention(Q, Q, Q, backend="fa9"), r"backend is 'fa9'; expected one of"),
        (lambda: gk.attention(Q, Q, Q, window=0), r"window is 0; expected at least 1"),
        (lambda: gk.attention(Q, Q, Q, backend="flash_attn"), r"backend='flash_attn' needs"),
        (lambda: gk.attention(Q, Q.bfloat16(), Q), r"q is torch.float32, k torch.bfloat16"),
        (
            lambda: gk.attention(P, P, P, cu_seqlens=torch.tensor([0, 6])),
            r"cu_seqlens is \(2,\) torch.int64.*torch.int32",
        ),
        (lambda: gk.attention(P, P, P, cu_seqlens=boundaries([2, 3])), r"cu_seqlens runs .* over N=6 tokens"),
        (lambda: gk.attention(P, P, P), r"expected \(B, T, H, h\)"),
        (lambda: gk.attention_decode(Q, Q, Q, torch.tensor([0, 1])), r"holds 1 tokens and gets 5 more.*S=5"),
        (lambda: gk.attention(Q, Q.to("meta"), Q), r"attention: q is on cpu, k on meta, v on cpu"),
        (lambda: gk.attention(Q.int(), Q.int(), Q.int()), r"attention: q is torch.int32; expected floating"),
        (lambda: gk.attention_decode(Q, Q, Q, torch.tensor([0, 0]), Q), r"one of k and v is None"),
        (lambda: gk.attention_decode(Q, Q, Q, torch.tensor([0, 0]), window=0), r"window is 0; expected at least 1"),
        (lambda: gk.attention_decode(Q, Q, Q, torch.zeros(2).long().to("meta")), r"cache_len is on meta but q is on"),
        (
            lambda: gk.attention_decode(Q, Q, Q, torch.tensor([0, 0]), Q.half(), Q),
            r"q is torch.float32 but k torch.float16; expected one dtype",
        ),
    ],
)
def test_errors_name_the_argument_and_both_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
