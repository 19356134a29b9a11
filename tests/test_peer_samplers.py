"""Peer samplers do what their papers say, known biases included: each against the law it is supposed to have.

Tolerances. Of `n` samples of `p` complex pixels, a mean of variances over pixels has a relative standard deviation of
``1/sqrt(p n)``, and whitened means have a chi-squared sum of squares (see test_exact_posterior). Tests allow five
standard deviations; what they allow beyond is named beside them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mri_posterior.config import ReconstructionConfig, parse_config
from mri_posterior.errors import UserError
from mri_posterior.exact import GaussianProblem, dense, gaussian_problem, white
from mri_posterior.image_operators import PixelMask
from mri_posterior.noise import NoiseStreams
from mri_posterior.posterior import GaussianTerm, Posterior
from mri_posterior.priors import GaussianPrior
from mri_posterior.samplers import SAMPLERS, sample
from mri_posterior.samplers.budget import budgeted
from mri_posterior.samplers.guided_diffusion import SmoothedPrior, data_draw, data_mean, noise_levels, renoise
from tests.test_exact_posterior import assert_gaussian, whitened

PEERS = sorted(set(SAMPLERS) - {"annealed_langevin", "reverse_diffusion", "tempered_smc"})
SINGLE_COIL = {"n_coils": 1, "every": 2, "centre": 2}
"""One constant coil: prior, operator and every sampler below are diagonal in Fourier space."""


def with_noise(problem: GaussianProblem, noise_std: float) -> GaussianProblem:
    """The same data, of which another noise level is believed."""
    return replace(problem, posterior=replace(problem.posterior, noise_std=noise_std))


# What they share


def test_the_smoothed_priors_denoiser_is_that_of_the_prior_with_more_variance(generator):
    spectrum = gaussian_problem((6, 8), eta=0.1, **SINGLE_COIL).spectrum
    x = white(generator, 3, 6, 8)
    smoothed = SmoothedPrior(GaussianPrior(spectrum=spectrum), 0.3)(x, 0.7)
    assert torch.allclose(smoothed, GaussianPrior(spectrum=spectrum + 0.3**2)(x, 0.7), atol=1e-12)


def test_noise_levels_end_without_noise():
    levels = noise_levels(10.0, 0.02, 30)
    assert len(levels) == 31
    assert levels[0] == pytest.approx(10)
    assert levels[-1] == 0
    assert sorted(levels, reverse=True) == levels


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_renoising_keeps_the_level(share, generator):
    noise = white(generator, 50, 20, 20)
    clean = torch.ones_like(noise)
    noised = renoise(NoiseStreams(range(50), dtype=noise.dtype), clean, noise, 0.4, share) - clean
    assert float(noised.abs().square().mean()) / 2 == pytest.approx(0.4**2, rel=5 / math.sqrt(noise.numel()))
    kept = float((noised * noise.conj()).real.mean()) / 2
    # A mean of products of unit normals has a standard deviation below sqrt(2) / sqrt(number of real channels).
    assert kept == pytest.approx(0.4 * math.sqrt(1 - share), abs=5 / math.sqrt(noise.numel()))


def test_the_draw_given_the_data_has_the_closed_form_law(generator):
    posterior = gaussian_problem((8, 8), 2, 3, 2, 0.03).posterior
    operator, n, std = posterior.operator, 600, 0.4
    image = white(generator, 8, 8)
    images = image.expand(n, 8, 8)
    covariance = torch.linalg.inv(dense(operator.normal, (8, 8)) / 0.03**2 + torch.eye(64) / std**2)
    pull = operator.adjoint(operator.residual(image, posterior.kspace)).flatten() / 0.03**2
    mean = image.flatten() + covariance @ pull
    assert torch.allclose(data_mean(posterior, images[:1], std, 1e-8, 200).flatten(), mean, atol=1e-6)
    draws = data_draw(NoiseStreams(range(n), dtype=image.dtype), posterior, images, std, 1e-5, 60)
    unit = whitened(draws, mean, covariance)
    assert abs(n * float(unit.mean(0).abs().square().sum()) - 128) < 5 * math.sqrt(4 * 64)
    assert float(unit.abs().square().mean()) / 2 == pytest.approx(1, abs=5 / math.sqrt(64 * n))


@pytest.mark.parametrize("name", PEERS)
def test_further_gaussian_terms_are_refused(name):
    posterior = gaussian_problem((6, 6), eta=0.1, **SINGLE_COIL).posterior
    with pytest.raises(ValueError, match=f"{name} knows no further Gaussian terms"):
        sample(budgeted(name, 4), posterior.with_term(GaussianTerm(torch.zeros(6, 6), 0.1)), 1)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("inpainting", [False, True])
def test_single_precision_and_other_operators_give_the_same_fit(name, inpainting):
    """The misfit of 32 samples, a sum over many measurements, in both precisions: other random numbers, one law."""
    misfits = []
    for dtype in (torch.complex64, torch.complex128):
        problem = gaussian_problem((12, 12), 2, 3, 4, 0.05, dtype=dtype)
        posterior = problem.posterior
        if inpainting:
            mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.6
            operator = PixelMask(mask, dtype)
            posterior = Posterior(posterior.prior, operator, operator.forward(problem.truth), 0.05)
        result = sample(budgeted(name, 40), posterior, 32, seed=4)
        assert result.images.dtype == dtype
        assert result.images.shape == (32, 12, 12)
        assert not result.images.requires_grad
        misfits.append(float(posterior.misfit(result.images).mean()))
    # 32 samples of some 80 complex residuals: 2 % of Monte-Carlo error each if all are alike; a few of them rule the
    # misfit of samplers that are far off at 40 evaluations.
    assert misfits[0] == pytest.approx(misfits[1], rel=0.3)


# One law each


def law(name: str, sampler, seen: bool, variance: float, eta: float, y: complex) -> tuple[complex, float]:
    """Mean and variance of one pixel, seen with noise `eta` or not at all, of a white prior of this total variance.

    Every step is affine: with the noise level going from s to t, ``x' = a x + b y + noise``.
    """
    levels = noise_levels(sampler.sigma_max, sampler.sigma_min, sampler.steps)
    mean, spread = 0j, levels[0] ** 2
    for s, t in pairwise(levels):
        gain = variance / (variance + s**2)
        if name == "dds":  # conjugate gradients are exact after as many steps as there are eigenvalues
            weight = sampler.data_weight / (1 + sampler.data_weight) if seen else 0.0
            share = sampler.stochasticity**2 * (1 - (t / s) ** 2)
            a, b = (1 - weight) * gain + t / s * math.sqrt(1 - share) * (1 - gain), weight
            fresh = t**2 * share
        elif name == "diffpir":
            weight = s**2 / (s**2 + sampler.prior_weight * eta**2) if seen else 0.0
            keep = t / s * math.sqrt(1 - sampler.fresh)
            a, b = (1 - keep) * (1 - weight) * gain + keep, (1 - keep) * weight
            fresh = t**2 * sampler.fresh
        else:
            flow = 1.0
            inner = noise_levels(s, sampler.sigma_min, sampler.ode_steps)
            for u, v in pairwise(inner):
                g = variance / (variance + u**2)
                flow *= g + v / u * (1 - g)
            weight = s**2 / (s**2 + eta**2) if seen else 0.0
            a, b = (1 - weight) * flow, weight
            fresh = (1 - weight) * s**2 + t**2
        mean, spread = a * mean + b * y, a**2 * spread + fresh
    return mean, spread


@pytest.mark.parametrize("name", ["dds", "diffpir", "daps"])
def test_law_of_a_pixel(name):
    """Against the recursion of mean and variance, and that against the posterior: none of them is calibrated."""
    n, eta, y = 400, 0.1, 0.8 - 0.5j
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[:3] = True
    prior = GaussianPrior(spectrum=torch.full((6, 6), 0.5**2, dtype=torch.float64))
    posterior = Posterior(prior, PixelMask(mask, torch.complex128), mask * torch.full((6, 6), y), eta)
    sampler = SAMPLERS[name](sigma_min=0.1, steps=60)
    images = sample(sampler, posterior, n, seed=2).images
    variance = 0.5**2 + 0.1**2
    excess = {}
    for seen in (True, False):
        mean, spread = law(name, sampler, seen, variance, eta, y)
        pixels = images[:, mask == seen]
        assert abs(pixels.mean() - mean) < 5 * math.sqrt(2 * spread / pixels.numel())
        assert float((pixels - mean).abs().square().mean()) / 2 == pytest.approx(
            spread, rel=5 / math.sqrt(pixels.numel())
        )
        excess[seen] = spread / (1 / (1 / variance + seen / eta**2))
    if name == "daps":  # right where the data speak, too wide where not
        assert excess[True] == pytest.approx(1, abs=0.05)
        assert 1.5 < excess[False] < 2.1
    else:
        assert abs(excess[True] - 1) > 0.3


def test_silent_pixels_of_daps_tend_to_twice_the_variance():
    many = SAMPLERS["daps"](sigma_min=0.1, steps=4000, ode_steps=100)
    assert law("daps", many, False, 0.26, 0.1, 0)[1] == pytest.approx(2 * 0.26, rel=0.02)


def test_the_langevin_draw_of_daps_agrees_with_the_exact_one():
    problem = gaussian_problem((8, 8), eta=0.1, **SINGLE_COIL)
    spreads = []
    for draw in ("exact", "langevin"):
        sampler = SAMPLERS["daps"](steps=20, ode_steps=2, draw=draw, langevin_h=0.05, langevin_steps=150)
        unit, gain = problem.whiten(sample(sampler, problem.posterior, 200, seed=3).images, sampler.sigma_min)
        spreads.append(float(unit[:, gain > 1].abs().square().mean()))
    # Euler's variance is 2/(2 - h) - 1 = 2.6 % too large; 32 directions, two sets.
    assert spreads[1] == pytest.approx(spreads[0], rel=0.026 + 5 * math.sqrt(2 / (32 * 200)))


def test_moment_matching_tends_to_the_exact_posterior():
    problem = gaussian_problem((8, 8), 2, 3, 2, 0.05)
    sampler = SAMPLERS["moment_matching"](steps=150, cg_iterations=30, cg_tolerance=1e-6)
    # 1 % for steps of 4 % in sigma, by a second-order solver.
    assert_gaussian(problem, sample(sampler, problem.posterior, 300, seed=5).images, 0.02, slack=0.01)


def test_pnp_dm_at_a_fixed_rho_has_the_posterior_of_noisier_data():
    """``eta^2 + rho^2 A A^H`` with ``A A^H = 1`` on what one coil measures."""
    problem = gaussian_problem((8, 8), eta=0.2, **SINGLE_COIL)
    sampler = SAMPLERS["pnp_dm"](rho_max=0.5, rho_min=0.5, iterations=120, diffusion_steps=15)
    images = sample(sampler, problem.posterior, 300, seed=6).images
    # 1 % for reverse diffusions of 15 steps.
    assert_gaussian(with_noise(problem, math.hypot(0.2, 0.5)), images, 0.02, slack=0.01)


def test_pnp_dm_tends_to_the_exact_posterior():
    problem = gaussian_problem((8, 8), 2, 3, 2, 0.2)
    sampler = SAMPLERS["pnp_dm"](rho_min=0.02, iterations=300, diffusion_steps=10)
    # The last rho adds 1 % to the variance of the data; 1 % for the finite speed of its fall.
    assert_gaussian(problem, sample(sampler, problem.posterior, 300, seed=7).images, 0.02, slack=0.02)


def test_preconditioned_ula_has_eulers_variance():
    """``2/(2 - gamma l)`` by direction, l the curvature in units of the preconditioner's."""
    eta, sigma_min, gamma = 0.05, 0.3, 0.5
    problem = gaussian_problem((8, 8), eta=eta, **SINGLE_COIL)
    sampler = SAMPLERS["preconditioned_ula"](sigma_min=sigma_min, levels=80, steps_per_level=8)
    n = 300
    unit, _ = problem.whiten(sample(sampler, problem.posterior, n, seed=8).images, sigma_min)
    seen = torch.fft.ifftshift(problem.posterior.operator.mask).flatten()
    data = seen / eta**2
    curvature = (data + 1 / (problem.spectrum.flatten() + sigma_min**2)) / (data + sigma_min**-2)
    expected = 2 / (2 - gamma * curvature)
    measured = unit.abs().square().mean(0) / 2
    assert float(expected[seen].mean()) == pytest.approx(2 / (2 - gamma), rel=0.02)
    for directions in (seen, ~seen):
        # 2 % for the speed at which the levels fall.
        ratio = float((measured / expected)[directions].mean())
        assert ratio == pytest.approx(1, abs=5 / math.sqrt(int(directions.sum()) * n) + 0.02)


