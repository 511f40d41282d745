"""The forward of a frozen vision transformer on a GPU, written out: what timm computes, in fewer passes over memory.

Of the 51 ms that a compiled SigLIP-L/16-384 of timm takes for 64 images (bf16, one H200, torch 2.11, 2026-11-21), 5.4
are passes of the GELU, 3.8 residual sums and norms, 2.1 the patches. Here

- the pixels less 128 are whole numbers that half precision holds exactly; mean, std and 255 are folded into the weight
  of the patches, and what they shift into the positions, with which the sum of that product starts;
- residual sums are made by the products themselves (beta = 1). They leave their biases out: the biases of all layers
  so far are one vector, and the LayerNorm that reads the sum adds it in fp32;
- tanh-GELU is the epilogue of its product (cuBLASLt); the exact GELU and quick-GELU are one pass each;
- attention over heads of 64 is a kernel of our own on sm_90, straight from the product of q, k and v (vision_triton).

`VisionTower` takes this path by itself where `why_not` and `why_not_this_encoder` have nothing against it.

Shape letters: I images, S side in pixels, p side of a patch in pixels, P patches, T tokens (prefix tokens and patches),
W vision width, F MLP width, H heads, h head size.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import GELU, GELUTanh, PatchEmbed, QuickGELU
from timm.models.vision_transformer import Attention, Block, Mlp, VisionTransformer
from torch import Tensor, nn

from ghostvis_kernels import attention
from ghostvis_kernels.registry import takes_triton

if TYPE_CHECKING:
    from ghostvis_model.vision import VisionTower

HALF = (torch.bfloat16, torch.float16)
QUICK = 1.702  # quick_gelu(x) = x sigmoid(1.702 x) = silu(1.702 x) / 1.702: both factors go into the products


# What is covered.


def why_not(tower: VisionTower, images: Tensor) -> str | None:
    """Why this call cannot take the fused path, whatever the encoder is made of; None where it can."""
    weight = next(tower.encoder.parameters())
    if not weight.is_cuda:
        return f"the fused forward is for CUDA; the weights are on {weight.device}"
    if tower.config.encoder == "tiny":
        return "the tiny encoder's 36 patches are too little work to gain by it"
    if not takes_triton(weight):
        return "the fused forward needs triton, sm_80 and GHOSTVIS_KERNELS other than ref"
    if type(weight.data) is not Tensor:
        return f"the weights are a {type(weight.data).__name__}"
    if images.device != weight.device:
        return f"the pictures are on {images.device}, the weights on {weight.device}"
    dtype, _ = dtypes(weight)
    if dtype not in HALF:
        return f"the fused forward is for half precision (weights or autocast); this is {dtype}"
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.encoder.parameters()):
        return "the encoder is learning; the fused forward has no gradient"
    return None


def dtypes(weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the products, dtype of the patches), as timm has them: under autocast its last norm gives float32."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind), torch.float32
    return weight.dtype, weight.dtype


def why_not_this_encoder(encoder: nn.Module) -> str | None:
    """What this encoder of timm has that the fused forward does not know; None if nothing.

    Known: `VisionTransformer` with plain blocks (LayerNorm, qkv, MLP), class token, registers, positions added at the
    start and a norm before the blocks; exact, tanh- and quick-GELU. Everything else in it must do nothing.
    """
    if type(encoder) is not VisionTransformer:
        return f"it is a {type(encoder).__name__}"
    for name, module in encoder.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the encoder'} has hooks, which the fused forward would not call"
    for name, parameter in encoder.named_parameters():
        if parameter.is_inference():
            return f"{name} was made in inference mode, where a change of it cannot be seen"
    if encoder.dynamic_img_size:
        return "its picture size is dynamic"
    blocks: Any = encoder.blocks
    for block in blocks:
        if type(block) is not Block:
            return f"it has a {type(block).__name__}"
    for inside, known in _expected(encoder):
        for name, module in inside.named_children():
            if name in known:
                if not known[name](module):
                    return f"its {name} is a {type(module).__name__} that the fused forward does not know"
            elif not _does_nothing(module):
                return f"it has {name} ({type(module).__name__}) in a {type(inside).__name__}"
    width, side = encoder.embed_dim, encoder.patch_embed.patch_size[0]
    shapes = {(b.attn.qkv.out_features, b.attn.num_heads, _activation(b.mlp.act)) for b in blocks}
    if len(shapes) != 1 or min(shapes)[0] != 3 * width or encoder.patch_embed.proj.kernel_size != (side, side):
        return f"its blocks differ, its heads are not {width} wide together, or its patches are not square"
    return None


def _expected(encoder: Any) -> Any:
    """(module, what each child that counts must be); other children must do nothing."""

    def kind(wanted: type) -> Any:
        return lambda module: type(module) is wanted

    def norm(module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None

    unused = dict.fromkeys(("fc_norm", "head", "head_drop", "attn_pool"), lambda module: True)
    first = {
        "patch_embed": kind(PatchEmbed),
        "norm_pre": lambda module: norm(module) or _does_nothing(module),
        "blocks": kind(nn.Sequential),
        "norm": norm,
    }
    yield encoder, first | unused
    yield encoder.patch_embed, {"proj": kind(nn.Conv2d)}
    for block in encoder.blocks:
        yield block, {"norm1": norm, "attn": kind(Attention), "norm2": norm, "mlp": kind(Mlp)}
        yield block.attn, {"qkv": kind(nn.Linear), "proj": kind(nn.Linear)}
        yield block.mlp, {"fc1": kind(nn.Linear), "act": _activation, "fc2": kind(nn.Linear)}


def _does_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)


def _activation(act: nn.Module) -> str | None:
    """gelu, gelu_tanh or quick_gelu; None for another."""
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]
    return {GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}.get(type(act))


# The weights as they are used.


class Norm(NamedTuple):
    """A LayerNorm and what is to be added to the residual stream before it."""

    carried: Tensor | None
    """fp32 [W]: the biases that the products before it left out."""
    weight: Tensor
    bias: Tensor
    eps: float


class Layer(NamedTuple):
    """One block; matrices [out, in] are the encoder's own where it is in half precision already."""

    norm1: Norm
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    norm2: Norm
    up: Tensor
    up_bias: Tensor | None
    down: Tensor


