"""Every image metric against its reference library, and the pose metric against its definition."""

import hashlib

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from evaluate.metrics import pixels as metrics
from prep.encoders.backbones import ALEXNET

SHAPES = [(3, 64, 64, 3), (2, 48, 88, 3), (1, 80, 56, 3), (1, 11, 11, 3)]


def pictures(shape, seed=0):
    """Smooth pictures and a noisy copy of each: SSIM on white noise alone would test little."""
    random = np.random.default_rng(seed)
    batch, height, width, _ = shape
    y, x = np.mgrid[:height, :width]
    phases = random.uniform(0, 6, size=(batch, 1, 1, 3))
    clean = 127 + 90 * np.sin(0.13 * x[None, :, :, None] + 0.21 * y[None, :, :, None] + phases)
    noisy = clean + random.normal(scale=25, size=shape)
    return np.uint8(clean), np.uint8(np.clip(noisy, 0, 255))


@pytest.mark.parametrize("shape", SHAPES)
def test_psnr_mse_and_ssim_equal_scikit_image(shape):
    clean, noisy = pictures(shape)
    for index in range(shape[0]):
        a, b = clean[index], noisy[index]
        assert metrics.mse(noisy, clean)[index] == pytest.approx(mean_squared_error(a / 255, b / 255), rel=1e-10)
        assert metrics.psnr(noisy, clean)[index] == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-10)
        reference = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=255
        )
        assert metrics.ssim(noisy, clean)[index] == pytest.approx(reference, abs=1e-4)


def test_identical_images_are_perfect():
    clean, _ = pictures((2, 32, 40, 3))
    assert np.array_equal(metrics.mse(clean, clean), [0, 0])
    assert np.isinf(metrics.psnr(clean, clean)).all()
    assert metrics.ssim(clean, clean) == pytest.approx([1, 1])


def test_wrong_types_and_shapes_are_refused():
    clean, _ = pictures((1, 32, 32, 3))
    with pytest.raises(ValueError, match="uint8"):
        metrics.mse(clean / 255, clean / 255)
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.psnr(clean, clean[:, :16])
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(clean[:, :10], clean[:, :10])


@pytest.mark.parametrize(
    ("change", "reason"),
    [(np.nan, "non-finite"), (np.inf, "non-finite"), (None, None)],
)
def test_non_finite_outputs_are_named(change, reason):
    image = np.random.default_rng(0).uniform(-1, 1, size=(3, 16, 16)).astype(np.float32)
    if change is not None:
        image[1, 3, 4] = change
    assert metrics.degenerate(image) == reason


@pytest.mark.parametrize("level", [-1.0, 0.25, 7.0])
def test_constant_outputs_are_named(level):
    assert metrics.degenerate(np.full((3, 16, 16), level, np.float32)) == "constant"


@pytest.fixture
def random_backbone(random_alexnet, monkeypatch):
    """A seeded random AlexNet where torch.hub looks: the real code path, meaningless values."""
    monkeypatch.setenv("TORCH_HOME", str(random_alexnet))
    return ALEXNET.path


@pytest.mark.filterwarnings("ignore::UserWarning")  # the package uses torchvision's old argument names
def test_lpips_equals_the_package_on_the_same_weights(random_backbone):
    import lpips

    assert metrics.lpips_unavailable() is None
    clean, noisy = pictures((3, 64, 64, 3))
    state = torch.get_rng_state()
    ours = metrics.Lpips()
    assert torch.equal(state, torch.get_rng_state())  # trap 28: measuring leaves the global generator alone
    reference = lpips.LPIPS(net="alex", verbose=False)  # finds the same file through torch.hub
    pair = [torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1 for array in (noisy, clean)]
    with torch.no_grad():
        expected = reference(*pair).flatten().numpy()
    assert ours(noisy, clean) == pytest.approx(expected, abs=1e-6)
    assert ours(clean, clean) == pytest.approx([0, 0, 0], abs=1e-7)
    assert (ours(noisy, clean) > 0).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lpips_that_does_not_fit_a_gpu_is_computed_in_parts(random_backbone):
    clean, noisy = pictures((5, 64, 64, 3))
    ours = metrics.Lpips()
    whole = ours(noisy, clean)
    ours._memory.limit, distances, sizes = 2, ours._distances, []
    ours._distances = lambda pairs: sizes.append(len(pairs)) or distances(pairs)
    assert ours(noisy, clean) == pytest.approx(whole, abs=1e-6)
    assert sizes == [2, 2, 1]
    assert len(ours(noisy[:0], clean[:0])) == 0


def test_lpips_says_that_random_weights_are_not_the_published_ones(random_backbone):
    ours = metrics.Lpips()
    assert not ours.published
    assert ours.backbone_sha256 == hashlib.sha256(random_backbone.read_bytes()).hexdigest()


def test_lpips_without_weights_is_unavailable_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    reason = metrics.lpips_unavailable()
    assert reason.startswith("no backbone weights: $TORCH_HOME/hub/checkpoints lacks alexnet-owt-7be5be79.pth")
    assert ALEXNET.remedy in reason
    assert str(tmp_path) not in reason, "a report says nothing of the machine it was made on"
    with pytest.raises(FileNotFoundError):
        metrics.Lpips()
    assert not list(tmp_path.rglob("*.pth"))
