# SPDX-License-Identifier: Apache-2.0
"""Makes of a frame what a vision-language model is fed: marks, placeholders, pixel values and their positions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.engines.anatomy import decoder_of
from kvstore.errors import ConfigError

_SAMPLE = 64
_FORMAT = {"input_data_format": "channels_last", "return_tensors": "pt"}


@dataclass(frozen=True, slots=True)
class Picture:
    """One frame, ready for a model's forward.

    Args:
        ids: token ids: the marks around the picture, and a placeholder for every visual token.
        inputs: the other arguments of the forward: pixel values, and the grid or mask that goes with them.
    """

    ids: list[int]
    inputs: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a family makes of a frame: number and id of its placeholders, the arguments of the forward."""

    num_tokens: int
    placeholder: int
    inputs: dict[str, Tensor]


def _gridded(config: Any, processor: Any, rgb: NDArray[np.uint8], most_tokens: int) -> _Seen:
    """Qwen: a picture of any size, scaled so that its patches, merged four to a token, are few enough."""
    vision = config.vision_config
    _check_sizes(
        (processor.patch_size, processor.merge_size, processor.temporal_patch_size),
        (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size),
    )
    token_pixels = (processor.patch_size * processor.merge_size) ** 2
    longest = min(processor.size["longest_edge"], most_tokens * token_pixels)
    size = {"shortest_edge": min(processor.size["shortest_edge"], longest), "longest_edge": longest}
    made = processor(images=[rgb], size=size, **_FORMAT)
    num_tokens = int(made["image_grid_thw"].prod()) // processor.merge_size**2
    inputs = {name: made[name] for name in ("pixel_values", "image_grid_thw")}
    return _Seen(num_tokens, config.image_token_id, inputs)


def _pooled(config: Any, processor: Any, rgb: NDArray[np.uint8], most_tokens: int) -> _Seen:
    """LLaVA-OneVision: a video of one frame, whose tokens are pooled two by two and end with a new line."""
    side = config.vision_config.image_size
    made = processor(images=[rgb], image_grid_pinpoints=[[side, side]], **_FORMAT)
    whole = made["pixel_values"][:, :1]  # behind it come the tiles of a single picture
    _check_sizes(tuple(whole.shape[-2:]), (side, side))
    num_side = -(-(side // config.vision_config.patch_size) // 2)
    return _Seen(num_side**2 + 1, config.video_token_id, {"pixel_values_videos": whole})


def _squared(config: Any, processor: Any, rgb: NDArray[np.uint8], most_tokens: int) -> _Seen:
    """SmolVLM: the whole picture as one square, without the tiles that a single picture is split into."""
    side, vision = processor.max_image_size["longest_edge"], config.vision_config
    _check_sizes((side,), (vision.image_size,))
    made = processor(images=[rgb], size={"longest_edge": side}, do_image_splitting=False, **_FORMAT)
    num_side = side // vision.patch_size // config.scale_factor
    return _Seen(num_side**2, config.image_token_id, dict(made))


def _check_sizes(made: tuple[int, ...], taken: tuple[int, ...]) -> None:
    if made != taken:
        raise ConfigError(f"it makes pictures or patches of {made}, and the vision tower takes {taken}")


def _qwen_marks(config: Any, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    return [config.vision_start_token_id], [config.vision_end_token_id]


def _no_marks(config: Any, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    return [], []


def _smolvlm_marks(config: Any, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    return encode("<fake_token_around_image><global-img>"), encode("<fake_token_around_image>")


FAMILIES: dict[str, tuple[Callable[..., _Seen], Callable[..., tuple[list[int], list[int]]]]] = {
    "llava_onevision": (_pooled, _no_marks),
    "qwen2_5_vl": (_gridded, _qwen_marks),
    "qwen2_vl": (_gridded, _qwen_marks),
    "qwen3_vl": (_gridded, _qwen_marks),
    "smolvlm": (_squared, _smolvlm_marks),
}
"""Vision-language models, by `model_type`, that can be fed frames."""


class PictureMaker:
    """Makes pictures for one model.

    Args:
        model: a vision-language model of one of `FAMILIES`.
        image_processor: its image processor, of Pillow's kind.
        encode: its tokenizer, without special tokens.
        most_tokens: tokens that a picture may take; families with one size of picture take what they take.
    """

    def __init__(self, model: Any, image_processor: Any, encode: Callable[[str], list[int]], most_tokens: int) -> None:
        self._model = model
        self._processor = image_processor
        self._see, marks = FAMILIES[model.config.model_type]
        # Now, not in `picture`: that runs in a thread of its own, and a tokenizer serves one at a time.
        self._begin, self._end = marks(self._model.config, encode)
        self._most_visual = max(most_tokens - len(self._begin) - len(self._end), 1)
        self._positions_of: Any = next(
            (m.get_rope_index for m in model.modules() if hasattr(m, "get_rope_index")), None
        )

    @property
    def name(self) -> str:
        """What decides a picture's tokens: the image processor with its settings, and the vision tower's weights."""
        digest = hashlib.blake2b(self._processor.to_json_string().encode(), digest_size=8)
        text = {id(weight) for weight in decoder_of(self._model).parameters()}
        for weight in self._model.parameters():
            if id(weight) not in text:
                digest.update(weight.detach().flatten()[:_SAMPLE].cpu().view(torch.uint8).numpy().tobytes())
        return f"{type(self._processor).__name__} {digest.hexdigest()}"

    def picture(self, rgb: NDArray[np.uint8]) -> Picture:
        """Prepare a frame; does not touch the model.

        Args:
            rgb: [height, width, 3] uint8.

        Raises:
            ConfigError: the image processor refuses it.
        """
        config = self._model.config
        try:
            seen = self._see(config, self._processor, rgb, self._most_visual)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{type(self._processor).__name__}: cannot take a frame of {rgb.shape[1]} x {rgb.shape[0]}: {error}"
            ) from error
        return Picture([*self._begin, *[seen.placeholder] * seen.num_tokens, *self._end], seen.inputs)

    def arguments(self, before: Sequence[int], picture: Picture, first_position: int) -> dict[str, Tensor]:
        """Arguments of the model's forward for a text with a picture behind it, at the end of a sequence.

        Args:
            before: token ids of the text.
            picture: from `picture`.
            first_position: RoPE position of the first token: M-RoPE counts a picture by its sides, not by its tokens.
        """
        device, dtype = self._model.device, self._model.dtype
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in picture.inputs.items()
        }
        inputs["input_ids"] = torch.tensor([[*before, *picture.ids]], device=device)
        if self._positions_of is not None:
            is_visual = (inputs["input_ids"] == self._model.config.image_token_id).int()
            positions, _ = self._positions_of(
                input_ids=inputs["input_ids"], mm_token_type_ids=is_visual, image_grid_thw=inputs["image_grid_thw"]
            )
            inputs["position_ids"] = positions + first_position
        return inputs
