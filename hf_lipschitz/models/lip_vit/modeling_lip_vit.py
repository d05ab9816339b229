"""LipViT: patches, orthogonal maps, token mixers that cost nothing (or a known amount), and a normalised head.

The features are at most 1-Lipschitz in ``l2`` on normalised input whenever every constrained matrix has norm at most
one, whatever the learned scalars are. The certificate measures those norms; it does not assume them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_lipschitz.bounds.program import Program
from hf_lipschitz.models.certified_model import CertifiedModel
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.nn.activation import GroupSort, MaxMin, PartialAbs
from hf_lipschitz.nn.attention import BoundedAttention, eager_attention
from hf_lipschitz.nn.head import NormalizedLinear
from hf_lipschitz.nn.init import orthogonal_weight, unit_rows
from hf_lipschitz.nn.linear import BatchCentering, LipschitzLinear, LipschitzMap
from hf_lipschitz.nn.mixing import ShiftMixer, TokenMixing
from hf_lipschitz.nn.module import ProgramBuilder
from hf_lipschitz.nn.pixels import Patchify, PatchMerge, PixelNormalization, TokenOffset
from hf_lipschitz.nn.pooling import L2Pool, SumPool
from hf_lipschitz.nn.sinkhorn import SinkhornAttention


def _activation(config: LipViTConfig, width: int) -> nn.Module:
    if config.activation == "maxmin":
        return MaxMin()
    if config.activation == "abs":
        return PartialAbs(max(1, round(config.abs_fraction * width)))
    return GroupSort(config.group_size)


def _map(config: LipViTConfig, in_features: int, out_features: int) -> LipschitzMap:
    return LipschitzMap(in_features, out_features, _activation(config, out_features), centering=config.batch_centering)


def _mixer(config: LipViTConfig, width: int, grid: tuple[int, int], index: int) -> nn.Module:
    kind = config.token_mixer
    if kind == "hybrid":
        kind = "shift" if index % 2 == 0 else "attention"
    if kind == "shift":
        return ShiftMixer(width, grid, max(1, int(config.shift_fraction * width)))
    if kind == "orthogonal":
        return TokenMixing(grid[0] * grid[1])
    attention = SinkhornAttention if config.attention_normalization == "sinkhorn" else BoundedAttention
    return attention(width, grid[0] * grid[1], config.num_attention_heads)


class LipViTEmbeddings(nn.Module):
    """Pixels (B, C, H, W) in [0, 1] -> tokens (B, N, d): normalise, patchify, map."""

    def __init__(self, config: LipViTConfig) -> None:
        super().__init__()
        self.expected = (config.num_channels, config.image_size, config.image_size)
        self.normalization = PixelNormalization(config.image_mean or [], config.image_std or [])
        self.patchify = Patchify(config.patch_size)
        width = (config.stages or [])[0]["width"]
        self.projection = _map(config, config.num_channels * config.patch_size**2, width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Raises ValueError for images of another size than the configured one."""
        if tuple(pixel_values.shape[1:]) != self.expected:
            raise ValueError(
                f"pixel_values has images of shape {tuple(pixel_values.shape[1:])}, this model takes {self.expected}: "
                "resize them with its image processor"
            )
        return self.projection(self.patchify(self.normalization(pixel_values)))

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """The nodes of its parts, in order."""
        for module in (self.normalization, self.patchify, self.projection):
            x = builder.apply(module, x)
        return x


class LipViTBlock(GradientCheckpointingLayer):
    """Position bias, token mixer, channel map: (B, N, d) -> (B, N, d)."""

    def __init__(self, config: LipViTConfig, width: int, grid: tuple[int, int], index: int) -> None:
        super().__init__()
        self.config = config
        self.position = TokenOffset(grid[0] * grid[1])
        self.mixer = _mixer(config, width, grid, index)
        self.channel = _map(config, width, width)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Keyword arguments go to the attention function."""
        x = self.position(hidden_states)
        if isinstance(self.mixer, BoundedAttention):
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation or "eager", eager_attention
            )
            x, _ = self.mixer(x, attention, **kwargs)
        else:
            x = self.mixer(x)
        return self.channel(x)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """The nodes of its parts, in order."""
        for module in (self.position, self.mixer, self.channel):
            x = builder.apply(module, x)
        return x


class LipViTReduction(LipschitzMap):
    """2 x 2 patch merging through an orthogonal map with its activation: (B, N, d) -> (B, N / 4, width)."""

    def __init__(self, config: LipViTConfig, grid: tuple[int, int], incoming: int, width: int) -> None:
        super().__init__(4 * incoming, width, _activation(config, width), centering=config.batch_centering)
        self.merge = PatchMerge(*grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Merge, then map."""
        return super().forward(self.merge(x))

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """The merging and the nodes of the map."""
        return super().bound_nodes(builder, builder.apply(self.merge, x))


