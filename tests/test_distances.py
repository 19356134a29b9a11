"""Distances against closed forms of normal laws and of point sets."""

from __future__ import annotations

import math

import pytest
import torch

from mri_posterior.distances import frechet_distance, gabor_features, monte_carlo_floor, sliced_wasserstein
from mri_posterior.exact import gaussian_problem, white


def test_sliced_wasserstein_of_a_shift(generator):
    """A set moved by v is ``|<v, direction>|`` away along each direction: root mean square ``|v| / sqrt(2 p)``."""
    a = white(generator, 30, 4, 3)
    shift = white(generator, 4, 3)
    n = 4000
    expected = math.sqrt(float(shift.abs().square().sum()) / 24)
    # <v, direction>^2 has a relative standard deviation below sqrt(2); the root halves it.
    assert sliced_wasserstein(a, a + shift, generator, n) == pytest.approx(expected, rel=5 * math.sqrt(2 / n) / 2)
    assert sliced_wasserstein(a, a, generator) == 0


def test_sliced_wasserstein_is_per_real_channel(generator):
    """White noise of level s against t: ``|s - t|``. Scaling one set gives the exact couple, but for the projections'
    sample variance: relative standard deviation ``1/sqrt(2 n)`` each, less over all projections.
    """
    a = 2.0 * white(generator, 500, 5, 5)
    assert sliced_wasserstein(a, 1.5 * a, generator) == pytest.approx(1.0, rel=0.05)


def test_sliced_wasserstein_of_unequal_sets_by_hand():
    """One pixel, real points {0, 3} against {0, 1, 2}: quantile functions differ by 0, 1, 2, 1 on sixths 2, 1, 1, 2."""
    a = torch.tensor([0.0, 3.0], dtype=torch.complex128).reshape(2, 1, 1)
    b = torch.tensor([0.0, 1.0, 2.0], dtype=torch.complex128).reshape(3, 1, 1)
    squared = (2 * 0 + 1 * 1 + 1 * 4 + 2 * 1) / 6
    n = 4000
    # A direction at angle t scales by |cos t|: mean of cos^2 is 1/2, its standard deviation sqrt(1/8).
    expected = math.sqrt(squared / 2)
    tolerance = 5 * math.sqrt(1 / 8 / n)
    assert sliced_wasserstein(a, b, torch.Generator().manual_seed(0), n) == pytest.approx(expected, rel=tolerance)


