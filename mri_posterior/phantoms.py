"""Object images without any patient's data: knee-like phantoms drawn at random, and slices of a brain template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float

from mri_posterior.errors import UserError

Field = Float[np.ndarray, "H W"]


def knee_phantom(shape: tuple[int, int], rng: np.random.Generator) -> Float[np.ndarray, "H W"]:
    """Draw a random magnitude image that looks like a coronal proton-density knee, to train and test priors on.

    Geometry is measured in halves of the shorter side, which stand for 80 mm: 160x160 is a knee at 1 mm.
    Pixels are square, so a longer side shows more of the leg or more air. Pose, anatomy, slice depth,
    fat suppression, contrast, shading and texture all vary with `rng`. Stylised: it is for exercising
    software, and no statement about anatomy.

    Parameters
    ----------
    shape: rows (superior at the top) and columns.
    rng: the image depends on `shape` and the generator's state only.

    Returns
    -------
    float32 ``[H, W]``, about 0 to 1.2, exactly 0 in the air outside of the leg.
    """
    pose = _Pose.draw(rng)
    tone = _Tones.draw(rng)
    u, v = pose.coordinates(shape, rng)
    canvas = _Canvas(u, blur=rng.uniform(1.0, 1.9) * 2 / min(shape))
    texture = _textures(shape, rng)

    leg = _paint_soft_tissue(canvas, u, v, tone, texture, rng)
    _paint_joint(canvas, u, v, pose, tone, texture, rng)

    shading = np.exp(rng.uniform(0.02, 0.14) * texture.smooth)
    # Surface coils see the joint best; the ends of the leg fade.
    fade = 1 / (1 + rng.uniform(0.0, 0.5) * np.abs(v) ** 3)
    image = canvas.image * shading * fade * (1 + 0.02 * texture.fine)
    return np.clip(image * canvas.coverage(leg) * rng.uniform(0.8, 1.0), 0, 1.25).astype(np.float32)


SAMPLE_HEIGHTS_MM = (-10.0, 10.0, 30.0, 50.0)
"""Of the embedded brain sample's slices."""


def brain_slices(shape: tuple[int, int], z_mm: Sequence[float]) -> Float[np.ndarray, "slices H W"]:
    """Axial T1 slices of a real head without downloading anything: the MNI152 template that nilearn ships.

    The template is an average of 152 adults and **skull-stripped**: no scalp, no skull, and smoother than any one
    person. It is the symmetric version, so left and right look alike.

    Parameters
    ----------
    shape: rows and columns of 2 mm; the template's 117x99 grid is centred in it by zero padding or cropping.
    z_mm: MNI heights, -72 to 116; the nearest 2 mm slice is taken.

    Returns
    -------
    float32 ``[slices, H, W]``, rows anterior (top) to posterior, columns left to right; the 99th percentile of
    all of them together is 1.

    Raises
    ------
    UserError: nilearn is not installed, or a height outside of the template.
    """
    slices, heights = _mni152()
    # Every second voxel is what nilearn's own 2 mm version is, less the specks of 1e-16 that its resampling leaves.
    slices, heights = slices[::2, ::2, ::2], heights[::2]
    indices = np.rint((np.asarray(z_mm, dtype=float) - heights[0]) / 2).astype(int)
    outside = [z for z, k in zip(z_mm, indices, strict=True) if not 0 <= k < len(slices)]
    if outside:
        raise UserError(f"z_mm {outside}: outside of the MNI152 template (-72 to 116 mm)")
    slices = slices[indices]
    framed = np.stack([_centred(s, shape) for s in slices])
    return framed / np.percentile(framed, 99).astype(np.float32)


def brain_template() -> Float[np.ndarray, "slices H W"]:
    """The MNI152 template's axial slices at 1 mm, to train on: from -60 to 75 mm, but for 4 mm around those of the
    embedded brain sample, which would otherwise be judged on what was learnt by heart.

    Raises
    ------
    UserError: nilearn is not installed.
    """
    slices, heights = _mni152()
    apart = np.abs(heights[:, None] - np.array(SAMPLE_HEIGHTS_MM)).min(axis=1)
    return np.ascontiguousarray(slices[(heights > -60) & (heights < 75) & (apart > 4)])


