"""Attention whose output is kept, so that a layer that is computed again does not attend again."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Kept(NamedTuple):
    """What the backward pass of the fused kernel needs beside its inputs."""

    out_NHLd: Float[Tensor, "N H L d"]
    logsumexp_NHL: Float[Tensor, "N H L"]  # of the scores


class Attention(NamedTuple):
    """A call of scaled_dot_product_attention, with torch's arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def plain(self) -> Tensor:
        """By torch."""
        q, k, v, mask, dropout_p, is_causal, scale, enable_gqa = self
        return scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def is_fused(self) -> bool:
        """Whether torch would take the CPU's fused kernel, whose pieces are used here."""
        q, k, v, mask, dropout_p, is_causal, scale, enable_gqa = self
        if q.device.type != "cpu" or dropout_p or q.dim() != 4:
            return False
        if mask is not None and mask.requires_grad:
            return False
        choice = torch._fused_sdp_choice(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return bool(choice == SDPBackend.FLASH_ATTENTION.value)

    def compute(self) -> Kept:
        """Output and statistics; no graph."""
        out, logsumexp = _fused(
            *self[:3], 0.0, self.is_causal, attn_mask=self._bias(), scale=self.scale
        )
        return Kept(out, logsumexp)

    def differentiable(self, kept: Kept) -> Tensor:
        """The output that was kept, with its derivative."""
        out: Tensor = _Attention.apply(*self[:3], self, kept)  # type: ignore[no-untyped-call]
        return out

    def _bias(self) -> Tensor | None:
        """The mask as a term of the scores, which is what the kernel takes."""
        mask = self.attn_mask
        if mask is None or mask.dtype != torch.bool:
            return mask
        zero = torch.zeros((), dtype=self.query.dtype, device=mask.device)
        return torch.where(mask, zero, -torch.inf)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Attention, kept: Kept
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.call, ctx.kept = call, kept
        return kept.out_NHLd.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        call, (out, logsumexp) = ctx.call, ctx.kept
        grads = _fused_backward(
            grad,
            query,
            key,
            value,
            out,
            logsumexp,
            0.0,
            call.is_causal,
            attn_mask=call._bias(),
            scale=call.scale,
        )
        return *grads, None, None
