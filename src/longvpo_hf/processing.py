"""From frames and messages to a model's inputs, through the model's own processor.

Takes a transformers processor, `Frames` and conversational messages; gives token ids with the expanded visual
placeholders and the processor's visual tensors, the video once however many questions are asked of it. Knows nothing of
rows, answers or batches. Training and answering share it, so that a model is asked as it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .frames import Frames

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Message = Mapping[str, Any]

#: What a processor returns of the text; everything else it returns is visual.
_TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Prompts about one video.

    Args:
        input_ids: Token ids of each prompt, visual placeholders expanded, generation prompt included.
        mm_token_type_ids: Per prompt and token 0 text, 1 image, 2 video; `None` for processors that give none.
        visual: The processor's visual tensors of the video, once; empty without a video.
    """

    input_ids: list[list[int]]
    mm_token_type_ids: list[list[int]] | None
    visual: dict[str, torch.Tensor]


class PromptEncoder:
    """Encodes prompts about videos with one processor.

    Args:
        processor: A transformers processor with a chat template and, for prompts with frames, a video processor.

    Raises:
        ValueError: If the processor has no chat template or takes no videos; the message names its class.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        name = type(processor).__name__
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(f"{name} has no chat template; set processor.chat_template to the model's own.")
        if getattr(processor, "video_processor", None) is None or not getattr(processor, "video_token", None):
            raise ValueError(
                f"{name} takes no videos: it lacks a video_processor or a video_token. Use a video model's processor."
            )
        self.processor = processor

    def encode(self, frames: Frames | None, prompts: Sequence[Sequence[Message]]) -> EncodedPrompts:
        """Encodes prompts that are all about `frames` (None: about no video).

        The video stands before the text of the first user message. It is processed once: from the second prompt on,
        only what follows the visual tokens is tokenized, where that is provably the same.
        """
        texts = [self._render(messages, frames is not None) for messages in prompts]
        first = self._process(texts[0], frames)
        visual = {key: value for key, value in first.items() if key not in _TEXT_KEYS}
        ids = [first["input_ids"][0].tolist()]
        types = [first["mm_token_type_ids"][0].tolist()] if "mm_token_type_ids" in first else None
        trunk = self._trunk_length(texts[0], ids[0]) if frames is not None else None
        for text in texts[1:]:
            if trunk is not None and self._head(text) == self._head(texts[0]):
                tail = self._tokenize(self._tail(text))
                ids.append(ids[0][:trunk] + tail)
                if types is not None:
                    types.append(types[0][:trunk] + [0] * len(tail))
            else:
                other = self._process(text, frames)
                ids.append(other["input_ids"][0].tolist())
                if types is not None:
                    types.append(other["mm_token_type_ids"][0].tolist())
        return EncodedPrompts(ids, types, visual)

    def encode_answer(self, question: str, answer: str) -> list[int]:
        """Token ids of an assistant's answer, with what the chat template writes after it.

        Raises:
            ValueError: If the template renders the prompt differently once an answer follows.
        """
        user = {"role": "user", "content": [{"type": "text", "text": question}]}
        assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        prompt = self.processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        whole = self.processor.apply_chat_template([user, assistant], tokenize=False)
        if not whole.startswith(prompt):
            raise ValueError(
                f"The chat template of {type(self.processor).__name__} renders a prompt differently once an answer "
                f"follows: {prompt[-60:]!r} is not how {whole[:200]!r} goes on. Use a template that only appends."
            )
        return self._tokenize(whole[len(prompt) :])

    def _render(self, messages: Sequence[Message], with_video: bool) -> str:
        rendered, placed = [], not with_video
        for message in messages:
            content = [{"type": "text", "text": message["content"]}]
            if not placed and message["role"] == "user":
                content.insert(0, {"type": "video"})
                placed = True
            rendered.append({"role": message["role"], "content": content})
        if not placed:
            raise ValueError(f"A prompt about a video needs a user message, got roles {[m['role'] for m in messages]}.")
        return self.processor.apply_chat_template(rendered, add_generation_prompt=True, tokenize=False)

    def _process(self, text: str, frames: Frames | None) -> Mapping[str, torch.Tensor]:
        videos: dict[str, Any] = {}
        if frames is not None:
            from transformers.video_utils import VideoMetadata

            fps = len(frames) / frames.duration_seconds
            metadata = VideoMetadata(
                total_num_frames=len(frames),
                fps=fps,
                duration=frames.duration_seconds,
                frames_indices=list(range(len(frames))),
                height=frames.pixels.shape[-2],
                width=frames.pixels.shape[-1],
            )
            videos = {"videos": [frames.pixels], "video_metadata": [metadata], "do_sample_frames": False}
        # The chat template has written the special tokens already.
        return self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **videos)

    def _head(self, text: str) -> str:
        return text.partition(self.processor.video_token)[0]

    def _tail(self, text: str) -> str:
        return text.partition(self.processor.video_token)[2]

    def _tokenize(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _trunk_length(self, text: str, ids: list[int]) -> int | None:
        """Tokens up to the last visual one, if what follows can be tokenized apart from them; else None."""
        tail = self._tokenize(self._tail(text))
        return len(ids) - len(tail) if tail and ids[-len(tail) :] == tail else None


def concatenate_visuals(visuals: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
    """The visual tensors of several videos as one model call takes them; None if their shapes do not allow it."""
    keys = list(visuals[0])
    for key in keys:
        if any(visual[key].shape[1:] != visuals[0][key].shape[1:] for visual in visuals):
            return None
    return {key: torch.cat([visual[key] for visual in visuals]) for key in keys}