def _mni152() -> tuple[Float[np.ndarray, "slices H W"], Float[np.ndarray, " slices"]]:
    """The template's axial slices, rows anterior to posterior and columns left to right, and their heights in mm."""
    try:
        from nilearn.datasets import load_mni152_template
    except ImportError:
        raise UserError('the brain template needs nilearn: pip install "mri-posterior[samples]"') from None
    template = load_mni152_template(resolution=1)  # from a file inside the package
    volume = np.asarray(template.dataobj, dtype=np.float32)  # axes point right, anterior and superior
    heights = template.affine[2, 2] * np.arange(volume.shape[2]) + template.affine[2, 3]
    return volume[:, ::-1].transpose(2, 1, 0).clip(0), heights


def smooth_phase(shape: tuple[int, int], rng: np.random.Generator, strength: float) -> Complex[np.ndarray, "H W"]:
    """The slowly varying phase that field inhomogeneity leaves in an image, as complex64 factors of unit modulus.

    Parameters
    ----------
    strength: root mean square of the phase, radians.
    """
    rows, columns = (np.arange(4)[:, None] * (np.arange(n) + 0.5) / n for n in shape)
    order = np.hypot(np.arange(4)[:, None], np.arange(4)[None, :])
    coefficients = rng.standard_normal((4, 4)) / (1 + order**2)
    phase = np.cos(np.pi * rows).T @ coefficients @ np.cos(np.pi * columns)
    phase *= strength / np.sqrt(np.mean(phase**2))
    return np.exp(1j * phase).astype(np.complex64)


