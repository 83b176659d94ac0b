"""Thin adapters between Lightning hooks and the classes of ``lightning_dp``."""

from callbacks.evaluate_generator import EvaluateGenerator
from callbacks.gradient_privatizer import GradientPrivatizer
from callbacks.privacy_accountant import PrivacyAccountant
from callbacks.private_checkpoint import PrivateCheckpoint
from callbacks.private_ddp import PrivateDDPStrategy
from callbacks.release_progress import ReleaseProgress
from callbacks.run_folder import RunFolder
from callbacks.sample_grid import SampleGrid

__all__ = [
    "EvaluateGenerator",
    "GradientPrivatizer",
    "PrivacyAccountant",
    "PrivateCheckpoint",
    "PrivateDDPStrategy",
    "ReleaseProgress",
    "RunFolder",
    "SampleGrid",
]