def test_csgm_langevin_with_tiny_steps_believes_in_more_noise():
    """``gamma = sigma_min`` at the last level: the likelihood of noise ``sqrt(eta^2 + sigma_min^2)``."""
    eta, sigma_min, h = 0.3, 0.2, 0.05
    problem = gaussian_problem((8, 8), eta=eta, **SINGLE_COIL)
    sampler = SAMPLERS["csgm_langevin"](
        sigma_min=sigma_min, sigma_max=10.0, levels=400, steps_per_level=5, final_steps=200, h=h
    )
    images = sample(sampler, problem.posterior, 300, seed=9).images
    # Euler: 2/(2 - h l) - 1 with l below 1 + sigma^2/(sigma^2 + eta^2) = 1.31, so 3.4 %.
    assert_gaussian(with_noise(problem, math.hypot(eta, sigma_min)), images, sigma_min, slack=0.034)
    with pytest.raises(AssertionError):
        assert_gaussian(problem, images, sigma_min, slack=0.034)


def test_a_step_of_dps_is_pushed_down_its_own_misfit(generator):
    """The push is the difference to a step without guidance; the Jacobian of a Gaussian denoiser is its gain."""
    problem = gaussian_problem((8, 8), 2, 3, 2, 0.05)
    posterior, operator = problem.posterior, problem.posterior.operator
    moved = []
    for guidance in (2.0, 1e-12):
        sampler = SAMPLERS["dps"](steps=50, guidance=guidance)
        streams = NoiseStreams(range(3), dtype=torch.complex128)
        step = sampler.plan(posterior)[30]
        state = sampler.start(posterior, streams, None)
        state = replace(state, x=state.x * step.sigma / sampler.sigma_max)
        moved.append(sampler.step(streams, state, step).x)
    gain = (problem.spectrum + 0.02**2) / (problem.spectrum + 0.02**2 + step.sigma**2)
    residual = operator.residual(torch.fft.ifft2(gain * torch.fft.fft2(state.x)), posterior.kspace)
    direction = torch.fft.ifft2(gain * torch.fft.fft2(operator.adjoint(residual)))
    direction = direction / residual.flatten(1).norm(dim=1)[:, None, None]
    length = 2.0 * (1000 / 50) * 8 / 320 * math.sqrt((1 + step.sigma**2) * (1 + step.next_sigma**2))
    assert torch.allclose(moved[0] - moved[1], length * direction, atol=1e-9)


