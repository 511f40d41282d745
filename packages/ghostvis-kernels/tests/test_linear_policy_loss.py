"""linear_policy_loss against autograd of the written formulas in float64, and what a policy loss must keep."""

from itertools import pairwise

import pytest
import torch

import ghostvis_kernels as gk
from ghostvis_kernels.linear_policy_loss import KINDS, _policy_op

BOUNDS = [0, 5, 6, 6, 19]  # four sequences, one of them empty
CHUNKED = 4096


def formula(x, weight, bias, batch, kind, clip, denom, kl_coef, temperature, softcap):
    """The formulas as the papers write them: materialised logits, a loop over sequences."""
    ids, old, advantages, mask, ref = batch
    logits = x @ weight.T + (0 if bias is None else bias)
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    logp = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    spans = [slice(a, b) for a, b in pairwise(BOUNDS)]
    if advantages.shape != mask.shape:
        advantages = torch.cat([a.expand(s.stop - s.start) for a, s in zip(advantages, spans, strict=True)])
    mask = mask.to(logp.dtype)
    lengths = [mask[s].sum().clamp(min=1) for s in spans]
    log_ratio = logp - old
    if kind == "gspo":
        means = [(log_ratio[s] * mask[s]).sum() / n for s, n in zip(spans, lengths, strict=True)]
        log_ratio = torch.cat([m.expand(s.stop - s.start) for m, s in zip(means, spans, strict=True)])
    ratio = log_ratio.exp()
    if kind == "reinforce":
        loss = -advantages * logp
    elif kind == "cispo":
        loss = -ratio.clamp(max=clip[1]).detach() * advantages * logp
    else:
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages)
    if ref is not None:
        loss = loss + kl_coef * ((ref - logp).exp() - (ref - logp) - 1)
    loss = loss * mask
    if kind in ("grpo", "gspo"):
        total = sum(loss[s].sum() / n for s, n in zip(spans, lengths, strict=True))
        return total / (len(spans) if denom is None else denom)
    return loss.sum() / (mask.sum() if denom is None else denom)


@pytest.fixture
def problem(normal, rng):
    """(x, weight, bias), (ids, old_logp, advantages, mask, ref_logp): ratios that rounding cannot move over a bound."""

    def make(device="cpu", dtype=torch.float32, vocabulary=61, per_sequence=False, ref=True, **options):
        rows = BOUNDS[-1]
        inputs = [
            (normal(*s, grad=False) * 0.5).to(device, dtype).requires_grad_()
            for s in ((rows, 16), (vocabulary, 16), (vocabulary,))
        ]
        ids = torch.randint(0, vocabulary, (rows,), generator=rng).to(device)
        x, weight, bias = (t.detach().double() for t in inputs)
        logp = gk.linear_logprob(x, weight, ids, bias, **options)
        steps = torch.tensor([0.0, 0.1, -0.12, 0.5, -0.5])[torch.randint(0, 5, (rows,), generator=rng)].to(device)
        advantages = normal(4 if per_sequence else rows, grad=False).to(device)
        mask = (torch.rand(rows, generator=rng) < 0.8).to(device)
        mask[-2:] = True
        reference = logp + 0.3 * normal(rows, grad=False).to(device) if ref else None
        return inputs, (ids, logp + steps, advantages, mask, reference)

    return make


def arguments(kind):
    """clip and denom that suit a kind."""
    return (0.0, 1.2) if kind == "cispo" else (0.2, 0.28), 57.0 if kind == "dr_grpo" else None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_loss_and_gradients_match_the_formula_in_float64(
    problem, device, dtype, kind, softcap, double, error, outputs_and_gradients
):
    options = {"temperature": 0.8, "softcap": softcap}
    inputs, batch = problem(device, dtype, per_sequence=kind in ("grpo", "gspo"), **options)
    clip, denom = arguments(kind)
    bounds = torch.tensor(BOUNDS, device=device)

    def ours(x, weight, bias):
        return gk.linear_policy_loss(
            x, weight, *batch, kind=kind, clip=clip, denom=denom, cu_seqlens=bounds, kl_coef=0.1, bias=bias,
            workspace_bytes=CHUNKED, **options,
        )[0]  # fmt: skip

    def theirs(x, weight, bias):
        tensors = tuple(t if t is None or not t.is_floating_point() else t.to(x.dtype) for t in batch)
        return formula(x, weight, bias, tensors, kind, clip, denom, 0.1, 0.8, softcap)

    found, seeds = outputs_and_gradients(ours, inputs)
    truth, _ = outputs_and_gradients(theirs, double(inputs), seeds)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    limit = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert error(found[0], truth[0], floor=0.5) < 5 * limit
    assert max(error(f, t, floor=1e-2) for f, t in zip(found[1:], truth[1:], strict=True)) < limit


