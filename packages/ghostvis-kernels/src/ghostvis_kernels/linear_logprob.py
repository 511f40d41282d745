"""Log-probabilities of ids under a linear head, for scoring and for reinforcement learning.

    logits = softcap * tanh(logit_scale * (x @ weight.T + bias) / softcap) / temperature
    logp_i = logits_i[ids_i] - logsumexp(logits_i)

Shape letters: N tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor

from ghostvis_kernels.linear_cross_entropy import check_numbers, check_shapes, linear_cross_entropy
from ghostvis_kernels.linear_cross_entropy_chunks import check_targets


def linear_logprob(
    x: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Log-probability of each id under the head: `-linear_cross_entropy(..., reduction="none")`.

    On Hopper and later, in bf16 or fp16, no logits are written: the tiles of the product are reduced where they are
    made. Elsewhere they pass through the workspace chunk by chunk. Backward computes them again, chunk by chunk.

    Args:
        x: [N, D].
        weight: [V, D].
        ids: [N] int64; `ignore_index` gives 0 and no gradient.
        bias, softcap, temperature, logit_scale, workspace_bytes: as in `linear_cross_entropy`.

    Returns:
        [N] fp32, differentiable with respect to x, weight and bias. Entropy and lse come from `linear_cross_entropy`
        with `reduction="none", return_=("entropy", "lse")`, at the same cost.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    op = "linear_logprob"  # what follows would speak of a target
    check_shapes(op, x, weight, ids, bias, "ids")
    check_numbers(op, temperature, softcap, workspace_bytes)
    if not torch.compiler.is_compiling():
        check_targets(ids, ignore_index, weight.shape[0], op, "ids")
    return -linear_cross_entropy(
        x, weight, ids, bias, ignore_index=ignore_index, reduction="none", softcap=softcap, temperature=temperature,
        logit_scale=logit_scale, workspace_bytes=workspace_bytes,
    )  # fmt: skip
