"""Your own images: an .npz file, or a folder per class; each mistake is one line that says how to mend it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolder, NpzImages
from datamodules.own import read_samples
from lightning_dp.errors import ConfigurationError, DataError

NUM_TRAIN, NUM_TEST, CLASSES = 12, 6, 3


def arrays(**other) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    own = {
        "train_images": rng.integers(0, 256, (NUM_TRAIN, 8, 9), dtype=np.uint8),
        "train_labels": np.arange(NUM_TRAIN) % CLASSES,
        "test_images": rng.integers(0, 256, (NUM_TEST, 8, 9), dtype=np.uint8),
        "test_labels": np.arange(NUM_TEST) % CLASSES,
    }
    return {key: value for key, value in {**own, **other}.items() if value is not None}


def saved(folder: Path, **other) -> str:
    np.savez(folder / "mine.npz", **arrays(**other))
    return str(folder / "mine.npz")


def write_folder(root: Path, *, size: tuple[int, int] = (9, 8)) -> dict[str, np.ndarray]:
    values = arrays()
    for part, first in (("train", 0), ("test", 100)):
        for k, (image, label) in enumerate(zip(values[f"{part}_images"], values[f"{part}_labels"], strict=True)):
            folder = root / part / f"class_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize(size).save(folder / f"{first + k:03d}.png")
    return values


# An .npz file ---------------------------------------------------------------------------------------------------------


def test_npz_holds_what_was_saved(tmp_path):
    values = arrays()
    module = NpzImages(saved(tmp_path), num_classes=CLASSES)
    assert (module.num_records, module.image_shape, module.num_classes) == (NUM_TRAIN, (1, 8, 9), CLASSES)
    assert module.name == "mine"
    module.setup()
    assert np.array_equal(module.train_images[:, 0].numpy(), values["train_images"])
    assert module.test_labels.tolist() == values["test_labels"].tolist()


@pytest.mark.parametrize("layout", ["last", "first"])
def test_npz_channels_stand_first_or_last(tmp_path, layout):
    pixels = np.random.default_rng(1).integers(0, 256, (NUM_TRAIN, 8, 9, 3), dtype=np.uint8)
    given = pixels if layout == "last" else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    module = NpzImages(saved(tmp_path, train_images=given, test_images=given[:NUM_TEST]), num_classes=CLASSES)
    assert module.image_shape == (3, 8, 9)
    module.setup()
    assert np.array_equal(module.train_images.numpy(), pixels.transpose(0, 3, 1, 2))


def test_npz_labels_of_any_whole_type(tmp_path):
    module = NpzImages(saved(tmp_path, train_labels=arrays()["train_labels"].astype(">u2")), num_classes=CLASSES)
    module.setup()
    assert module.train_labels.dtype == torch.int64
    assert module.train_labels.tolist() == arrays()["train_labels"].tolist()


def test_facts_do_not_depend_on_the_records(tmp_path):
    first = NpzImages(saved(tmp_path), num_classes=CLASSES)
    second = NpzImages(saved(tmp_path, train_images=255 - arrays()["train_images"]), num_classes=CLASSES)
    assert first.fingerprint == second.fingerprint  # a hash of pixels would test guesses of a record
    assert first.fingerprint != NpzImages(saved(tmp_path), num_classes=CLASSES, name="other").fingerprint


BAD_ARRAYS = [
    ({"test_labels": None}, "Missing: test_labels"),
    ({"train_images": arrays()["train_images"] / 255.0}, "train_images in .* to be uint8, 0..255, got float64"),
    ({"train_images": np.full((NUM_TRAIN, 8, 9), np.nan)}, "uint8"),
    ({"train_labels": np.full(NUM_TRAIN, "cat")}, "train_labels in .* to be whole numbers"),
    ({"train_labels": np.array([None] * NUM_TRAIN)}, "whole numbers, got object"),
    ({"train_labels": np.arange(NUM_TRAIN - 1)}, "one label per image"),
    ({"train_images": np.zeros((0, 8, 9), np.uint8), "train_labels": np.zeros(0, int)}, "at least one"),
    ({"test_images": np.zeros((NUM_TEST, 9, 9), np.uint8)}, r"\(1, 8, 9\) and \(1, 9, 9\)"),
    ({"train_images": np.zeros((NUM_TRAIN, 72), np.uint8)}, r"of shape \(N, H, W\)"),
    ({"train_images": np.zeros((NUM_TRAIN, 3, 8, 3), np.uint8)}, "Reshape it"),
    ({"train_images": np.zeros((NUM_TRAIN, 8, 9, 4), np.uint8)}, "C 1 or 3"),
]


@pytest.mark.parametrize(("other", "message"), BAD_ARRAYS)
def test_npz_of_another_kind(tmp_path, other, message):
    with pytest.raises(DataError, match=message):
        NpzImages(saved(tmp_path, **other), num_classes=CLASSES)


@pytest.mark.parametrize("labels", [np.arange(NUM_TRAIN), np.full(NUM_TRAIN, -1)])
def test_npz_labels_out_of_range_are_not_told(tmp_path, labels):
    module = NpzImages(saved(tmp_path, train_labels=labels), num_classes=CLASSES)
    with pytest.raises(DataError, match=r"train_labels 0\.\.2 in .*, got others\. Number the classes from 0"):
        module.setup()


def test_npz_missing_damaged_or_none(tmp_path):
    with pytest.raises(DataError, match="found no file at"):
        NpzImages(str(tmp_path / "nowhere.npz"), num_classes=CLASSES)
    whole = Path(saved(tmp_path)).read_bytes()
    for content in (b"a,b\n1,2\n", whole[: len(whole) // 2], b""):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"Expected an \.npz file at .*, got: "):
            NpzImages(str(tmp_path / "bad.npz"), num_classes=CLASSES)
    flipped = bytearray(whole)
    flipped[400] ^= 1
    (tmp_path / "bad.npz").write_bytes(flipped)
    with pytest.raises(DataError, match="Bad CRC-32"):
        NpzImages(str(tmp_path / "bad.npz"), num_classes=CLASSES).setup()
    with pytest.raises(ConfigurationError, match="num_classes >= 1"):
        NpzImages(saved(tmp_path), num_classes=0)


# A folder of files ----------------------------------------------------------------------------------------------------


def test_folder_holds_the_files_in_the_order_of_their_names(tmp_path):
    values = write_folder(tmp_path)
    module = ImageFolder(str(tmp_path), image_shape=(1, 8, 9))
    assert (module.num_records, module.num_classes) == (NUM_TRAIN, CLASSES)
    assert module.name == tmp_path.name
    module.setup()
    assert np.array_equal(module.train_images[:, 0].numpy(), values["train_images"])
    assert module.train_labels.tolist() == values["train_labels"].tolist()
    assert module.test_labels.tolist() == values["test_labels"].tolist()


def test_a_file_that_changes_its_class_moves_no_other_record(tmp_path):
    # Sorted by class first, all records between the two places would change their positions, and so their teachers.
    write_folder(tmp_path)
    before = ImageFolder(str(tmp_path), image_shape=(1, 8, 9))
    before.setup()
    (tmp_path / "train" / "class_0" / "000.png").rename(tmp_path / "train" / "class_2" / "000.png")
    after = ImageFolder(str(tmp_path), image_shape=(1, 8, 9))
    after.setup()
    assert torch.equal(before.train_images, after.train_images)
    assert (before.train_labels != after.train_labels).nonzero().flatten().tolist() == [0]
    assert before.fingerprint == after.fingerprint


def test_folder_turns_files_into_the_shape_asked_for(tmp_path):
    write_folder(tmp_path, size=(20, 30))
    Image.new("RGBA", (5, 5), (255, 0, 0, 255)).save(tmp_path / "train" / "class_0" / "000.png")
    (tmp_path / "train" / "class_0" / "notes.txt").write_text("no image")
    module = ImageFolder(str(tmp_path), image_shape=(3, 4, 6))
    module.setup()
    assert tuple(module.train_images.shape) == (NUM_TRAIN, 3, 4, 6)
    assert module.train_images[0].float().mean(dim=(1, 2)).tolist() == [255, 0, 0]


def test_folder_mistakes(tmp_path):
    def make() -> ImageFolder:
        return ImageFolder(str(tmp_path), image_shape=(1, 8, 9))

    with pytest.raises(DataError, match=r"found no .*train\. Mend data\.root"):
        make()
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="one folder per class"):
        make()
    write_folder(tmp_path)
    with pytest.raises(ConfigurationError, match=r"C 1 \(gray\) or 3 \(RGB\), got \[2, 8, 9\]"):
        ImageFolder(str(tmp_path), image_shape=(2, 8, 9))
    (tmp_path / "test" / "class_9").mkdir()
    with pytest.raises(DataError, match="got also 'class_9'"):
        make()
    (tmp_path / "test" / "class_9").rmdir()
    twin = tmp_path / "train" / "class_1" / "000.png"
    Image.new("L", (9, 8)).save(twin)
    with pytest.raises(DataError, match=r"each file name once in .*, got '000.png' in two classes"):
        make()
    twin.unlink()


@pytest.mark.parametrize("content", ["text", "truncated", "16 bits"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    write_folder(tmp_path)
    path = tmp_path / "train" / "class_0" / "000.png"
    if content == "16 bits":
        Image.fromarray(np.full((8, 9), 40000, dtype=np.uint16)).save(path)  # would become white
    else:
        path.write_bytes(b"no image" if content == "text" else path.read_bytes()[:60])
    module = ImageFolder(str(tmp_path), image_shape=(1, 8, 9))
    with pytest.raises(DataError, match=r"Expected an image in .*000.png, got: .*Replace or remove") as caught:
        module.setup()
    assert "class_0" not in str(caught.value)  # the record's label; reports copy such lines


def test_a_split_without_files(tmp_path):
    write_folder(tmp_path)
    for path in (tmp_path / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="Expected image files"):
        ImageFolder(str(tmp_path), image_shape=(1, 8, 9))


# Samples of another program -------------------------------------------------------------------------------------------


def test_samples_of_a_folder_and_of_a_file_are_the_same(tmp_path):
    values = write_folder(tmp_path / "mine")
    images, labels = read_samples(tmp_path / "mine" / "train", (1, 8, 9))
    assert images.shape == (NUM_TRAIN, 1, 8, 9)
    np.savez(tmp_path / "s.npz", images=images.numpy(), labels=labels.numpy())
    again, numbers = read_samples(tmp_path / "s.npz", (1, 8, 9))
    assert torch.equal(images, again)
    assert labels.tolist() == numbers.tolist() == sorted(values["train_labels"].tolist())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 8, 9), np.uint8)}, "the arrays images and labels"),
        ({"images": np.zeros((2, 8, 9)), "labels": np.zeros(2, int)}, "Expected uint8 images of"),
        ({"images": np.zeros((2, 9, 9), np.uint8), "labels": np.zeros(2, int)}, "Expected uint8 images of"),
        ({"images": np.zeros((2, 8, 9), np.uint8), "labels": np.zeros(3, int)}, "Expected 2 whole labels"),
        ({"images": np.zeros((2, 8, 9), np.uint8), "labels": np.zeros(2)}, "Expected 2 whole labels"),
    ],
)
def test_samples_of_another_kind(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_samples(tmp_path / "s.npz", (1, 8, 9))


def test_samples_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="found nothing at"):
        read_samples(tmp_path / "nowhere", (1, 8, 9))
    with pytest.raises(DataError, match=r"image files in .*/CLASS, found none"):
        read_samples(tmp_path, (1, 8, 9))
