"""The fused vision forward is timm's arithmetic, follows every change of a weight, leaves the rest to timm."""

import copy
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from ghostvis_model import vision_fused
from ghostvis_model.encoders import ENCODERS
from ghostvis_model.vision import VisionTower
from ghostvis_model.vision_fused import FusedVision, why_not_this_encoder

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "mlp_size": 96}
SIGLIP = replace(ENCODERS["siglip_l16_384"], **SIZES)
CLIP = replace(ENCODERS["clip_vit_l14"], **SIZES)
TOWERS = {
    "siglip, tanh-GELU": SIGLIP,
    "clip: class token, a norm in front, quick-GELU": CLIP,
    "exact GELU": replace(SIGLIP, activation=""),
    "pixels that fill no patch": replace(SIGLIP, image_size=38),
    "registers without positions": replace(SIGLIP, timm_name="vit_base_patch16_reg4_gap_256", activation=""),
    "a width that is no power of two": replace(SIGLIP, hidden_size=72, num_heads=1),
}
every_tower = pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)


def tower_of(config, dtype=torch.float32):
    """A tower with random weights throughout: the zeros of a fresh one's biases would hide what is carried."""
    generator = torch.Generator().manual_seed(1)
    tower = VisionTower(config).eval().requires_grad_(False)
    for parameter in tower.parameters():
        parameter.normal_(std=0.3 if parameter.ndim == 1 else 0.15, generator=generator)
    return tower.to(dtype)


def pictures(config, count, device="cpu"):
    shape = (count, 3, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2)).to(device)


def exact(tower, images):
    """timm in float64, with the mean and std of the config."""
    encoder, config = copy.deepcopy(tower.encoder).double(), tower.config
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device=images.device).view(1, 3, 1, 1)
        for values in (config.mean, config.std)
    )
    return encoder.forward_features((images.double() / 255 - mean) / std)[:, encoder.num_prefix_tokens :]


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@every_tower
@pytest.mark.parametrize("count", [1, 5])
def test_it_is_timms_arithmetic(config, count):
    tower = tower_of(config).double()
    images = pictures(config, count)
    assert why_not_this_encoder(tower.encoder) is None
    found = FusedVision(tower, torch.float64, torch.float64)(images)
    assert error(found, exact(tower, images)) < 1e-12


@every_tower
def test_bfloat16_is_no_further_from_the_truth_than_timms(config):
    tower, images = tower_of(config, torch.bfloat16), pictures(config, 3)
    wanted = exact(tower, images)
    found = FusedVision(tower, torch.bfloat16, torch.bfloat16)(images)
    assert found.dtype == torch.bfloat16
    assert error(found, wanted) < 1.1 * error(tower(images), wanted) < 0.01