def test_dps_has_the_priors_spread_unseen_and_far_too_little_seen():
    problem = gaussian_problem((16, 16), 2, 3, 4, 0.03)
    sampler = budgeted("dps", 300)
    unit, gain = problem.whiten(sample(sampler, problem.posterior, 60, seed=10).images, sampler.sigma_min)
    variance = unit.abs().square().mean(0) / 2
    assert float(variance[gain > 10].mean()) < 0.3
    assert float(variance[gain < 0.1].mean()) == pytest.approx(1, abs=0.1)


def test_red_diff_starts_with_steps_of_the_learning_rate():
    """Adam's first step is ``learning_rate`` times the sign of the gradient, in each real channel."""
    posterior = gaussian_problem((8, 8), eta=0.1, **SINGLE_COIL).posterior
    sampler = SAMPLERS["red_diff"](steps=20)
    streams = NoiseStreams(range(2), dtype=torch.complex128)
    state = sampler.start(posterior, streams, None)
    moved = sampler.step(streams, state, sampler.plan(posterior)[0]).x - state.x
    # Adam's 1e-8 in the denominator shows where a gradient is below 1e-5 or so.
    assert float((torch.view_as_real(moved).abs() - 0.04).abs().max()) < 1e-4


def test_red_diff_has_next_to_no_spread():
    problem = gaussian_problem((16, 16), 2, 3, 4, 0.03)
    sampler = budgeted("red_diff", 300)
    images = sample(sampler, problem.posterior, 60, seed=11).images
    unit, gain = problem.whiten(images, sampler.sigma_min)
    variance = (unit - unit.mean(0)).abs().square().mean(0) / 2
    assert float(variance[gain > 10].mean()) < 0.1
    assert float(variance.mean()) < 0.3


