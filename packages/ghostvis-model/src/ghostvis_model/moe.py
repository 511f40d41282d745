"""A mixture of SwiGLU experts: a router picks some of them for every token (Shazeer et al. 2017, arXiv 1701.06538).

The chosen experts' outputs are weighted by a softmax over their own scores (Mixtral, arXiv 2401.04088); no token is
dropped. N tokens, D model width, F width of an expert, E experts, k experts of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostvis_kernels import swiglu
from ghostvis_model.config import TextConfig


class MixtureOfExperts(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.hidden_size, config.intermediate_size
        self.experts_per_token = config.experts_per_token
        self.router = nn.Linear(width, experts, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] -> ([..., D], balance loss, float32 scalar: 1 when all experts are used alike, at most E)."""
        tokens = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):  # rounded scores send tokens to other experts
            scores = F.linear(tokens.float(), self.router.weight.float())
        best, chosen = scores.topk(self.experts_per_token, dim=-1)  # [N, k]
        weights = best.softmax(-1)
        order = chosen.flatten().argsort(stable=True)  # assignments, sorted by expert
        token = order // self.experts_per_token
        counts = F.one_hot(chosen.flatten(), scores.shape[1]).sum(0)  # bincount has no static shape under compile
        out = self._experts(tokens[token], counts) * weights.flatten()[order, None].to(x.dtype)
        mixed = torch.zeros_like(tokens, dtype=out.dtype).index_add(0, token, out)
        share = counts / chosen.numel()
        balance = scores.shape[1] * (share * scores.softmax(-1).mean(0)).sum()
        return mixed.view_as(x), balance

    def _experts(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N*k, D], sorted by expert, `counts` int64 [E] of each -> [N*k, D]."""
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, *weights = (t.to(dtype) for t in (x, *weights))
        gate, up, down = weights
        if x.is_cuda and x.dtype == torch.bfloat16:  # one kernel for all experts, and nothing waits for the device
            ends = counts.cumsum(0).to(torch.int32)
            hidden = swiglu(F.grouped_mm(x, gate.mT, offs=ends), F.grouped_mm(x, up.mT, offs=ends))
            return F.grouped_mm(hidden, down.mT, offs=ends)
        parts = x.split(counts.tolist())
        done = [
            F.linear(swiglu(F.linear(part, gate[i]), F.linear(part, up[i])), down[i]) for i, part in enumerate(parts)
        ]
        return torch.cat(done)