def test_sliced_wasserstein_repeats_with_its_generator(generator):
    a, b = white(generator, 20, 4, 4), white(generator, 10, 4, 4)
    first, second = (sliced_wasserstein(a, b, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    # Doubling a set changes nothing: it is the same distribution.
    assert sliced_wasserstein(a, b.repeat(2, 1, 1), torch.Generator().manual_seed(3)) == pytest.approx(first)


def test_floor_compares_fresh_sets_of_the_sizes_asked_for(generator):
    sets = []
    floor = monte_carlo_floor(
        lambda a, b: float(len(sets)), lambda n, g: sets.append(white(g, n, 1, 1)) or sets[-1], (2, 3), generator, 2
    )
    assert floor.tolist() == [2, 4]
    assert [len(x) for x in sets] == [2, 3, 2, 3]
    assert len({complex(x[0, 0, 0]) for x in sets}) == 4


@pytest.mark.parametrize("factor", [1.3, 0.7])
def test_wrong_spread_is_above_the_floor_and_right_spread_is_not(factor, generator):
    """Under the null hypothesis a false alarm has probability 1/40."""
    problem = gaussian_problem((6, 6), 2, 3, 2, 0.05)
    draw = lambda n, g: problem.exact_samples(n, 0.02, g)  # noqa: E731
    distance = lambda a, b: sliced_wasserstein(a, b, torch.Generator().manual_seed(0), 64)  # noqa: E731
    floor = monte_carlo_floor(distance, draw, (200, 300), generator, repeats=39)
    assert floor.shape == (39,)
    assert float(floor.min()) > 0
    right, exact = draw(200, generator), draw(300, generator)
    wrong = right.mean(0) + factor * (right - right.mean(0))
    assert distance(right, exact) <= float(floor.max())
    assert distance(wrong, exact) > float(floor.max())


def test_frechet_distance_of_known_means_and_covariances():
    """Sets built to have them exactly. Commuting: ``sum (sqrt a - sqrt b)^2``, here 1 + 4; the shift adds 9 + 16."""
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    unit = square * math.sqrt(3 / 4)  # covariance (divided by n - 1 = 3) is the identity
    a, b = unit * torch.tensor([1.0, 2.0]), unit * torch.tensor([2.0, 4.0]) + torch.tensor([3.0, 4.0])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 9 + 16)
    assert frechet_distance(b, a) == pytest.approx(30)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In two dimensions ``tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))``."""
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64) * math.sqrt(3 / 4)
    root_a = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    root_b = torch.tensor([[1.5, 0.7], [0.7, 1.0]], dtype=torch.float64)
    product = root_a @ root_a @ root_b @ root_b
    cross = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    expected = float((root_a @ root_a).trace() + (root_b @ root_b).trace()) - 2 * cross
    assert frechet_distance(square @ root_a, square @ root_b) == pytest.approx(expected)


def test_frechet_distance_of_fewer_images_than_features(generator):
    """Singular covariances: still finite, zero for equal sets, and the squared shift for a moved set."""
    a = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    # Square roots of eigenvalues that rounding leaves at 1e-16 instead of 0.
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + 0.5) == pytest.approx(40 * 0.25, abs=1e-5)


def test_gabor_features_see_scale_direction_and_place():
    """A plane wave in the left half answers in the filter of its own frequency and direction, in the left cells."""
    size = 32
    columns = torch.arange(size, dtype=torch.float64)
    wave = torch.polar(torch.ones(size, dtype=torch.float64), 2 * math.pi * columns / 8).expand(1, size, size).clone()
    wave[:, :, size // 2 :] = 0
    features = gabor_features(wave).reshape(3, 8, 2, 2)
    strongest = int(features.sum((2, 3)).argmax())
    assert divmod(strongest, 8) == (1, 0)  # 1/8 cycles per pixel is the second scale, direction 0 along a row
    cells = features[1, 0]
    assert float(cells[:, 0].min()) > 3 * float(cells[:, 1].max())


def test_gabor_features_are_fixed_linear_in_scale_and_blind_to_phase(generator):
    images = white(generator, 3, 20, 17)
    features = gabor_features(images)
    assert features.shape == (3, 3 * 8 * 4)
    assert torch.equal(features, gabor_features(images))
    assert torch.allclose(gabor_features(2j * images), 2 * features)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        gabor_features(images[:, :12])


def test_frechet_distance_of_textures_is_above_its_floor(generator):
    """Equal power in every pixel, another spectrum: features see what a single pixel does not. False alarms: 1/20."""
    shape = (32, 32)
    smooth = torch.exp(-8 * torch.fft.fftfreq(32).square())[:, None].double()
    smooth = smooth / smooth.square().mean().sqrt()
    rough = lambda n, g: white(g, n, *shape)  # noqa: E731
    distance = lambda a, b: frechet_distance(gabor_features(a), gabor_features(b))  # noqa: E731
    floor = monte_carlo_floor(distance, rough, (40, 40), generator, repeats=19)
    filtered = torch.fft.ifft2(smooth * torch.fft.fft2(rough(40, generator)))
    assert distance(rough(40, generator), rough(40, generator)) <= float(floor.max())
    assert distance(filtered, rough(40, generator)) > float(floor.max())


def test_what_cannot_be_compared_is_refused(generator):
    a = white(generator, 4, 3, 3)
    with pytest.raises(ValueError, match="one image shape"):
        sliced_wasserstein(a, a[:, :2], generator)
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(torch.zeros(3, 2), torch.zeros(3, 4))