def _centred(image: Field, shape: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Zero-pad or crop about the centre, pixel ``n // 2`` to pixel ``n // 2``."""
    framed = np.zeros(shape, image.dtype)
    source, target = [], []
    for old, new in zip(image.shape, shape, strict=True):
        shift = new // 2 - old // 2
        source.append(slice(max(-shift, 0), min(new - shift, old)))
        target.append(slice(max(shift, 0), min(old + shift, new)))
    framed[tuple(target)] = image[tuple(source)]
    return framed


# ---------------------------------------------------------------- what varies


@dataclass(frozen=True)
class _Pose:
    """Anatomy and position of one knee. `lateral` is +1 where the fibula is on the right of the image."""

    lateral: float
    depth: float  # -1 posterior .. 1 anterior
    size: float
    tilt: float
    centre: tuple[float, float]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Pose:
        return cls(
            lateral=float(rng.choice([-1.0, 1.0])),
            depth=rng.uniform(-1, 1),
            size=rng.uniform(0.84, 1.02),
            tilt=rng.normal(0, 0.06),
            centre=(rng.normal(0, 0.03), rng.normal(0.02, 0.07)),
        )

    def coordinates(self, shape: tuple[int, int], rng: np.random.Generator) -> tuple[Field, Field]:
        """Each pixel in the knee's own frame: `u` from medial to lateral, `v` from superior to inferior."""
        half = min(shape) / 2
        y = (np.arange(shape[0], dtype=np.float32)[:, None] + 0.5 - shape[0] / 2) / half - self.centre[1]
        x = (np.arange(shape[1], dtype=np.float32)[None, :] + 0.5 - shape[1] / 2) / half - self.centre[0]
        c, s = math.cos(self.tilt) / self.size, math.sin(self.tilt) / self.size
        u, v = self.lateral * (c * x + s * y), c * y - s * x
        # Long waves bend the leg, short ones roughen the outline of every structure alike.
        for wavenumber, amplitude in ((1.5, 0.022), (4.0, 0.009), (9.0, 0.0035)):
            du, dv = (_waves(u, v, wavenumber, rng) for _ in range(2))
            u, v = u + amplitude * du, v + amplitude * dv
        return u, v


@dataclass(frozen=True)
class _Tones:
    """Grey level of each tissue."""

    fat: float
    marrow: float
    muscle: float
    cartilage: float
    fluid: float
    dark: float  # cortical bone, menisci, ligaments
    skin: float
    vessel: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Tones:
        if rng.random() < 0.5:  # fat suppressed
            fat = rng.uniform(0.12, 0.30)
            marrow = fat * rng.uniform(0.7, 1.0)
            muscle, cartilage, fluid = rng.uniform(0.34, 0.52), rng.uniform(0.62, 0.85), rng.uniform(0.85, 1.1)
            vessel = fluid * rng.uniform(0.7, 1.0)
        else:
            fat = rng.uniform(0.80, 1.0)
            marrow = fat * rng.uniform(0.7, 0.95)
            muscle, cartilage, fluid = rng.uniform(0.28, 0.45), rng.uniform(0.5, 0.7), rng.uniform(0.6, 0.85)
            vessel = rng.choice([0.08, fluid])
        dark = rng.uniform(0.03, 0.10)
        return cls(fat, marrow, muscle, cartilage, fluid, dark, skin=rng.uniform(0.3, 0.5), vessel=float(vessel))


# ---------------------------------------------------------------- drawing


class _Canvas:
    """Painter's algorithm on signed distances (negative inside), with edges `blur` wide instead of jagged."""

    def __init__(self, like: Field, blur: float):
        self.image = np.zeros_like(like)
        self.blur = blur

    def coverage(self, distance: Field) -> Field:
        t = np.clip(0.5 - distance / np.float32(self.blur), 0, 1)
        return t * t * (3 - 2 * t)

    def paint(self, distance: Field, value: Field | float, opacity: float = 1.0) -> None:
        self.image += np.float32(opacity) * self.coverage(distance) * (value - self.image)


@dataclass(frozen=True)
class _Textures:
    """Zero-mean, unit-variance random fields shared by all tissues of one image."""

    fine: Field
    grain: Field
    fibres: Field  # elongated along the leg
    septa: Field
    smooth: Field


def _textures(shape: tuple[int, int], rng: np.random.Generator) -> _Textures:
    """Fields with power spectra ``|k|^-2s``: noise-like for small slope `s`, cloudy for large."""
    ky = np.fft.fftfreq(shape[0]).astype(np.float32)[:, None] * shape[0]
    kx = np.fft.fftfreq(shape[1]).astype(np.float32)[None, :] * shape[1]

    def pair(slope: float, stretch: float, low: float) -> tuple[Field, Field]:
        envelope = ((stretch * ky) ** 2 + kx**2 + np.float32(low) ** 2) ** np.float32(-slope / 2)
        noise = rng.standard_normal((2, *shape), dtype=np.float32)
        field = np.fft.ifft2((noise[0] + 1j * noise[1]) * envelope)
        real, imaginary = field.real, field.imag  # two independent fields for one transform
        return (real - real.mean()) / real.std(), (imaginary - imaginary.mean()) / imaginary.std()

    fine, grain = pair(rng.uniform(0.8, 1.3), rng.uniform(0.6, 1.0), 4.0)
    fibres, septa = pair(rng.uniform(1.3, 1.7), rng.uniform(2.5, 4.0), 8.0)
    smooth, _ = pair(3.0, 1.0, 1.5)
    return _Textures(*(f.astype(np.float32) for f in (fine, grain, fibres, septa, smooth)))


def _waves(u: Field, v: Field, wavenumber: float, rng: np.random.Generator, n: int = 3) -> Field:
    """A smooth random function of unit size: `n` plane waves of about `wavenumber` radians per unit length."""
    total = np.zeros_like(u)
    for angle, phase, k in zip(
        rng.uniform(0, math.pi, n), rng.uniform(0, 2 * math.pi, n), wavenumber * rng.uniform(0.6, 1.4, n), strict=True
    ):
        total += np.cos(np.float32(k * math.cos(angle)) * u + np.float32(k * math.sin(angle)) * v + np.float32(phase))
    return total * np.float32(math.sqrt(2 / n))


def _ellipse(u: Field, v: Field, centre: tuple[float, float], radii: tuple[float, float], power: float = 2.0) -> Field:
    """Approximate distance to a superellipse; `power` above 2 squares it off."""
    a, b = np.abs((u - centre[0]) / radii[0]), np.abs((v - centre[1]) / radii[1])
    radius = np.hypot(a, b) if power == 2 else (a**power + b**power) ** (1 / power)
    return (radius - 1) * min(radii)


def _band(u: Field, v: Field, start: tuple[float, float], end: tuple[float, float], radius: float) -> Field:
    """Distance to a straight band with round ends."""
    du, dv = end[0] - start[0], end[1] - start[1]
    t = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / (du * du + dv * dv), 0, 1)
    return np.hypot(u - start[0] - t * du, v - start[1] - t * dv) - radius


