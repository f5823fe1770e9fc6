"""The likeness of two pictures, pixel by pixel: pure functions on arrays.

Images are uint8 ``(B, H, W, 3)`` (one image is a batch of one), so that every method, baseline and reference is judged
on the same quantised pixels. Every function returns one number per image: averages and intervals belong to
:mod:`evaluate.statistics.intervals`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from nanodit.files import sha256_file
from prep.encoders.backbones import ALEXNET, CACHE
from prep.encoders.halving import Halving

PSNR_CEILING = 10 * np.log10(12 * 255**2)  # 58.9 dB: the error that rounding to 8 bits leaves of a perfect picture
SSIM_SIGMA = 1.5
SSIM_RADIUS = 5  # an 11 x 11 window, as in the paper


def mse(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the mean squared error per image, on pixels scaled to [0, 1].

    ``images``, ``references``: uint8 (B, H, W, 3). Returns float64 (B,) in [0, 1].
    """
    _check_pair(images, references)
    difference = (images.astype(np.float64) - references.astype(np.float64)) / 255
    return np.mean(difference**2, axis=(1, 2, 3))


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio per image in dB; identical images give infinity.

    ``images``, ``references``: uint8 (B, H, W, 3). Returns float64 (B,): ``-10 log10(mse)``.
    """
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mse(images, references))


def ssim(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the structural similarity per image as first published: Gaussian 11 x 11, sigma 1.5, K = (.01, .03).

    ``images``, ``references``: uint8 (B, H, W, 3), sides of at least 11. Returns float64 (B,) in [-1, 1], the mean
    over windows that lie inside the image and over the three channels. Wang et al. 2004, eq. 13; equal to
    scikit-image's ``structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    channel_axis=-1)``.
    """
    _check_pair(images, references)
    if min(images.shape[1:3]) <= 2 * SSIM_RADIUS:
        raise ValueError(f"SSIM needs sides of at least {2 * SSIM_RADIUS + 1} pixels, got {images.shape[1:3]}")
    x = images.astype(np.float64) / 255
    y = references.astype(np.float64) / 255
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return np.mean(numerator / denominator, axis=(1, 2, 3))


def _blur(images: np.ndarray) -> np.ndarray:
    """Blur (B, H, W, C) by SSIM's separable Gaussian, valid positions only: (B, H - 10, W - 10, C)."""
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    kernel = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        size = images.shape[axis] - 2 * SSIM_RADIUS
        images = sum(weight * images.take(range(start, start + size), axis=axis) for start, weight in enumerate(kernel))
    return images


def degenerate(image: np.ndarray) -> str | None:
    """Return why an image cannot be scored, or None: ``non-finite`` or ``constant``.

    ``image``: float (3, H, W) as the sampler returned it, before rounding to 8 bits. Constant means that no channel
    varies by more than one 8-bit level, which no photograph or drawing does and a collapsed model does.
    """
    if not np.isfinite(image).all():
        return "non-finite"
    flat = np.clip(image.reshape(image.shape[0], -1), -1, 1)
    return "constant" if np.ptp(flat, axis=1).max() <= 2 / 255 else None


class Lpips:
    """LPIPS v0.1 with the AlexNet backbone (Zhang et al. 2018) on a device; lower is closer, 0 is identical.

    The backbone is read from torch.hub's cache and never downloaded; without the file the constructor raises
    ``FileNotFoundError``, for which :func:`lpips_unavailable` gives the reason beforehand. The file is read with
    ``weights_only`` and hashed: ``published`` tells whether these are the published weights, without which the values
    mean nothing.
    """

    def __init__(self, backbone: Path | None = None, device: str = "cpu"):
        import lpips  # pulls in torchvision: seconds that a run without the weights need not spend

        backbone = backbone or ALEXNET.path
        digest = sha256_file(backbone)
        self.published = digest.startswith(ALEXNET.digits)
        self.backbone_sha256 = digest
        # the random initialisation is overwritten below; the package still uses torchvision's old argument names
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            self._network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).requires_grad_(False)
        weights = torch.load(backbone, map_location="cpu", weights_only=True)
        slices = [getattr(self._network.net, f"slice{number}") for number in range(1, 6)]
        for layers in slices:
            for index, layer in layers.named_children():  # the children keep AlexNet's own indices
                own = {name: weights[f"features.{index}.{name}"] for name in layer.state_dict()}
                layer.load_state_dict(own)
        self.device = device
        self._network.to(device)
        self._memory = Halving("LPIPS", device)

    def __call__(self, images: np.ndarray, references: np.ndarray) -> np.ndarray:
        """Return LPIPS per image of uint8 (B, H, W, 3) against uint8 (B, H, W, 3): float64 (B,), at least 0."""
        _check_pair(images, references)
        if not len(images):
            return np.zeros(0)
        return np.concatenate(list(self._memory.run(self._distances, np.stack([images, references], axis=1))))

    @torch.inference_mode()
    def _distances(self, pairs: np.ndarray) -> np.ndarray:
        """LPIPS of pairs, uint8 (B, 2, H, W, 3)."""
        pair = [
            torch.from_numpy(pairs[:, side]).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
            for side in (0, 1)
        ]
        return self._network(*pair).flatten().double().cpu().numpy()


def lpips_unavailable() -> str | None:
    """Return why LPIPS cannot be computed here, and what to do; None when it can."""
    if ALEXNET.path.is_file():
        return None
    return f"no backbone weights: {CACHE} lacks {ALEXNET.file}; {ALEXNET.remedy}"


def _check_pair(images: np.ndarray, references: np.ndarray) -> None:
    for array in (images, references):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise ValueError(f"expected uint8 (B, H, W, 3), got {array.dtype} {array.shape}")
    if images.shape != references.shape:
        raise ValueError(f"images {images.shape} and references {references.shape} differ in shape")


def score_pixels(pictures: np.ndarray, truths: np.ndarray, lpips: Lpips | None) -> list[dict[str, float | None]]:
    """Return columns mse, psnr, ssim and lpips of each picture, uint8 (B, H, W, 3), against its truth.

    PSNR is at most PSNR_CEILING, so that an exact copy has a number; LPIPS is null without its weights.
    """
    columns = {
        "mse": mse(pictures, truths),
        "psnr": np.minimum(psnr(pictures, truths), PSNR_CEILING),
        "ssim": ssim(pictures, truths),
        "lpips": np.full(len(pictures), np.nan) if lpips is None else lpips(pictures, truths),
    }
    finite = {name: [float(v) if np.isfinite(v) else None for v in values] for name, values in columns.items()}
    return [dict(zip(finite, values)) for values in zip(*finite.values())]
