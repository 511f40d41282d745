"""The eyes: the table is timm's, weights of either layout give transformers' patches, sizes fit or are refused."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ghostvis_model import encoders
from ghostvis_model.config import get_vlm_config
from ghostvis_model.encoders import ENCODERS, VisionConfig, with_image_size
from ghostvis_model.errors import ConfigError
from ghostvis_model.vision import VisionTower, load_encoder_weights, read_vision_config, vision_config
from ghostvis_model.weights import CheckpointError

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "mlp_size": 96}
SIGLIP = replace(ENCODERS["siglip_l16_384"], **SIZES)
CLIP = replace(ENCODERS["clip_vit_l14"], **SIZES)
PICTURES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def theirs(kind):
    """A vision tower of transformers as small as SIZES, every weight of which matters."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}VisionConfig")(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    tower = getattr(transformers, f"{kind}VisionModel")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 1 else 0.15, generator=generator)
    return tower


def normalised(config: VisionConfig):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    return (PICTURES / 255 - mean) / std


@pytest.mark.parametrize("layout", ["folder", "file", "in a model with text", "named as by transformers 4"])
@torch.inference_mode()
def test_siglip_of_transformers_gives_the_same_patches(layout, tmp_path):
    reference = theirs("Siglip")
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    source = tmp_path / "weights.safetensors"
    if layout == "folder":
        reference.save_pretrained(source := tmp_path / "siglip")
    elif layout == "file":
        save_file(state, source)
    elif layout == "in a model with text":
        text = {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 4), "logit_scale": torch.zeros(1)}
        save_file({**{f"vision_model.{name}": tensor for name, tensor in state.items()}, **text}, source)
    else:
        positions = {"vision_model.embeddings.position_ids": torch.arange(16)[None]}
        save_file({**{f"vision_model.{name}": tensor for name, tensor in state.items()}, **positions}, source)
    tower = VisionTower(SIGLIP).eval()
    load_encoder_weights(tower, str(source))
    expected = reference(normalised(SIGLIP)).last_hidden_state
    torch.testing.assert_close(tower(PICTURES), expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_clip_of_transformers_gives_the_same_patches(tmp_path):
    reference = theirs("CLIP")
    reference.save_pretrained(tmp_path)
    tower = VisionTower(CLIP).eval()
    load_encoder_weights(tower, str(tmp_path))
    hidden = reference(normalised(CLIP)).last_hidden_state
    norm = getattr(reference, "vision_model", reference).post_layernorm  # transformers applies it to the class token
    torch.testing.assert_close(tower(PICTURES), norm(hidden[:, 1:]), rtol=0, atol=1e-5)


def test_timms_own_names_and_a_checkpoint_of_ours_fill_a_tower(tmp_path):
    tower, other = VisionTower(SIGLIP), VisionTower(SIGLIP)
    save_file(tower.encoder.state_dict(), tmp_path / "timm.safetensors")
    load_encoder_weights(other, str(tmp_path / "timm.safetensors"))
    assert torch.equal(tower(PICTURES), other(PICTURES))
    torch.save(tower.encoder.state_dict(), tmp_path / "timm.pt")
    load_encoder_weights(VisionTower(SIGLIP), str(tmp_path / "timm.pt"))
    ours = {f"vision.{name}": tensor for name, tensor in tower.state_dict().items()}
    save_file({**ours, "connector.positions": torch.zeros(3)}, tmp_path / "vision.safetensors")
    load_encoder_weights(again := VisionTower(SIGLIP), str(tmp_path / "vision.safetensors"))
    assert torch.equal(tower(PICTURES), again(PICTURES))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"weights": print}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="never run"):
        load_encoder_weights(VisionTower(SIGLIP), str(tmp_path / "evil.pt"))


def test_weights_that_do_not_fit_are_listed(tmp_path):
    state = VisionTower(SIGLIP).encoder.state_dict()
    state["blocks.9.surplus"] = state.pop("norm.weight")
    state["patch_embed.proj.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"missing\s+norm\.weight") as error:
        load_encoder_weights(VisionTower(SIGLIP), str(tmp_path / "w.safetensors"))
    assert "blocks.9.surplus" in str(error.value)
    assert "patch_embed.proj.bias [3] instead of [64]" in str(error.value)
    with pytest.raises(CheckpointError, match="no such file"):
        load_encoder_weights(VisionTower(SIGLIP), str(tmp_path / "none.safetensors"))


def test_published_weights_that_cannot_be_had_are_named(monkeypatch):
    import timm

    def offline(name, **_):
        raise FileNotFoundError("no connection")

    tower = VisionTower(SIGLIP)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"weights of vit_large_patch16_siglip_384\.webli could not be"):
        load_encoder_weights(tower, "hub")