def _union(a: Field, b: Field, roundness: float) -> Field:
    """The smaller of two distances with the crease rounded off."""
    h = np.clip(roundness - np.abs(a - b), 0, None)
    return np.minimum(a, b) - h * h / (4 * roundness)


def _threads(u: Field, v: Field, wavenumber: float, rng: np.random.Generator) -> Field:
    """Distance to thin curved lines: the zero crossings of a smooth random function."""
    return np.abs(_waves(u, v, wavenumber, rng, n=4)) / wavenumber - rng.uniform(0.001, 0.006)


def _step(x: Field, at: float, width: float) -> Field:
    return 1 / (1 + np.exp(np.clip((at - x) / width, -30, 30)))


# ---------------------------------------------------------------- anatomy


def _paint_soft_tissue(
    canvas: _Canvas, u: Field, v: Field, tone: _Tones, texture: _Textures, rng: np.random.Generator
) -> Field:
    """Skin, subcutaneous fat, muscles and vessels; returns the distance to the leg's outline."""
    thigh, knee, calf = rng.uniform(0.82, 0.98), rng.uniform(0.74, 0.84), rng.uniform(0.74, 0.90)
    width = knee + (thigh - knee) * _step(-v, 0.45, 0.18) + (calf - knee) * _step(v, 0.55, 0.18)
    leg = np.abs(u + rng.normal(0, 0.02)) - width
    fat = tone.fat * (1 + 0.06 * texture.grain + 0.05 * texture.smooth)
    canvas.paint(leg, tone.skin)
    canvas.paint(leg + rng.uniform(0.018, 0.03), fat)
    septa = np.maximum(_threads(u, v, 22.0, rng), leg + 0.05)
    canvas.paint(np.maximum(septa, 0.02 * texture.septa), tone.muscle, rng.uniform(0.2, 0.7))

    fascia = leg + rng.uniform(0.06, 0.20) + 0.02 * _waves(u, v, 3.0, rng)
    canvas.paint(np.abs(fascia) - 0.006, tone.dark, rng.uniform(0.3, 0.8))
    iliotibial = np.maximum(np.abs(fascia) - rng.uniform(0.008, 0.016), np.maximum(v + 0.1, 0.3 - u))
    canvas.paint(iliotibial, tone.dark, rng.uniform(0.4, 1.0))
    fibres = tone.muscle * (1 + 0.10 * texture.fibres + 0.05 * texture.grain)
    bellies = [  # centre and radii: two vasti (the medial one reaches lower), gastrocnemius heads or peroneals
        ((-0.58, -0.95), (0.40, 0.80)), ((0.60, -1.0), (0.40, 0.70)),
        ((-0.46, 1.05), (0.40, 0.80)), ((0.62, 1.05), (0.32, 0.78)), ((0.24, 1.15), (0.28, 0.66)),
    ]  # fmt: skip
    for (cu, cv), (ru, rv) in bellies:
        centre = (cu + rng.normal(0, 0.04), cv + rng.normal(0, 0.05))
        belly = _ellipse(u, v, centre, (ru * rng.uniform(0.9, 1.15), rv * rng.uniform(0.85, 1.1)), 2.4)
        belly = -_union(-belly, -fascia - 0.012, 0.04)
        canvas.paint(belly - 0.014, fat, 0.8)
        canvas.paint(belly, fibres * rng.uniform(0.9, 1.1))
        # Fat lies between bundles of fibres, which run along the leg.
        streaks = np.maximum(_threads(u, 0.2 * v, 40.0, rng), 0.02 * (texture.septa + rng.uniform(0, 1)))
        canvas.paint(np.maximum(belly + 0.02, streaks), fat, rng.uniform(0.1, 0.7))
    for _ in range(rng.poisson(5)):
        side = float(rng.choice([-1, 1]))
        start = (side * rng.uniform(0.5, 0.8), rng.uniform(-0.9, 0.9))
        end = (start[0] + rng.normal(0, 0.06), start[1] + rng.exponential(0.2))
        bend = 0.012 * np.sin(np.float32(rng.uniform(8, 25)) * v + np.float32(rng.uniform(0, 6)))
        vessel = np.maximum(_band(u + bend, v, start, end, rng.uniform(0.004, 0.015)), leg + 0.05)
        canvas.paint(vessel, tone.vessel, rng.uniform(0.5, 1))
    return leg


