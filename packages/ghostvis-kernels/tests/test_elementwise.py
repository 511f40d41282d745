"""rms_norm, add_rms_norm, rope, qk_norm_rope, swiglu, relu2 against float64."""

import pytest
import torch
import torch.nn.functional as F

import ghostvis_kernels as gk
from ghostvis_kernels.rms_norm import rms_norm_reference
from ghostvis_kernels.rope import rope_reference
from ghostvis_kernels.swiglu import swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 123), (127, 123), (2, 3, 128), (5, 1280)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_and_its_gradients_match_float64(normal, device, dtype, shape, zero_centered, assert_as_good_as_torch):
    x = normal(*shape, device=device, dtype=dtype).detach()
    x = (x + x.sign()).requires_grad_()  # away from zero: at width 1 a rounding error there is as large as 1 / x
    weight = normal(shape[-1], device=device, dtype=dtype)
    assert_as_good_as_torch(
        lambda x, w: gk.rms_norm(x, w, zero_centered=zero_centered),
        lambda x, w: rms_norm_reference(x, w, 1e-6, zero_centered),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w + 1 if zero_centered else w, 1e-6),
        [x, weight],
        floor=1.0,  # at width 1 the gradient of x is zero but for eps
    )


def test_rms_norm_without_weight_and_over_strided_input_matches_float64(normal, device, assert_as_good_as_torch):
    base = normal(6, 4, 3, 16, device=device)

    def through(norm):
        return lambda base: norm(base.transpose(1, 2)[:, 1:, :, ::2])

    assert_as_good_as_torch(
        through(gk.rms_norm), through(rms_norm_reference), through(lambda x: F.rms_norm(x, (8,), None, 1e-6)), [base]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(70001, 1280), (4099, 8192), (513, 16384), (33, 20000), (70001, 123), (1, 2048)], ids=str
)
def test_norms_of_huge_and_odd_shapes_match_float64_on_cuda(normal, dtype, shape, assert_as_good_as_torch):
    x, weight = normal(*shape, device="cuda", dtype=dtype), normal(shape[-1], device="cuda", dtype=dtype)
    plain = lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)  # noqa: E731
    assert_as_good_as_torch(gk.rms_norm, rms_norm_reference, plain, [x, weight])
    assert_as_good_as_torch(gk.rms_norm, rms_norm_reference, lambda x: F.rms_norm(x, x.shape[-1:], None, 1e-6), [x])
    residual = normal(*shape, device="cuda", dtype=dtype)

    def added(norm):
        def call(x, residual, weight):
            total = residual + x
            return norm(total, weight), total

        return call

    assert_as_good_as_torch(
        gk.add_rms_norm, added(rms_norm_reference), added(plain), [x, residual, weight]
    )  # fmt: skip


def test_rms_norm_keeps_an_fp32_weight_gradient_in_fp32_under_bf16_input(normal, device):
    x, weight = normal(64, 32, device=device, dtype=torch.bfloat16), normal(32, device=device)
    y = gk.rms_norm(x, weight)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_rms_norm_returns_the_norm_of_the_sum_and_the_sum(
    normal, device, residual_dtype, outputs_and_gradients, error, double
):
    x = normal(7, 40, device=device, dtype=torch.bfloat16)
    residual, weight = normal(7, 40, device=device, dtype=residual_dtype), normal(40, device=device)
    found, seeds = outputs_and_gradients(gk.add_rms_norm, [x, residual, weight])
    assert [t.dtype for t in found] == [torch.bfloat16, residual_dtype, torch.bfloat16, residual_dtype, torch.float32]

    def plain(x, residual, weight):
        total = residual + x
        return rms_norm_reference(total, weight), total

    truth, _ = outputs_and_gradients(
        plain, [t.detach().double().requires_grad_() for t in (x, residual, weight)], seeds
    )
    assert max(error(f, t) for f, t in zip(found, truth, strict=True)) < 1e-2


