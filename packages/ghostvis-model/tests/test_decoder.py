"""The decoder's options, each beside a reference written out in plain torch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ghostvis_model.config import TextConfig, VLMConfig, get_config, qwen25_config
from ghostvis_model.decoder import Decoder
from ghostvis_model.moe import MixtureOfExperts
from ghostvis_model.vlm import GhostVis

SMALL_QWEN = qwen25_config("tiny")
CONFIGS = {
    "ghost": get_config(2, 300, 128),
    "relu2": get_config(2, 300, 128, mlp="relu2"),
    "moe": get_config(2, 300, 128, mlp="moe", num_experts=4),
    "qwen25 6:1": SMALL_QWEN,
    "qwen25 7:1 untied": replace(SMALL_QWEN, hidden_size=448, num_heads=7, tied_head=False),
    "biases": replace(get_config(2, 300, 128), qkv_bias=True, linear_bias=True),
}


def randomised(config: TextConfig, seed: int = 0) -> Decoder:
    """A decoder in which every weight, scale and bias matters."""
    decoder = Decoder(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(std=spread, generator=generator)
    return decoder


def norm(x, weight, eps):
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def turned(x, theta):
    """RoPE by complex numbers: [T, H, h], element i of the first half turns with element i of the second."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[0])[:, None] * theta ** (-torch.arange(half) / half)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


def mlp(layer, x, config):
    if config.mlp == "relu2":
        return layer.down_proj(F.relu(layer.up_proj(x)) ** 2)
    if config.mlp == "swiglu":
        return layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x))
    out, experts = torch.zeros_like(x), layer.experts
    for i, token in enumerate(x):
        best, chosen = experts.router(token).topk(config.experts_per_token)
        for weight, e in zip(best.softmax(-1), chosen, strict=True):
            hidden = F.silu(experts.gate_proj[e] @ token) * (experts.up_proj[e] @ token)
            out[i] += weight * (experts.down_proj[e] @ hidden)
    return out


def reference(decoder: Decoder, embeddings):
    """[T, D] -> logits [T, V], as the papers write it: explicit scores, repeated key heads."""
    config = decoder.config
    x = norm(embeddings, None, config.norm_eps) if config.embedding_norm else embeddings
    tokens = len(x)
    future = torch.full((tokens, tokens), float("-inf")).triu(1)
    for layer in decoder.layers:
        h = norm(x, layer.attention_norm, config.norm_eps)
        q, k, v = (p(h).view(tokens, -1, config.head_dim) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        if config.qk_norm:
            q, k = norm(q, None, config.norm_eps), norm(k, None, config.norm_eps)
        q, k = turned(q, config.rope_theta), turned(k, config.rope_theta)
        k, v = (t.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / config.head_dim**0.5 + future
        x = x + layer.o_proj(torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1))
        x = x + mlp(layer, norm(x, layer.mlp_norm, config.norm_eps), config)
    head = decoder.embed_tokens.weight if config.tied_head else decoder.lm_head.weight
    logits = norm(x, decoder.norm, config.norm_eps) @ head.T
    return config.logit_softcap * torch.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_computes_what_its_paper_writes(name):
    decoder = randomised(CONFIGS[name])
    embeddings = decoder.embed_tokens(torch.randint(0, 300, (1, 23), generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        logits = decoder.logits(decoder(embeddings))[0]
        torch.testing.assert_close(logits, reference(decoder, embeddings[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name):
    model = GhostVis(VLMConfig(CONFIGS[name])).train()
    model.decoder.load_state_dict(randomised(CONFIGS[name]).state_dict())
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    results = []
    for flag in (False, True):
        model.decoder.gradient_checkpointing = flag
        model.zero_grad()
        loss = model(ids, targets=ids.roll(-1, 1))
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (loss, gradients), (again, recomputed) = results
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))


def test_gradient_checkpointing_keeps_less():
    model = GhostVis(VLMConfig(get_config(4, 300, 256))).train()
    ids = torch.randint(0, 300, (2, 256))

    def kept(flag):
        model.decoder.gradient_checkpointing = flag
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, targets=ids)
        return total

    assert kept(True) < kept(False) / 3


def test_a_tied_head_is_one_weight_in_memory_on_disk_and_after_loading(tmp_path):
    from safetensors.torch import load_file, save_file

    decoder = randomised(SMALL_QWEN)
    state = decoder.state_dict()
    assert "lm_head.weight" not in state
    save_file(state, tmp_path / "w.safetensors")
    loaded = Decoder(SMALL_QWEN)
    loaded.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, decoder.embed_tokens.weight)
    moved = loaded.to(torch.bfloat16)
    assert moved.lm_head.weight is moved.embed_tokens.weight
    with pytest.raises(RuntimeError, match="embed_tokens"):
        loaded.load_state_dict({name: tensor for name, tensor in state.items() if name != "embed_tokens.weight"})


@pytest.mark.parametrize("context", [32_768, 65_536])
def test_the_last_position_of_a_long_context_is_turned_by_its_own_angle(context):
    decoder = randomised(replace(CONFIGS["ghost"], context_length=context, rope_theta=1e6))
    embeddings = decoder.embed_tokens(torch.arange(12)[None])
    far = torch.arange(context - 12, context)[None]
    with torch.no_grad():  # attention sees distances alone, so the same tokens at the end of the context agree
        torch.testing.assert_close(decoder(embeddings, far), decoder(embeddings), rtol=0, atol=2e-3)
        gap = far.clone()
        gap[0, 6:] -= 5000
        assert (decoder(embeddings, gap) - decoder(embeddings)).abs().max() > 0.05


def test_theta_decides_how_fast_positions_turn():
    slow, fast = (randomised(replace(CONFIGS["ghost"], rope_theta=theta)) for theta in (1e6, 1e4))
    embeddings = slow.embed_tokens(torch.arange(50)[None])
    with torch.no_grad():
        assert (slow(embeddings) - fast(embeddings)).abs().max() > 0.05


def test_experts_are_balanced_by_the_loss_and_one_used_alone_costs_most():
    config = CONFIGS["moe"]
    experts = MixtureOfExperts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.zero_()
        x = torch.randn(64, config.hidden_size)
        experts.router.weight.normal_(generator=torch.Generator().manual_seed(0), std=1e-3)
        assert experts(x)[1].item() == pytest.approx(1, abs=0.1)
        x[:, 0] = 1
        experts.router.weight[:2, 0] += 100  # all tokens to experts 0 and 1
        assert experts(x)[1].item() == pytest.approx(2, abs=0.01)


def test_the_balance_loss_is_a_part_of_each_learned_tokens_loss():
    config = replace(CONFIGS["moe"], router_loss=0.5)
    model, free = GhostVis(VLMConfig(config)), GhostVis(VLMConfig(replace(config, router_loss=0.0)))
    state = randomised(config).state_dict()
    model.decoder.load_state_dict(state)
    free.decoder.load_state_dict(state)
    ids = torch.arange(30)[None]
    targets = ids.clone()
    targets[0, :10] = -100
    balance: list[torch.Tensor] = []
    model.decoder(model.decoder.embed_tokens(ids), balance=balance)
    expected = free(ids, targets=targets) + 0.5 * 20 * torch.stack(balance).mean()
    torch.testing.assert_close(model(ids, targets=targets), expected)
    assert len(balance) == config.num_layers


def test_every_expert_and_the_router_get_a_gradient():
    model = GhostVis(VLMConfig(CONFIGS["moe"]))
    model.decoder.load_state_dict(randomised(CONFIGS["moe"]).state_dict())
    ids = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(3))
    model(ids, targets=ids.roll(-1, 1)).backward()
    for layer in model.decoder.layers:
        for parameter in layer.experts.parameters():
            assert parameter.grad.flatten(1).abs().amax(1).min() > 0


