# SPDX-License-Identifier: Apache-2.0
"""What a model perceives a video with: screens read as text, or pictures for a vision tower of its own."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from kvstore.engines.loading import LanguageModel
from kvstore.engines.pictures import PictureMaker
from kvstore.video.changes import FrameGroup
from kvstore.video.perception import Observation
from kvstore.video.prompt import PICTURE_PREAMBLE, TEXT_PROMPTS, Prompts

_MARK = "{words}"


class PictureTaker:
    """A perception that hands the group's frame on as a picture; its text is empty.

    Args:
        maker: makes pictures for the model that will see them.

    Attributes:
        name: what decides the visual tokens; see `PictureMaker.name`.
    """

    def __init__(self, maker: PictureMaker) -> None:
        self.maker = maker
        self.name = maker.name

    def describe(self, group: FrameGroup) -> Observation:
        """Prepare the group's frame."""
        return Observation(group.start_s, group.end_s, "", self.maker.picture(group.frame.rgb()))


def prompts_of(language_model: LanguageModel) -> Prompts:
    """The words around a stream that this model reads or sees.

    A model that is fed pictures gets one turn of its chat format, or plain words where it has none.
    """
    if language_model.image_processor is None:
        return TEXT_PROMPTS
    tokenizer = language_model.tokenizer
    contents: list[Any] = [_MARK, [{"type": "text", "text": _MARK}]] if tokenizer.chat_template else []
    for content in contents:  # templates take words, or a list of parts
        try:
            turn = [{"role": "user", "content": content}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, ValueError):
            continue
        if text.count(_MARK) == 1:
            before, after = text.split(_MARK)
            return Prompts(before + PICTURE_PREAMBLE, "\n", after)
    return Prompts(PICTURE_PREAMBLE)