def test_red_diff_takes_seen_pixels_from_the_data_and_the_others_from_the_prior():
    """From pixels that start at 0, within two of Adam's steps of 0.04."""
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[:3] = True
    prior = GaussianPrior(0.7, spectrum=torch.full((6, 6), 0.3**2, dtype=torch.float64))
    posterior = Posterior(prior, PixelMask(mask, torch.complex128), mask * torch.full((6, 6), 0.5j), 0.1)
    image = sample(SAMPLERS["red_diff"](steps=300), posterior, 200, seed=12).images.mean(0)
    assert float((image[mask] - 0.5j).abs().max()) < 0.08
    assert float((image[~mask] - 0.7).abs().max()) < 0.08


# Budgets and configuration

DEFAULT_EVALUATIONS = {
    "annealed_langevin": 50,
    "csgm_langevin": 2737,
    "daps": 1000,
    "dds": 99,
    "diffpir": 100,
    "dps": 1000,
    "moment_matching": 400,
    "pnp_dm": 1000,
    "preconditioned_ula": 200,
    "red_diff": 1000,
    "reverse_diffusion": 60,
    "tempered_smc": 252,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_defaults_are_the_settings_of_their_own_budget(name):
    assert budgeted(name, DEFAULT_EVALUATIONS[name]) == SAMPLERS[name]()


@pytest.mark.parametrize("nfe", [4, 19, 20, 50, 137])
@pytest.mark.parametrize("name", SAMPLERS)
def test_budgets_are_used_and_kept(name, nfe):
    posterior = gaussian_problem((8, 8), 2, 3, 2, 0.05).posterior
    evaluations = sample(budgeted(name, nfe), posterior, 2).n_evaluations
    assert 0.74 * nfe <= evaluations <= nfe
    if nfe >= 50:  # moment matching spends up to 4 evaluations a step and may leave as many
        assert evaluations >= 0.93 * nfe


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_budget_that_is_too_small_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} needs at least"):
        budgeted(name, 0)


