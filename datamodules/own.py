"""Your own images: four arrays in one .npz file, or a folder of image files per class."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datamodules.base import ImageDataModule, ImageSplits
from datamodules.catalogue import DatasetFacts
from lightning_dp.errors import ConfigurationError, DataError

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_SPLITS = ("train", "test")
_MODES = {1: "L", 3: "RGB"}
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


class NpzImages(ImageDataModule):
    """Four arrays in one .npz file: train_images, train_labels, test_images, test_labels.

    Images are uint8, (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; labels are whole numbers from 0 to
    num_classes - 1. A record is a row: replacing a record is replacing one row, in its place. The test rows are held
    out for judging; what is computed from them leaves the run, so they must be other records than those that the claim
    protects.

    Sizes and shapes are read from the file's headers and treated as public; no pixel is looked at for them.

    Args:
        file: The .npz file.
        num_classes: Number of labels (public choice, never taken from the records).
        name: Name of the data set in ledgers and tables; the file's name without .npz when null. Runs that share a
            budget must call the same records by the same name.
        num_train: Use only the first `num_train` training records (public choice); all of them when null.
        steps_per_epoch: Number of steps that Lightning calls one epoch.

    Raises:
        DataError: The file is missing, is no .npz, or lacks an array, or an array has another type or shape.
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        file: str,
        num_classes: int,
        name: str | None = None,
        num_train: int | None = None,
        steps_per_epoch: int = 100,
    ) -> None:
        _check_num_classes(num_classes)
        self.file = Path(file).expanduser()
        shapes = _array_shapes(self.file)
        sizes = {part: _image_shape(shapes[f"{part}_images"], f"{part}_images", self.file) for part in _SPLITS}
        if sizes["train"] != sizes["test"]:
            raise DataError(
                f"Expected train_images and test_images of one (C, H, W) in {self.file}, got {sizes['train']} and "
                f"{sizes['test']}. Resize one of them."
            )
        for part in _SPLITS:
            count = shapes[f"{part}_images"][0]
            if shapes[f"{part}_labels"] != (count,) or not count:
                raise DataError(
                    f"Expected one label per image, at least one, in {self.file}, got {part}_images of "
                    f"shape={shapes[f'{part}_images']} and {part}_labels of shape={shapes[f'{part}_labels']}."
                )
        self.facts = DatasetFacts(
            name=name or self.file.stem,
            num_train=shapes["train_images"][0],
            num_test=shapes["test_images"][0],
            image_shape=sizes["train"],
            num_classes=num_classes,
        )
        super().__init__(num_train=num_train, steps_per_epoch=steps_per_epoch)

    def read(self) -> ImageSplits:
        """Read the four arrays.

        Raises:
            DataError: The file is damaged, or labels are out of range.
        """
        try:
            with np.load(self.file, allow_pickle=False) as arrays:
                read = {key: arrays[key] for key in ARRAYS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"Expected readable arrays in {self.file}, got: {_plain(error)}. Save it anew.") from None
        found: dict[str, Tensor] = {}
        for part in _SPLITS:
            found[f"{part}_images"] = torch.from_numpy(_channels_first(read[f"{part}_images"]))
            labels = torch.from_numpy(read[f"{part}_labels"].astype(np.int64))
            if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                # Which labels they are is the records' own business: the message may end in a log.
                raise DataError(
                    f"Expected {part}_labels 0..{self.num_classes - 1} in {self.file}, got others. Number the classes "
                    "from 0, or set data.num_classes."
                )
            found[f"{part}_labels"] = labels
        return ImageSplits(**found)


