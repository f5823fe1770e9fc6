"""An exported model for diffusers: what its pipeline draws is what ``train sample`` draws.

``DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`` comes here through the loaders that
:func:`train.draw.export.write_loaders` puts into the folder. Needs diffusers: ``pip install -e '.[export]'``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from nanodit.errors import ConfigError
from nanodit.rng import noise
from train.checkpoint.exported import build
from train.draw.draw import PROMPT_NOISE_KEY
from train.draw.export import write_loaders
from train.draw.request import Given, canonical, encode
from train.hardware import autocast
from train.method.sampling import DRAWING, Sampling, sample, to_uint8, trajectory_keep_ids
from train.model.conditions import Conditions
from train.model.modalities import MODALITIES
from train.model.network import NanoDiT


class NanoDiTTransformer(ModelMixin, ConfigMixin):
    """A NanoDiT as diffusers knows models; its config is the content of an export's ``config.json``."""

    # of a file with two types diffusers would take both as they are, where no type is asked for; float32 is meant
    _supports_param_buffer_assignment = False

    @register_to_config
    def __init__(
        self, schema: int, step: int, source: dict, model: dict, flow: dict, tread: dict, conditioning: dict,
        dataset: dict,
    ) -> None:  # fmt: skip
        super().__init__()
        network, self.settings, self.state = build(self.config)
        self.network = network.eval()

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """See :class:`train.model.network.NanoDiT`."""
        return self.network(*arguments, **named)