def tables(positions, half, device="cpu"):
    angle = torch.arange(positions)[:, None] * 100.0 ** (-torch.arange(half) / half)
    return angle.cos().to(device), angle.sin().to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_with_and_without_norm_matches_float64(
    normal, rng, device, dtype, interleaved, norm, assert_as_good_as_torch
):
    tokens, half = 9, 6
    cos, sin = tables(50, half, device)
    position_ids = torch.randint(0, 50, (2, tokens), generator=rng).to(device)
    q, k = (normal(2, tokens, heads, 2 * half, device=device, dtype=dtype) for heads in (4, 2))
    q_weight, k_weight = (normal(2 * half, device=device, dtype=dtype, grad=norm) for _ in range(2))

    def reference(q, k, q_weight, k_weight):
        if norm:
            q, k = rms_norm_reference(q, q_weight), rms_norm_reference(k, k_weight)
        c, s = (t[position_ids].unsqueeze(-2) for t in (cos, sin))
        return rope_reference(q, c, s, interleaved), rope_reference(k, c, s, interleaved)

    def ours(q, k, q_weight, k_weight):
        if norm:
            return gk.qk_norm_rope(q, k, cos, sin, q_weight, k_weight, 1e-6, position_ids, interleaved)
        return gk.rope(q, k, cos, sin, position_ids, interleaved)

    inputs = [q, k, q_weight, k_weight]
    assert_as_good_as_torch(ours, reference, reference, inputs)


def test_rope_at_default_positions_equals_the_half_split_formula(normal):
    cos, sin = tables(20, 4)
    q, k = normal(11, 3, 8), normal(11, 1, 8)
    turned, _ = gk.rope(q, k, cos, sin)
    c, s = (torch.cat((t[:11], t[:11]), -1)[:, None] for t in (cos, sin))
    rotated = torch.cat((-q[..., 4:], q[..., :4]), -1)
    torch.testing.assert_close(turned, q * c + rotated * s)


def test_rope_scores_depend_on_distance_alone(normal):
    cos, sin = tables(40, 8)
    q, k = normal(1, 1, 16), normal(1, 1, 16)
    scores = []
    for shift in (0, 17):
        a, _ = gk.rope(q, k, cos, sin, position_ids=torch.tensor([5 + shift]))
        _, b = gk.rope(q, k, cos, sin, position_ids=torch.tensor([2 + shift]))
        scores.append((a * b).sum())
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_and_relu2_match_float64(normal, device, dtype, shape, assert_as_good_as_torch):
    gate, up = normal(*shape, device=device, dtype=dtype), normal(*shape, device=device, dtype=dtype)
    # floor: below 6e-5 fp16 has fewer bits
    assert_as_good_as_torch(gk.swiglu, swiglu_reference, lambda g, u: F.silu(g) * u, [gate, up], floor=0.1)
    square = lambda x: x.clamp_min(0) ** 2  # noqa: E731
    assert_as_good_as_torch(gk.relu2, square, square, [gate], floor=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_packed_equals_swiglu_of_the_halves(normal, dtype, outputs_and_gradients):
    packed = normal(6, 10, 2 * 17, dtype=dtype)
    found, seeds = outputs_and_gradients(gk.swiglu_packed, [packed])
    halves, _ = outputs_and_gradients(lambda p: gk.swiglu(p[..., :17], p[..., 17:]), [packed], seeds)
    for f, h in zip(found, halves, strict=True):
        torch.testing.assert_close(f, h, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "size"), [(70001, (10, 5), 128), (4097, (12, 2), 64), (1, (3, 1), 256)])