class ImageFolder(ImageDataModule):
    """A folder of image files: ROOT/train/CLASS/FILE and ROOT/test/CLASS/FILE, as torchvision lays them out.

    Every file becomes gray or RGB, resized to `image_shape` (bilinear, antialiased), by itself. Classes are the names
    of the folders in train, sorted; they are the set of labels, which every claim treats as public.

    A record is a file *name*; its pixels and its class are private. Records stand in the order of their names alone,
    so that a file moved to another class, which is a record replaced, moves no other record: a name may stand in one
    class only. Names and their number are treated as public; let them say nothing about whom they show. The test
    files are held out for judging, and must be other records than those that the claim protects.

    Args:
        root: The folder with train and test in it.
        image_shape: (C, H, W) of what is learned, C 1 (gray) or 3 (RGB).
        name: Name of the data set in ledgers and tables; the folder's name when null. Runs that share a budget must
            call the same records by the same name.
        num_train: Use only the first `num_train` training records (public choice); all of them when null.
        steps_per_epoch: Number of steps that Lightning calls one epoch.

    Raises:
        DataError: A folder is missing or empty, or a file name stands in two classes.
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        root: str,
        image_shape: tuple[int, int, int],
        name: str | None = None,
        num_train: int | None = None,
        steps_per_epoch: int = 100,
    ) -> None:
        self.root = Path(root).expanduser()
        shape = (int(image_shape[0]), int(image_shape[1]), int(image_shape[2]))
        if shape[0] not in _MODES or min(shape) < 1:
            raise ConfigurationError(
                f"Expected data.image_shape [C, H, W] with C 1 (gray) or 3 (RGB), got {list(shape)}. Set it."
            )
        self.classes = _class_names(self.root / "train")
        self._files = {part: _files(self.root / part, self.classes) for part in _SPLITS}
        self.facts = DatasetFacts(
            name=name or self.root.resolve().name,
            num_train=len(self._files["train"]),
            num_test=len(self._files["test"]),
            image_shape=shape,
            num_classes=len(self.classes),
        )
        super().__init__(num_train=num_train, steps_per_epoch=steps_per_epoch)

    def read(self) -> ImageSplits:
        """Decode all files.

        Raises:
            DataError: A file is gone or is no image.
        """
        found: dict[str, Tensor] = {}
        for part, files in self._files.items():
            found[f"{part}_images"] = torch.from_numpy(np.stack([_decode(path, self.image_shape) for path, _ in files]))
            found[f"{part}_labels"] = torch.tensor([label for _, label in files], dtype=torch.int64)
        return ImageSplits(**found)


def read_samples(path: Path, image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return images, uint8 (N, C, H, W), and labels, int64 (N,), that any program made.

    Args:
        path: An .npz file with images and labels, or a folder of image files per class; classes in the order of their
            names are the labels 0, 1, ...
        image_shape: (C, H, W) that is expected; files of a folder are turned into it.

    Raises:
        DataError: Neither is there, or what is there is something else.
    """
    if path.is_dir():
        classes = _folders(path)
        files = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((path / name).iterdir())
            if file.suffix.lower() in SUFFIXES
        ]
        if not files:
            raise DataError(
                f"Expected image files in {path}/CLASS, found none. Give the folder that holds the classes."
            )
        images = torch.from_numpy(np.stack([_decode(file, image_shape) for file, _ in files]))
        return images, torch.tensor([label for _, label in files])
    if not path.is_file():
        raise DataError(
            f"Expected samples, an .npz file or a folder per class, found nothing at {path}. Mend the path."
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found, numbers = arrays["images"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"Expected the arrays images and labels in {path}, got: {_plain(error)}. Save them.") from None
    if found.dtype != np.uint8 or _image_shape(found.shape, "images", path) != image_shape:
        raise DataError(f"Expected uint8 images of {image_shape} in {path}, got {found.dtype} {found.shape[1:]}.")
    if numbers.shape != found.shape[:1] or not len(numbers) or not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(f"Expected {len(found)} whole labels in {path}, got {numbers.dtype} of shape {numbers.shape}.")
    return torch.from_numpy(_channels_first(found)), torch.from_numpy(numbers.astype(np.int64))


def _check_num_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ConfigurationError(f"Expected data.num_classes >= 1, got num_classes={num_classes}.")


def _array_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the four arrays from their headers; types are checked on the way."""
    if not file.is_file():
        raise DataError(f"Expected an .npz file with {', '.join(ARRAYS)}, found no file at {file}. Mend data.file.")
    try:
        with zipfile.ZipFile(file) as archive:
            names = {entry.removesuffix(".npy") for entry in archive.namelist()}
            if missing := [key for key in ARRAYS if key not in names]:
                raise DataError(
                    f"Expected the arrays {', '.join(ARRAYS)} in {file}, got {', '.join(sorted(names)) or 'none'}. "
                    f"Missing: {', '.join(missing)}."
                )
            headers = {key: _header(archive, key) for key in ARRAYS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"Expected an .npz file at {file}, got: {_plain(error)}. Save it with numpy.savez.") from None
    for key, (_, kind) in headers.items():
        is_right = kind == np.uint8 if key.endswith("images") else np.issubdtype(kind, np.integer)
        if not is_right:
            wanted, mend = (
                ("uint8, 0..255", "Scale and round them; missing values have no uint8.")
                if key.endswith("images")
                else ("whole numbers", "Convert them.")
            )
            raise DataError(f"Expected {key} in {file} to be {wanted}, got {kind}. {mend}")
    return {key: shape for key, (shape, _) in headers.items()}


def _header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of one array without reading its elements."""
    with archive.open(f"{key}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(stream)
    return tuple(shape), kind


def _image_shape(shape: tuple[int, ...], key: str, file: Path) -> tuple[int, int, int]:
    """Return (C, H, W) of an array of images in one of the three layouts."""
    if len(shape) == 3:
        return 1, shape[1], shape[2]
    is_first, is_last = len(shape) == 4 and shape[1] in _MODES, len(shape) == 4 and shape[3] in _MODES
    if is_first == is_last:
        raise DataError(
            f"Expected {key} in {file} of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, got {shape}. "
            "Reshape it."
        )
    return (shape[1], shape[2], shape[3]) if is_first else (shape[3], shape[1], shape[2])


def _channels_first(images: np.ndarray) -> np.ndarray:
    """Return images in one of the three layouts as (N, C, H, W)."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[1] not in _MODES:
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(
            f"Expected folders ROOT/train/CLASS and ROOT/test/CLASS of image files, found no {folder}. Mend data.root."
        )
    if not (names := _folders(folder)):
        raise DataError(f"Expected one folder per class in {folder}, found none. Sort the images by class.")
    return names


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Return the image files of a split with their labels, in the order of their names alone."""
    if not folder.is_dir():
        raise DataError(f"Expected held-out images for judging in {folder}/CLASS, found none. Split some off.")
    if others := sorted({*_folders(folder)} - {*classes}):
        raise DataError(f"Expected the classes of train ({', '.join(classes)}) in {folder}, got also {others[0]!r}.")
    found: dict[str, tuple[Path, int]] = {}
    for label, name in enumerate(classes):
        for path in (folder / name).iterdir() if (folder / name).is_dir() else ():
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                continue
            if path.name in found:
                raise DataError(
                    f"Expected each file name once in {folder}, got {path.name!r} in two classes; a name is what "
                    "stays when a record is replaced. Rename the files (running numbers over all classes)."
                )
            found[path.name] = (path, label)
    if not found:
        raise DataError(f"Expected image files ({', '.join(SUFFIXES)}) in {folder}/CLASS, found none.")
    return [found[name] for name in sorted(found)]


def _decode(path: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Return one file as uint8, (C, H, W)."""
    channels, height, width = image_shape
    try:
        with Image.open(path) as image:
            if image.mode not in _EIGHT_BITS:  # pillow would cut off what is above 255
                raise ValueError(f"pixels of mode {image.mode}, where 8 bits a channel are read")
            pixels = image.convert(_MODES[channels])
            if pixels.size != (width, height):
                pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        # Names are public, classes are not: a failed run's last line is copied into reports of comparisons.
        where, said = path.parents[1] / "*" / path.name, _plain(error).replace(str(path), path.name)
        raise DataError(f"Expected an image in {where}, got: {said}. Replace or remove the file.") from None
    array = np.asarray(pixels, dtype=np.uint8)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _plain(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
