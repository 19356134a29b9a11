"""deepinv 0.5's DPS, DiffPIR and Langevin sampler beside ours: one denoiser, one scanner, one exact posterior.

    pip install --no-deps deepinv==0.5.0 natsort
    python -m benchmarks.deepinv_beside

A Gaussian image, 32x32, 4 coils, every fourth line and the centre, noise 0.02 per real channel. All samplers see the
same data through deepinv's `MultiCoilMRI` or our `SenseOperator`, which are checked to be equal first.

Reading the table. *Variance* is that of the samples whitened by the exact posterior, where the data speak (observed)
and where they do not (unobserved); *bias* is chi-squared of the samples' mean over its degrees of freedom. All three
are ideally 1, the line *exact draws* shows how near that many samples can come. Each sampler is judged by its own
target, the prior smoothed by its own last noise level. *Time* is per sample, over ours in the same run; the
denoiser costs next to nothing here, so with a network the number of evaluations is what counts.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest.mock import MagicMock

import torch
from jaxtyping import Complex, Float

from benchmarks.exactness import gaussian_score
from mri_posterior.exact import GaussianProblem, gaussian_problem
from mri_posterior.operator import SenseOperator
from mri_posterior.samplers import SAMPLERS, sample

Channels = Float[torch.Tensor, "n 2 *rest"]
Data = Complex[torch.Tensor, "n *rest"]
Images = Complex[torch.Tensor, "n H W"]

COLUMNS = ("variance, observed", "variance, unobserved", "bias χ²/dof")
SEED = 1  # deepinv's DiffPIR takes a seed of 0 for none

_TORCHVISION = (
    "torchvision",
    "torchvision.utils",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.datasets",
    "torchvision.datasets.folder",
    "torchvision.datasets.utils",
)


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Let deepinv be imported where torchvision is missing, or does not fit torch and so cannot be imported.

    deepinv asks for it on import, for its data sets, plots and trainer, none of which take part here. Afterwards the
    stand-ins are gone: other libraries probe for torchvision and would believe them.
    """
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchvision"}
    stand_ins = {name: MagicMock() for name in _TORCHVISION}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(hidden)


def import_deepinv() -> ModuleType:
    """deepinv 0.5.0.

    Raises
    ------
    SystemExit: it is missing, or of another version: the interface changes from one to the next.
    """
    install = "pip install --no-deps deepinv==0.5.0 natsort"
    try:
        with _without_torchvision():
            deepinv = importlib.import_module("deepinv")
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: {install}") from None
    if deepinv.__version__ != "0.5.0":
        raise SystemExit(f"deepinv {deepinv.__version__} is not the version compared with: {install}")
    return deepinv


def to_channels(x: Data) -> Channels:
    return torch.view_as_real(x.to(torch.complex64)).movedim(-1, 1).contiguous()


def to_complex(x: Channels) -> Data:
    return torch.view_as_complex(x.movedim(1, -1).contiguous())


class ChannelDenoiser(torch.nn.Module):
    """The problem's prior by deepinv's interface, ``forward(x, sigma)`` on real channels; counts evaluations."""

    def __init__(self, problem: GaussianProblem):
        super().__init__()
        self.prior = problem.posterior.prior
        self.calls = 0

    def forward(self, x: Channels, sigma: float | torch.Tensor, *args, **kwargs) -> Channels:
        self.calls += 1
        return to_channels(self.prior(to_complex(x), sigma))


class UnitDenoiser(torch.nn.Module):
    """A denoiser of ``u = (x + 1) / 2`` from one of `x`: deepinv's DiffPIR knows images in [0, 1] only."""

    def __init__(self, denoiser: ChannelDenoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, u: Channels, sigma: float | torch.Tensor) -> Channels:
        return (self.denoiser(2 * u - 1, 2 * sigma) + 1) / 2


