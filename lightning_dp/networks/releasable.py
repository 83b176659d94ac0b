"""What every network has in common that a run may publish."""

import inspect
from abc import ABC
from typing import Any, ClassVar

from torch import nn


class ReleasableNetwork(nn.Module, ABC):
    """A network that can be rebuilt from its constructor's arguments and its parameters alone.

    A subclass keeps its constructor arguments as attributes of the same names, and no persistent buffer, which could
    carry statistics of private data.

    Attributes:
        kind: What it is, in one word; names the files of its release.
        num_classes: Number of labels.
        image_shape: (C, H, W) of the images.
    """

    kind: ClassVar[str]
    num_classes: int
    image_shape: tuple[int, int, int]

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments, from the attributes of the same names.

        Raises:
            TypeError: The class keeps an argument under another name, so a released network could not be rebuilt.
        """
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise TypeError(f"{type(self).__name__} must keep its constructor arguments as attributes: {missing}.")
        return {name: getattr(self, name) for name in names}