@pytest.mark.parametrize("kind", ["dapo", "gspo"])
def test_metrics_are_means_over_the_masked_tokens(problem, device, kind, rng):
    inputs, batch = problem(device, torch.float64)
    ids, old, advantages, mask, ref = batch
    bounds = torch.tensor(BOUNDS, device=device)
    x, weight, bias = (t.detach() for t in inputs)
    _, metrics = gk.linear_policy_loss(x, weight, *batch, kind=kind, cu_seqlens=bounds, bias=bias)
    logits = (x @ weight.T + bias).log_softmax(-1)
    logp = logits.gather(1, ids[:, None])[:, 0]
    log_ratio = logp - old
    if kind == "gspo":
        spans = [slice(a, b) for a, b in pairwise(BOUNDS)]
        log_ratio = torch.cat([log_ratio[s][mask[s]].mean().expand(s.stop - s.start) for s in spans])
    ratio = log_ratio.exp()
    low, high = (advantages < 0) & (ratio < 0.8), (advantages > 0) & (ratio > 1.28)
    truth = {
        "ratio": ratio, "clip_low": low.double(), "clip_high": high.double(), "kl": (ref - logp).expm1() - (ref - logp),
        "entropy": -(logits.exp() * logits).sum(-1), "logp": logp, "clip_fraction": (low | high).double(),
    }  # fmt: skip
    assert metrics["tokens"] == mask.sum()
    assert {*truth, "tokens"} == metrics.keys()
    for name, value in truth.items():
        torch.testing.assert_close(metrics[name], value[mask].mean(), msg=lambda m, name=name: f"{name}: {m}")
        assert metrics[name].shape == ()
        assert not metrics[name].requires_grad


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_on_policy_the_gradient_is_that_of_reinforce_and_nothing_is_clipped(problem, device, kind):
    inputs, (ids, _, advantages, mask, _) = problem(device, torch.float64, ref=False)
    x, weight, bias = inputs
    bounds = torch.tensor(BOUNDS, device=device)
    advantages = advantages[:1].expand(4) if kind in ("grpo", "gspo") else advantages  # GSPO: one per sequence
    old = gk.linear_logprob(x, weight, ids, bias).detach()

    def gradients(kind, more):
        loss, metrics = gk.linear_policy_loss(x, weight, ids, old, advantages, mask, kind=kind, bias=bias, **more)
        return torch.autograd.grad(loss, inputs), metrics

    found, metrics = gradients(kind, {"cu_seqlens": bounds, "denom": 3.0})
    assert metrics["clip_fraction"] == 0
    torch.testing.assert_close(metrics["ratio"], torch.ones_like(metrics["ratio"]))
    if kind in ("dapo", "dr_grpo"):
        plain, _ = gradients("reinforce", {"denom": 3.0})
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_out_does_not_matter(problem, device, kind):
    inputs, (ids, old, advantages, mask, ref) = problem(device)
    x, weight, bias = inputs
    clip, denom = arguments(kind)

    def run(ids, old, advantages, ref):
        loss, metrics = gk.linear_policy_loss(
            x, weight, ids, old, advantages, mask, ref, kind=kind, clip=clip, denom=denom, bias=bias, kl_coef=0.1,
            cu_seqlens=torch.tensor(BOUNDS, device=device),
        )  # fmt: skip
        return [loss, *metrics.values(), *torch.autograd.grad(loss, inputs)]

    nan, far = torch.full_like(old, torch.nan), torch.full_like(ids, -7)
    given = ((ids, far), (old, nan), (advantages, nan), (ref, nan))
    spoiled = run(*(torch.where(mask, a, b.to(a.dtype)) for a, b in given))
    for a, b in zip(run(ids, old, advantages, ref), spoiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_masked_in_gives_zero_loss_and_zero_gradients(problem, device, kind):
    inputs, (ids, old, advantages, mask, ref) = problem(device)
    clip, denom = arguments(kind)
    loss, metrics = gk.linear_policy_loss(
        *inputs[:2], ids, old, advantages, torch.zeros_like(mask), ref, kind=kind, clip=clip, denom=denom,
        cu_seqlens=torch.tensor(BOUNDS, device=device), bias=inputs[2],
    )  # fmt: skip
    for tensor in (loss, *metrics.values(), *torch.autograd.grad(loss, inputs)):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("kind", ["grpo", "dapo", "gspo"])
def test_micro_batches_with_the_global_denominator_add_up_to_the_whole(problem, device, kind):
    inputs, (ids, old, advantages, mask, ref) = problem(device, torch.float64)
    x, weight, _ = inputs
    denom = 4.0 if kind in ("grpo", "gspo") else mask.sum()

    def run(part, bounds):
        tensors = (ids[part], old[part], advantages[part], mask[part], ref[part])
        bounds = torch.tensor(bounds, device=device)
        loss, _ = gk.linear_policy_loss(
            x[part], weight, *tensors, kind=kind, denom=denom, cu_seqlens=bounds, kl_coef=0.1
        )
        return [loss, *torch.autograd.grad(loss, inputs[:2])]

    whole = run(slice(None), BOUNDS)
    parts = [run(slice(0, 6), [0, 5, 6]), run(slice(6, 19), [0, 0, 13])]
    for a, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(a, first + second)


def test_far_off_policy_numbers_stay_finite(problem, device):
    inputs, (ids, old, advantages, mask, _) = problem(device)
    for shift in (-300.0, 300.0):
        loss, metrics = gk.linear_policy_loss(
            *inputs[:2], ids, old + shift, advantages, mask, old - shift, kind="dapo", kl_coef=0.1
        )
        tensors = (loss, *metrics.values(), *torch.autograd.grad(loss, inputs[:2]))
        assert all(t.isfinite().all() for t in tensors)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "gspo"])
