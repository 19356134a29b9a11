"""The U-Nets of DDPM++ and NCSN++ (Song et al. 2021) in the form in which EDM trained them (Karras et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional

Features = Float[torch.Tensor, "n c h w"]


@dataclass(frozen=True)
class SongUNetConfig:
    """The architecture.

    Attributes
    ----------
    in_channels, base: channels of the image and of the first convolution.
    widths: channels per resolution, finest first.
    blocks: residual blocks per resolution on the way down; one more on the way up.
    attention: resolutions with self-attention, by index; the coarsest has one more, between the two ways.
    embedding, noise_features: width of the embedded noise level and of its sinusoids.
    fourier: random Fourier features of the noise level (NCSN++) rather than geometric frequencies (DDPM++).
    residual: the input, too, goes down beside the encoder and is added at every resolution (NCSN++).
    taps: of the separable filter that halves and doubles: (1, 1) in DDPM++, (1, 3, 3, 1) in NCSN++.
    """

    in_channels: int
    base: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    embedding: int
    noise_features: int
    fourier: bool = False
    residual: bool = False
    taps: tuple[float, ...] = (1.0, 1.0)


class SongUNet(nn.Module):
    """EDM's ``F(x, c_noise)``: x ``[n, c, H, W]``, sides multiples of ``2^(resolutions - 1)``; c_noise ``[n]``."""

    def __init__(self, config: SongUNetConfig):
        super().__init__()
        self.config = config
        half = config.noise_features // 2
        # Geometric from 1 to 1/10000, both included; random ones come with the weights, in cycles per unit.
        frequencies = torch.zeros(half) if config.fourier else 1e-4 ** (torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=config.fourier)
        self.embed = nn.ModuleList(
            [nn.Linear(config.noise_features, config.embedding), nn.Linear(config.embedding, config.embedding)]
        )
        self.register_buffer("filter", _separable(config.taps), persistent=False)
        self.conv_in = nn.Conv2d(config.in_channels, config.base, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        before, carried, kept = config.base, config.in_channels, [config.base]
        for level, width in enumerate(config.widths):
            stage = nn.Module()
            if level:
                stage.down = ResidualBlock(config, before, before, resample="down")
                kept.append(before)
                if config.residual:
                    stage.residual = nn.Conv2d(carried, before, 3)
                    carried = before
            attention = level in config.attention
            stage.blocks = nn.ModuleList(
                ResidualBlock(config, width if i else before, width, attention) for i in range(config.blocks)
            )
            kept += [width] * config.blocks
            before = width
            self.encoder.append(stage)
        self.middle = nn.ModuleList(
            [ResidualBlock(config, before, before, attention=True), ResidualBlock(config, before, before)]
        )
        for level, width in reversed(list(enumerate(config.widths))):
            stage = nn.Module()
            if level < len(config.widths) - 1:
                stage.up = ResidualBlock(config, before, before, resample="up")
            stage.blocks = nn.ModuleList()
            for i in range(config.blocks + 1):
                attention = level in config.attention and i == config.blocks
                stage.blocks.append(ResidualBlock(config, before + kept.pop(), width, attention))
                before = width
            self.decoder.insert(0, stage)
        self.norm_out = _norm(before)
        self.conv_out = nn.Conv2d(before, config.in_channels, 3, padding=1)

    def forward(self, x: Features, c_noise: Float[torch.Tensor, n]) -> Features:
        phase = c_noise[:, None] * self.frequencies * (2 * math.pi if self.config.fourier else 1)
        embedding = torch.cat([phase.sin(), phase.cos()], 1)
        for layer in self.embed:
            embedding = functional.silu(layer(embedding))

        image, x = x, self.conv_in(x)
        skips = [x]
        for level, stage in enumerate(self.encoder):
            if level:
                x = stage.down(x, embedding)
                if self.config.residual:
                    x = image = (x + self._halved_convolution(image, stage.residual)) / math.sqrt(2)
                skips.append(x)
            for block in stage.blocks:
                x = block(x, embedding)
                skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for level in reversed(range(len(self.decoder))):
            stage = self.decoder[level]
            if level < len(self.decoder) - 1:
                x = stage.up(x, embedding)
            for block in stage.blocks:
                x = block(torch.cat([x, skips.pop()], 1), embedding)
        return self.conv_out(functional.silu(self.norm_out(x)))

    def _halved_convolution(self, x: Features, conv: nn.Conv2d) -> Features:
        """Convolve, then halve: the image is extended by zeros once, before the two, not before each."""
        extended = functional.conv2d(x, conv.weight, padding=1 + (len(self.config.taps) - 1) // 2)
        return _resampled(extended, self.filter, "down", margin=0) + conv.bias[:, None, None]


class ResidualBlock(nn.Module):
    """Two convolutions around which the input is added, all over sqrt(2); the noise level shifts the channels between.

    With `resample`, input and first convolution are at half or double the resolution. With `attention`, one head
    follows, residual and scaled likewise.
    """

    def __init__(self, config: SongUNetConfig, before: int, width: int, attention=False, resample: str | None = None):
        super().__init__()
        self.resample = resample
        if resample:
            self.register_buffer("filter", _separable(config.taps), persistent=False)
        self.norm0, self.norm1 = _norm(before), _norm(width)
        self.conv0 = nn.Conv2d(before, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.affine = nn.Linear(config.embedding, width)
        self.skip = nn.Conv2d(before, width, 1) if before != width or resample else None
        if attention:
            self.norm2 = _norm(width)
            self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.attention = attention

    def forward(self, x: Features, embedding: Float[torch.Tensor, "n e"]) -> Features:
        inner, outer = functional.silu(self.norm0(x)), x
        if self.resample:
            inner, outer = (_resampled(part, self.filter, self.resample) for part in (inner, outer))
        inner = self.conv0(inner) + self.affine(embedding)[:, :, None, None]
        inner = self.conv1(functional.silu(self.norm1(inner)))
        x = (inner + (outer if self.skip is None else self.skip(outer))) / math.sqrt(2)
        if not self.attention:
            return x
        # Query, key and value of a channel are neighbours in the output of `qkv`.
        q, k, v = self.qkv(self.norm2(x)).unflatten(1, (-1, 3)).flatten(3).movedim(2, 0).transpose(-2, -1)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(-2, -1).unflatten(-1, x.shape[-2:])
        return (x + self.proj(mixed)) / math.sqrt(2)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


def _separable(taps: tuple[float, ...]) -> Float[torch.Tensor, "k k"]:
    """A filter that keeps constants."""
    line = torch.tensor(taps) / sum(taps)
    return torch.outer(line, line)


def _resampled(x: Features, filter_: Float[torch.Tensor, "k k"], direction: str, margin: int | None = None) -> Features:
    """`x` at half or double the resolution, channel by channel; zeros beyond the edge."""
    kernel = filter_.expand(x.shape[1], 1, -1, -1)
    margin = (len(filter_) - 1) // 2 if margin is None else margin
    if direction == "down":
        return functional.conv2d(x, kernel, stride=2, padding=margin, groups=x.shape[1])
    return functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=margin, groups=x.shape[1])