@dataclass(frozen=True)
class Bench:
    """One problem as deepinv sees it; each method draws samples ``[n, H, W]``."""

    deepinv: ModuleType
    problem: GaussianProblem
    samples: int

    def __post_init__(self) -> None:
        posterior = self.problem.posterior
        ours = posterior.operator.forward(self.problem.truth)
        theirs = to_complex(self.physics().A(to_channels(self.problem.truth[None])))[0]
        # Single precision: 1e-7 per operation, a few hundred of them in an FFT.
        if float((ours - theirs).norm() / ours.norm()) > 1e-5:
            raise SystemExit("deepinv's MultiCoilMRI and SenseOperator differ: nothing to compare")

    def physics(self, noise_std: float | None = None):
        operator: SenseOperator = self.problem.posterior.operator
        noise = self.deepinv.physics.GaussianNoise(noise_std or self.problem.posterior.noise_std)
        return self.deepinv.physics.MultiCoilMRI(operator.mask.float(), operator.maps, noise_model=noise)

    def data(self) -> Channels:
        return to_channels(self.problem.posterior.kspace.expand(self.samples, *self.problem.posterior.kspace.shape))

    def dps(self, denoiser: ChannelDenoiser, weight: float, steps: int) -> Images:
        """`minus_one_one` off: the denoiser knows MRI units; the built-in clip to [-1, 1] touches nothing here."""
        rng = torch.Generator().manual_seed(SEED)
        sampler = self.deepinv.sampling.DPS(denoiser, weight=weight, num_steps=steps, rng=rng, minus_one_one=False)
        return to_complex(sampler(self.data(), self.physics(), seed=SEED))

    def diffpir(self, denoiser: ChannelDenoiser, zeta: float, steps: int) -> Images:
        """In ``u = (x + 1) / 2``, whose data are ``(y + A 1) / 2`` and whose noise is half as strong."""
        noise_std = self.problem.posterior.noise_std / 2
        physics = self.physics(noise_std)
        data = self.data()
        data = (data + physics.A(torch.ones(self.samples, 2, *self.problem.truth.shape))) / 2
        fidelity = self.deepinv.optim.data_fidelity.L2()
        sampler = self.deepinv.sampling.DiffPIR(
            UnitDenoiser(denoiser), fidelity, sigma=noise_std, max_iter=steps, zeta=zeta
        )
        return to_complex(2 * sampler(data, physics, seed=SEED) - 1)

    def ula(self, denoiser: ChannelDenoiser, sigma: float, steps: int) -> Images:
        """Its last state, at half the largest stable step, from its own start ``A^H y``."""
        eta = self.problem.posterior.noise_std
        sampler = self.deepinv.sampling.ULA(
            self.deepinv.optim.ScorePrior(denoiser),
            self.deepinv.optim.data_fidelity.L2(sigma=eta),
            step_size=1 / (1 / eta**2 + 1 / sigma**2),
            sigma=sigma,
            max_iter=steps,
            thinning=1,
            clip=None,
            save_chain=1,
        )
        sampler.sample(self.data(), self.physics(), seed=SEED)
        return to_complex(sampler.get_chain()[-1]["x"])


@dataclass(frozen=True)
class Line:
    name: str
    evaluations: int
    seconds: float
    figures: dict[str, float]


def measure(problem: GaussianProblem, name: str, sigma_min: float, draw: Callable[[], tuple[Images, int]]) -> Line:
    start = time.perf_counter()
    images, evaluations = draw()
    seconds = time.perf_counter() - start
    return Line(name, evaluations, seconds, gaussian_score(problem, images.detach(), sigma_min))


def lines(bench: Bench) -> Iterator[Line]:
    """Ours, exact draws, then deepinv's."""
    problem, n = bench.problem, bench.samples
    ours = SAMPLERS["annealed_langevin"]()

    def draw_ours() -> tuple[Images, int]:
        result = sample(ours, problem.posterior, n, seed=SEED)
        return result.images, result.n_evaluations

    draw_ours()  # the first run pays for the FFT library's start
    yield measure(problem, "**annealed_langevin (ours)**", ours.sigma_min, draw_ours)

    def draw_exactly() -> tuple[Images, int]:
        return problem.exact_samples(n, ours.sigma_min, torch.Generator().manual_seed(SEED)), 0

    yield measure(problem, "exact draws", ours.sigma_min, draw_exactly)

    def draw_theirs(method: Callable[..., Images], *settings) -> Callable[[], tuple[Images, int]]:
        def draw() -> tuple[Images, int]:
            denoiser = ChannelDenoiser(problem)
            # Some of deepinv's samplers seed the global generator.
            with torch.random.fork_rng():
                images = method(denoiser, *settings)
            return images, denoiser.calls

        return draw

    # 1 is deepinv's default; 1000 was chosen against the known answer, which no user has: DPS at its best.
    for weight in (1.0, 100.0, 1000.0):
        # Its last step returns the denoised image: no noise is left.
        yield measure(problem, f"deepinv DPS, weight {weight:g}", 0.0, draw_theirs(bench.dps, weight, 1000))
    for zeta in (0.1, 1.0):
        # Its variance-preserving schedule ends at beta_1 = 1e-4, noise of level 0.01.
        yield measure(problem, f"deepinv DiffPIR, zeta {zeta:g}", 0.01, draw_theirs(bench.diffpir, zeta, 100))
    for steps in (1000, 4000):
        sigma = ours.sigma_min
        yield measure(problem, f"deepinv ULA, {steps} steps", sigma, draw_theirs(bench.ula, sigma, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    deepinv = import_deepinv()
    problem = gaussian_problem((32, 32), 4, 4, 4, 0.02, dtype=torch.complex64)
    reference = None
    print(f"| sampler | {' | '.join(COLUMNS)} | evaluations | time / ours |\n" + "|---" * 6 + "|")
    for line in lines(Bench(deepinv, problem, options.samples)):
        reference = reference or line.seconds
        figures = " | ".join(f"{line.figures[column]:.3g}" for column in COLUMNS)
        ratio = f"{line.seconds / reference:.2g}" if line.evaluations else "-"
        print(f"| {line.name} | {figures} | {line.evaluations or '-'} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
