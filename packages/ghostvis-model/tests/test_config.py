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


def test_a_config_survives_json_and_refuses_strangers():
    import json

    config = c.get_vlm_config(4, 512, encoder="tiny", tokens_per_image=9)
    data = json.loads(json.dumps(config.to_dict()))
    assert c.VLMConfig.from_dict(data) == config
    data["text"]["num_wheels"] = 8
    with pytest.raises(c.ConfigError, match="num_wheels"):
        c.VLMConfig.from_dict(data)
    del data["text"]["num_wheels"], data["text"]["num_heads"]
    with pytest.raises(c.ConfigError, match="num_heads"):
        c.VLMConfig.from_dict(data)


def test_a_checkpoint_from_before_a_field_existed_is_the_model_it_was():
    data = c.VLMConfig(c.get_config(4, 512)).to_dict()
    for newer in ("family", "mlp", "qk_norm", "norm_weight", "embedding_norm", "qkv_bias", "tied_head", "num_experts"):
        del data["text"][newer]
    assert c.VLMConfig.from_dict(data) == c.VLMConfig(c.get_config(4, 512))


@pytest.mark.parametrize("size, groups", [("0.5B", 7), ("1.5B", 6), ("7B", 7), ("tiny", 6)])
def test_qwen25_has_the_published_shapes(size, groups):
    text = c.qwen25_config(size)
    assert text.num_heads == groups * text.num_kv_heads
    assert text.head_dim * text.num_heads == text.hidden_size
    assert (text.rope_theta, text.qkv_bias, text.norm_weight, text.qk_norm) == (1e6, True, True, False)
    assert text.logit_softcap == 0
    assert text.tied_head == (size != "7B")
    assert (text.family, c.get_config(4).family) == ("qwen25", "ghost")


def test_an_unknown_qwen_size_is_refused_with_the_known_ones():
    with pytest.raises(c.ConfigError, match=r"1\.5B"):
        c.qwen25_config("3.14B")


def test_the_mlp_is_an_option_and_experts_share_the_width_of_a_dense_one():
    assert c.get_config(20, mlp="relu2").intermediate_size == 4 * 1280
    moe = c.get_config(20, mlp="moe", num_experts=8, experts_per_token=2)
    assert (moe.num_experts, moe.experts_per_token) == (8, 2)
    assert 0 <= 2 * moe.intermediate_size - 2.7 * 1280 < 2 * 128
    assert c.get_config(20, num_experts=8) == c.get_config(20)
    for typo in ({"mlp": "gelu"}, {"vocab_size": 0}, {"context_length": -1}):
        with pytest.raises(c.ConfigError):
            c.get_config(20, **typo)
    with pytest.raises(c.ConfigError, match="3 of 2 experts"):
        c.get_config(20, mlp="moe", num_experts=2, experts_per_token=3)


@pytest.mark.parametrize(
    "kind, tokens, nearest",
    [("mlp", 9, "36"), ("pixel_shuffle", 16, "9"), ("perceiver", 10, "9"), ("avgpool", 49, "36")],
)
def test_tokens_that_a_connector_cannot_make_are_refused_with_the_nearest_it_can(kind, tokens, nearest):
    with pytest.raises(c.ConfigError, match=f"nearest: {nearest}"):
        c.get_vlm_config(4, 512, encoder="tiny", connector=kind, tokens_per_image=tokens)


def test_an_unknown_connector_is_refused_with_the_known_ones():
    with pytest.raises(c.ConfigError, match="perceiver, avgpool, pixel_shuffle, mlp"):
        c.get_vlm_config(4, connector="percever")


def test_an_unknown_encoder_is_refused_with_the_known_ones():
    with pytest.raises(c.ConfigError, match="siglip2_l16_384"):
        c.get_vlm_config(4, encoder="siglip_h14")


@pytest.mark.parametrize(
    "encoder, size, nearest",
    [
        ("siglip2_l16_384", 450, "448, 464"),
        ("clip_vit_l14", 300, "294, 308"),
        ("siglip_so400m_14_384", 390, "392, 384"),
    ],
)
def test_an_impossible_picture_size_is_refused_with_the_nearest_possible(encoder, size, nearest):
    with pytest.raises(c.ConfigError, match=f"nearest  {nearest}"):
        c.get_vlm_config(4, 512, encoder=encoder, image_size=size)


def test_the_published_picture_size_needs_not_hold_whole_patches():
    assert c.get_vlm_config(4, 512, encoder="siglip_so400m_14_384", image_size=384).vision.num_patches == 27**2
    assert c.get_vlm_config(4, 512, encoder="siglip2_l16_384", image_size=448).vision.num_patches == 28**2