def test_qk_norm_rope_of_many_tokens_matches_float64_on_cuda(
    normal, rng, dtype, tokens, heads, size, assert_as_good_as_torch
):
    cos, sin = tables(4096, size // 2, "cuda")
    position_ids = torch.randint(0, 4096, (tokens,), generator=rng).cuda()
    packed = normal(tokens, sum(heads) + heads[1], size, device="cuda", dtype=dtype)  # as one projection leaves it
    weights = [normal(size, device="cuda", dtype=dtype) for _ in range(2)]

    def split(packed):
        return packed[:, : heads[0]], packed[:, heads[0] : sum(heads)]

    def reference(packed, q_weight, k_weight):
        c, s = (t[position_ids].unsqueeze(-2) for t in (cos, sin))
        normed = (rms_norm_reference(t, w) for t, w in zip(split(packed), (q_weight, k_weight), strict=True))
        return tuple(rope_reference(t, c, s) for t in normed)

    assert_as_good_as_torch(
        lambda packed, *w: gk.qk_norm_rope(*split(packed), cos, sin, *w, 1e-6, position_ids), reference, reference,
        [packed, *weights],
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_huge_shapes_match_float64_on_cuda(normal, dtype, assert_as_good_as_torch):
    gate_up = normal(70001, 2 * 1280, device="cuda", dtype=dtype)
    plain = lambda p: F.silu(p[:, :1280]) * p[:, 1280:]  # noqa: E731
    assert_as_good_as_torch(gk.swiglu_packed, plain, plain, [gate_up], floor=0.1)
    square = lambda x: x.clamp_min(0) ** 2  # noqa: E731
    assert_as_good_as_torch(gk.relu2, square, square, [gate_up], floor=0.1)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_are_all_reached():
    x = torch.full((2**20 + 3, 2048), 2.0, device="cuda", dtype=torch.bfloat16)
    assert bool((gk.relu2(x)[-3:] == 4).all())
    assert bool((gk.rms_norm(x)[-3:] == 1).all())
    assert bool((gk.swiglu_packed(x)[-3:] == gk.swiglu_packed(x)[0, 0]).all())


@pytest.mark.gpu
def test_a_search_finds_a_tile_that_gives_the_same_gradients(normal, monkeypatch):
    from ghostvis_kernels import rms_norm_triton, tuning

    x, weight, grad = (
        normal(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((512, 640), (640,), (512, 640))
    )
    expected = torch.autograd.grad(gk.rms_norm(x, weight), (x, weight), grad)
    few = [rms_norm_triton.Tile(256, 1, 1, 1, 8), rms_norm_triton.Tile(256, 2, 2, 2, 4)]
    monkeypatch.setattr(rms_norm_triton, "persistent_tiles", lambda width: iter(few))
    monkeypatch.setattr(tuning, "found", {})
    monkeypatch.setenv("GHOSTVIS_KERNELS_SEARCH", "1")
    found = torch.autograd.grad(gk.rms_norm(x, weight), (x, weight), grad)
    ((tile, ms),) = tuning.found.values()
    assert tile in few
    assert ms > 0
    torch.testing.assert_close(found[0], expected[0])  # to the last bit but one: columns are summed in another order,
    torch.testing.assert_close(found[1], expected[1], rtol=1e-2, atol=1e-2)  # and so are rows


def test_a_search_is_asked_for_by_0_or_1(monkeypatch):
    tuning = pytest.importorskip("ghostvis_kernels.tuning")
    assert not tuning.searches()
    monkeypatch.setenv("GHOSTVIS_KERNELS_SEARCH", "yes")
    with pytest.raises(ValueError, match=r"GHOSTVIS_KERNELS_SEARCH is 'yes'; expected 0 or 1"):
        tuning.searches()


def test_every_tile_of_the_table_is_among_those_that_a_search_tries():
    kernels = pytest.importorskip("ghostvis_kernels.rms_norm_triton")
    for (_, width), tile in kernels.TILES.items():
        assert tile in set(kernels.persistent_tiles(width)), (width, tile)


def every_op(device):
    """name: (call, inputs) with views of uneven strides among the inputs."""
    cos, sin = tables(6, 8, device)

    def make(*shape):
        return torch.randn(*shape).to(device).requires_grad_()

    def heads(qkv):
        return gk.qk_norm_rope(qkv[:, :, :2], qkv[:, :, 2:3], cos, sin, qkv[0, 0, 3], qkv[0, 0, 4])

    return {
        "rms_norm": (lambda x, w: gk.rms_norm(x[:, :40], w), [make(7, 64), make(40)]),
        "rms_norm of columns": (lambda x: gk.rms_norm(x.t()), [make(40, 7)]),
        "add_rms_norm": (lambda x, r, w: gk.add_rms_norm(x[::2], r, w), [make(10, 40), make(5, 40), make(40)]),
        "rope": (lambda q, k: gk.rope(q.transpose(1, 2), k, cos, sin), [make(2, 3, 6, 16), make(2, 6, 1, 16)]),
        "qk_norm_rope": (heads, [make(2, 6, 5, 16)]),
        "swiglu": (lambda g, u: gk.swiglu(g, u[:, ::2]), [make(9, 20), make(9, 40)]),
        "swiglu_packed": (lambda p: gk.swiglu_packed(p[:, 4:]), [make(9, 44)]),
        "relu2": (lambda x: gk.relu2(x[:, 1:]), [make(9, 20)]),
    }


@pytest.mark.parametrize("name", every_op("cpu"))
def test_backward_can_run_twice_scales_with_its_gradient_and_leaves_all_inputs_alone(name, device):
    call, inputs = every_op(device)[name]
    before = [t.detach().clone() for t in inputs]
    out = call(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    seeds = [torch.randn_like(o) for o in out]
    kept = [s.clone() for s in seeds]
    values = [o.detach().clone() for o in out]
    once = torch.autograd.grad(out, inputs, seeds, retain_graph=True)
    again = torch.autograd.grad(out, inputs, seeds, retain_graph=True)
    scaled = torch.autograd.grad(out, inputs, [4 * s for s in seeds])
    for first, second, four in zip(once, again, scaled, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(four, 4 * first)
    for now, then in zip((*inputs, *seeds, *out), (*before, *kept, *values), strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("name", every_op("cpu"))
def test_strides_do_not_change_a_result(name, device):
    call, inputs = every_op(device)[name]
    found = call(*inputs)
    # The same numbers under other strides: each input as every second element of a larger tensor.
    spread = [torch.stack((t, t), -1)[..., 0].detach().requires_grad_() for t in inputs]
    again = call(*spread)
    for a, b in zip(*((o if isinstance(o, tuple) else (o,)) for o in (found, again)), strict=True):
        torch.testing.assert_close(a, b)  # not bit for bit: the order of a sum follows the width of the loads


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_empty_input_gives_empty_output_and_zero_gradients(normal, device, shape):
    x, weight = normal(*shape, device=device), normal(8, device=device)
    y, total = gk.add_rms_norm(gk.rms_norm(x, weight), x, weight)
    y = gk.swiglu_packed(y) + gk.relu2(total[..., :4])
    heads = total.unflatten(-1, (2, 4))
    q, k = gk.qk_norm_rope(heads, heads, *tables(4, 2, device), weight[:4], weight[4:])
    (y.sum() + q.sum() + k.sum()).backward()
    assert y.shape == (*shape[:-1], 4)
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.gpu
def test_positions_outside_the_tables_give_nan_on_cuda(normal):
    q = normal(4, 2, 8, device="cuda")
    turned, _ = gk.rope(q, q, *tables(6, 4, "cuda"), position_ids=torch.tensor([0, 5, 6, -1], device="cuda"))
    assert turned.isnan().flatten(1).any(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gk.rms_norm(torch.ones(2, 3), torch.ones(4)), r"rms_norm: weight is \(4,\).*D=3"),
        (
            lambda: gk.add_rms_norm(torch.ones(2, 3), torch.ones(3)),
            r"add_rms_norm: x is \(2, 3\) but residual is \(3,\)",
        ),
        (lambda: gk.swiglu(torch.ones(2), torch.ones(3)), r"swiglu: gate is \(2,\).*up is \(3,\)"),
        (lambda: gk.swiglu_packed(torch.ones(2, 3)), r"swiglu_packed: gate_up is \(2, 3\); expected \[..., 2F\]"),
        (lambda: gk.rope(torch.ones(9, 1, 4), torch.ones(9, 1, 4), *tables(8, 2)), r"rope: q has T=9.*8 positions"),
        (
            lambda: gk.rope(torch.ones(9, 1, 4), torch.ones(9, 1, 4), *tables(9, 3)),
            r"rope: cos is \(9, 3\).*\(T_max, 2\)",
        ),
        (
            lambda: gk.rope(torch.ones(5, 1, 4), torch.ones(5, 1, 4), *tables(9, 2), torch.arange(7)),
            r"rope: position_ids is \(7,\) torch.int64; expected .* broadcastable to \(5,\)",
        ),
        (
            lambda: gk.rope(torch.ones(5, 1, 4), torch.ones(5, 1, 4), *tables(9, 2), torch.ones(5)),
            r"rope: position_ids is \(5,\) torch.float32; expected int32 or int64",
        ),
        (lambda: gk.newton_schulz(torch.ones(3)), r"newton_schulz: g is \(3,\)"),
        (lambda: gk.newton_schulz(torch.arange(4).view(2, 2)), r"newton_schulz: g is \(2, 2\) torch.int64"),
        (
            lambda: gk.rms_norm(torch.ones(2, 3), torch.ones(3, device="meta")),
            r"rms_norm: weight is on meta but x is on",
        ),
        (
            lambda: gk.add_rms_norm(torch.ones(2, 3), torch.arange(6).view(2, 3)),
            r"add_rms_norm: residual is torch.int64",
        ),
        (lambda: gk.swiglu(torch.ones(2), torch.ones(2, device="meta")), r"swiglu: up is on meta but gate is on cpu"),
        (lambda: gk.relu2(torch.arange(3)), r"relu2: x is torch.int64; expected floating-point"),
        (
            lambda: gk.qk_norm_rope(*[torch.ones(9, 1, 4)] * 2, *tables(9, 2, "meta")),
            r"qk_norm_rope: cos is on meta but q is on cpu",
        ),
    ],
)
def test_errors_name_the_op_the_argument_and_both_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
