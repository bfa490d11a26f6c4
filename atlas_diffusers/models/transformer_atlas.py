"""A diffusion transformer over patches, made of Diffusers' blocks."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import Attention, FeedForward
from diffusers.models.attention_processor import HunyuanAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxTransformerBlock
from diffusers.utils import apply_lora_scale
from torch import nn

from .network import AtlasNetwork

TEXT_ATTENTION = ("cross", "joint")
TIME_FEATURES = 256
ROTARY_BASE = 100  # of the longest wavelength, in patches: pictures have tens of patches a side, texts thousands of words

Rotary = tuple[torch.Tensor, torch.Tensor]


class AtlasTransformerBlock(nn.Module):
    """Self-attention with rotary positions, cross-attention to the text, and a feed-forward layer, gated by the timestep."""

    def __init__(self, width: int, num_heads: int, cross_attention_dim: int | None, dropout: float):
        super().__init__()
        heads = {"heads": num_heads, "dim_head": width // num_heads, "qk_norm": "rms_norm", "bias": True, "dropout": dropout}
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        rotary = HunyuanAttnProcessor2_0()
        self.attn1 = Attention(width, processor=rotary, **heads)  # pyright: ignore[reportArgumentType]: it takes any processor
        self.attn2 = None if cross_attention_dim is None else Attention(width, cross_attention_dim, **heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(width, dropout=dropout, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor | None, modulation: torch.Tensor, rotary: Rotary
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (batch, patches, width).
            context: text states, (batch, tokens, cross_attention_dim).
            modulation: shift, scale and gate of attention and of the feed-forward layer, (batch, 6, width).
            rotary: cosines and sines of the positions.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.scale_shift_table).unsqueeze(2).unbind(1)
        normed = self.norm1(hidden_states) * (1 + scale1) + shift1
        hidden_states = hidden_states + gate1 * self.attn1(normed, image_rotary_emb=rotary)
        if self.attn2 is not None:
            hidden_states = hidden_states + self.attn2(hidden_states, context)
        normed = self.norm2(hidden_states) * (1 + scale2) + shift2
        return hidden_states + gate2 * self.ff(normed)


class AtlasTransformer2DModel(AtlasNetwork):
    r"""
    Transformer that predicts noise, velocity or data; the options that are not named here are those of every
    :class:`AtlasNetwork`.

    Patches are tokens with rotary positions in two directions, so a sample may have any size. The timestep scales, shifts and
    gates every block (adaLN-zero: a new network's blocks are the identity, and its prediction is zero). Peebles & Xie 2022
    (arXiv 2212.09748); one modulation for all blocks with `cross` (Chen et al. 2023, arXiv 2310.00426), one a block with
    `joint` (Esser et al. 2024, arXiv 2403.03206). Called like :class:`AtlasUNet2DModel`.

    Args:
        width: of the hidden states.
        num_layers: blocks.
        num_heads: attention heads; ``width / num_heads`` must be a multiple of 4.
        patch_size: side of a patch.
        text_attention: `cross`: every block attends to the text; `joint`: patches and words attend to each other.
        dropout: dropout probability, with `cross`.

    Raises:
        ValueError: for widths, heads or text options that do not fit each other.
    """

    _no_split_modules = ["AtlasTransformerBlock", "FluxTransformerBlock"]
    _repeated_blocks = ["AtlasTransformerBlock", "FluxTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 256,
        num_layers: int = 6,
        num_heads: int = 4,
        patch_size: int = 2,
        cross_attention_dim: int | None = None,
        text_attention: str = "cross",
        addition_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        dropout: float = 0.0,
        num_resolutions: int = 1,
    ):
        super().__init__()
        self._check_config()
        joint = text_attention == "joint"
        head = width // num_heads
        self._build_conditions(TIME_FEATURES, width)
        self.pos_embed = FluxPosEmbed(ROTARY_BASE, [head // 2, head // 2])
        self.proj_in = nn.Linear(in_channels * patch_size**2, width)
        self.context_embedder = nn.Linear(self.config.cross_attention_dim, width) if joint else None
        self.modulation = None if joint else nn.Linear(width, 6 * width)
        self.transformer_blocks = nn.ModuleList(
            FluxTransformerBlock(width, num_heads, head)
            if joint
            else AtlasTransformerBlock(width, num_heads, cross_attention_dim, dropout)
            for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(width, out_channels * patch_size**2)
        self._start_at_zero()

    def _check_config(self) -> None:
        super()._check_config()
        c = self.config
        if c.width % (4 * c.num_heads):
            raise ValueError(f"width={c.width} must be a multiple of 4 * num_heads={4 * c.num_heads}")
        if c.text_attention not in TEXT_ATTENTION:
            raise ValueError(f"text_attention={c.text_attention!r}; allowed are {TEXT_ATTENTION}")
        if c.cross_attention_dim is None and (c.text_attention == "joint" or c.addition_embed_type):
            raise ValueError("text_attention='joint' and addition_embed_type='text' need cross_attention_dim, got None")
        if c.text_attention == "joint" and c.dropout:
            raise ValueError(f"dropout={c.dropout} has no effect with text_attention='joint'")

    def _start_at_zero(self) -> None:
        gates: list[nn.Module] = [self.proj_out, self.norm_out.linear]
        gates += [] if self.modulation is None else [self.modulation]
        for block in self.transformer_blocks:
            if isinstance(block, FluxTransformerBlock):
                gates += [block.norm1.linear, block.norm1_context.linear]
            elif isinstance(block, AtlasTransformerBlock) and block.attn2 is not None:
                gates.append(block.attn2.get_submodule("to_out.0"))
        for layer in gates:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    @property
    def size_multiple(self) -> int:
        return self.config.patch_size

    @property
    def reads_text(self) -> bool:
        return self.config.cross_attention_dim is not None

    def positions(self, height: int, width: int, words: int, device: torch.device) -> Rotary:
        """Rotations of ``words`` words, which have none, and of height x width patches: ``(tokens, head)`` each."""
        rows, columns = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        patches = torch.stack([rows.flatten(), columns.flatten()], dim=1)
        return self.pos_embed(torch.cat([patches.new_zeros(words, 2), patches]))

    @apply_lora_scale("cross_attention_kwargs")
    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        attention_kwargs: dict | None = None,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            sample: noisy input ``x_t``, ``(batch, in_channels, height, width)``.
            timestep: ``t`` in ``[0, num_train_timesteps]``, a number or ``(batch,)``.
            encoder_hidden_states: text states, ``(batch, tokens, cross_attention_dim)``.
            class_labels: integer labels, ``(batch,)``.
            attention_kwargs, cross_attention_kwargs: ``{"scale": s}`` scales LoRA layers during this call; both names
                exist because Diffusers' pipelines use the second.
            return_dict: return an output object instead of a tuple.

        Returns:
            The prediction, ``(batch, out_channels, height, width)``.

        Raises:
            ValueError: for shapes that do not fit, or conditioning that the network needs.
        """
        self.check_inputs(sample, encoder_hidden_states)
        p = self.config.patch_size
        height, width = sample.shape[2] // p, sample.shape[3] // p
        emb = self.embed(sample, timestep, encoder_hidden_states, class_labels)
        hidden = self.proj_in(F.pixel_unshuffle(sample, p).flatten(2).transpose(1, 2))
        if self.modulation is not None:
            modulation = self.modulation(F.silu(emb)).unflatten(1, (6, -1))
            rotary = self.positions(height, width, 0, sample.device)
            context = encoder_hidden_states if self.reads_text else None
            for block in self.transformer_blocks:
                hidden = self._run(block, hidden, context, modulation, rotary)
        if self.context_embedder is not None:
            words = self.context_embedder(encoder_hidden_states)
            rotary = self.positions(height, width, words.shape[1], sample.device)
            for block in self.transformer_blocks:
                words, hidden = self._run(block, hidden, words, emb, rotary)
        hidden = self.proj_out(self.norm_out(hidden, emb))
        output = F.pixel_shuffle(hidden.transpose(1, 2).unflatten(2, (height, width)), p)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