def test_float32_weights_are_cast_as_under_autocast():
    tower, images = tower_of(SIGLIP), pictures(SIGLIP, 3)
    found = FusedVision(tower, torch.bfloat16, torch.float32)(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert found.dtype == tower(images).dtype == torch.float32
    wanted = exact(tower, images)
    assert error(found, wanted) < 1.1 * error(tower.to(torch.bfloat16)(images), wanted) < 0.02


def test_no_picture_gives_no_patches():
    fused = FusedVision(tower_of(CLIP), torch.float32, torch.float32)
    assert fused(pictures(CLIP, 0)).shape == (0, 16, 64)


@pytest.fixture
def allowed(monkeypatch):
    """Everything but the encoder's own make is taken to be right, so that a CPU takes the path."""
    monkeypatch.setattr(vision_fused, "why_not", lambda tower, images: None)


def replace_module(tower):
    tower.encoder.blocks[1].mlp.fc2 = copy.deepcopy(tower.encoder.blocks[0].mlp.fc2)


def replace_parameter(tower):
    tower.encoder.blocks[0].norm1.weight = nn.Parameter(torch.full((64,), 0.5), requires_grad=False)


CHANGES = {
    "load_state_dict": lambda tower: tower.load_state_dict(
        {name: tensor * 0.9 for name, tensor in tower.state_dict().items()}
    ),
    "a step of an optimizer": lambda tower: tower.encoder.patch_embed.proj.weight.mul_(0.5),
    "another parameter": replace_parameter,
    "another module": replace_module,
    "a cast": lambda tower: tower.double(),
    "another activation": lambda tower: (
        setattr(tower.encoder.blocks[0].mlp, "act", nn.GELU()) or setattr(tower.encoder.blocks[1].mlp, "act", nn.GELU())
    ),
}


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_weights_is_seen(change):
    tower, images = tower_of(SIGLIP), pictures(SIGLIP, 2)
    before = tower(images)
    assert tower.path == "the fused forward in float32"
    folded = tower._chosen._fused
    tower(images)
    assert tower._chosen._fused is folded  # not folded at every call
    with torch.no_grad():
        change(tower)
    after = tower(images)
    assert tower.path.startswith("the fused forward")
    assert error(after, exact(tower, images)) < 1e-6
    assert not torch.equal(before.double(), after.double())


@pytest.mark.usefixtures("allowed")
def test_weights_folded_in_inference_mode_serve_a_training_step():
    tower, images = tower_of(CLIP), pictures(CLIP, 2)
    with torch.inference_mode():
        wanted = tower(images).clone()
    weight = torch.ones(64, requires_grad=True)
    found = tower(images)
    (found * weight).sum().backward()
    assert torch.equal(found, wanted)
    torch.testing.assert_close(weight.grad, found.sum((0, 1)))


@pytest.mark.usefixtures("allowed")
def test_a_copy_folds_its_own_weights():
    tower, images = tower_of(SIGLIP), pictures(SIGLIP, 2)
    wanted = tower(images)
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert other.path == ""
        with torch.no_grad():
            other.encoder.norm.weight.zero_()
        assert not torch.equal(other(images), wanted)
    assert torch.equal(tower(images), wanted)


def hooked(encoder):
    encoder.blocks[0].attn.register_forward_hook(lambda *_: None)


def squashed(encoder):
    encoder.blocks[1].mlp.act = nn.ReLU()


def mixed(encoder):
    encoder.blocks[1].mlp.act = nn.GELU()


def dropping(encoder):
    encoder.blocks[0].attn.proj_drop.p = 0.1


def adapted(encoder):
    class Adapter(nn.Linear):
        pass

    encoder.blocks[0].attn.qkv = Adapter(64, 192).requires_grad_(False)


UNKNOWN = {
    "hooks": hooked,
    "its act is a ReLU": squashed,
    "its blocks differ": mixed,
    "it has proj_drop": dropping,
    "its qkv is a Adapter": adapted,
}


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("reason", UNKNOWN)
def test_what_it_does_not_know_goes_through_timm_and_the_tower_says_why(reason):
    tower, images = tower_of(SIGLIP), pictures(SIGLIP, 1)
    UNKNOWN[reason](tower.encoder)
    found = tower(images)
    assert tower.path.startswith("timm's forward: ")
    assert reason in tower.path
    assert error(found, exact(tower, images)) < 1e-6


@pytest.mark.usefixtures("allowed")
def test_a_hook_of_later_is_called():
    tower, images, calls = tower_of(SIGLIP), pictures(SIGLIP, 1), []
    tower(images)
    assert tower.path.startswith("the fused forward")
    hook = tower.encoder.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    tower(images)
    assert calls == [1]
    hook.remove()
    tower(images)
    assert calls == [1]
    assert tower.path.startswith("the fused forward")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch14_dinov2", "ls1"),
        ("eva02_tiny_patch14_224", "Eva"),
        ("vit_small_patch16_36x1_224", "ls1"),
        ("vit_small_patch16_18x2_224", "it has a Parallel"),
        ("vit_little_patch16_reg1_gap_256", "ls1"),
    ],
)
def test_encoders_of_another_make_are_named(name, reason):
    with torch.device("meta"):
        encoder = timm.create_model(name, num_classes=0, global_pool="")
    assert re.search(reason, why_not_this_encoder(encoder) or "")


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_every_named_encoder_but_eva_is_of_a_make_it_knows(name):
    with torch.device("meta"):
        tower = VisionTower(ENCODERS[name])
    assert why_not_this_encoder(tower.encoder) == ("it is a Eva" if name == "eva_giant" else None)


def test_a_compiled_tower_is_timms_in_one_graph(allowed):
    tower, images = tower_of(SIGLIP), pictures(SIGLIP, 2)
    compiled = torch.compile(tower, backend="eager", fullgraph=True)
    assert error(compiled(images), exact(tower, images)) < 1e-6
    assert tower.path == ""


def test_the_path_is_logged_once(caplog):
    tower, images = tower_of(SIGLIP), pictures(SIGLIP, 1)
    with caplog.at_level("INFO", logger="ghostvis"):
        tower(images)
        tower(images)
    assert [record.getMessage() for record in caplog.records] == [f"vision: siglip_l16_384: {tower.path}"]


def test_weights_made_in_inference_mode_are_left_to_timm(allowed):
    with torch.inference_mode():
        tower = tower_of(SIGLIP)
        tower(pictures(SIGLIP, 1))
    assert "inference mode" in tower.path


def test_a_cpu_takes_timms_forward_bit_for_bit():
    tower, images = tower_of(SIGLIP), pictures(SIGLIP, 2)
    found = tower(images)
    assert tower.path == "timm's forward: the fused forward is for CUDA; the weights are on cpu"
    assert torch.equal(found, tower.encoder.forward_features((images.float() / 255 - tower.mean) / tower.std))


NORM = """
import torch
import torch.nn.functional as F
from ghostvis_model import vision_triton

generator = torch.Generator().manual_seed(0)
for rows, width in ((1, 64), (70, 72), (3, 1024), (2, 5000)):
    for dtype in (torch.float32, torch.bfloat16):
        for carries in (False, True):
            carried, weight, bias = torch.randn(3, width, generator=generator) * 3
            x = torch.randn(rows, width, generator=generator) * 3
            x = (x + 20).to(dtype)
            weight, bias, carried = weight.to(dtype), bias.to(dtype), carried if carries else None
            wide = x.float() if carried is None else x.float() + carried
            wanted = F.layer_norm(wide, (width,), weight.float(), bias.float(), 1e-6)
            for found in (torch.full((rows, width), float("nan")), torch.full_like(x, float("nan")), x):
                vision_triton.layer_norm(x, carried, weight, bias, 1e-6, found)
                near = 1e-5 if found.dtype == torch.float32 else 0.01
                torch.testing.assert_close(found.float(), wanted, rtol=near, atol=near)
print("norm")
"""

