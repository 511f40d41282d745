"""Fused operations for language and vision-language models: Triton on GPUs, plain torch everywhere."""

from ghostvis_kernels import nn, optim
from ghostvis_kernels.attention import attention
from ghostvis_kernels.attention_decode import attention_decode
from ghostvis_kernels.backends import backends
from ghostvis_kernels.linear_cross_entropy import linear_cross_entropy
from ghostvis_kernels.linear_logprob import linear_logprob
from ghostvis_kernels.linear_policy_loss import linear_policy_loss
from ghostvis_kernels.newton_schulz import newton_schulz
from ghostvis_kernels.rms_norm import add_rms_norm, rms_norm
from ghostvis_kernels.rope import qk_norm_rope, rope
from ghostvis_kernels.swiglu import relu2, swiglu, swiglu_packed

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_decode",
    "backends",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_policy_loss",
    "newton_schulz",
    "nn",
    "optim",
    "qk_norm_rope",
    "relu2",
    "rms_norm",
    "rope",
    "swiglu",
    "swiglu_packed",
]
