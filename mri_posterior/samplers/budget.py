"""Every sampler at a given number of network evaluations, to compare samplers at equal cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mri_posterior.samplers import SAMPLERS
from mri_posterior.samplers.step import Sampler

LEARNING = 8
"""Evaluations that measure the prior's spectrum and check it, at the default number of probes."""


def budgeted(name: str, nfe: int) -> Sampler:
    """The sampler `name` of `SAMPLERS` with settings for at most `nfe` evaluations, as near as they come.

    The defaults are kept where the budget is theirs; all else but the numbers of steps is as by default.

    Raises
    ------
    ValueError: fewer evaluations than any setting of the sampler needs.
    """
    least = _LEAST.get(name, 1)
    if nfe < least:
        raise ValueError(f"{name} needs at least {least} network evaluations, got {nfe}")
    return SAMPLERS[name](**_SETTINGS[name](nfe))


def _annealed_langevin(nfe: int) -> dict[str, Any]:
    """Half for the way down, the rest at the last level but for a few in annealing."""
    # With fewer than this the preconditioner has to do without what it would have learnt.
    learns = nfe >= 20
    steps = nfe - LEARNING if learns else nfe
    diffusion_steps = max(1, steps // 4)
    rest = steps - 2 * diffusion_steps
    if rest < 1:
        return {"diffusion_steps": 1, "guided_steps": 1, "levels": 1, "final_steps": nfe - 2, "precondition": "scalar"}
    levels = min(max(1, round(rest / 11)), 16)
    settings = {"diffusion_steps": diffusion_steps, "levels": levels, "final_steps": rest - levels}
    return settings if learns else settings | {"precondition": "scalar"}


def _tempered_smc(nfe: int) -> dict[str, Any]:
    """Two fifths for draws of the prior, the rest for moves."""
    learns = nfe >= 40
    steps = nfe - LEARNING if learns else nfe
    draws, levels = min(max(steps // 60, 1), 4), min(max(steps // 20, 1), 12)
    diffusion_steps = max(1, round(0.41 * steps / draws))
    settings = {"draws": draws, "diffusion_steps": diffusion_steps, "levels": levels}
    settings["moves"] = (steps - draws * diffusion_steps) // levels
    return settings if learns else settings | {"precondition": "scalar"}


def _daps(nfe: int) -> dict[str, Any]:
    ode_steps = 5 if nfe >= 100 else 2 if nfe >= 2 else 1
    return {"ode_steps": ode_steps, "steps": nfe // ode_steps}


def _pnp_dm(nfe: int) -> dict[str, Any]:
    """Iterations and the steps of each grow together."""
    diffusion_steps = min(max(round(math.sqrt(nfe / 10)), 1), 10)
    return {"diffusion_steps": diffusion_steps, "iterations": nfe // diffusion_steps}


def _csgm_langevin(nfe: int) -> dict[str, Any]:
    steps_per_level = 3 if nfe >= 12 else 1
    levels = nfe // steps_per_level
    return {"steps_per_level": steps_per_level, "levels": levels, "final_steps": nfe - levels * steps_per_level}


def _preconditioned_ula(nfe: int) -> dict[str, Any]:
    steps_per_level = min(max(nfe // 100, 1), 4)
    return {"steps_per_level": steps_per_level, "levels": nfe // steps_per_level}


def _moment_matching(nfe: int) -> dict[str, Any]:
    cg_iterations = 2 if nfe >= 100 else 1
    return {"cg_iterations": cg_iterations, "steps": nfe // (2 + cg_iterations)}


def _steps(nfe: int) -> dict[str, Any]:
    return {"steps": nfe}


_SETTINGS: dict[str, Callable[[int], dict[str, Any]]] = {
    "annealed_langevin": _annealed_langevin,
    "csgm_langevin": _csgm_langevin,
    "daps": _daps,
    "dds": _steps,
    "diffpir": _steps,
    "dps": _steps,
    "moment_matching": _moment_matching,
    "pnp_dm": _pnp_dm,
    "preconditioned_ula": _preconditioned_ula,
    "red_diff": _steps,
    "reverse_diffusion": _steps,
    "tempered_smc": _tempered_smc,
}

_LEAST = {"annealed_langevin": 2, "csgm_langevin": 2, "moment_matching": 3, "tempered_smc": 2}