def test_compiled_in_one_graph_equals_eager(problem, device, kind, outputs_and_gradients):
    inputs, batch = problem(device)
    bounds = torch.tensor(BOUNDS, device=device)

    def step(x, weight, bias):
        loss, metrics = gk.linear_policy_loss(x * 2, weight, *batch, kind=kind, cu_seqlens=bounds, bias=bias)
        return loss * (1 + metrics["tokens"])

    eager, seeds = outputs_and_gradients(step, inputs)
    torch._dynamo.reset()
    compiled, _ = outputs_and_gradients(torch.compile(step, fullgraph=True, backend="aot_eager"), inputs, seeds)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["dapo", "gspo"])
@pytest.mark.parametrize("needs", [[True, True, True], [False, False, False]], ids=str)
def test_the_operator_passes_opcheck(problem, device, kind, needs):
    inputs, (ids, old, advantages, mask, ref) = problem(device)
    x, weight, bias = (t.detach() for t in inputs)
    bounds = torch.tensor(BOUNDS, device=device)
    numbers = (kind, [0.8, 1.2], 0.1, [1.0, 0.0, 1.0], 1 << 20, needs)
    call = (x, weight, bias, ids, old, advantages, mask, None, ref, bounds, *numbers)
    torch.library.opcheck(_policy_op, call, test_utils=("test_schema", "test_faketensor"))


def test_a_second_backward_and_a_scale_give_the_same_gradient(problem, device):
    inputs, batch = problem(device)
    loss, _ = gk.linear_policy_loss(*inputs[:2], *batch, kind="dapo")
    first = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    second = torch.autograd.grad(loss * -3, inputs[:2])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(-3 * a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dapo", "gspo"])
def test_nothing_waits_for_the_device_and_results_repeat_bitwise(problem, kind):
    inputs, batch = problem("cuda", torch.bfloat16, vocabulary=1009)
    bounds = torch.tensor(BOUNDS, device="cuda")

    def run():
        loss, metrics = gk.linear_policy_loss(*inputs[:2], *batch, kind=kind, cu_seqlens=bounds, kl_coef=0.1, denom=3.0)
        return [loss, *metrics.values(), *torch.autograd.grad(loss, inputs[:2])]

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


ONES, IDS, ROW = torch.ones(3, 4), torch.tensor([0, 1, 3]), torch.ones(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ppo"}, r"kind is 'ppo'; expected one of"),
        ({"kind": "grpo"}, r"kind 'grpo' averages over sequences, but cu_seqlens is None"),
        ({"kind": "dr_grpo"}, r"kind 'dr_grpo' divides by a constant, but denom is None"),
        ({"old_logp": torch.ones(2)}, r"old_logp is \(2,\); expected \(3,\)"),
        ({"advantages": torch.ones(2)}, r"advantages is \(2,\); expected \(3,\); one per sequence needs cu_seqlens"),
        ({"ids": torch.tensor([0, 1, 4])}, r"linear_policy_loss: ids holds 4, outside \[0, 4\)"),
        ({"weight": torch.ones(4, 6)}, r"linear_policy_loss: weight \(V, D\) has D=6 but x has D=4"),
        ({"clip": (-0.1, 0.2)}, r"clip is \(-0.1, 0.2\)"),
        ({"temperature": 0.0}, r"temperature is 0.0"),
        ({"advantages": torch.ones(3, device="meta")}, r"linear_policy_loss: advantages is on meta but x is on cpu"),
        ({"old_logp": torch.arange(3)}, r"old_logp is torch.int64; expected floating-point"),
        ({"cu_seqlens": torch.tensor([0, 2, 9])}, r"cu_seqlens runs \[0, 2, 9\] .. \[2, 9\] over N=3 tokens"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, r"cu_seqlens is \(2,\) torch.float32; expected \(S \+ 1,\)"),
    ],
)
def test_errors_name_the_argument_and_both_values(change, message):
    call = {"x": ONES, "weight": ONES.new_ones(4, 4), "ids": IDS, "old_logp": ROW, "advantages": ROW, "mask": ROW}
    with pytest.raises(ValueError, match=message):
        gk.linear_policy_loss(**{**call, **change})
