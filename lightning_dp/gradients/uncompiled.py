"""Compiled networks run as they were written where their layers are listened to."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def uncompiled() -> AbstractContextManager[object]:
    """Let networks that `torch.compile` wrapped run as written, which `vmap` and listening to layers need."""
    # Asking the compiler would import it, for seconds; what was compiled has done so.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
