"""Weights under EDM's names, against a forward pass written out from the papers on those names."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from mri_posterior.errors import UserError
from mri_posterior.exact import white
from mri_posterior.priors import AdapterConfig, load_prior
from mri_posterior.priors.edm_weights import from_edm_state_dict

ADAPTER = AdapterConfig((1.0, 1.0), scale=1.0, sigma_range=(0.002, 80.0), sigma_data=0.5)
FINE, COARSE = "16x16", "8x8"
BASE, WIDE, EMBEDDING = 8, 16, 12
# float32 rounding through some thirty layers; outputs are of order 1.
ROUNDING = 2e-5


def random_state(generator: torch.Generator, ncsnpp: bool, channels: int = 2) -> dict[str, torch.Tensor]:
    """The keys and shapes of a DDPM++ or NCSN++ network: two resolutions, one block each, attention at the coarse."""
    state: dict[str, torch.Tensor] = {}
    line = torch.tensor([1.0, 3.0, 3.0, 1.0] if ncsnpp else [1.0, 1.0])

    def layer(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.3 * torch.randn(width, generator=generator)

    def resampling(name: str) -> None:
        state[f"{name}.resample_filter"] = (torch.outer(line, line) / line.sum() ** 2)[None, None]

    def block(name: str, before: int, width: int, attention: bool = False, resample: bool = False) -> None:
        norm(f"{name}.norm0", before)
        layer(f"{name}.conv0", width, before, 3, 3)
        layer(f"{name}.affine", width, EMBEDDING)
        norm(f"{name}.norm1", width)
        layer(f"{name}.conv1", width, width, 3, 3)
        if before != width or resample:
            layer(f"{name}.skip", width, before, 1, 1)
        if resample:
            resampling(f"{name}.conv0")
            resampling(f"{name}.skip")
        if attention:
            norm(f"{name}.norm2", width)
            layer(f"{name}.qkv", 3 * width, width, 1, 1)
            layer(f"{name}.proj", width, width, 1, 1)

    features = BASE * (2 if ncsnpp else 1)
    if ncsnpp:
        state["map_noise.freqs"] = torch.randn(features // 2, generator=generator)
    state["map_augment.weight"] = torch.randn(features, 9, generator=generator)
    layer("map_layer0", EMBEDDING, features)
    layer("map_layer1", EMBEDDING, EMBEDDING)
    layer(f"enc.{FINE}_conv", BASE, channels, 3, 3)
    block(f"enc.{FINE}_block0", BASE, BASE)
    block(f"enc.{COARSE}_down", BASE, BASE, resample=True)
    if ncsnpp:
        layer(f"enc.{COARSE}_aux_residual", BASE, channels, 3, 3)
        resampling(f"enc.{COARSE}_aux_residual")
    block(f"enc.{COARSE}_block0", BASE, WIDE, attention=True)
    block(f"dec.{COARSE}_in0", WIDE, WIDE, attention=True)
    block(f"dec.{COARSE}_in1", WIDE, WIDE)
    block(f"dec.{COARSE}_block0", WIDE + WIDE, WIDE)
    block(f"dec.{COARSE}_block1", WIDE + BASE, WIDE, attention=True)
    block(f"dec.{FINE}_up", WIDE, WIDE, resample=True)
    block(f"dec.{FINE}_block0", WIDE + BASE, BASE)
    block(f"dec.{FINE}_block1", BASE + BASE, BASE)
    norm(f"dec.{FINE}_aux_norm", BASE)
    layer(f"dec.{FINE}_aux_conv", channels, BASE, 3, 3)
    return {f"model.{key}": value for key, value in state.items()}


def halve(x: torch.Tensor, ncsnpp: bool, extend: bool = True) -> torch.Tensor:
    """Mean of 2 pixels, or of 4 with weights 1, 3, 3, 1, along each axis, with zeros beyond the edge if extended."""
    if not ncsnpp:
        return functional.avg_pool2d(x, 2)
    for axis in (-2, -1):
        x = x.movedim(axis, -1)
        x = functional.pad(x, (1, 1)) if extend else x
        n = (x.shape[-1] - 2) // 2
        x = sum(w * x[..., k : k + 2 * n : 2] for k, w in enumerate((1, 3, 3, 1))) / 8
        x = x.movedim(-1, axis)
    return x


def double(x: torch.Tensor, ncsnpp: bool) -> torch.Tensor:
    """Repeat, or put the new pixels a quarter of the way to the neighbours: the transpose of `halve`, times 4."""
    if not ncsnpp:
        return x.repeat_interleave(2, -2).repeat_interleave(2, -1)
    for axis in (-2, -1):
        x = functional.pad(x.movedim(axis, -1), (1, 1))
        left, right = 3 * x[..., 1:-1] + x[..., :-2], 3 * x[..., 1:-1] + x[..., 2:]
        x = (torch.stack([left, right], -1).flatten(-2) / 4).movedim(-1, axis)
    return x


def forward(state: dict[str, torch.Tensor], ncsnpp: bool, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
    """The network of Song et al. 2021 with the changes of Karras et al. 2022, step by step."""
    state = {key.removeprefix("model."): value for key, value in state.items()}

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        grouped = x.unflatten(1, (x.shape[1] // 4, 4))
        centred = grouped - grouped.mean((2, 3, 4), keepdim=True)
        spread = (centred.square().mean((2, 3, 4), keepdim=True) + 1e-6).sqrt()
        weight, bias = (state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return (centred / spread).flatten(1, 2) * weight + bias

    def dense(name: str, v: torch.Tensor) -> torch.Tensor:
        return v @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def silu(v: torch.Tensor) -> torch.Tensor:
        return v / (1 + (-v).exp())

    def block(name: str, x: torch.Tensor, resample=lambda x, _: x) -> torch.Tensor:
        inner = conv(f"{name}.conv0", resample(silu(norm(f"{name}.norm0", x)), ncsnpp))
        inner = inner + dense(f"{name}.affine", embedding)[..., None, None]
        inner = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", inner)))
        outer = resample(x, ncsnpp)
        x = (inner + (conv(f"{name}.skip", outer) if f"{name}.skip.weight" in state else outer)) / 2**0.5
        if f"{name}.qkv.weight" in state:
            n, c, h, w = x.shape
            q, k, v = conv(f"{name}.qkv", norm(f"{name}.norm2", x)).reshape(n, c, 3, h * w).unbind(2)
            share = (torch.einsum("ncq,nck->nqk", q, k) / c**0.5).softmax(-1)
            mixed = torch.einsum("nqk,nck->ncq", share, v).reshape(n, c, h, w)
            x = (conv(f"{name}.proj", mixed) + x) / 2**0.5
        return x

    if ncsnpp:
        phase = 2 * math.pi * c_noise[:, None] * state["map_noise.freqs"]
    else:
        phase = torch.stack([c_noise * 10000 ** (-i / (BASE // 2 - 1)) for i in range(BASE // 2)], 1)
    embedding = torch.cat([phase.sin(), phase.cos()], 1)
    embedding = silu(dense("map_layer1", silu(dense("map_layer0", embedding))))

    first = conv(f"enc.{FINE}_conv", x)
    fine = block(f"enc.{FINE}_block0", first)
    down = block(f"enc.{COARSE}_down", fine, halve)
    if ncsnpp:
        name = f"enc.{COARSE}_aux_residual"
        wide = functional.conv2d(x, state[f"{name}.weight"], padding=2)
        down = (down + halve(wide, True, extend=False) + state[f"{name}.bias"][:, None, None]) / 2**0.5
    coarse = block(f"enc.{COARSE}_block0", down)
    y = block(f"dec.{COARSE}_in1", block(f"dec.{COARSE}_in0", coarse))
    y = block(f"dec.{COARSE}_block0", torch.cat([y, coarse], 1))
    y = block(f"dec.{COARSE}_block1", torch.cat([y, down], 1))
    y = block(f"dec.{FINE}_up", y, double)
    y = block(f"dec.{FINE}_block0", torch.cat([y, fine], 1))
    y = block(f"dec.{FINE}_block1", torch.cat([y, first], 1))
    return conv(f"dec.{FINE}_aux_conv", silu(norm(f"dec.{FINE}_aux_norm", y)))


@pytest.mark.parametrize("ncsnpp", [False, True], ids=["DDPM++", "NCSN++"])
@pytest.mark.parametrize("shape", [(16, 16), (8, 14)])
def test_converted_weights_compute_what_the_papers_say(ncsnpp, shape, generator):
    state = random_state(generator, ncsnpp)
    x, c_noise = torch.randn(3, 2, *shape, generator=generator), torch.tensor([-1.2, 0.0, 1.1])
    found, expected = from_edm_state_dict(state)(x, c_noise), forward(state, ncsnpp, x, c_noise)
    assert torch.allclose(found, expected, atol=ROUNDING)


@pytest.mark.parametrize("ncsnpp", [False, True], ids=["DDPM++", "NCSN++"])
def test_a_file_of_weights_is_a_denoiser_of_complex_images(tmp_path, ncsnpp, generator):
    """EDM's preconditioning, with c_noise and the skip connection that fit sigma_data, written out."""
    state, d = random_state(generator, ncsnpp), 0.3
    save_file(state, tmp_path / "edm.safetensors")
    prior = load_prior(tmp_path / "edm.safetensors", replace(ADAPTER, sigma_data=d))
    x, sigma = white(generator, 2, 8, 10, dtype=torch.complex64), torch.tensor([0.05, 2.0])
    level = sigma[:, None, None, None]
    channels = torch.stack([x.real, x.imag], 1)
    scaled, c_noise = channels / (level**2 + d**2) ** 0.5, sigma.log() / 4
    output = forward(state, ncsnpp, scaled, c_noise)
    expected = channels * d**2 / (level**2 + d**2) + output * level * d / (level**2 + d**2) ** 0.5
    assert torch.allclose(prior(x, sigma), torch.complex(expected[:, 0], expected[:, 1]), atol=ROUNDING)
    assert prior(x[:, :7, :9], sigma).shape == (2, 7, 9)