class LipViTStage(nn.Module):
    """An optional 2 x 2 patch merging through an orthogonal map, then blocks of one width."""

    def __init__(self, config: LipViTConfig, index: int, first_block: int) -> None:
        super().__init__()
        stages, grids = config.stages or [], config.grids()
        width = stages[index]["width"]
        before = stages[index - 1]["width"]
        self.reduction = LipViTReduction(config, grids[index - 1], before, width) if index > 0 else None
        blocks = [LipViTBlock(config, width, grids[index], first_block + i) for i in range(stages[index]["depth"])]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, N, d) -> (B, N / 4 or N, width)."""
        x = hidden_states
        if self.reduction is not None:
            x = self.reduction(x)
        for block in self.blocks:
            x = block(x, **kwargs)
        return x

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """The nodes of its parts, in order."""
        for module in (*([] if self.reduction is None else [self.reduction]), *self.blocks):
            x = builder.apply(module, x)
        return x


class LipViTPreTrainedModel(CertifiedModel):
    """Base class: loading, saving with a certificate, and initial weights that satisfy the constraints."""

    config: LipViTConfig
    config_class = LipViTConfig
    base_model_prefix = "lip_vit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    model_tags = ["lipschitz", "certified-robustness", "hf-lipschitz"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["LipViTEmbeddings", "LipViTBlock"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # the embeddings' output, then that of every reduction and block, in order
    _can_record_outputs = {"hidden_states": [LipViTBlock, LipViTReduction], "attentions": BoundedAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices orthogonal and verified, head rows of unit norm, biases zero, raw scalars of attention at their
        defaults.
        """
        own = list(module.parameters(recurse=False))
        if any(parameter.is_meta for parameter in own):
            return
        weight = getattr(module, "weight", None)
        if isinstance(module, LipschitzLinear | ShiftMixer | TokenMixing | NormalizedLinear):
            assert isinstance(weight, torch.Tensor)
            if not getattr(weight, "_is_hf_initialized", False):
                draw = unit_rows if isinstance(module, NormalizedLinear) else orthogonal_weight
                init.copy_(weight, draw(*weight.shape).to(weight))
        if isinstance(module, LipschitzLinear | NormalizedLinear | BatchCentering) and module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, BatchCentering):
            init.zeros_(module.running_mean)
        if isinstance(module, TokenOffset):
            init.zeros_(module.offset)
        if isinstance(module, BoundedAttention):
            init.constant_(module.temperature, 0.5)
            init.constant_(module.radius, 0.5)
            init.zeros_(module.residual)

    def origin_node(self, builder: ProgramBuilder) -> int:
        """The program's input: one image in pixel units."""
        size = self.config.image_size
        shape = [self.config.num_channels, size, size]
        return builder.add("input@1", attrs={"shape": shape, "space": "pixels[0,1]"})


class LipViTModel(LipViTPreTrainedModel):
    """The body: pixels -> features (``pooler_output``, shape (B, d))."""

    def __init__(self, config: LipViTConfig) -> None:
        super().__init__(config)
        self.embeddings = LipViTEmbeddings(config)
        stages = config.stages or []
        first = [sum(stage["depth"] for stage in stages[:i]) for i in range(len(stages))]
        self.stages = nn.ModuleList([LipViTStage(config, i, first[i]) for i in range(len(stages))])
        self.pooling = L2Pool(config.pool_eps) if config.pooling == "l2" else SumPool()
        width = config.hidden_size
        self.neck = nn.ModuleList([_map(config, width, width) for _ in range(config.neck_depth)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """pixel_values: (B, C, H, W) in [0, 1], cast to the dtype of the weights."""
        if pixel_values is None:
            raise ValueError("pixel_values is missing: pass images of shape (batch, channels, height, width)")
        pixel_values = pixel_values.to(self.embeddings.projection.linear.weight.dtype)
        hidden_states = self.embeddings(pixel_values)
        for stage in self.stages:
            hidden_states = stage(hidden_states, **kwargs)
        # under autocast the pool would square and sum in low precision, and eps would vanish
        pooled = self.pooling(hidden_states.to(pixel_values.dtype))
        for layer in self.neck:
            pooled = layer(pooled)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """The nodes of its parts, in order."""
        for module in (self.embeddings, *self.stages, self.pooling, *self.neck):
            x = builder.apply(module, x)
        return x

    def bound_program(self) -> Program:
        """The bound program from pixels to features (the logits of a body alone are its features)."""
        builder = ProgramBuilder(self)
        features = builder.apply(self, self.origin_node(builder))
        return builder.program(features=features, logits=features)


class LipViTForImageClassification(LipViTPreTrainedModel):
    """LipViT with a last-layer-normalised head: pixels -> logits (B, num_labels)."""

    def __init__(self, config: LipViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        if self.num_labels < 2:
            raise ValueError(f"num_labels is {config.num_labels}: a classifier needs at least 2 labels")
        self.lip_vit = LipViTModel(config)
        self.classifier = NormalizedLinear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """labels: (B,) class indices; the loss is the cross entropy of ``config.loss_scale`` times the logits."""
        outputs = self.lip_vit(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits * self.config.loss_scale, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def bound_program(self) -> Program:
        """The bound program from pixels to features and logits."""
        builder = ProgramBuilder(self)
        features = builder.apply(self.lip_vit, self.origin_node(builder))
        return builder.program(features=features, logits=builder.apply(self.classifier, features))


__all__ = ["LipViTForImageClassification", "LipViTModel", "LipViTPreTrainedModel"]
