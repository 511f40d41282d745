"""linear_cross_entropy and linear_logprob against materialised logits in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ghostvis_kernels as gk
from ghostvis_kernels.linear_cross_entropy import linear_cross_entropy_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = {"softcap": 5.0, "z_loss": 1e-2, "label_smoothing": 0.1, "temperature": 0.7, "logit_scale": 1.3}
OPTIONS = [
    {},
    {"softcap": 15.0},
    {"z_loss": 1e-3},
    {"label_smoothing": 0.2},
    {"temperature": 1.7},
    {"logit_scale": 0.2},
    ALL,
]
CHUNKED = 4096  # bytes: a handful of rows at a time


def problem(normal, rng, rows=61, width=23, vocabulary=97, device="cpu", dtype=torch.float32, ignored=0.3):
    x = normal(rows, width, device=device, dtype=dtype)
    weight = normal(vocabulary, width, device=device, dtype=dtype)
    bias = normal(vocabulary, device=device, dtype=dtype)
    target = torch.randint(0, vocabulary, (rows,), generator=rng)
    target[torch.rand(rows, generator=rng) < ignored] = -100
    return x, weight, bias, target.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_loss_and_gradients_match_float64(normal, rng, device, dtype, reduction, options, assert_as_good_as_torch):
    x, weight, bias, target = problem(normal, rng, device=device, dtype=dtype)
    token_weight = torch.rand(x.shape[0], generator=rng).to(device) if options is ALL else None

    def call(op, **more):
        return lambda x, w, b: op(x, w, target, b, reduction=reduction, token_weight=token_weight, **options, **more)

    reference = call(linear_cross_entropy_reference)
    assert_as_good_as_torch(
        call(gk.linear_cross_entropy, workspace_bytes=CHUNKED), reference, reference, [x, weight, bias]
    )


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 123, 50), (127, 1, 7), (300, 64, 1001)], ids=str)
def test_odd_sizes_match_float64(normal, rng, device, shape, assert_as_good_as_torch):
    x, weight, _, target = problem(normal, rng, *shape, device=device, ignored=0.0)

    def call(op):
        return lambda x, w: op(x, w, target, reduction="sum", softcap=15.0)

    reference = call(linear_cross_entropy_reference)
    assert_as_good_as_torch(call(gk.linear_cross_entropy), reference, reference, [x, weight])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_a_batch_without_targets_gives_zero_loss_and_zero_gradients(
    normal, device, reduction, rows, outputs_and_gradients
):
    x, weight = normal(rows, 8, device=device), normal(11, 8, device=device)
    target = torch.full((rows,), -100, device=device)
    found, _ = outputs_and_gradients(
        lambda x, w: gk.linear_cross_entropy(x, w, target, reduction=reduction), [x, weight]
    )
    for tensor in found:
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_two_backwards_through_one_graph_give_equal_gradients(normal, rng, device, reduction):
    x, weight, bias, target = problem(normal, rng, device=device)
    loss = gk.linear_cross_entropy(x, weight, target, bias, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [0.0, 1 / 4096, -3.0])
def test_gradients_scale_with_the_upstream_gradient(normal, rng, device, scale):
    x, weight, _, target = problem(normal, rng, device=device)
    one = torch.autograd.grad(gk.linear_cross_entropy(x, weight, target, reduction="sum"), (x, weight))
    scaled = torch.autograd.grad(gk.linear_cross_entropy(x, weight, target, reduction="sum") * scale, (x, weight))
    for a, b in zip(one, scaled, strict=True):
        torch.testing.assert_close(a * scale, b)


def test_only_the_gradients_asked_for_are_made_and_inputs_are_not_written(normal, rng, device):
    x, weight, bias, target = problem(normal, rng, device=device)
    before = [t.detach().clone() for t in (x, weight, bias, target)]
    for frozen in range(3):
        inputs = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((x, weight, bias))]
        gk.linear_cross_entropy(inputs[0], inputs[1], target, inputs[2]).backward()
        assert [t.grad is None for t in inputs] == [i == frozen for i in range(3)]
    with torch.no_grad():
        assert not gk.linear_cross_entropy(x, weight, target, bias).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias, target), strict=True))


def test_strided_input_equals_contiguous_input(normal, rng, device):
    x, weight, _, target = problem(normal, rng, width=24, device=device)
    loss = gk.linear_cross_entropy(x[:, ::2], weight[:, 1::2], target)
    torch.testing.assert_close(
        loss, gk.linear_cross_entropy(x[:, ::2].contiguous(), weight[:, 1::2].contiguous(), target)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lse_entropy_and_argmax_are_those_of_the_final_logits(normal, rng, device, dtype, double):
    x, weight, bias, target = problem(normal, rng, device=device, dtype=dtype)
    names = ("entropy", "argmax", "lse")
    loss, aux = gk.linear_cross_entropy(
        x, weight, target, bias, softcap=5.0, temperature=0.8, return_=names, workspace_bytes=CHUNKED
    )
    plain = gk.linear_cross_entropy(x, weight, target, bias, softcap=5.0, temperature=0.8)
    logits = (torch.nn.functional.linear(x, weight, bias).double() / 5).tanh() * 5 / 0.8
    chance = torch.distributions.Categorical(logits=logits)
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (1e-2, 5e-2)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(aux["lse"].double(), logits.logsumexp(-1), rtol=rtol, atol=atol)
    torch.testing.assert_close(aux["entropy"].double(), chance.entropy(), rtol=rtol, atol=atol)
    top = logits.gather(1, aux["argmax"].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(top, logits.amax(-1), rtol=rtol, atol=atol)


def test_lse_survives_logits_that_would_underflow(normal, device):
    x, weight = torch.full((1, 1), 500.0, device=device), torch.tensor([[1.0], [-1.0]], device=device)
    loss = gk.linear_cross_entropy(x, weight, torch.tensor([1], device=device))
    torch.testing.assert_close(loss, torch.tensor(1000.0, device=device))


def test_logprob_is_the_log_softmax_at_the_ids_and_has_gradients(normal, rng, device, assert_as_good_as_torch):
    x, weight, bias, target = problem(normal, rng, device=device, ignored=0.0)
    assert_as_good_as_torch(
        lambda x, w, b: gk.linear_logprob(x, w, target, b, temperature=0.7),
        lambda x, w, b: ((x @ w.T + b) / 0.7).log_softmax(-1).gather(1, target[:, None])[:, 0],
        lambda x, w, b: ((x @ w.T + b) / 0.7).log_softmax(-1).gather(1, target[:, None])[:, 0],
        [x, weight, bias],
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_computes_in_bf16_and_returns_gradients_in_the_inputs_dtypes(
    normal, rng, device, reduction, error, double
):
    x, weight, bias, target = problem(normal, rng, rows=200, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = gk.linear_cross_entropy(x, weight, target, bias, reduction=reduction, workspace_bytes=1 << 16).sum()
    grads = torch.autograd.grad(loss, (x, weight, bias))
    assert loss.dtype == torch.float32
    assert {g.dtype for g in grads} == {torch.float32}
    inputs = double([x, weight, bias])
    truth = torch.autograd.grad(
        linear_cross_entropy_reference(inputs[0], inputs[1], target, inputs[2], reduction="sum"), inputs
    )
    assert max(error(g, t) for g, t in zip(grads, truth, strict=True)) < 8e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_in_one_graph_equals_eager_with_ignored_tokens(normal, rng, device, reduction, outputs_and_gradients):
    x, weight, bias, target = problem(normal, rng, device=device)

    def step(x, weight, bias):
        return gk.linear_cross_entropy(x * 2, weight, target, bias, reduction=reduction, softcap=15.0)

    eager, seeds = outputs_and_gradients(step, [x, weight, bias])
    torch._dynamo.reset()
    compiled, _ = outputs_and_gradients(
        torch.compile(step, fullgraph=True, backend="aot_eager"), [x, weight, bias], seeds
    )
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(70001, 50257), (257, 151937)])
def test_the_largest_sizes_match_float64(normal, rng, reduction, tokens, vocabulary, error):
    # 70,001 x 50,257 is over 2^31 logits, and both vocabularies are odd.
    x, weight, _, target = problem(normal, rng, tokens, 128, vocabulary, "cuda", torch.bfloat16)
    weight = (weight.detach() * 0.1).requires_grad_()  # logits of about 1: bf16 is too coarse for those of 40
    loss = gk.linear_cross_entropy(x, weight, target, reduction=reduction, workspace_bytes=256 << 20)
    found = torch.autograd.grad(loss.sum(), (x, weight))
    total, grads = 0.0, [torch.zeros_like(t, dtype=torch.float64) for t in (x, weight)]
    for part in torch.arange(tokens, device="cuda").split(2048):
        inputs = [t.detach().double().requires_grad_() for t in (x[part], weight)]
        piece = linear_cross_entropy_reference(*inputs, target[part], reduction="sum")
        grad_x, grad_weight = torch.autograd.grad(piece, inputs)
        grads[0][part] = grad_x
        grads[1] += grad_weight
        total += piece.detach()
    count = (target != -100).sum() if reduction == "mean" else 1
    assert error(loss.sum(), total / count) < 1e-3
    assert max(error(f, t / count) for f, t in zip(found, grads, strict=True)) < 8e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocabulary", [50257, 65536, 151937])
def test_odd_vocabularies_are_as_good_as_torch(normal, rng, vocabulary, reduction, dtype, assert_as_good_as_torch):
    x, weight, bias, target = problem(normal, rng, 131, 123, vocabulary, "cuda", dtype)

    def call(op, **more):
        return lambda x, w, b: op(x, w, target, b, reduction=reduction, softcap=15.0, **more)

    reference = call(linear_cross_entropy_reference)
    ours = call(gk.linear_cross_entropy, workspace_bytes=50 * vocabulary * x.element_size())
    assert_as_good_as_torch(ours, reference, reference, [x, weight, bias])


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_device_and_results_repeat_bitwise(normal, rng, reduction):
    x, weight, bias, target = problem(normal, rng, 300, 64, 1009, "cuda", torch.bfloat16)

    def run():
        loss = gk.linear_cross_entropy(x, weight, target, bias, reduction=reduction, workspace_bytes=1 << 18, **ALL)
        return [loss, *torch.autograd.grad(loss.sum(), (x, weight, bias))]

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("call", "name"),
    [(gk.linear_cross_entropy, "linear_cross_entropy: target"), (gk.linear_logprob, "linear_logprob: ids")],
)
def test_checked_mode_names_a_target_out_of_range(monkeypatch, call, name, dtype):
    monkeypatch.setenv("GHOSTVIS_CHECK", "1")
    x, weight = (torch.ones(3, 8, device="cuda", dtype=dtype) for _ in range(2))
    with pytest.raises(ValueError, match=name + r" holds 3, outside \[0, 3\) and not ignore_index=-100"):
        call(x, weight, torch.tensor([0, 3, 1], device="cuda"))


@given(
    rows=st.integers(1, 12), vocabulary=st.integers(2, 40), room=st.integers(1, 9), seed=st.integers(0, 2**31),
    reduction=st.sampled_from(["mean", "sum"]), softcap=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
def test_the_workspace_changes_nothing_but_rounding(rows, vocabulary, room, seed, reduction, softcap):
    rng = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, 5, generator=rng, dtype=torch.float64).requires_grad_() for n in (rows, vocabulary))
    target = torch.randint(0, vocabulary, (rows,), generator=rng)
    target[torch.rand(rows, generator=rng) < 0.3] = -100

    def run(workspace_bytes):
        loss = gk.linear_cross_entropy(
            x, weight, target, reduction=reduction, softcap=softcap, workspace_bytes=workspace_bytes
        )
        return [loss, *torch.autograd.grad(loss, (x, weight))]

    for a, b in zip(run(1 << 30), run(room * vocabulary * 8), strict=True):
        torch.testing.assert_close(a, b)


ONES = torch.ones(3, 4)
IDS = torch.tensor([0, 1, 4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gk.linear_cross_entropy(ONES, torch.ones(5, 6), IDS), r"weight \(V, D\) has D=6 but x has D=4"),
        (lambda: gk.linear_cross_entropy(ONES, torch.ones(4, 4), IDS), r"target holds 4, outside \[0, 4\)"),
        (
            lambda: gk.linear_cross_entropy(ONES, torch.ones(5, 4), IDS.int()),
            r"target is \(3,\) torch.int32; expected \(3,\)",
        ),
        (
            lambda: gk.linear_cross_entropy(ONES, torch.ones(5, 4), IDS, torch.ones(4)),
            r"bias is \(4,\); expected \(5,\)",
        ),
        (
            lambda: gk.linear_cross_entropy(ONES, torch.ones(5, 4), IDS, reduction="avg"),
            r"reduction is 'avg'; expected one of",
        ),
        (lambda: gk.linear_cross_entropy(ONES, torch.ones(5, 4), IDS, return_=("acc",)), r"return_ names \['acc'\]"),
        (lambda: gk.linear_cross_entropy(ONES, torch.ones(5, 4), IDS, temperature=0.0), r"temperature is 0.0"),
        (lambda: gk.linear_cross_entropy(ONES, torch.ones(5, 4), IDS, workspace_bytes=0), r"workspace_bytes is 0"),
        (lambda: gk.linear_cross_entropy(ONES.int(), torch.ones(5, 4), IDS), r"x is torch.int32; expected floating"),
        (
            lambda: gk.linear_cross_entropy(ONES, torch.ones(5, 4, device="meta"), IDS),
            r"linear_cross_entropy: weight is on meta but x is on cpu",
        ),
        (
            lambda: gk.linear_cross_entropy(ONES, torch.ones(5, 4), IDS, token_weight=torch.ones(3, device="meta")),
            r"token_weight is on meta but x is on cpu",
        ),
        (lambda: gk.linear_logprob(ONES, torch.ones(4, 4), IDS), r"linear_logprob: ids holds 4, outside \[0, 4\)"),
        (lambda: gk.linear_logprob(ONES, torch.ones(5, 4), IDS[:2]), r"linear_logprob: ids is \(2,\).*\(3,\)"),
    ],
)
def test_errors_name_the_argument_and_both_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
