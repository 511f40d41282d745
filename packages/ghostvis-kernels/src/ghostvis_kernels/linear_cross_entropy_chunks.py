"""The chunk loop behind `linear_cross_entropy`, in plain torch.

Shape letters: N tokens, M rows of a chunk, D model width, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ghostvis_kernels.registry import looks_at_numbers

# On CPU the buffers of a chunk stay in the last-level cache: V 8,192, D 256, 2,048 tokens, soft-cap, forward and
# backward take 430 ms at 32 MB, 577 at 2, 463 at 64, and 744 for logits in one piece (one core of an EPYC, torch 2.15).
CPU_WORKSPACE_BYTES = 32 << 20


class Options(NamedTuple):
    """The plain-number arguments of `linear_cross_entropy`, in its words."""

    ignore_index: int
    reduction: str
    softcap: float
    z_loss: float
    label_smoothing: float
    temperature: float
    logit_scale: float
    workspace_bytes: int
    aux: str  # names from `return_`, with spaces between


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weight: bool
    bias: bool


class Gradients:
    """Gradients of x, weight and bias, summed over chunks of logit gradients; unwanted ones stay empty."""

    def __init__(self, x: Tensor, weight: Tensor, needs: Needs) -> None:
        acc = torch.promote_types(x.dtype, torch.float32)
        start = torch.empty if x.shape[0] else torch.zeros
        shapes = (
            x.shape if needs.x else (0,),
            weight.shape if needs.weight else (0,),
            weight.shape[:1] if needs.bias else (0,),
        )
        self.x = start(shapes[0], dtype=x.dtype, device=x.device)
        self.weight = start(shapes[1], dtype=acc, device=x.device)
        self.bias = torch.zeros(shapes[2], dtype=acc, device=x.device)
        self.needs = needs

    def add(self, part: slice, x: Tensor, weight: Tensor, slope: Tensor) -> None:
        """Add the chunk whose logits have gradient `slope` [M, V], in fp32 or the dtype of x."""
        if self.needs.bias:
            self.bias += slope.sum(0, dtype=self.bias.dtype)
        slope = slope.to(x.dtype)
        if self.needs.x:
            torch.mm(slope, weight, out=self.x[part])
        if not self.needs.weight:
            return
        first = part.start == 0
        if slope.dtype == self.weight.dtype:
            torch.addmm(self.weight, slope.T, x[part], beta=0 if first else 1, out=self.weight)
        elif slope.is_cuda:  # the sum over the chunks stays inside the product, in fp32
            torch.addmm(
                self.weight, slope.T, x[part], beta=0 if first else 1, out_dtype=self.weight.dtype, out=self.weight
            )
        elif first:
            self.weight.copy_(torch.mm(slope.T, x[part]))
        else:
            self.weight += torch.mm(slope.T, x[part])


def chunked_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    options: Options,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and the gradients of its sum.

    Returns:
        (loss, inverse, grad_x, grad_weight, grad_bias, lse, entropy, argmax). `inverse` [] is what the gradients are
        still to be multiplied with: 1 / total for "mean", else 1, so that they do not underflow in fp16. Gradients not
        needed (all of them for "none") and aux not asked for are empty. lse is there for "none": backward reads it.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    rows, weight = x.shape[0], weight.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        counted = _counted_rows(target, options, weight.shape[0])
        if counted is not None:
            x, target = x.index_select(0, counted), target.index_select(0, counted)
            token_weight = None if token_weight is None else token_weight.index_select(0, counted)
        valid = target != options.ignore_index
        target = torch.where(valid, target, 0)
        factor = valid.to(acc) if token_weight is None else token_weight.to(acc) * valid
        gradients = Gradients(x, weight, needs if options.reduction != "none" else Needs(False, False, False))
        loss, lse = factor.new_empty(x.shape[0]), factor.new_empty(x.shape[0])
        entropy = factor.new_empty(x.shape[0] if "entropy" in options.aux else 0)
        argmax = target.new_empty(x.shape[0] if "argmax" in options.aux else 0)
        for part, logits, spare in _logit_chunks(x, weight, bias, options):
            chosen = logits.gather(1, target[part].unsqueeze(1)).squeeze(1)
            if "argmax" in options.aux:
                torch.argmax(logits, dim=-1, out=argmax[part])
            # The largest probability is at least 1 / V, so its logarithm loses nothing: cheaper than logsumexp.
            top = logits.amax(-1)
            probability = torch.softmax(logits, dim=-1, out=spare)
            chunk_lse = lse[part].copy_(top - probability.amax(-1).log_())
            if "entropy" in options.aux:
                entropy[part] = chunk_lse - torch.linalg.vecdot(probability, logits)
            row = chunk_lse - (1 - options.label_smoothing) * chosen
            if options.label_smoothing:
                row -= options.label_smoothing * logits.mean(-1)
            if options.z_loss:
                row += options.z_loss * chunk_lse.square()
            loss[part] = torch.where(valid[part], row, 0) * factor[part]
            if any(gradients.needs):
                slope = _logit_gradient(probability, logits, target[part], factor[part], chunk_lse, options)
                gradients.add(part, x, weight, slope)
        inverse = torch.ones((), dtype=acc, device=x.device)
        if options.reduction == "mean":
            total = factor.sum()
            inverse = 1 / torch.where(total == 0, 1, total)
        loss = loss if options.reduction == "none" else loss.sum() * inverse
        grad_x = gradients.x
        if counted is not None:
            loss = _spread(loss, counted, rows) if options.reduction == "none" else loss
            lse = _spread(lse, counted, rows)
            grad_x = _spread(grad_x, counted, rows) if gradients.needs.x else grad_x
        if options.reduction != "none" and "lse" not in options.aux:
            lse = lse.new_empty(0)
        return loss, inverse, grad_x, gradients.weight, gradients.bias, lse, entropy, argmax


def chunked_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    options: Options,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias for a gradient [N] of the token losses, from logits computed again."""
    rows, weight = x.shape[0], weight.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        counted = _counted_rows(target, options, weight.shape[0])
        if counted is not None:
            x, target, lse, grad = (t.index_select(0, counted) for t in (x, target, lse, grad))
            token_weight = None if token_weight is None else token_weight.index_select(0, counted)
        valid = target != options.ignore_index
        target = torch.where(valid, target, 0)
        factor = torch.where(valid, grad if token_weight is None else grad * token_weight, 0).to(lse.dtype)
        gradients = Gradients(x, weight, needs)
        for part, logits, spare in _logit_chunks(x, weight, bias, options):
            probability = torch.exp(torch.sub(logits, lse[part].unsqueeze(1), out=spare), out=spare)
            slope = _logit_gradient(probability, logits, target[part], factor[part], lse[part], options)
            gradients.add(part, x, weight, slope)
        grad_x = gradients.x
        if counted is not None and needs.x:
            grad_x = _spread(grad_x, counted, rows)
        return grad_x, gradients.weight, gradients.bias