ATTENTION = """
import torch
from ghostvis_model import vision_triton

generator = torch.Generator().manual_seed(0)
for tokens in (50, 64, 129):
    for stretch in (1, 60):  # with 60 some scores are more than 69 above a token's own: computed again
        qkv = torch.randn(2 * tokens, 3 * 64, generator=generator)
        qkv[:, :64] *= stretch
        found = vision_triton.attention(qkv, tokens, 2)
        q, k, v = (part.view(2, tokens, 2, 32).transpose(1, 2) for part in qkv.split(64, 1))
        scores = q @ k.mT / 32**0.5
        above = (scores.amax(-1) - scores.diagonal(dim1=-2, dim2=-1)).max()
        assert bool(above > 70) == (stretch > 1), above
        wanted = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2 * tokens, 64)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
print("attention")
"""

PATCHES = """
import torch
from ghostvis_model import vision_fused, vision_triton

for count, size, grid, side in ((3, 38, 4, 9), (1, 38, 2, 16), (2, 32, 4, 8)):
    for images in (torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8),
                   torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)):
        wanted = vision_fused.patches(images, grid, side, torch.float32)
        assert wanted.shape == (count, grid * grid, 3 * side * side)
        assert torch.equal(vision_triton.patches(images, grid, side, torch.float32), wanted)
print("patches")
"""


def test_the_kernels_are_what_they_stand_for_in_plain_torch():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    program = NORM + ATTENTION + PATCHES  # one process: it takes longer to import than to compute
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout == "norm\nattention\npatches\n", done.stderr[-3000:]


# On CUDA, with heads of 64 that our attention takes, and others.

LARGE = {
    "siglip": replace(SIGLIP, hidden_size=128, num_heads=2, image_size=128),
    "clip": replace(CLIP, hidden_size=128, num_heads=2, image_size=96),
    "exact GELU": replace(SIGLIP, activation="", hidden_size=128, num_heads=2),
    "heads of 72": replace(SIGLIP, hidden_size=144, num_heads=2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("count", [1, 301])
@pytest.mark.parametrize("config", LARGE.values(), ids=LARGE)
def test_on_cuda_it_is_no_further_from_the_truth_than_timm(config, count, dtype):
    tower, images = tower_of(config, dtype).cuda(), pictures(config, count, "cuda")
    wanted = exact(tower, images)
    found = tower(images)
    assert tower.path == f"the fused forward in {str(dtype).removeprefix('torch.')}"
    pixels = (images.to(dtype) / 255 - tower.mean) / tower.std
    theirs = tower.encoder.forward_features(pixels)[:, tower.encoder.num_prefix_tokens :]
    assert found.dtype == theirs.dtype
    assert error(found, wanted) < 1.2 * error(theirs, wanted) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("stretch", [1, 60])  # with 60 some scores are far above a token's own: computed again
@pytest.mark.parametrize("tokens", [16, 145, 576])
def test_on_cuda_attention_is_no_further_from_the_truth_than_torchs(tokens, stretch, dtype):
    from ghostvis_model import vision_triton

    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(3 * tokens, 3 * 256, generator=generator)
    qkv[:, :256] *= stretch
    qkv = qkv.to("cuda", dtype)
    q, k, v = (part.view(3, tokens, 4, 64).transpose(1, 2) for part in qkv.split(256, 1))
    theirs = nn.functional.scaled_dot_product_attention(q, k, v)
    wanted = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    found = vision_triton.attention(qkv, tokens, 4).view(3, tokens, 4, 64).transpose(1, 2)
    assert error(found, wanted) < 1.2 * error(theirs, wanted) < 0.02


@pytest.mark.gpu
def test_on_cuda_a_frozen_tower_under_autocast_is_fused_and_a_learning_one_is_not():
    config = LARGE["siglip"]
    tower, images = tower_of(config).cuda().train(), pictures(config, 5, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = tower(images)
    assert tower.path == "the fused forward in bfloat16"
    assert found.dtype == torch.float32
    assert error(found, exact(tower, images)) < 0.01
    tower(images)
    assert "half precision" in tower.path
    tower.requires_grad_(True)
    with torch.autocast("cuda", torch.bfloat16):
        learning = tower(images)
    assert "learning" in tower.path
    assert learning.requires_grad
    torch.testing.assert_close(found, learning.detach(), rtol=0.1, atol=0.1)


@pytest.mark.gpu
def test_on_cuda_the_tiny_encoder_stays_with_timm():
    config = ENCODERS["tiny"]
    tower = tower_of(config, torch.bfloat16).cuda()
    tower(pictures(config, 2, "cuda"))
    assert "tiny" in tower.path
