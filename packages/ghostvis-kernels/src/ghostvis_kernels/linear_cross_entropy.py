"""Cross-entropy of a linear head without the full logits.

    logits = softcap * tanh(logit_scale * (x @ weight.T + bias) / softcap) / temperature
    loss_i = token_weight_i * ((1 - s) * (lse_i - logits_i[target_i]) + s * (lse_i - mean(logits_i)) + z_loss * lse_i^2)

with lse_i = logsumexp(logits_i) and s = label_smoothing. Rows are taken in chunks whose logits fit a workspace, and
the gradients of x, weight and bias are computed beside the loss, so that no chunk is computed twice (Hsu et al. 2024,
Liger Kernel, arXiv:2410.10989). The gradient of the weight is accumulated in fp32 over the chunks.
z-loss: Chowdhery et al. 2022 (PaLM, arXiv:2204.02311). Soft-cap: Gemma 2 (arXiv:2408.00118).
Shape letters: N tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostvis_kernels.linear_cross_entropy_chunks import Needs, Options, chunked_backward, chunked_forward
from ghostvis_kernels.registry import check_tensors, register, triton_path

AUX = ("lse", "entropy", "argmax")
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
) -> Tensor:
    """The meaning of `linear_cross_entropy` in plain torch with all logits in memory, differentiated by autograd."""
    acc = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x, weight, bias).to(acc) * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    valid = target != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, torch.where(valid, target, 0).unsqueeze(1)).squeeze(1)
    loss = lse - (1 - label_smoothing) * picked - label_smoothing * logits.mean(-1) + z_loss * lse.square()
    counts = valid.to(acc) if token_weight is None else token_weight.to(acc) * valid
    loss = torch.where(valid, loss, 0) * counts
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / torch.where(counts.sum() == 0, 1, counts.sum())


def _forward_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, token_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    options, needs = _unpack(*rest)
    return chunked_forward(x, weight, bias, target, token_weight, options, needs)


def _forward_fused() -> Callable[..., tuple[Tensor, ...]]:
    from ghostvis_kernels.linear_cross_entropy_triton import forward

    def run(x, weight, bias, target, token_weight, *rest):
        return forward(x, weight, bias, target, token_weight, *_unpack(*rest))

    return run


def _unpack(
    numbers: Sequence[float], ignore_index: int, reduction: str, workspace_bytes: int, aux: str, needs: Sequence[bool]
) -> tuple[Options, Needs]:
    return Options(ignore_index, reduction, *numbers, workspace_bytes, aux), Needs(*needs)


def _forward_shapes(x, weight, bias, target, token_weight, *rest):
    options, needs = _unpack(*rest)
    acc, rows = torch.promote_types(x.dtype, torch.float32), x.shape[0]
    per_token = options.reduction == "none"
    made = [need and not per_token for need in needs]
    return (
        x.new_empty((rows,) if per_token else (), dtype=acc),
        x.new_empty((), dtype=acc),
        x.new_empty(x.shape if made[0] else (0,)),
        x.new_empty(weight.shape if made[1] else (0,), dtype=acc),
        x.new_empty(weight.shape[:1] if made[2] else (0,), dtype=acc),
        x.new_empty(rows if per_token or "lse" in options.aux else 0, dtype=acc),
        x.new_empty(rows if "entropy" in options.aux else 0, dtype=acc),
        target.new_empty(rows if "argmax" in options.aux else 0),
    )


_forward_op = register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? token_weight, float[] numbers, "
    "int ignore_index, str reduction, int workspace_bytes, str aux, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_plain,
    _forward_fused,
    _forward_shapes,
)


def _backward_plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    numbers: Sequence[float],
    ignore_index: int,
    workspace_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    options, made = _unpack(numbers, ignore_index, "none", workspace_bytes, "", needs)
    return chunked_backward(x, weight, bias, target, token_weight, lse, grad, options, made)


def _backward_fused() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from ghostvis_kernels.linear_cross_entropy_triton import backward

    def run(x, weight, bias, target, token_weight, lse, grad, numbers, ignore_index, workspace_bytes, needs):
        options, made = _unpack(numbers, ignore_index, "none", workspace_bytes, "", needs)
        return backward(x, weight, bias, target, token_weight, grad, options, made)

    return run


def _backward_shapes(x, weight, bias, target, token_weight, lse, grad, numbers, ignore_index, workspace_bytes, needs):
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        x.new_empty(weight.shape if needs[1] else (0,), dtype=lse.dtype),
        x.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=lse.dtype),
    )


_backward_op = register(
    "linear_cross_entropy_backward(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? token_weight, "
    "Tensor lse, Tensor grad, float[] numbers, int ignore_index, int workspace_bytes, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_plain,
    _backward_fused,
    _backward_shapes,
)


scale_cast = register(
    "scale_cast(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    lambda x, scale, dtype: (x * scale).to(dtype),
    triton_path("linear_cross_entropy_triton", "scale_cast"),
    lambda x, scale, dtype: torch.empty_like(x, dtype=dtype),
)


class _LinearCrossEntropy(torch.autograd.Function):
    # The chunk loops are registered operators, opaque to torch.compile: one graph, and no loop unrolled into it.
    @staticmethod
    def forward(ctx, x, weight, bias, target, token_weight, options: Options, needs: Needs):
        numbers = list(options[2:7])
        loss, inverse, grad_x, grad_weight, grad_bias, lse, entropy, argmax = _forward_op(
            x, weight, bias, target, token_weight, numbers, options.ignore_index, options.reduction,
            options.workspace_bytes, options.aux, list(needs),
        )  # fmt: skip
        if options.reduction == "none":
            ctx.save_for_backward(x, weight, bias, target, token_weight, lse)
        else:
            ctx.save_for_backward(inverse, grad_x, grad_weight, grad_bias)
        ctx.options, ctx.needs = options, needs
        ctx.dtypes = (x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype)
        ctx.mark_non_differentiable(lse, entropy, argmax)
        return loss, lse, entropy, argmax

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_):
        wanted = list(zip(ctx.dtypes, ctx.needs, strict=True))
        if ctx.options.reduction == "none":
            options = ctx.options
            grads = _backward_op(
                *ctx.saved_tensors, grad, list(options[2:7]), options.ignore_index, options.workspace_bytes,
                list(ctx.needs),
            )  # fmt: skip
            cast = [g.to(dtype) if need else None for g, (dtype, need) in zip(grads, wanted, strict=True)]
        else:
            inverse, *grads = ctx.saved_tensors
            scale = grad * inverse
            cast = [scale_cast(g, scale, d) if need else None for g, (d, need) in zip(grads, wanted, strict=True)]
        return *cast, None, None, None, None


@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    return_: tuple[()] = (),
    workspace_bytes: int | None = None,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    return_: Sequence[str],
    workspace_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]: ...
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    return_: Sequence[str] = (),
    workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of `x @ weight.T` against `target`, chunk by chunk.

    Args:
        x: [N, D] fp32, bf16, fp16 or fp64.
        weight: [V, D], any floating dtype; cast once to the dtype of x, its gradient comes back in its own dtype.
        target: [N] int64 in [0, V), or `ignore_index`: no loss and no gradient. Checked on CPU; on CUDA only
            under GHOSTVIS_CHECK=1, because looking at them waits for the device.
        bias: [V] or None.
        ignore_index: the target of tokens that do not count.
        reduction: "sum"; "mean" over the counted tokens (over their weights when `token_weight` is given; 0 when none
            counts); or "none" for [N], which recomputes the logits in backward (one more matrix product).
        softcap: cap of the logits, 0 for none.
        z_loss: factor of lse^2.
        label_smoothing: share of the target spread evenly over the vocabulary.
        temperature: divides the capped logits.
        logit_scale: multiplies the logits before the cap.
        token_weight: [N] factor of each token's loss, no gradient.
        return_: which of "lse", "entropy" (nats) and "argmax" to return: [N] each, of the final logits, for ignored
            tokens too, no gradient.
        workspace_bytes: bound on the memory for logits; None for `workspace_for`'s choice, 1 to 2 GiB on CUDA.

    Under `torch.autocast` x and weight are cast to the autocast dtype. Saved for backward: the gradients themselves
    ([N, D], and [V, D] in fp32), or the inputs for "none". Not twice differentiable. Inputs are never written.

    Returns:
        the loss in fp32 (fp64 for fp64 input); with `return_`, (loss, {name: tensor}).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, or (on CPU) a target is out of range.
    """
    check_shapes("linear_cross_entropy", x, weight, target, bias)
    grad_on = torch.is_grad_enabled()
    needs = Needs(*(grad_on and t is not None and t.requires_grad for t in (x, weight, bias)))
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    workspace = workspace_for(x, weight) if workspace_bytes is None else workspace_bytes
    numbers = (softcap, z_loss, label_smoothing, temperature, logit_scale)
    options = Options(ignore_index, reduction, *numbers, workspace, " ".join(return_))
    _check(x, token_weight, options)
    loss, *aux = _LinearCrossEntropy.apply(x, weight, bias, target, token_weight, options, needs)
    if not return_:
        return loss
    found = dict(zip(AUX, aux, strict=True))
    return loss, {name: found[name] for name in return_}


