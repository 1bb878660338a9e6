"""Rows of a pass that need not be computed: at the U-Net's beginning those that are still equal, at its end those that
nobody reads on.

Belongs here: the two blocks where the number of rows changes. Not here: which rows those are, which a pass's reading
says (`m2m.models.image_set_attention`).
"""

from typing import Any

from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D
from torch import Tensor, nn


def spare_rows(unet: UNet2DConditionModel) -> None:
    """Change the first and the last block with Image-Set Attention of a U-Net, in place.

    Guidance's branches differ from the first Image-Set Attention on: the self-attention before it is computed for one
    of them. The clean stream (paper, section 5.1) is read for the last time by the last one: what comes after it (a
    feed-forward layer, a projection, the last convolution) is left out for clean images. A U-Net whose last block has
    no attention keeps its end.
    """
    # the same modules and tensors with another forward, so that names in files stay diffusers' own
    first = next((block for block in unet.down_blocks.modules() if type(block) is BasicTransformerBlock), None)
    if first is not None:
        first.__class__ = _FirstBlock
    last: Any = unet.up_blocks[-1]
    if isinstance(last, CrossAttnUpBlock2D) and last.upsamplers is None:
        transformer: Any = last.attentions[-1]
        transformer.__class__ = _LastTransformer
        transformer.transformer_blocks[-1].__class__ = _LastBlock


class _Block(BasicTransformerBlock):
    """diffusers' block as Stable Diffusion has it, where no part is left out."""

    norm2: nn.Module
    norm3: nn.Module
    attn2: nn.Module

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Any = None, *_, **__
    ) -> Tensor:
        hidden_states = self.attend_to_itself(hidden_states, encoder_hidden_states)
        read = self.attn2(self.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states)
        hidden_states = self.kept(read + hidden_states, encoder_hidden_states)
        return self.ff(self.norm3(hidden_states)) + hidden_states

    def attend_to_itself(self, hidden_states: Tensor, reading: Any) -> Tensor:
        return self.attn1(self.norm1(hidden_states)) + hidden_states

    def kept(self, hidden_states: Tensor, reading: Any) -> Tensor:
        return hidden_states


class _FirstBlock(_Block):
    def attend_to_itself(self, hidden_states: Tensor, reading: Any) -> Tensor:
        copies = reading.copies
        distinct = super().attend_to_itself(hidden_states[: len(hidden_states) // copies], reading)
        return distinct if copies == 1 else distinct.repeat(copies, 1, 1)


class _LastBlock(_Block):
    def kept(self, hidden_states: Tensor, reading: Any) -> Tensor:
        return reading.going_on(hidden_states)


class _LastTransformer(Transformer2DModel):
    """diffusers' transformer around blocks of which the last one leaves rows out."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, *size: Any, **sizes: Any
    ) -> Tensor:
        rows = hidden_states.shape[0]
        # those that go on are the last ones
        return super()._get_output_for_continuous_inputs(
            hidden_states, residual[residual.shape[0] - rows :], rows, *size, **sizes
        )


BLOCKS = (_FirstBlock.__name__, _LastBlock.__name__)
"""Names of the classes that stand in the place of a BasicTransformerBlock."""