class NanoDiTPipeline(DiffusionPipeline):
    """Draws images from prompts, a reference image and a pose, or from :class:`train.model.conditions.Conditions`.

    ``encoders`` says where an encoder is that the model's data does not name: ``{"t5": FOLDER}``, as ``--encoder`` of
    ``train sample``.
    """

    def __init__(self, transformer: NanoDiTTransformer, encoders: dict | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)
        self._encoders = dict(encoders or {})

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        reference: Image.Image | None = None,
        pose: Any = None,
        *,
        conditions: Conditions | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = DRAWING.steps,
        guidance_scale: float = 1.0,
        sampling: Sampling | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw ``num_images_per_prompt`` images of each prompt, or of each image of ``conditions``.

        ``pose`` is a PIL image of a person or a :class:`train.draw.pose_file.Skeleton`. ``height`` and ``width`` are
        pixels (default: the bucket of pose or reference, else the base square). ``sampling`` says how to draw, in place
        of ``num_inference_steps`` (of train.method.sampling.DRAWING) and ``guidance_scale`` (1: none). The noise is
        that of ``train sample --seed`` for ``seed``, ``seed + 1``, ...; or ``latents`` (B, 3, H, W), standard normal;
        or drawn by ``generator``. ``output_type`` is ``pil``, ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W), the latter
        two float32 in [0, 1]. Raises :class:`ConfigError` for a request that makes no sense or that the model was never
        trained for.
        """
        model, config, state = self.transformer.network, self.transformer.settings, self.transformer.state
        sampling = sampling or replace(DRAWING, steps=num_inference_steps, guidance=guidance_scale)
        if output_type not in ("pil", "np", "pt"):
            raise ConfigError(f"output_type {output_type!r}: unknown; use pil, np or pt")
        if num_images_per_prompt < 1:
            raise ConfigError(f"num_images_per_prompt {num_images_per_prompt}: must be at least 1")
        if prompt is not None and not isinstance(prompt, str) and not len(prompt):
            raise ConfigError("prompt: an empty list; leave it out for images without text")
        if sum(given is not None for given in (seed, generator, latents)) > 1:
            raise ConfigError("seed, generator, latents: each says which noise to start from; give only one")
        if latents is not None:
            height, width = latents.shape[2:]
        if conditions is None:
            given = self._given((prompt,) if isinstance(prompt, str) else tuple(prompt or ()), reference, pose)
            bucket = given.bucket(state["dataset"]["base"])
            height, width = height or bucket.height, width or bucket.width
            self._check(model, height, width)
            sampling.check(given.subset, self._table, model)
            conditions = self.encode(given, height, width)
        elif prompt is not None or reference is not None or pose is not None:
            raise ConfigError("conditions: take the place of prompt, reference and pose; leave those out")
        else:
            height, width = (side or state["dataset"]["base"] for side in (height, width))
            self._check(model, height, width)
            for kept in conditions.keep.unique(dim=0).tolist():
                sampling.check(frozenset(name for name, on in zip(MODALITIES, kept) if on), self._table, model)
        conditions = conditions.select(torch.arange(len(conditions)).repeat_interleave(num_images_per_prompt))

        count, device = len(conditions), self._execution_device
        if isinstance(generator, list) and len(generator) not in (1, count):
            raise ConfigError(f"generator: a list of {len(generator)}, for {count} images; give one for each")
        seeds = [(seed or 0) + i % num_images_per_prompt for i in range(count)]
        if seed is not None:
            latents = torch.from_numpy(np.stack([noise(PROMPT_NOISE_KEY, each, height, width) for each in seeds]))
        elif latents is None:
            latents = randn_tensor((count, 3, height, width), generator, device, torch.float32)
        elif len(latents) != count:
            raise ConfigError(f"latents: noise for {len(latents)} images, but conditions for {count}")
        tokens = (height // model.config.patch_size) * (width // model.config.patch_size)
        keep_ids = trajectory_keep_ids(config.tread, [(PROMPT_NOISE_KEY, each) for each in seeds], tokens)
        with self.progress_bar(total=sampling.steps) as bar, self._precision(device):
            images = sample(
                model, conditions, latents, flow=config.flow, sampling=sampling, keep_ids=keep_ids,
                on_step=lambda t, z: bar.update(),
            )  # fmt: skip
        result = _output(images, output_type)
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def encode(self, given: Given, height: int, width: int) -> Conditions:
        """Encode what is given for images of this size; the encoders are loaded for it and freed after it.

        The result may be used again as ``conditions``. Raises :class:`DataError` where an encoder found is not the one
        of the training data.
        """
        dataset = self.transformer.state["dataset"]
        return encode(given, given.subset, dataset, (width, height), self._execution_device, self._encoders)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """Write model_index.json, and the loaders that it names; :meth:`save_pretrained` calls this last."""
        write_loaders(Path(save_directory))

    @property
    def _table(self) -> Mapping[frozenset[str], float]:
        return self.transformer.settings.conditioning.resolve(self.transformer.network.features.modalities)

    @staticmethod
    def _given(prompts: tuple[str, ...], reference: Any, pose: Any) -> Given:
        if any(not text.strip() for text in prompts):
            raise ConfigError("prompt: is empty; leave it out for a picture without text")
        reference = None if reference is None else canonical(reference, "reference")
        if pose is not None and not hasattr(pose, "keypoints"):  # a Skeleton has them
            pose = canonical(pose, "pose")
        return Given(prompts, reference, pose)

    def _check(self, model: NanoDiT, height: int, width: int) -> None:
        patch = model.config.patch_size
        if height % patch or width % patch or height < patch or width < patch:
            raise ConfigError(f"size {width}x{height}: both sides must be multiples of the patch size, {patch}")

    def _precision(self, device: torch.device) -> Any:
        """Return the context for drawing: float32 as ``train sample`` draws, other weights by autocast."""
        # neighbouring times differ by less than bfloat16 resolves, so this MLP always computes in float32
        self.transformer.network.timestep.float()
        dtype = self.transformer.network.final.weight.dtype
        return autocast(device, None if dtype == torch.float32 else dtype)


def _output(images: Tensor, output_type: str) -> Any:
    if output_type == "pil":
        return [Image.fromarray(pixels) for pixels in to_uint8(images)]
    images = ((images + 1) / 2).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