def workspace_for(x: Tensor, weight: Tensor) -> int:
    """Bytes for the logits of 8,192 tokens, within 1 and 2 GiB; on CPU the cache sets a lower bound.

    Every chunk reads and writes the fp32 weight gradient once, 8 V D bytes beside 6 M V D operations. At V 151,936,
    1 GiB is 3,328 tokens a chunk and 2 GiB 6,656: 77.1 and 73.9 ms for 32k tokens (one H200).
    """
    return min(max(8192 * weight.shape[0] * x.element_size(), 1 << 30), 2 << 30)


def check_shapes(
    op: str, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, target_name: str = "target"
) -> None:
    """Raise ValueError unless x is [N, D], weight [V, D], target [N] int64 and bias [V] or None, all on one device."""
    check_tensors(op, (target_name,), x=x, weight=weight, bias=bias, **{target_name: target})
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"{op}: x is {tuple(x.shape)} and weight is {tuple(weight.shape)}; expected (N, D) and (V, D)")
    rows, vocabulary = x.shape[0], weight.shape[0]
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: weight (V, D) has D={weight.shape[1]} but x has D={x.shape[1]}")
    if target.shape != (rows,) or target.dtype != torch.int64:
        raise ValueError(f"{op}: {target_name} is {tuple(target.shape)} {target.dtype}; expected ({rows},) torch.int64")
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"{op}: bias is {tuple(bias.shape)}; expected ({vocabulary},)")


