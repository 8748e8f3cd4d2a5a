"""A benchmark and reproducibility suite for sharded data-parallel training."""

__version__ = "0.1.0"
