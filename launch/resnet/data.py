"""Images in the idx format of MNIST's authors, and random crops and flips of them."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Images = npt.NDArray[np.uint8]

# Pixels that a crop may be off the middle, as He et al. 2016 (section 4.2) have it.
SHIFT = 4
_UNSIGNED_BYTES = 0x08


class ImagesError(ValueError):
    """Files that can't be read; the message names the file."""


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Grey images, uint8 [n, height, width], and their classes, int64 [n]."""

    images: Images
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def load_images(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """The training and the test images of a folder in MNIST's layout.

    Raises:
        ImagesError: where a file is missing or of another kind.
    """
    found = []
    for part in ("train", "t10k"):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels):
            raise ImagesError(f"{folder}: {len(images)} images but {len(labels)} labels for {part}")
        found.append(LabelledImages(images, labels.astype(np.int64)))
    return found[0], found[1]


def read_idx(file: Path, dimensions: int) -> Images:
    """A packed idx file of unsigned bytes: uint8 of as many dimensions.

    Raises:
        ImagesError: where it is no such file.
    """
    try:
        content = gzip.decompress(file.read_bytes())
        zero, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
        if (zero, kind, rank) != (0, _UNSIGNED_BYTES, dimensions):
            raise ValueError(f"{rank} dimensions of type {kind}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise ImagesError(f"{file}: not an idx file of {dimensions} dimensions: {error}") from None


def augmented(images: Images, keys: list[tuple[int, int, int]]) -> Images:
    """Every image shifted by up to SHIFT pixels each way and mirrored or not, as its key says; uint8, same shape."""
    height, width = images.shape[1:]
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    seeds = np.array([np.random.SeedSequence(key).generate_state(1)[0] for key in keys], np.int64)
    span = 2 * SHIFT + 1
    down, right, mirrored = seeds % span, seeds // span % span, seeds // span**2 % 2 == 1
    rows = down[:, None, None] + np.arange(height)[None, :, None]
    columns = right[:, None, None] + np.arange(width)[None, None, :]
    columns = np.where(mirrored[:, None, None], columns[:, :, ::-1], columns)
    return padded[np.arange(len(images))[:, None, None], rows, columns]


def normalized(images: Images, mean: float, deviation: float) -> Tensor:
    """fp32 [n, 1, height, width] of mean 0 and variance 1 over the training set."""
    values = torch.from_numpy(images.astype(np.float32)).sub_(mean).div_(deviation)
    return values.unsqueeze(1)
