"""The score network: a conditional 2-D UNet made of Diffusers' blocks."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from .network import AtlasNetwork


class AtlasUNetBlock(nn.Module):
    """A residual block followed, where the level asks for it, by a transformer over the pixels of the feature map."""

    def __init__(self, in_channels: int, out_channels: int, resnet: dict, transformer: dict | None):
        super().__init__()
        self.resnet = ResnetBlock2D(in_channels=in_channels, out_channels=out_channels, **resnet)
        self.transformer = None
        if transformer is not None:
            heads = transformer["num_attention_heads"]
            self.transformer = Transformer2DModel(
                attention_head_dim=out_channels // heads, in_channels=out_channels, **transformer
            )

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        hidden_states = self.resnet(hidden_states, temb)
        if self.transformer is not None:
            hidden_states = self.transformer(hidden_states, encoder_hidden_states=context, return_dict=False)[0]
        return hidden_states


class AtlasUNet2DModel(AtlasNetwork):
    r"""
    UNet that predicts noise, velocity or data; the options that are not named here are those of every :class:`AtlasNetwork`.

    Called like :class:`diffusers.UNet2DConditionModel`, so Diffusers' pipelines accept it. Attention runs through
    ``scaled_dot_product_attention``; no token-by-token matrix is stored. Structure: Ho et al. 2020 (arXiv 2006.11239)
    and Dhariwal & Nichol 2021 (arXiv 2105.05233).

    Args:
        base_channels: width of the first level; level ``i`` has ``base_channels * channel_mult[i]`` channels.
        channel_mult: one factor a level; each level after the first halves the resolution.
        num_res_blocks: residual blocks a level on the way down (one more on the way up).
        attention_levels: indices of the levels with self-attention.
        cross_attention_levels: indices of the levels that attend to ``encoder_hidden_states``.
        num_heads: attention heads; must divide the width of every attention level.
        patch_size: space-to-depth factor: pixels of a ``patch_size`` square become channels.
        dropout: dropout probability in the residual blocks and transformers.
        norm_num_groups: groups of every group norm; must divide every level's width.
        time_cond_proj_dim: width of ``timestep_cond`` (guidance embedding of distilled models), or ``None``.

    Raises:
        ValueError: for widths, levels or heads that do not fit each other.
    """

    _no_split_modules = ["AtlasUNetBlock", "BasicTransformerBlock", "ResnetBlock2D"]
    _repeated_blocks = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        base_channels: int = 64,
        channel_mult: tuple[int, ...] = (1, 2, 2),
        num_res_blocks: int = 2,
        attention_levels: tuple[int, ...] = (1, 2),
        cross_attention_levels: tuple[int, ...] = (),
        num_heads: int = 4,
        cross_attention_dim: int | None = None,
        addition_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        patch_size: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        time_cond_proj_dim: int | None = None,
        num_resolutions: int = 1,
    ):
        super().__init__()
        self._check_config()
        widths = [base_channels * m for m in channel_mult]
        time_dim = 4 * base_channels
        self._build_conditions(base_channels, time_dim, time_cond_proj_dim)
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)
        self._build_levels(widths, time_dim)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], out_channels * patch_size**2, 3, padding=1)

    def _check_config(self) -> None:
        super()._check_config()
        c = self.config
        levels = range(len(c.channel_mult))
        widths = [c.base_channels * m for m in c.channel_mult]
        for name in ("attention_levels", "cross_attention_levels"):
            if unknown := [i for i in getattr(c, name) if i not in levels]:
                raise ValueError(f"{name} has {unknown}; the levels of channel_mult={c.channel_mult} are {list(levels)}")
        if bad := [w for w in widths if w % c.norm_num_groups]:
            raise ValueError(f"level widths {bad} are not divisible by norm_num_groups={c.norm_num_groups}")
        attending = sorted({*c.attention_levels, *c.cross_attention_levels, levels[-1]})
        if bad := [widths[i] for i in attending if widths[i] % c.num_heads]:
            raise ValueError(f"attention widths {bad} are not divisible by num_heads={c.num_heads}")
        if (c.cross_attention_levels or c.addition_embed_type) and c.cross_attention_dim is None:
            raise ValueError("cross_attention_levels and addition_embed_type='text' need cross_attention_dim, got None")

    def _build_levels(self, widths: list[int], time_dim: int) -> None:
        c = self.config
        resnet = {
            "temb_channels": time_dim,
            "groups": c.norm_num_groups,
            "eps": 1e-5,
            "dropout": c.dropout,
            "time_embedding_norm": "scale_shift",
        }

        def block(level: int, channels: int) -> AtlasUNetBlock:
            self_attention, cross_attention = level in c.attention_levels, level in c.cross_attention_levels
            transformer = {
                "num_attention_heads": c.num_heads,
                "norm_num_groups": c.norm_num_groups,
                "use_linear_projection": True,
                "dropout": c.dropout,
                "cross_attention_dim": c.cross_attention_dim if cross_attention else None,
                "only_cross_attention": cross_attention and not self_attention,
            }
            return AtlasUNetBlock(channels, widths[level], resnet, transformer if self_attention or cross_attention else None)

        last = len(widths) - 1
        channels, skips = widths[0], [widths[0]]
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.down_blocks.append(nn.ModuleList(block(level, w) for w in [channels] + [width] * (c.num_res_blocks - 1)))
            self.downsamplers.append(Downsample2D(width, use_conv=True, name="op") if level < last else nn.Identity())
            channels = width
            skips += [width] * (c.num_res_blocks + (level < last))
        self.mid_blocks = nn.ModuleList([block(last, channels), block(last, channels)])
        self.up_blocks, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = nn.ModuleList()
            for _ in range(c.num_res_blocks + 1):
                blocks.append(block(level, channels + skips.pop()))
                channels = widths[level]
            self.up_blocks.append(blocks)
            self.upsamplers.append(Upsample2D(channels, use_conv=True) if level > 0 else nn.Identity())

    @property
    def size_multiple(self) -> int:
        return self.config.patch_size * 2 ** (len(self.config.channel_mult) - 1)

    @property
    def reads_text(self) -> bool:
        return bool(self.config.cross_attention_levels or self.config.addition_embed_type)

    @apply_lora_scale("cross_attention_kwargs")
    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_kwargs: dict | None = None,
        cross_attention_kwargs: dict | None = None,
        added_cond_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """
        Args:
            sample: noisy input ``x_t``, ``(batch, in_channels, height, width)``.
            timestep: ``t`` in ``[0, num_train_timesteps)``, a number or ``(batch,)``.
            encoder_hidden_states: text states, ``(batch, tokens, cross_attention_dim)``.
            class_labels: integer labels, ``(batch,)``.
            timestep_cond: guidance embedding, ``(batch, time_cond_proj_dim)``.
            attention_kwargs, cross_attention_kwargs: ``{"scale": s}`` scales LoRA layers during this call; both names
                exist because Diffusers' pipelines use the second.
            added_cond_kwargs: accepted for Diffusers' pipelines; must be empty.
            return_dict: return an output object instead of a tuple.

        Returns:
            The prediction, ``(batch, out_channels, height, width)``.

        Raises:
            ValueError: for shapes that do not fit, or conditioning that the network needs or does not know.
        """
        self.check_inputs(sample, encoder_hidden_states)
        if added_cond_kwargs:
            raise ValueError(f"added_cond_kwargs are not used by this network, got {sorted(added_cond_kwargs)}")
        emb = self.embed(sample, timestep, encoder_hidden_states, class_labels, timestep_cond)
        hidden = self.conv_in(F.pixel_unshuffle(sample, self.config.patch_size))
        skips = [hidden]
        for level, (blocks, downsample) in enumerate(zip(self.down_blocks, self.downsamplers, strict=True)):
            for block in blocks.children():
                hidden = self._run(block, hidden, emb, encoder_hidden_states)
                skips.append(hidden)
            if level < len(self.down_blocks) - 1:
                hidden = downsample(hidden)
                skips.append(hidden)
        for block in self.mid_blocks:
            hidden = self._run(block, hidden, emb, encoder_hidden_states)
        for blocks, upsample in zip(self.up_blocks, self.upsamplers, strict=True):
            for block in blocks.children():
                hidden = self._run(block, torch.cat([hidden, skips.pop()], dim=1), emb, encoder_hidden_states)
            hidden = upsample(hidden)
        hidden = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        output = F.pixel_shuffle(hidden, self.config.patch_size)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)