@pytest.mark.parametrize("name", PEERS)
def test_a_configuration_can_name_it(name):
    tree = {"prior": {"name": "mine"}, "sampler": {"name": name, "sigma_min": 0.03}}
    assert parse_config(ReconstructionConfig, tree, "a.yaml").sampler == SAMPLERS[name](sigma_min=0.03)
    tree["sampler"]["sigma_mim"] = 1
    with pytest.raises(UserError, match=r"unknown key sampler\.sigma_mim: did you mean sigma_min"):
        parse_config(ReconstructionConfig, tree, "a.yaml")


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        *((name, "sigma_min", 0.0) for name in PEERS),
        *((name, "sigma_max", 0.01) for name in PEERS if name != "pnp_dm"),
        *((name, "steps", 0) for name in ("daps", "dds", "diffpir", "dps", "moment_matching", "red_diff")),
        ("csgm_langevin", "h", 0.0),
        ("csgm_langevin", "levels", 1),
        ("daps", "ode_steps", 0),
        ("daps", "langevin_h", 2.0),
        ("dds", "cg_steps", 0),
        ("dds", "stochasticity", 1.5),
        ("diffpir", "fresh", -0.1),
        ("diffpir", "prior_weight", 0.0),
        ("dps", "guidance", 0.0),
        ("moment_matching", "cg_iterations", 0),
        ("pnp_dm", "iterations", 0),
        ("pnp_dm", "rho_max", 0.001),
        ("preconditioned_ula", "gamma", 2.0),
        ("red_diff", "learning_rate", 0.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, setting, value):
    with pytest.raises(UserError, match=f"sampler.{setting} {value}"):
        SAMPLERS[name](**{setting: value})
