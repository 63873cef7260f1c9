"""Llama 4: its experts are no module that Transformers' decorator marks, and all of them see all tokens."""

import torch

from ..nn.fused import StandIn, experts_mlp
from .family import Family


class Llama4Experts(StandIn):
    """Stands in for the `Llama4TextExperts` of Transformers."""

    model_type, stands_for = "llama4", "Llama4TextExperts"

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_experts * tokens, hidden_size] -> the same shape: every token once for each expert, multiplied by the
        router's score. Where that is 0, so is the result, and the expert is not read, but for a compiled graph."""
        rows = hidden_states.view(-1, self.hidden_size)
        indices = torch.arange(self.num_experts, device=rows.device).repeat_interleave(len(rows) // self.num_experts)
        if torch.compiler.is_compiling():
            return experts_mlp(self, rows, indices, sorted_indices=True).to(rows.dtype)
        chosen = rows.detach().any(-1).nonzero().squeeze(-1)
        y = experts_mlp(self, rows[chosen], indices[chosen], sorted_indices=True).to(rows.dtype)
        return torch.zeros_like(rows).index_copy(0, chosen, y)


class Llama4(Family):
    also = ("llama4_text",)
    experts = "feed_forward.experts"
    stand_in = Llama4Experts
