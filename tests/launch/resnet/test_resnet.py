"""The image task: its files, its random crops, and losses that no other sample has a part in."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet.data import SHIFT, ImagesError, augmented, load_images, read_idx
from resnet.model import ResNet, ResNetConfig


def write_idx(file: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    file.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def write_images(folder: Path, count: int = 64) -> Path:
    """Images in MNIST's layout whose class is the row of their one bright bar."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        labels = np.arange(count) % 10
        images = np.zeros((count, 28, 28))
        images[np.arange(count), 4 + 2 * labels] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def test_images_come_back_as_they_were_written(tmp_path: Path) -> None:
    train, test = load_images(write_images(tmp_path))
    assert train.images.shape == (64, 28, 28)
    assert train.labels.dtype == np.int64
    assert np.array_equal(train.images[13].argmax(axis=0), np.full(28, 4 + 2 * train.labels[13]))
    assert len(test) == 64


@pytest.mark.parametrize(
    "content", [None, b"no gzip", gzip.compress(b"\0\0"), gzip.compress(b"\0\0\x08\x02" + bytes(8))]
)
def test_another_file_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "train-images-idx3-ubyte.gz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ImagesError, match="train-images"):
        read_idx(file, 3)


def test_a_crop_depends_on_its_key_alone_and_shifts_by_so_much_at_most() -> None:
    images = np.zeros((400, 28, 28), np.uint8)
    images[:, 14, 10] = 255
    keys = [(0, 1, number) for number in range(400)]
    crops = augmented(images, keys)
    assert crops.shape == images.shape
    assert np.array_equal(crops[100:], augmented(images[100:], keys[100:]))
    places = np.argwhere(crops)[:, 1:]
    assert len(places) == 400, "the pixel stays within the image"
    assert set(places[:, 0]) == set(range(14 - SHIFT, 14 + SHIFT + 1))
    left, mirrored = set(range(10 - SHIFT, 10 + SHIFT + 1)), set(range(17 - SHIFT, 17 + SHIFT + 1))
    assert set(places[:, 1]) == left | mirrored


def test_a_sample_s_loss_has_no_part_of_the_others() -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(blocks=1, width=8))
    for block in model.blocks:
        torch.nn.init.ones_(block.norm2.weight)
    images = torch.randn(4, 1, 28, 28)
    assert torch.allclose(model(images)[:1], model(images[:1]), atol=1e-5)


def test_a_block_begins_as_its_shortcut() -> None:
    torch.manual_seed(0)
    block = ResNet(ResNetConfig(blocks=2, width=8)).blocks[1]
    x = torch.rand(2, 8, 6, 6)
    assert torch.equal(block(x), x)