def _paint_joint(
    canvas: _Canvas, u: Field, v: Field, pose: _Pose, tone: _Tones, texture: _Textures, rng: np.random.Generator
) -> None:
    """Bones with cortex and marrow, cartilage, fluid, menisci and ligaments."""
    gap = rng.uniform(0.055, 0.085)  # between the bones
    half = rng.uniform(0.48, 0.56)  # half width of the joint
    a = np.abs(u)

    # Femur: a shaft that flares into two condyles with a notch between.
    shaft = rng.uniform(0.17, 0.23)
    flare = shaft + (half - 0.02 - shaft) * _step(v, -0.50 + rng.normal(0, 0.03), 0.065)
    femur = np.maximum(a - flare, v + 0.20)
    if pose.depth < -0.5:  # the slice runs behind the shaft, through fat
        top = -0.42 - rng.uniform(0, 0.25)
        femur = -_union(-femur, -(top + 0.5 * u * u - 0.03 * texture.smooth - v), 0.15)
    for side in (-1, 1):
        radii = (half / 2 + rng.uniform(-0.005, 0.015), rng.uniform(0.21, 0.25))
        condyle = _ellipse(u, v, (side * half / 2, -radii[1] + rng.normal(0, 0.005)), radii, rng.uniform(2.1, 2.6))
        femur = _union(femur, condyle, 0.06)
    height = 0.20 - 0.11 * pose.depth
    notch = _ellipse(u, v, (0.0, 0.0), (rng.uniform(0.085, 0.125), height * rng.uniform(0.9, 1.15)), 2.3)
    femur = -_union(-femur, notch, 0.04)

    # Tibia: a plateau with the eminence in its middle, tapering to the shaft. Fibula: lateral, behind.
    shaft = rng.uniform(0.19, 0.25)
    taper = shaft + (half - shaft) * _step(-v, -0.40 + rng.normal(0, 0.03), 0.085)
    eminence = rng.uniform(0.03, 0.07) * (np.exp(-(((a - 0.055) / 0.035) ** 2)) + 0.6 * np.exp(-((u / 0.07) ** 2)))
    dish = rng.uniform(0.005, 0.02) * np.cos(math.pi * (a / half - 0.5) * 2)
    plateau = gap + dish - eminence
    tibia = -_union(-(a - taper), -(plateau - v), 0.06)
    fibula = None
    if pose.depth < rng.uniform(-0.2, 0.6):
        cu = half - rng.uniform(0.0, 0.07)
        head = _ellipse(u, v, (cu, 0.33), (rng.uniform(0.085, 0.115), rng.uniform(0.10, 0.14)))
        fibula = _union(head, _band(u, v, (cu, 0.36), (cu - 0.03, 2.0), rng.uniform(0.05, 0.065)), 0.05)
    bones = np.minimum(femur, tibia)

    fat = tone.fat * (1 + 0.06 * texture.grain)
    capsule = _ellipse(u, v, (0.0, gap / 2), (half + rng.uniform(0.06, 0.1), rng.uniform(0.28, 0.4)), 2.3)
    canvas.paint(capsule, fat)
    canvas.paint(np.abs(capsule) - 0.006, tone.dark, rng.uniform(0.1, 0.6))
    canvas.paint(bones - rng.uniform(0.01, 0.03), fat)  # a fat line between bone and muscle

    fluid = tone.fluid * (1 + 0.04 * texture.grain)
    between = np.maximum(np.maximum(np.abs(v - gap / 2) - 0.16, a - half), np.minimum(femur, tibia) - gap * 0.9)
    canvas.paint(between, fluid, rng.uniform(0.7, 1.0))
    cartilage = tone.cartilage * (1 + 0.05 * texture.fine)
    thickness = gap * rng.uniform(0.38, 0.5)
    layer = np.maximum(femur - thickness, np.maximum(-0.17 - v, a - half))
    layer = np.minimum(layer, np.maximum(tibia - thickness, np.maximum(v - 0.16, a - half * 0.95)))
    canvas.paint(layer, cartilage)

    # Notch: fat and fluid, then the cruciates as dark striated bands.
    inside_notch = np.maximum(notch - 0.01, v - gap)
    canvas.paint(inside_notch, 0.6 * fat + 0.4 * tone.fluid)
    ligament = tone.dark + 0.08 + 0.03 * texture.fibres
    slant = rng.uniform(0.04, 0.09)
    for start, end, radius in (
        ((slant, -height * 0.8), (-slant * 0.6, gap - 0.03), rng.uniform(0.018, 0.034)),
        ((-slant, -height * 0.6), (-slant * 0.4, -height * 0.15), rng.uniform(0.025, 0.045)),
    ):
        canvas.paint(np.maximum(_band(u, v, start, end, radius), -bones), ligament, rng.uniform(0.6, 1))

    # Menisci fill the wedge that opens between the round condyle and the flat plateau.
    for side in (-1, 1):
        inner = half * rng.uniform(0.45, 0.72)
        wedge = np.maximum(np.maximum(inner - side * u, side * u - half - 0.015), thickness * 0.9 - bones)
        wedge = np.maximum(wedge, np.abs(v - gap / 2 + 0.02) - 0.11)
        meniscus = tone.dark * (1 + 0.2 * texture.fine)
        canvas.paint(wedge, np.maximum(meniscus, 0.02))
        if rng.random() < 0.3:  # degenerative signal or a tear
            at = (side * half * rng.uniform(0.75, 0.95), gap / 2 + rng.normal(0, 0.015))
            tear = _band(u, v, at, (at[0] + side * rng.uniform(-0.05, 0.02), at[1] + rng.normal(0, 0.03)), 0.008)
            canvas.paint(np.maximum(tear, wedge), tone.fluid, rng.uniform(0.4, 0.9))

    _paint_bone(canvas, femur, u, v, -0.33, tone, texture, rng)
    _paint_bone(canvas, tibia, u, v, 0.27, tone, texture, rng)
    if fibula is not None:
        canvas.paint(fibula - 0.02, fat)
        _paint_bone(canvas, fibula, u, v, 9.0, tone, texture, rng)

    # Collateral ligaments: the medial one is broad, the lateral one runs to the fibula.
    edge = half + 0.025
    for start, end in (
        ((-edge + 0.02, -0.36), (-edge, -0.02)), ((-edge, -0.02), (-edge + 0.10, 0.50)),
        ((edge, -0.26), (edge + 0.01, 0.26)),
    ):  # fmt: skip
        canvas.paint(_band(u, v, start, end, rng.uniform(0.008, 0.018)), ligament, rng.uniform(0.5, 1))


