"""What a model costs is the model's own: counted, not estimated, and without building it."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ghostvis_model import config as c
from ghostvis_model import costs
from ghostvis_model.encoders import ENCODERS
from ghostvis_model.kv_cache import KVCache
from ghostvis_model.vlm import GhostVis

TEXTS = {
    "d2": c.get_config(2, 300),
    "d4": c.get_config(4, 512),
    "d6": c.get_config(6, 1000),
    "relu2": c.get_config(2, 300, mlp="relu2"),
    "moe": c.get_config(2, 300, mlp="moe", num_experts=4),
    "qwen25": c.qwen25_config("tiny"),
    "untied qwen25": replace(c.qwen25_config("tiny"), tied_head=False),
    "biases": replace(c.get_config(2, 300), qkv_bias=True, linear_bias=True),
    "relu2 biases": replace(c.get_config(2, 300, mlp="relu2"), qkv_bias=True, linear_bias=True),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_parameter_count_is_the_models_own(name):
    text = TEXTS[name]
    named = dict(GhostVis(c.VLMConfig(text)).named_parameters())
    assert costs.text_params(text) == sum(p.numel() for p in named.values())
    vectors = sum(p.numel() for p in named.values() if p.ndim == 1)
    matrices = sum(p.numel() for n, p in named.items() if p.ndim > 1 and ".layers." in n)
    assert (costs.count_text(text).vectors, costs.count_text(text).matrices) == (vectors, matrices)


@pytest.mark.parametrize("size, published", [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512)])
def test_qwen25_has_the_published_number_of_parameters(size, published):
    assert costs.text_params(c.qwen25_config(size)) == published


@pytest.mark.parametrize("connector, tokens", [("perceiver", 9), ("avgpool", 9), ("pixel_shuffle", 9), ("mlp", 36)])
def test_a_model_with_eyes_is_counted_whole(connector, tokens):
    config = c.get_vlm_config(2, 300, encoder="tiny", connector=connector, tokens_per_image=tokens)
    assert costs.vlm_params(config) == sum(p.numel() for p in GhostVis(config).parameters())


def test_flops_are_six_per_multiplying_parameter_plus_attention():
    text = c.get_config(20)
    assert costs.flops_per_token(text, context=0) == 6 * (costs.text_params(text) - text.vocab_size * text.hidden_size)
    assert costs.flops_per_token(text) - costs.flops_per_token(text, 0) == 6 * 20 * 1280 * 2048
    assert costs.flops_per_token_nanochat(text) - costs.flops_per_token(text, 0) == 12 * 20 * 1280 * 2048


def test_a_tied_head_multiplies_and_an_idle_expert_does_not():
    tied = c.qwen25_config("tiny")
    assert costs.flops_per_token(tied) == costs.flops_per_token(replace(tied, tied_head=False))
    two, four = (c.get_config(2, 300, mlp="moe", num_experts=n, experts_per_token=2) for n in (2, 4))
    router = 6 * 2 * 2 * 128
    assert costs.flops_per_token(four) - costs.flops_per_token(two) == router
    assert costs.text_params(four) > costs.text_params(two)


def test_the_encoders_flops_count_every_product_of_every_patch():
    tiny = ENCODERS["tiny"]
    products = 3 * (4 * 128 * 128 + 2 * 128 * 384) + 3 * 8 * 8 * 128
    assert costs.vision_flops_per_image(tiny) == 2 * 36 * products + 3 * 4 * 36 * 36 * 128
    assert 0.36e12 < costs.vision_flops_per_image(ENCODERS["siglip2_l16_384"]) < 0.40e12


@pytest.mark.parametrize("connector, tokens", [("perceiver", 9), ("avgpool", 9), ("pixel_shuffle", 9), ("mlp", 36)])
def test_counted_flops_of_eyes_are_those_torch_counts(connector, tokens):
    from torch.utils.flop_counter import FlopCounterMode

    config = c.get_vlm_config(2, 300, encoder="tiny", connector=connector, tokens_per_image=tokens)
    model = GhostVis(config).eval()
    with FlopCounterMode(display=False) as encoder, torch.no_grad():
        patches = model.vision(torch.zeros(2, 3, 48, 48, dtype=torch.uint8))
    assert encoder.get_total_flops() == 2 * costs.vision_flops_per_image(config.vision)
    with FlopCounterMode(display=False) as connect, torch.no_grad():
        model.connector(patches)
    assert connect.get_total_flops() == 2 * costs.connector_flops_per_image(config.connector, config.vision, 128)


def test_a_step_counts_a_frozen_encoder_once_and_a_learning_one_three_times():
    config = c.get_vlm_config(2, 300, encoder="tiny", tokens_per_image=9)
    text = costs.step_flops(config, 100)
    assert text == 100 * costs.flops_per_token(config.text)
    frozen, learning = (costs.step_flops(config, 100, 5, train_encoder=flag) for flag in (False, True))
    assert learning - frozen == 5 * 2 * costs.vision_flops_per_image(config.vision)
    assert frozen > text


def test_inference_bytes_are_those_of_the_weights_the_tables_and_the_cache():
    config = c.get_vlm_config(2, 300, context_length=64, encoder="tiny", tokens_per_image=9)
    model = GhostVis(config).to(torch.bfloat16)
    cache = KVCache(config.text, 3, 64, "cpu", torch.bfloat16)
    held = sum(p.nbytes for p in model.parameters()) + cache.keys.nbytes + cache.values.nbytes
    tables = GhostVis(config).decoder  # float32, as in a model that was not cast
    held += tables.cos.nbytes + tables.sin.nbytes
    assert costs.inference_bytes(config, batch=3) == held
    assert costs.kv_bytes_per_token(config.text) * 3 * 64 == cache.keys.nbytes + cache.values.nbytes


def test_training_bytes_are_weights_gradients_and_the_state_of_both_optimizers():
    config = c.get_vlm_config(2, 300, encoder="tiny", tokens_per_image=9)
    held = 0
    for name, parameter in GhostVis(config).named_parameters():
        matrix = "decoder.layers." in name or (name.startswith("connector.") and not name.endswith("positions"))
        held += parameter.nbytes * (3 if matrix else 4)
    assert costs.training_bytes(config) == held
    frozen = costs.training_bytes(config, train_encoder=False)
    assert held - frozen == 12 * config.vision.num_params


def test_the_command_prints_exact_counts_without_importing_torch():
    code = (
        "import sys; from ghostvis_model.__main__ import main\n"
        "status = main(['params', '--depth', '20,48', '--qwen25'])\n"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "531,496,960" in done.stdout
    assert "1,543,714,304" in done.stdout


def test_the_command_names_an_illegal_depth(capsys):
    from ghostvis_model.__main__ import main

    assert main(["params", "--depth", "7"]) == 1
    assert "nearest are 6 and 8" in capsys.readouterr().err
    assert main(["params", "--depth", "x"]) == 1