def test_a_renamed_weight_of_transformers_is_refused_with_its_name(tmp_path):
    state = {name: tensor.clone() for name, tensor in theirs("Siglip").state_dict().items()}
    key = next(name for name in state if name.endswith("layers.1.self_attn.k_proj.bias"))
    state[f"{key}_old"] = state.pop(key)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.bias"):
        load_encoder_weights(VisionTower(SIGLIP), str(tmp_path / "w.safetensors"))


def test_a_naflex_file_is_refused_with_what_to_take(tmp_path):
    state = {"vision_model.embeddings.patch_embedding.weight": torch.zeros(64, 192)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="NaFlex"):
        load_encoder_weights(VisionTower(SIGLIP), str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("config", [SIGLIP, CLIP], ids=["siglip", "clip with its class token"])
def test_weights_of_another_picture_size_are_interpolated_and_say_so(config, tmp_path, caplog):
    tower = VisionTower(config)
    prefix = tower.encoder.num_prefix_tokens
    with torch.no_grad():  # positions that rise from left to right and from top to bottom
        ramp = torch.arange(4.0)[:, None] * 10 + torch.arange(4.0)
        tower.encoder.pos_embed[0, prefix:] = ramp.flatten()[:, None]
    save_file(tower.encoder.state_dict(), tmp_path / "w.safetensors")
    larger = VisionTower(with_image_size(config, 64))
    load_encoder_weights(larger, str(tmp_path / "w.safetensors"))
    assert "4 x 4 are interpolated to 8 x 8" in caplog.text.replace("patches ", "")
    positions = larger.encoder.pos_embed[0, prefix:].view(8, 8, -1)
    assert torch.all(positions[1:] > positions[:-1])
    assert torch.all(positions[:, 1:] > positions[:, :-1])
    assert torch.equal(larger.encoder.pos_embed[:, :prefix], tower.encoder.pos_embed[:, :prefix])
    assert larger(PICTURES.repeat(1, 1, 2, 2)).shape == (2, 64, 64)


def test_the_encoder_table_says_what_timm_builds():
    for name, config in ENCODERS.items():
        if name == "tiny":
            assert sum(p.numel() for p in VisionTower(config).parameters()) == config.num_params
        else:
            published = read_vision_config(f"timm:{config.timm_name}")
            assert replace(published, encoder=name, activation=config.activation) == config


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_every_named_encoder_takes_448_pixels_and_is_counted_at_them(name):
    config = vision_config(name, 448)
    with torch.device("meta"):
        tower = VisionTower(config)
    assert sum(p.numel() for p in tower.parameters()) == config.num_params
    assert tower.encoder.patch_embed.num_patches == config.num_patches == (448 // config.patch_size) ** 2
    assert vision_config(name) == ENCODERS[name]


def test_any_plain_vision_transformer_of_timm_is_read_at_any_size_it_can_take():
    small = vision_config("timm:vit_small_patch16_224", 448)
    assert (small.image_size, small.num_patches, small.hidden_size) == (448, 784, 384)
    assert vision_config("timm:vit_small_patch16_224", 224) == vision_config("timm:vit_small_patch16_224")
    rotary = vision_config("timm:eva02_tiny_patch14_224", 448)
    with torch.device("meta"):
        tower = VisionTower(rotary)
    assert sum(p.numel() for p in tower.parameters()) == rotary.num_params
    with pytest.raises(ConfigError, match="nearest  448, 464"):
        vision_config("timm:vit_small_patch16_224", 450)
    with pytest.raises(ConfigError, match="timm has no model"):
        vision_config("timm:vit_unheard_of")
    with pytest.raises(ConfigError, match="timm has no model"):
        VisionTower(replace(SIGLIP, timm_name="vit_of_a_newer_timm"))
    with pytest.raises(ConfigError, match="vision transformers"):
        vision_config("timm:resnet18")


def test_an_old_encoder_name_says_once_what_it_loads(caplog):
    encoders._today.cache_clear()
    for config in (get_vlm_config(2, encoder="siglip_vit_l14").vision, vision_config("siglip_vit_l14")):
        assert config == ENCODERS["siglip2_l16_384"]
    assert [record.message for record in caplog.records] == [
        "encoder siglip_vit_l14 is an old name: loading siglip2_l16_384"
    ]


def test_the_published_so400m_drops_what_does_not_fill_a_patch():
    tower = VisionTower(replace(ENCODERS["siglip_so400m_14_384"], **{**SIZES, "image_size": 36})).eval()
    assert tower(torch.zeros(1, 3, 36, 36, dtype=torch.uint8)).shape == (1, 16, 64)