class FusedVision:
    """The fused forward of a tower, with the weights that are folded for it. They do not follow the tower's.

    Any device and dtype: on a CPU the same arithmetic runs in plain torch, which is how the tests compare it with timm.
    """

    def __init__(self, tower: VisionTower, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        """dtype: of the products and the residual stream. out_dtype: of the patches."""
        encoder, config = tower.encoder, tower.config
        self._acc = torch.promote_types(dtype, torch.float32)  # fp64 for fp64
        self._out_dtype, self._grid, self._patch = out_dtype, config.grid, config.patch_size
        self._prefix, self._heads = encoder.num_prefix_tokens, encoder.blocks[0].attn.num_heads
        size = config.hidden_size // self._heads
        self._activation = _activation(encoder.blocks[0].mlp.act)
        self._stretch = QUICK if self._activation == "quick_gelu" else 1.0
        weight = encoder.patch_embed.proj.weight.detach()
        mean, std = (torch.tensor(v, dtype=self._acc, device=weight.device) for v in (config.mean, config.std))
        # Heads of 64 on sm_90: 0.216 ms against cuDNN's 0.321 for 64 images (see vision_triton); the whole of one image
        # 4.3 ms against 5.0. Not measured elsewhere.
        self._ours = weight.is_cuda and size == 64 and torch.cuda.get_device_capability(weight.device)[0] == 9
        weight = weight.to(self._acc) / (255 * std).view(1, 3, 1, 1)
        shift = (weight * (128 - 255 * mean).view(1, 3, 1, 1)).sum((1, 2, 3))
        self._patches = weight.flatten(1).to(dtype)  # [W, 3 p p]
        self._start = _start(encoder, shift).to(dtype)  # [T, W]
        carried = None
        self._norm_pre = None
        if isinstance(encoder.norm_pre, nn.LayerNorm):
            self._norm_pre = _norm(encoder.norm_pre, None)
        self._layers: list[Layer] = []
        for block in encoder.blocks:
            attn, mlp = block.attn, block.mlp
            norm1 = _norm(block.norm1, carried)
            carried = self._plus(carried, attn.proj.bias)
            norm2 = _norm(block.norm2, carried)
            carried = self._plus(carried, mlp.fc2.bias)
            qkv, out, up, down = (_cast(m.weight, dtype) for m in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
            up_bias = None if mlp.fc1.bias is None else (mlp.fc1.bias.detach() * self._stretch).to(dtype)
            self._layers.append(Layer(norm1, qkv, _cast(attn.qkv.bias, dtype), out, norm2, up, up_bias, down))
        self._norm = _norm(encoder.norm, carried)

    def _plus(self, carried: Tensor | None, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return carried
        bias = bias.detach().to(self._acc)
        return bias if carried is None else carried + bias

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [I, 3, S, S] -> [I, P, W]."""
        count, width = images.shape[0], self._start.shape[1]
        if count == 0:
            return images.new_empty(0, self._grid**2, width, dtype=self._out_dtype)
        here = torch.cuda.device(images.device) if images.is_cuda else nullcontext()  # for Triton's launches
        with here, torch.autocast(images.device.type, enabled=False):
            x = self._embed(images)
            for layer in self._layers:
                self._attend(x, layer)
                self._think(x, layer)
            y = torch.empty_like(x, dtype=self._out_dtype)
            layer_norm(x, self._norm, y)
        return y.view(count, -1, width)[:, self._prefix :]

    def _embed(self, images: Tensor) -> Tensor:
        """The residual stream [I*T, W] before the first block."""
        count = images.shape[0]
        pixels = patches(images, self._grid, self._patch, self._start.dtype)
        x = self._start.repeat(count, 1, 1)
        if self._prefix:
            x[:, self._prefix :].baddbmm_(pixels, self._patches.T.expand(count, -1, -1))
        else:
            x.flatten(0, 1).addmm_(pixels.flatten(0, 1), self._patches.T)
        x = x.flatten(0, 1)
        if self._norm_pre is not None:
            layer_norm(x, self._norm_pre, x)
        return x

    def _attend(self, x: Tensor, layer: Layer) -> None:
        """x [I*T, W] += attention of its norm, without the bias of the last product."""
        h = torch.empty_like(x)
        layer_norm(x, layer.norm1, h)
        h = h @ layer.qkv.T if layer.qkv_bias is None else torch.addmm(layer.qkv_bias, h, layer.qkv.T)
        x.addmm_(self._mix(h, len(self._start)), layer.out.T)

    def _mix(self, qkv: Tensor, tokens: int) -> Tensor:
        """[I*T, 3 W] -> [I*T, W], attention within each image."""
        if self._ours:
            from ghostvis_model import vision_triton  # here: it imports triton

            return vision_triton.attention(qkv, tokens, self._heads)
        q, k, v = qkv.view(-1, tokens, 3, self._heads, qkv.shape[1] // (3 * self._heads)).unbind(2)
        return attention(q, k, v, causal=False).reshape(len(qkv), -1)

    def _think(self, x: Tensor, layer: Layer) -> None:
        """x [I*T, W] += MLP of its norm, without the bias of the last product."""
        h = torch.empty_like(x)
        layer_norm(x, layer.norm2, h)
        if self._activation == "gelu_tanh" and h.is_cuda and layer.up_bias is not None:
            # On CUDA this is the tanh form, as an epilogue: 0.530 ms against 0.457 and a pass of 0.171 (64 images, one
            # H200). On a CPU it is the exact GELU.
            h = torch._addmm_activation(layer.up_bias, h, layer.up.T, use_gelu=True)
        else:
            if layer.up_bias is None:
                h = torch.mm(h, layer.up.T) * self._stretch
            else:
                h = torch.addmm(layer.up_bias, h, layer.up.T, alpha=self._stretch)
            if self._activation == "quick_gelu":
                h = F.silu(h, inplace=True)
            else:
                h = F.gelu(h, approximate="tanh" if self._activation == "gelu_tanh" else "none")
        x.addmm_(h, layer.down.T, alpha=1 / self._stretch)


def layer_norm(x: Tensor, norm: Norm, y: Tensor) -> None:
    """Write the LayerNorm of x [R, W] + norm.carried to y [R, W], which may be x: Triton on CUDA, else plain torch."""
    if x.is_cuda:
        from ghostvis_model import vision_triton  # here: it imports triton

        vision_triton.layer_norm(x, norm.carried, norm.weight, norm.bias, norm.eps, y)
        return
    acc = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(acc) if norm.carried is None else x.to(acc) + norm.carried
    y.copy_(F.layer_norm(wide, wide.shape[-1:], norm.weight.to(acc), norm.bias.to(acc), norm.eps))


def patches(images: Tensor, grid: int, side: int, dtype: torch.dtype) -> Tensor:
    """uint8 [I, 3, S, S] -> [I, P, 3 p p], each value less 128; pixels that fill no patch are left out, as timm does.

    Triton on CUDA, else plain torch.
    """
    if images.is_cuda:
        from ghostvis_model import vision_triton  # here: it imports triton

        return vision_triton.patches(images, grid, side, dtype)
    whole = images[:, :, : grid * side, : grid * side]
    cut = whole.unflatten(3, (grid, side)).unflatten(2, (grid, side)).permute(0, 2, 4, 1, 3, 5)
    return cut.to(dtype).sub_(128).flatten(1, 2).flatten(2)


def _norm(module: Any, carried: Tensor | None) -> Norm:
    return Norm(carried, module.weight.detach(), module.bias.detach(), module.eps)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor.detach().to(dtype)


def _start(encoder: Any, shift: Tensor) -> Tensor:
    """What the residual stream [T, W] is before any pixel: prefix tokens, positions, biases; dtype of shift."""
    patches = shift.expand(encoder.patch_embed.num_patches, -1)
    if encoder.patch_embed.proj.bias is not None:
        patches = patches + encoder.patch_embed.proj.bias.detach()
    positions = 0 if encoder.pos_embed is None else encoder.pos_embed.detach()[0].to(shift.dtype)
    tokens = (encoder.cls_token, encoder.reg_token)
    prefix = [token.detach()[0].to(shift.dtype) for token in tokens if token is not None]
    if encoder.no_embed_class:
        return torch.cat([*prefix, patches + positions])
    return torch.cat([*prefix, patches]) + positions


# Which path, and when to fold again.


class Chosen:
    """The path that a tower takes, and the fused forward while it holds."""

    def __init__(self) -> None:
        self.path = ""
        """In words, with the reason; of the last call."""
        self._dtypes: tuple[torch.dtype, torch.dtype] | None = None
        self._seen: Snapshot | None = None
        self._fused: FusedVision | str = ""  # or why there is none for what was seen

    def forward_of(self, tower: VisionTower, images: Tensor) -> FusedVision | None:
        """The fused forward for this call; None where timm's has to be taken, and then `path` says why."""
        reason = why_not(tower, images)
        if reason is None:
            wanted = dtypes(next(tower.encoder.parameters()))
            if self._seen is None or self._dtypes != wanted or not self._seen.holds(tower.encoder):
                against = why_not_this_encoder(tower.encoder)
                with torch.inference_mode(False):  # what is folded may be used outside of it, too
                    self._fused = FusedVision(tower, *wanted) if against is None else against
                self._dtypes, self._seen = wanted, Snapshot(tower.encoder)
            if isinstance(self._fused, FusedVision):
                self.path = f"the fused forward in {str(wanted[0]).removeprefix('torch.')}"
                return self._fused
            reason = self._fused
        self.path = f"timm's forward: {reason}"
        return None


class Snapshot:
    """An encoder's modules, weights and hooks as they were, to see at each call whether anything has changed.

    Not seen is `weight.data.copy_`, of which torch keeps no count. A look takes 0.11 ms for the 540 modules of a
    SigLIP-L on one EPYC core.
    """

    def __init__(self, encoder: nn.Module) -> None:
        modules = list(encoder.modules())
        self._encoder = encoder
        self._children = [module._modules for module in modules]
        self._weights = [module._parameters for module in modules]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [vars(module) for module in modules]
        self._counted = [weight for weight in encoder.parameters() if not weight.is_inference()]
        self._found = self._look()

    def holds(self, encoder: nn.Module) -> bool:
        """Whether everything is still as it was."""
        if encoder is not self._encoder:
            return False
        (objects, numbers), (before, numbers_before) = self._look(), self._found
        same = len(objects) == len(before) and all(map(operator.is_, objects, before))
        return same and numbers == numbers_before

    def _look(self) -> tuple[list[Any], list[Any]]:
        """What is compared by identity, and what by value."""
        children = [child for inside in self._children for child in inside.values()]
        weights = [weight for own in self._weights for weight in own.values()]
        places = [weight.data_ptr() for weight in weights if weight is not None]
        versions = [weight._version for weight in self._counted]
        forwards = ["forward" in attributes for attributes in self._attributes]
        return children + weights, [places, versions, forwards, [len(hooks) for hooks in self._hooks]]
