"""Train a text-to-image diffusion transformer from scratch on one GPU, and measure it.

Where what stands, in the order of the data:

- ``prep``: images become a dataset. Its files are in ``prep/dataset``, its passes in ``prep/passes`` and ``encoders``.
- ``train``: the model in ``train/model``; the time law in ``train/method/flow.py``, beside the losses, the optimisers
  and the sampler; the loop in ``train/loop``, drawing with a checkpoint in ``train/draw``, sweeps in ``train/sweep``.
- ``evaluate``: the tests in ``evaluate/suite``, their measures in ``evaluate/metrics``, pages in ``evaluate/report``.
- ``nanodit``: what the three stand on, from errors and configs to storage and randomness, and the command (``cli.py``).
"""

__version__ = "0.1.0"  # pyproject.toml reads it here