def test_half_precision_weights_without_prefix_are_read(generator):
    state = {k: v.half() for k, v in random_state(generator, False).items()}
    bare = {key.removeprefix("model."): value for key, value in state.items()}
    x, c_noise = torch.randn(1, 2, 8, 8, generator=generator), torch.zeros(1)
    assert torch.equal(from_edm_state_dict(bare)(x, c_noise), from_edm_state_dict(state)(x, c_noise))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("map_label.weight", (8, 3), "class label"),
        ("out_norm.weight", (8,), "ADM"),
        ("enc.8x8_aux_skip.weight", (8, 2, 1, 1), "skip connections"),
        ("dec.16x16_aux_up.resample_filter", (1, 1, 2, 2), "skip connections"),
        ("u", (1001,), "iDDPM"),
        ("enc.16x16_novelty.weight", (8,), "novelty"),
        ("enc.8x8_down.conv0.resample_filter", (1, 1, 4, 4), "filters differ"),
        ("enc.8x8_block0.affine.weight", (32, 12), "affine"),
    ],
)
def test_other_networks_are_refused(tmp_path, key, shape, message, generator):
    state = random_state(generator, False) | {f"model.{key}": torch.ones(shape)}
    save_file(state, tmp_path / "edm.safetensors")
    with pytest.raises(UserError, match=rf"edm\.safetensors: .*{message}.*: give DDPM\+\+") as raised:
        load_prior(tmp_path / "edm.safetensors", ADAPTER)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["enc.16x16_conv.weight", "map_layer0.weight", "dec.8x8_in1.conv0.bias", "enc"])
def test_incomplete_weights_are_refused(missing, generator):
    state = random_state(generator, False)
    kept = {k: v for k, v in state.items() if not k.removeprefix("model.").startswith(missing)}
    with pytest.raises(ValueError, match=r"missing|Missing|no layers"):
        from_edm_state_dict(kept)


def test_what_the_weights_do_not_say_is_asked_for(tmp_path, generator):
    file = tmp_path / "edm.safetensors"
    save_file(random_state(generator, False, channels=1), file)
    for change, message in [
        ({"sigma_data": None}, r"set prior\.adapter\.sigma_data"),
        ({}, r"set prior\.adapter\.channels to separate"),
        ({"channels": "separate", "sigma_range": None}, r"set prior\.adapter\.sigma_range"),
    ]:
        with pytest.raises(UserError, match=message):
            load_prior(file, replace(ADAPTER, **change))
    assert load_prior(file, replace(ADAPTER, channels="separate"))(torch.ones(1, 8, 8) + 0j, 1.0).shape == (1, 8, 8)