def _logit_chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Options
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, final logits [M, V], spare buffer [M, V]) in fp32; both buffers are used again for the next chunk."""
    acc = torch.promote_types(x.dtype, torch.float32)
    rows, vocabulary = x.shape[0], weight.shape[0]
    size = _chunk_rows(rows, vocabulary, x, options.workspace_bytes)
    buffers = torch.empty(2, size, vocabulary, dtype=acc, device=x.device)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        logits, spare = buffers[0, : part.stop - start], buffers[1, : part.stop - start]
        if acc == x.dtype:
            torch.mm(x[part], weight.T, out=logits)
        else:
            logits.copy_(torch.mm(x[part], weight.T))
        if bias is not None:
            logits += bias
        if options.softcap:
            logits.mul_(options.logit_scale / options.softcap).tanh_().mul_(options.softcap / options.temperature)
        elif options.logit_scale != options.temperature:
            logits.mul_(options.logit_scale / options.temperature)
        yield part, logits, spare


def _chunk_rows(rows: int, vocabulary: int, x: Tensor, workspace_bytes: int) -> int:
    """Rows of a chunk: two fp32 buffers, and for half precision the product and the gradient beside them."""
    if not x.is_cuda:
        workspace_bytes = min(workspace_bytes, CPU_WORKSPACE_BYTES)
    bytes_per_logit = 2 * max(4, x.element_size()) + (4 if x.element_size() == 2 else 0)
    most = max(1, workspace_bytes // (vocabulary * bytes_per_logit))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))  # equal chunks: a short last one wastes the matrix units


def _logit_gradient(
    probability: Tensor, logits: Tensor, target: Tensor, factor: Tensor, lse: Tensor, options: Options
) -> Tensor:
    """Gradient [M, V] of the logits before scale, written over `probability`; `logits` is spent too."""
    factor = factor * (options.logit_scale / options.temperature)
    slope = factor * (1 + 2 * options.z_loss * lse) if options.z_loss else factor
    probability.mul_(slope.unsqueeze(1))
    if options.label_smoothing:
        probability.sub_((factor * (options.label_smoothing / logits.shape[1])).unsqueeze(1))
    probability.scatter_add_(1, target.unsqueeze(1), (factor * (options.label_smoothing - 1)).unsqueeze(1))
    if options.softcap:  # d tanh(u) = 1 - tanh(u)^2, and logits = softcap / temperature * tanh(u)
        logits.mul_(logits)
        probability.addcmul_(probability, logits, value=-((options.temperature / options.softcap) ** 2))
    return probability


def _counted_rows(target: Tensor, options: Options, vocabulary: int) -> Tensor | None:
    """Indices of the rows worth computing, or None for all. CPU only: on CUDA counting would wait for the device."""
    if target.is_cuda:
        check_targets(target, options.ignore_index, vocabulary, "linear_cross_entropy")
        return None
    valid = target != options.ignore_index
    counted = valid.nonzero().squeeze(1)
    chosen = target.index_select(0, counted)
    if chosen.numel() and (chosen.min() < 0 or chosen.max() >= vocabulary):
        check_targets(chosen, options.ignore_index, vocabulary, "linear_cross_entropy")
    return counted if counted.numel() < target.numel() and not options.aux else None


def check_targets(target: Tensor, ignore_index: int, vocabulary: int, op: str, name: str = "target") -> None:
    """Raise ValueError for a target outside [0, vocabulary) that is not ignore_index; on CUDA with GHOSTVIS_CHECK=1."""
    if not looks_at_numbers(target):
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= vocabulary))
    if wrong.any():
        raise ValueError(
            f"{op}: {name} holds {target[wrong][0].item()}, outside [0, {vocabulary}) and not "
            f"ignore_index={ignore_index}; the tokenizer and the head may disagree on the vocabulary"
        )


def _spread(rows: Tensor, index: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, index, rows)