def check_numbers(op: str, temperature: float, softcap: float, workspace_bytes: int | None) -> None:
    """Raise ValueError for numbers that make no loss."""
    if temperature <= 0:
        raise ValueError(f"{op}: temperature is {temperature}; expected a number above 0")
    if softcap < 0:
        raise ValueError(f"{op}: softcap is {softcap}; expected a positive cap, or 0 for none")
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"{op}: workspace_bytes is {workspace_bytes}; expected a positive number, or None")


def _check(x: Tensor, token_weight: Tensor | None, options: Options) -> None:
    op, rows = "linear_cross_entropy", x.shape[0]
    check_tensors(op, ("token_weight",), x=x, token_weight=token_weight)
    check_numbers(op, options.temperature, options.softcap, options.workspace_bytes)
    if token_weight is not None and token_weight.shape != (rows,):
        raise ValueError(f"{op}: token_weight is {tuple(token_weight.shape)}; expected ({rows},)")
    if token_weight is not None and token_weight.requires_grad:
        raise ValueError(f"{op}: token_weight requires grad, but no gradient flows to it; pass token_weight.detach()")
    if options.reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {options.reduction!r}; expected one of {REDUCTIONS}")
    if unknown := [name for name in options.aux.split() if name not in AUX]:
        raise ValueError(f"{op}: return_ names {unknown}; expected names from {AUX}")
    if not 0 <= options.label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing is {options.label_smoothing}; expected 0 <= s < 1")
