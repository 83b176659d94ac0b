"""Differentially private generative models and training on PyTorch Lightning."""

__version__ = "0.1.0"