def _paint_bone(
    canvas: _Canvas,
    bone: Field,
    u: Field,
    v: Field,
    scar: float,
    tone: _Tones,
    texture: _Textures,
    rng: np.random.Generator,
) -> None:
    """Cortex as a dark rim, thick along the shaft; marrow with trabeculae, growth-plate scar, sometimes oedema."""
    rim = rng.uniform(0.012, 0.02) + rng.uniform(0.01, 0.035) * np.clip(np.abs(v) * 1.8 - 0.5, 0, 1)
    canvas.paint(bone, tone.dark)
    trabeculae = rng.uniform(0.04, 0.09) * texture.fibres + rng.uniform(0.03, 0.07) * texture.fine
    red = rng.uniform(0, 0.12) * texture.smooth * np.clip(2 * np.abs(v) - 0.3, 0, 1)
    marrow = tone.marrow * (1 + trabeculae - red)
    if rng.random() < 0.25:  # oedema: water, so bright where fat is dark and the other way round
        where = (rng.uniform(-0.4, 0.4), scar * rng.uniform(0.3, 0.9))
        distance = np.hypot(u - where[0], v - where[1]) / rng.uniform(0.04, 0.12)
        lesion = np.exp(0.3 * texture.grain - distance**2)
        marrow = marrow + np.clip(lesion, 0, 1) * (0.6 - marrow) * rng.uniform(0.3, 0.9)
    canvas.paint(bone + rim, marrow)
    line = np.abs(v - scar + 0.02 * _waves(u, v, 9.0, rng)) - rng.uniform(0.004, 0.012)
    canvas.paint(np.maximum(line, bone + rim), tone.dark, rng.uniform(0.0, 0.6))
