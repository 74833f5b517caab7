# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision-language models, and folders of them with a tokenizer and an image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)
from transformers.utils import logging as transformers_logging

from tests.tiny_models import SIZES, build

IMAGE, VIDEO, BEGIN, END = 290, 291, 292, 293
MARKS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
WIDE = {**TOWER, "intermediate_size": 48, "out_hidden_size": 64}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def tiny(config_class: Any, **fields: Any) -> Any:
    """A config; what transformers declares for its fields is not always what it takes."""
    return config_class(**fields)


def qwen2_vl() -> PreTrainedModel:
    """Qwen2-VL."""
    vision = {**TOWER, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    text = {**SIZES, "rope_parameters": ROPE}
    return build(Qwen2VLForConditionalGeneration, Qwen2VLConfig(text_config=text, vision_config=vision, **MARKS))


def qwen2_5_vl() -> PreTrainedModel:
    """Qwen2.5-VL."""
    vision = {**WIDE, "window_size": 16, "fullatt_block_indexes": [0]}
    text = {**SIZES, "rope_parameters": ROPE}
    return build(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=vision, **MARKS))


def qwen3_vl() -> PreTrainedModel:
    """Qwen3-VL: interleaved M-RoPE, norms before RoPE, features added in later layers."""
    vision = {**WIDE, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {**SIZES, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    return build(Qwen3VLForConditionalGeneration, Qwen3VLConfig(text_config=text, vision_config=vision, **MARKS))


def llava_onevision() -> PreTrainedModel:
    """LLaVA-OneVision."""
    made = tiny(
        LlavaOnevisionConfig,
        text_config={**SIZES, "model_type": "qwen2"},
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 16]],
    )
    return build(LlavaOnevisionForConditionalGeneration, made)


def smolvlm() -> PreTrainedModel:
    """SmolVLM."""
    text = {**SIZES, "model_type": "llama"}
    made = tiny(
        SmolVLMConfig, text_config=text, vision_config=SIGLIP, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return build(SmolVLMForConditionalGeneration, made)


def _qwen_processor(**changes: Any) -> Any:
    return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, **changes)


def _qwen3_processor() -> Any:
    return _qwen_processor(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _llava_processor() -> Any:
    return LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16})


def _smolvlm_processor() -> Any:
    return SmolVLMImageProcessorPil(max_image_size={"longest_edge": 16}, size={"longest_edge": 64})


VISION_FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen2_vl": (qwen2_vl, _qwen_processor),
    "qwen2_5_vl": (qwen2_5_vl, _qwen_processor),
    "qwen3_vl": (qwen3_vl, _qwen3_processor),
    "llava_onevision": (llava_onevision, _llava_processor),
    "smolvlm": (smolvlm, _smolvlm_processor),
}
_SIGNS = {
    "<end>": 256,
    "<image>": IMAGE,
    "<video>": VIDEO,
    "<begin>": BEGIN,
    "<stop>": END,
    "<fake_token_around_image>": 294,
    "<global-img>": 295,
}


def save_vision_model(folder: Path, family: str, chat_template: str | None = None) -> Path:
    """Save a random model of a family that reads bytes, with its tokenizer and image processor."""
    make, make_processor = VISION_FAMILIES[family]
    vocabulary = {sign: number for number, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"<unused{number}>": number for number in range(256, 300) if number not in _SIGNS.values()} | _SIGNS
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers_logging.disable_progress_bar()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        additional_special_tokens=[*_SIGNS][1:],
        chat_template=chat_template,
    ).save_pretrained(folder)
    make().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder
