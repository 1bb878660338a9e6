"""Where the clean stream ends: after the last Image-Set Attention has read it, nobody does (paper, section 5.1).

Belongs here: the end of the U-Net, from its last attention on, over fewer rows than it began with. Not here: what a
pass reads and which rows go on (`m2m.models.image_set_attention`).
"""

from typing import Any

from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D
from torch import Tensor


def end_clean_stream(unet: UNet2DConditionModel) -> None:
    """Let a U-Net with Image-Set Attention go on from its last attention with the rows that are read on, in place.

    What comes after it (a feed-forward layer, a projection, the last convolution) is left out for the others. A U-Net
    whose last block has no attention stays as it is.
    """
    last = unet.up_blocks[-1]
    if not isinstance(last, CrossAttnUpBlock2D) or last.upsamplers is not None:
        return
    transformer: Any = last.attentions[-1]
    # the same modules and tensors with another forward, so that names in files stay diffusers' own
    transformer.__class__ = _EndingTransformer
    transformer.transformer_blocks[-1].__class__ = _EndingBlock


class _EndingBlock(BasicTransformerBlock):
    """diffusers' block as Stable Diffusion has it; its result has only the rows that go on."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Any = None, *_, **__
    ) -> Tensor:
        hidden_states = self.attn1(self.norm1(hidden_states)) + hidden_states
        read = self.attn2(self.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states)
        hidden_states = encoder_hidden_states.going_on(read + hidden_states)
        return self.ff(self.norm3(hidden_states)) + hidden_states


class _EndingTransformer(Transformer2DModel):
    """diffusers' transformer around blocks of which the last one leaves rows out."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, *size: Any, **sizes: Any
    ) -> Tensor:
        rows = hidden_states.shape[0]
        # those that go on are the last ones
        return super()._get_output_for_continuous_inputs(
            hidden_states, residual[residual.shape[0] - rows :], rows, *size, **sizes
        )
