"""linear_logprob: with and without gradients, and without logits in memory."""

import pytest
import torch

import ghostvis_kernels as gk


def wanted(x, weight, ids, bias, temperature, softcap):
    logits = x @ weight.T + (0 if bias is None else bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return (logits / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(1, 8, 3), (61, 23, 97), (130, 64, 1031)], ids=str)
def test_without_gradients_it_is_the_log_softmax_at_the_ids(
    normal, rng, device, dtype, softcap, shape, assert_as_good_as_torch
):
    rows, width, vocabulary = shape
    x, weight, bias = (
        normal(*s, device=device, dtype=dtype) for s in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    ids = torch.randint(0, vocabulary, (rows,), generator=rng).to(device)
    with torch.no_grad():
        found = gk.linear_logprob(x, weight, ids, bias, temperature=0.7, softcap=softcap)
        plain = wanted(x, weight, ids, bias, 0.7, softcap)
        truth = wanted(x.double(), weight.double(), ids, bias.double(), 0.7, softcap)
    ours, torchs = (torch.linalg.vector_norm(t.double() - truth) for t in (found, plain))
    # The rounding of one number of this dtype beside it: over a single row torch may be lucky.
    assert ours <= 2 * torchs + max(1e-5, torch.finfo(dtype).eps / 2) * (1 + torch.linalg.vector_norm(truth))


def test_ids_to_ignore_get_zero_and_no_gradient(normal, rng, device):
    x, weight = normal(7, 8, device=device), normal(11, 8, device=device)
    ids = torch.randint(0, 11, (7,), generator=rng).to(device)
    ids[3] = -100
    logp = gk.linear_logprob(x, weight, ids)
    (grad,) = torch.autograd.grad(logp.sum(), x)
    assert logp[3] == 0
    assert torch.equal(grad[3], torch.zeros_like(grad[3]))
    with torch.no_grad():
        assert gk.linear_logprob(x, weight, ids)[3] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [50257, 151937])
def test_no_logits_are_held_and_the_largest_sizes_are_right(normal, rng, vocabulary):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("before sm_90 logits pass through the workspace")
    x = normal(16384, 128, device="cuda", dtype=torch.bfloat16, grad=False)
    weight = normal(vocabulary, 128, device="cuda", dtype=torch.bfloat16, grad=False) * 0.2
    ids = torch.randint(0, vocabulary, (16384,), generator=rng).cuda()
    gk.linear_logprob(x, weight, ids)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = gk.linear_logprob(x, weight, ids)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < x.shape[0] * (vocabulary // 256 + 16) * 8 * 1.1  # two fp32 a tile of 256, and [N] vectors
    rows = torch.arange(0, 16384, 331, device="cuda")
    truth = wanted(x[rows].double(), weight.double(), ids[rows], None, 1.0, 0.0)
    torch.testing.assert_close(found[rows].double(), truth, rtol=1e-5, atol=1e-4)
