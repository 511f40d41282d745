"""Sizes and costs: the depth dial, the encoder table, strict reading."""

import pytest

from ghostvis_model import config as c


@pytest.mark.parametrize("depth, heads, kv_heads, width", [(20, 10, 5, 1280), (32, 16, 8, 2048), (48, 24, 12, 3072)])
def test_the_depth_dial_gives_the_settled_shapes(depth, heads, kv_heads, width):
    text = c.get_config(depth)
    assert (text.num_heads, text.num_kv_heads, text.hidden_size) == (heads, kv_heads, width)
    assert text.intermediate_size % 128 == 0
    assert 0 <= text.intermediate_size - 2.7 * width < 128
    assert text.head_dim * text.num_heads == width


@pytest.mark.parametrize("depth", range(2, 50, 2))
def test_every_even_depth_is_a_whole_model(depth):
    text = c.get_config(depth)
    assert text.num_heads == 2 * text.num_kv_heads
    assert text.head_dim == (128 if depth % 4 == 0 else 64)


@pytest.mark.parametrize("depth, nearest", [(0, "2 and 4"), (-3, "2 and 4"), (1, "2 and 4"), (7, "6 and 8")])
def test_an_illegal_depth_is_refused_with_the_nearest_legal_ones(depth, nearest):
    with pytest.raises(c.ConfigError, match=nearest):
        c.get_config(depth)


def test_the_parameter_count_is_the_models_own():
    from ghostvis_model.vlm import GhostVis

    for depth, vocab in ((2, 300), (4, 512), (6, 1000)):
        text = c.get_config(depth, vocab)
        assert c.text_params(text) == sum(p.numel() for p in GhostVis(c.VLMConfig(text)).parameters())


def test_flops_are_six_per_multiplying_parameter_plus_attention():
    text = c.get_config(20)
    assert c.flops_per_token(text, context=0) == 6 * (c.text_params(text) - text.vocab_size * text.hidden_size)
    assert c.flops_per_token(text) - c.flops_per_token(text, 0) == 6 * 20 * 1280 * 2048


def test_the_encoders_flops_count_every_product_of_every_patch():
    tiny = c.ENCODERS["tiny"]
    products = 3 * (4 * 128 * 128 + 2 * 128 * 384) + 3 * 8 * 8 * 128
    assert c.vision_flops_per_image(tiny) == 2 * 36 * products + 3 * 4 * 36 * 36 * 128
    assert 0.36e12 < c.vision_flops_per_image(c.ENCODERS["siglip2_l16_384"]) < 0.40e12


def test_a_config_survives_json_and_refuses_strangers():
    import json

    config = c.get_vlm_config(4, 512, encoder="tiny", tokens_per_image=9)
    data = json.loads(json.dumps(config.to_dict()))
    assert c.VLMConfig.from_dict(data) == config
    data["text"]["num_experts"] = 8
    with pytest.raises(c.ConfigError, match="num_experts"):
        c.VLMConfig.from_dict(data)
    del data["text"]["num_experts"], data["text"]["num_heads"]
    with pytest.raises(c.ConfigError, match="num_heads"):
        c.VLMConfig.from_dict(data)


@pytest.mark.parametrize(
    "kind, tokens, nearest",
    [("mlp", 9, "36"), ("pixel_shuffle", 16, "9"), ("perceiver", 10, "9"), ("avgpool", 49, "36")],
)
def test_tokens_that_a_connector_cannot_make_are_refused_with_the_nearest_it_can(kind, tokens, nearest):
    with pytest.raises(c.ConfigError, match=f"nearest: {nearest}"):
        c.get_vlm_config(4, 512, encoder="tiny", connector=kind, tokens_per_image=tokens)


def test_an_unknown_encoder_is_refused_with_the_known_ones():
    with pytest.raises(c.ConfigError, match="siglip2_l16_384"):
        c.get_vlm_config(4, encoder="siglip_h14")


def test_the_encoder_table_says_what_timm_builds():
    from dataclasses import replace

    from ghostvis_model.vision import VisionTower, read_vision_config

    for name, config in c.ENCODERS.items():
        if name == "tiny":
            built = sum(p.numel() for p in VisionTower(config).parameters())
            assert built == config.num_params
        else:
            assert replace(read_vision_config(f"timm:{config.timm_name}"), encoder=name) == config


def test_an_old_encoder_name_loads_what_it_says(caplog):
    from ghostvis_model.vision import vision_config

    assert vision_config("siglip_vit_l14").encoder == "siglip2_l16_384"
    assert "siglip2_l16_384" in caplog.text
