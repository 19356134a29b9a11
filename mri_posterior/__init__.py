"""Samples of the true posterior p(image | k-space) for undersampled multi-coil MRI."""

__version__ = "0.1.0"
