"""Counter-based noise: a golden hash, and independence of everything but its name."""

from __future__ import annotations

import numpy as np

from nanodit.files import sha256_bytes
from nanodit.rng import generator, noise


def test_golden_hash_is_equal_on_every_machine():
    e = noise("0123456789abcdef0123456789abcdef", 0, 64, 64)
    assert e.dtype == np.float32
    assert e.shape == (3, 64, 64)
    assert sha256_bytes(e.tobytes()) == "fb366fe97c0079d20cfb47135fab18754f1809823b01e8e87e9d36ef65aa3f1d"


def test_noise_is_standard_normal_and_keyed():
    e = noise("a" * 32, 0, 64, 64)
    assert abs(e.mean()) < 0.03
    assert abs(e.std() - 1) < 0.03
    np.testing.assert_array_equal(e, noise("a" * 32, 0, 64, 64))
    assert abs(np.corrcoef(e.ravel(), noise("a" * 32, 1, 64, 64).ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(e.ravel(), noise("b" * 32, 0, 64, 64).ravel())[0, 1]) < 0.05


def test_trap_28_global_generators_are_untouched():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    noise("a", 0, 8, 8)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_parts_of_a_name_do_not_run_together():
    draws = {float(generator(*parts).random()) for parts in (("a", 1), ("a1",), ("a", "1"), (1, "a"), ("a", 1, 0))}
    assert len(draws) == 5
