"""The 15 corruptions of ImageNet-C (Hendrycks and Dietterich, 2019, arXiv 1903.12261), by the package corrupt-tta.

Of the packages that have them this one runs with NumPy 2: imagecorruptions 1.1.2 fails in fog and glass_blur there, and imagenet-c 0.0.3
needs ImageMagick. Severities are those of 224 x 224 images; on smaller ones they are harder, and no figures of CIFAR-10-C.
"""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from data import Images
from torch import nn

NOISE = ("gaussian_noise", "shot_noise", "impulse_noise")
BLUR = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")
WEATHER = ("snow", "frost", "fog", "brightness")
DIGITAL = ("contrast", "elastic_transform", "pixelate", "jpeg_compression")
ALL = (*NOISE, *BLUR, *WEATHER, *DIGITAL)


def package() -> Any:
    """corrupt-tta's function; ValueError where it is missing."""
    try:
        from corrupt_tta import corrupt as apply
    except ImportError as error:
        raise ValueError(f"corruptions need the package corrupt-tta ({error}): pip install corrupt-tta") from error
    return apply


def names(given: list[str]) -> list[str]:
    """The names, "all" being all 15."""
    if given == ["all"]:
        return list(ALL)
    if unknown := [name for name in given if name not in ALL]:
        raise ValueError(f"corruptions must be all or some of {', '.join(ALL)}, got {unknown[0]!r}")
    return given


def corrupt(image: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """uint8 [height, width, 3] -> the same, corrupted; equal seeds give equal noise."""
    apply, state, new_generator = package(), np.random.get_state(), np.random.default_rng

    def seeded(given: int | None = None) -> np.random.Generator:
        return new_generator(seed if given is None else given)

    try:
        np.random.seed(seed)  # the package draws from NumPy's global generator, and for impulse_noise from a new one of scikit-image
        with mock.patch.object(np.random, "default_rng", seeded):
            found = apply(image, severity=severity, corruption_name=name)
    finally:
        np.random.set_state(state)
    return np.clip(np.round(found), 0, 255).astype(np.uint8)


@torch.no_grad()
def shares_right(
    models: Sequence[nn.Module],
    images: Images,
    name: str,
    severity: int,
    device: torch.device,
    batch: int = 256,
    kept: dict[tuple[str, int, int], np.ndarray] | None = None,
) -> list[float]:
    """The share of corrupted images that each model classifies rightly. Corrupting takes most of the time.

    Args:
        kept: corrupted images of earlier calls with the same images, to which those of this call are added.
    """
    right = [0] * len(models)
    for part in torch.arange(len(images)).split(batch):
        key = name, severity, int(part[0])
        if kept is None or key not in kept:
            raw = np.stack([corrupt(images.raw(i), name, severity, i) for i in part.tolist()])
            if kept is not None:
                kept[key] = raw
        else:
            raw = kept[key]
        x = torch.stack([images.from_raw(image) for image in raw]).to(device)
        for i, model in enumerate(models):
            right[i] += int((model.eval()(x).argmax(1).cpu() == images.y[part]).sum())
    return [count / len(images) for count in right]
