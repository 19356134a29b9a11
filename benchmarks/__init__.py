"""Measurements too long for the test suite: the paper's figures, and comparisons with other methods."""
