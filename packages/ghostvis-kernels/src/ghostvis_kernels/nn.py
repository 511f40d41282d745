"""Modules over the functions: each owns its weight, so that FSDP2 gathers it before the op and scatters its gradient.

Under `fully_shard` a weight is a plain tensor inside the forward of the module that owns it, and a DTensor outside. A
head weight passed around by hand meets the op as a DTensor, which raises; shard `LinearCrossEntropy` instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ghostvis_kernels.linear_cross_entropy import linear_cross_entropy
from ghostvis_kernels.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """`rms_norm` with its weight, and `add_rms_norm` where a residual is given.

    Args:
        width: D, size of the last dimension.
        eps: added to the mean square.
        zero_centered: the scale is 1 + weight, and weight starts at 0.
        affine: False for no weight.
    """

    def __init__(self, width: int, eps: float = 1e-6, zero_centered: bool = False, affine: bool = True) -> None:
        super().__init__()
        if zero_centered and not affine:
            raise ValueError("RMSNorm: zero_centered=True needs a weight; got affine=False")
        self.eps, self.zero_centered = eps, zero_centered
        self.weight = nn.Parameter(torch.empty(width)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The scale is 1."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., D] -> [..., D]; with a residual of the same shape (y, residual + x)."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, self.zero_centered)
        if self.zero_centered:
            raise ValueError("RMSNorm: zero_centered=True takes no residual; add it first, or use zero_centered=False")
        return add_rms_norm(x, residual, self.weight, self.eps)


class LinearCrossEntropy(nn.Module):
    """The head and its loss, without the full logits: `linear_cross_entropy` with its weight.

    Args:
        width: D, model width.
        vocabulary: V, rows of the head.
        bias: whether the head has one.
        ignore_index, reduction, softcap, z_loss, label_smoothing: as in `linear_cross_entropy`.
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        bias: bool = False,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        softcap: float = 0.0,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.ignore_index, self.reduction, self.softcap = ignore_index, reduction, softcap
        self.z_loss, self.label_smoothing = z_loss, label_smoothing
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.bias = nn.Parameter(torch.empty(vocabulary)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 1/sqrt(D), bias zero."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, target: Tensor, token_weight: Tensor | None = None, return_: Sequence[str] = ()
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """x [N, D], target int64 [N] -> the loss; (loss, {name: [N]}) where `return_` names auxiliary outputs."""
        if not return_:
            return linear_cross_entropy(
                x, self.weight, target, self.bias, ignore_index=self.ignore_index, reduction=self.reduction,
                softcap=self.softcap, z_loss=self.z_loss, label_smoothing=self.label_smoothing,
                token_weight=token_weight,
            )  # fmt: skip
        return linear_cross_entropy(
            x, self.weight, target, self.bias, ignore_index=self.ignore_index, reduction=self.reduction,
            softcap=self.softcap, z_loss=self.z_loss, label_smoothing=self.label_smoothing, token_weight=token_weight,
            return_=return_,
        )  # fmt: skip

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V] soft-capped logits in fp32, for sampling."""
        logits = nn.functional.linear(x, self.weight, self.bias).float()
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