@pytest.mark.slow
def test_one_document_of_32k_tokens_runs_and_its_beginning_is_what_it_is_alone():
    decoder = randomised(replace(CONFIGS["ghost"], context_length=32_768, rope_theta=1e6))
    ids = torch.randint(0, 300, (1, 32_768), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        hidden = decoder(decoder.embed_tokens(ids))
        torch.testing.assert_close(hidden[:, :700], decoder(decoder.embed_tokens(ids[:, :700])), rtol=0, atol=1e-4)
    assert hidden.isfinite().all()


@pytest.mark.gpu
def test_one_document_of_64k_tokens_learns_on_the_gpu():
    config = replace(CONFIGS["ghost"], context_length=65_536, rope_theta=1e6)
    model = GhostVis(VLMConfig(config)).cuda()
    model.decoder.load_state_dict(randomised(config).state_dict())
    ids = torch.randint(0, 300, (1, 65_536), generator=torch.Generator().manual_seed(5)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(ids, targets=ids.roll(-1, 1))
        beginning = model(ids[:, :700])
        assert (model(ids)[:, :700] - beginning).abs().max() < 0.2
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_on_the_gpu_are_those_of_the_cpu(name):
    model = GhostVis(VLMConfig(CONFIGS[name])).train()
    model.decoder.load_state_dict(randomised(CONFIGS[name]).state_dict())
    ids = torch.randint(0, 300, (2, 128), generator=torch.Generator().manual_seed(6))
    loss = model(ids, targets=ids.roll(-1, 1))
    loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.cuda()
    on_gpu = model(ids.cuda(), targets=ids.roll(-1, 1).cuda())
    on_gpu.backward()
    torch.testing.assert_close(on_gpu.cpu(), loss, rtol=1e-5, atol=0)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad.cpu() - gradient).norm() <= 1e-3 * gradient.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_rounds_and_no_more(name):
    model = GhostVis(VLMConfig(CONFIGS[name]))
    model.decoder.load_state_dict(randomised(CONFIGS[name]).state_dict())
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        exact = model(ids, targets=ids.roll(-1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(ids, targets=ids.roll(-1, 1)), exact, rtol=0.02, atol=0)


def test_casting_a_model_leaves_the_rotary_tables_in_float32():
    decoder = Decoder(get_config(2, 64, 128))
    before = decoder.cos.clone()
    decoder.to(torch.bfloat16)
    assert decoder.embed_tokens.weight.dtype == torch.bfloat16
    assert decoder.cos.dtype == torch.float32
    assert torch.equal(decoder.cos, before)
