"""From frames and messages to a model's inputs, through the model's own processor.

Training and answering share this encoder, so that a model is asked as it was trained. Frames come as `frames.py` took
them: no processor samples, decodes or crops. What a processor learns of them:

- *Time.* It gets a video of one tick per microsecond and the ticks of the frames, so every timestamp it derives is the
  frame's own `timeline_seconds` to half a microsecond, uniform or not. Families then round as they do: Qwen3-VL writes
  the mean of each pair of frames in tenths of a second, SmolVLM writes whole seconds, Qwen2.5-VL has one spacing for
  the whole video and gets the mean one; InternVL and LLaVA-OneVision write no times.
- *Size.* Families with a patch grid (the Qwens) would scale a video to bounds of their own, some of them over all its
  frames together. Here they only round each frame to their grid, so the pixel budget of the frames holds. Families of
  one fixed tile (InternVL, LLaVA-OneVision, SmolVLM) scale every frame to it by their own rules.

`docs/families.md` lists what was run for each family.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.chat_template_utils import mark_control_tokens

from longvpo_hf.errors import ModelError
from longvpo_hf.families import family_of
from longvpo_hf.families.refused import refusal
from longvpo_hf.families.templates import prompt_before, thinking_switch
from longvpo_hf.frames import Frames
from longvpo_hf.paths import shown
from longvpo_hf.reasoning import TAG, AnswerReasoning, parts_of, without_reasoning

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Message = Mapping[str, Any]

#: What a processor returns for the text; everything else it returns is visual.
_TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "text_replacement_offsets")

#: Molmo2's places of the patches that are pooled into a token, counted from the video's first patch.
_POOLED_PATCHES = "video_token_pooling"
#: With what transformers marks the start of a control token that is to be read as text.
_MARK = mark_control_tokens("x", re.compile("x"))[0]

#: The clock that processors get: `VideoMetadata.frames_indices` are whole numbers.
_TICKS_PER_SECOND = 1_000_000


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Prompts about one video.

    Args:
        input_ids: Token ids of each prompt, visual placeholders expanded, generation prompt included.
        mm_token_type_ids: Per prompt and token: 0 text, 1 image, 2 video. `None` for processors that return none.
        visual: The processor's visual tensors of the video, once; empty without a video.
    """

    input_ids: list[list[int]]
    mm_token_type_ids: list[list[int]] | None
    visual: dict[str, torch.Tensor]


class PromptEncoder:
    """Encodes prompts about videos with one processor.

    Args:
        processor: A transformers processor of a video model, with its chat template.
        thinking: Whether prompts ask for reasoning before the answer; None leaves it to the template.
        answer_reasoning: Whether the reasoning in given answers is kept, as the template renders it, or dropped.

    Attributes:
        switch: What the template is told of it; see `thinking_switch`.

    Raises:
        ModelError: If the processor cannot be given frames; names its class and all that it lacks. If its template has
            no switch for reasoning and `thinking` is not None.
    """

    def __init__(
        self, processor: ProcessorMixin, thinking: bool | None = None, answer_reasoning: AnswerReasoning = "keep"
    ) -> None:
        reason = refusal(processor)
        if reason is not None:
            raise ModelError(f"{type(processor).__name__}: {reason} docs/families.md lists models that can be.")
        lacks = _lacks(processor)
        if lacks:
            raise ModelError(
                f"{type(processor).__name__} cannot be given frames and questions: it lacks {'; '.join(lacks)}. "
                "Use a video model's processor with its own chat template; docs/families.md lists those that were run."
            )
        self.processor = processor
        self.switch = thinking_switch(processor, thinking)
        self.answer_reasoning = answer_reasoning
        self._family = family_of(processor)
        feature = self._family.feature_token
        placeholders = (*processor.all_special_multimodal_tokens, *([feature] if feature else []))
        self._control_tokens = control_tokens(processor.tokenizer, placeholders)
        self._video_settings = self._family.video_settings(processor.video_processor) or {}
        if not self._family.processor and (reason := _reason_in_trial(self)):
            raise ModelError(
                f"{type(processor).__name__} is of no family that docs/families.md lists, and a trial on two small "
                f"videos failed: {reason}. Choose a model of a listed family, or add this one as that page says."
            )

    def encode(
        self,
        frames: Frames | None,
        prompts: Sequence[Sequence[Message]],
        answers: Sequence[Sequence[str]] | None = None,
    ) -> EncodedPrompts:
        """Encodes prompts that are all about `frames` (None: about no video).

        Args:
            frames: What they are about.
            prompts: Messages of each.
            answers: The answers that follow each, where they are known: a template that writes empty reasoning before
                them writes it into the prompt. See `encode_texts`.

        The video goes before the text of the first user message. The processor sees it once, with the first prompt;
        the text that it writes in place of the video is then put into the other prompts, which are only tokenized.

        Raises:
            ModelError: If no message is the user's, or one holds a control token that the tokenizer cannot read as
                text.
        """
        texts = [
            self._conversations(messages, following, frames is not None)[0]
            for messages, following in zip(prompts, answers or [()] * len(prompts), strict=True)
        ]
        # Processors count placeholders in what they are given, marked as text or not: they see a prompt without marks.
        plain = self._turns([{"role": "user", "content": ""}], frames is not None)
        seen = texts[0] if _MARK not in texts[0] else self._rendered(plain, asking=True)
        first = self._process(seen, frames)
        video_text = first["text_replacement_offsets"][0][0]["replacement"] if frames is not None else ""
        ids: list[list[int]] = []
        types: list[list[int]] | None = [] if "mm_token_type_ids" in first else None
        for text in texts:
            if text == seen:
                ids.append(first["input_ids"][0].tolist())
            else:
                replacements = [video_text] if frames is not None else []
                expanded, _ = self.processor.get_text_with_replacements([text], [], replacements, [])
                ids.append(self._tokenize(expanded[0]))
            if types is not None:
                types += self.processor.create_mm_token_type_ids(ids[-1:])
        return EncodedPrompts(ids, types, {key: value for key, value in first.items() if key not in _TEXT_KEYS})

    def encode_answer(self, prompt: str | Sequence[Message], answer: str) -> list[int]:
        """Token ids of an assistant's only answer about a video; see `encode_texts`."""
        return self.encode_texts(prompt, [answer])[1][0]

    def encode_texts(
        self, prompt: str | Sequence[Message], answers: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt with its video as one placeholder, and of the assistant's answers to it.

        Args:
            prompt: The messages before them, or the text of a single question.
            answers: Each an answer of its own.

        Prompt and answer together are the tokens of the whole conversation, with what the template writes after the
        answer. Where the template writes empty reasoning before all of the answers, that is the prompt's. Where the
        tokens would merge the prompt's end with an answer's start, the answer starts at the prompt's end, as it does
        when a model generates it.

        Raises:
            ModelError: If the template renders the prompt differently once an answer follows, or leaves reasoning out
                that is to be kept; if an answer ends inside its reasoning; if a text holds a control token that the
                tokenizer cannot read as text; if it has no ids for an answer that follow the prompt's.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        # Rendered with a video, like the prompt: SmolVLM's processor has another template for texts alone.
        before, wholes = self._conversations(messages, answers, with_video=True)
        prompt_ids = self._tokenize(before)
        return prompt_ids, [self._answer_ids(prompt_ids, before, whole) for whole in wholes]

    def _answer_ids(self, prompt_ids: list[int], before: str, whole: str) -> list[int]:
        whole_ids = self._tokenize(whole)
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return whole_ids[len(prompt_ids) :]
        answer_ids = self._tokenize(whole[len(before) :])
        if self._text(prompt_ids + answer_ids) != self._text(whole_ids):  # a space put before the answer, for one
            raise ModelError(
                f"{type(self.processor.tokenizer).__name__} merges the prompt's end {before[-20:]!r} with the answer's "
                f"start {whole[len(before) :][:20]!r}, and reads the answer alone as another text: drop what the "
                "answer starts with."
            )
        return answer_ids

    def _conversations(
        self, messages: Sequence[Message], answers: Sequence[str], with_video: bool
    ) -> tuple[str, list[str]]:
        """The prompt's text, and of each answer the whole conversation, which starts with it."""
        turns = self._turns(messages, with_video)
        asked = self._rendered(turns, asking=True)
        wholes = [self._whole(turns, answer) for answer in answers]
        if not wholes:
            return asked, []
        if len(set(wholes)) < len(wholes):
            raise ModelError(f"The answers are one and the same as the template renders them: {answers[0][:80]!r}.")
        candidates = prompt_before(asked, wholes)
        if not candidates:
            raise ModelError(
                f"The chat template of {type(self.processor).__name__} renders a prompt differently once an answer "
                f"follows: {asked[-60:]!r} is not how {wholes[0][:200]!r} goes on. Use a template that only appends."
            )
        return next((before for before in candidates if self._starts(before, wholes)), candidates[0]), wholes

    def _starts(self, before: str, wholes: Sequence[str]) -> bool:
        """Whether the prompt's tokens are the first of each conversation's."""
        ids = self._tokenize(before)
        return all(self._tokenize(whole)[: len(ids)] == ids for whole in wholes)

    def _whole(self, turns: Sequence[Mapping[str, Any]], answer: str) -> str:
        """The conversation with an answer, its reasoning kept or dropped."""
        text, parts = answer, [self._marked(part) for part in parts_of(answer)]
        if TAG.search(answer):
            text = without_reasoning(answer)
            if not text:
                raise ModelError(
                    f"The answer {answer[:80]!r} ends inside its reasoning, or with it: leave its row out."
                )
        if self.answer_reasoning == "drop" or text == answer:
            return self._rendered([*turns, {"role": "assistant", "content": self._content(text)}])
        fields = dict.fromkeys(("reasoning", "reasoning_content"), parts[0])
        for message in ({"content": self._content(answer)}, {"content": self._content(text), **fields}):
            whole = self._rendered([*turns, {"role": "assistant", **message}])
            if all(part in whole for part in parts):
                return whole
        raise ModelError(
            f"The chat template of {type(self.processor).__name__} leaves out reasoning of the answer "
            f"{answer[:80]!r}: set answer_reasoning='drop', or a template that renders it."
        )

    def _rendered(self, turns: Sequence[Mapping[str, Any]], asking: bool = False) -> str:
        """The template's text of turns; `asking` for an answer, as the model is asked."""
        more = {"add_generation_prompt": True, **self.switch} if asking else {}
        text = self.processor.apply_chat_template(turns, tokenize=False, **more)
        return self._family.written(self.processor, text)  # as the processor would tokenize it

    def holds_control_token(self, text: str) -> bool:
        """Whether a text holds, by its letters, one of the model's control tokens."""
        return self._control_tokens.search(text) is not None

    def _content(self, text: str) -> list[dict[str, str]]:
        """A text as a part of a message, its control tokens marked as plain text."""
        return [{"type": "text", "text": self._marked(text)}]

    def _marked(self, text: str) -> str:
        marked = mark_control_tokens(text, self._control_tokens)
        if marked != text:
            try:
                self._tokenize(marked)
            except ValueError as error:
                raise ModelError(
                    f"The text {shown(text)} holds a control token of {type(self.processor.tokenizer).__name__}, which "
                    f"cannot read it as plain text: {error}. Remove it from the text."
                ) from error
        return marked

    def _turns(self, messages: Sequence[Message], with_video: bool) -> list[dict[str, Any]]:
        """The messages as a chat template takes them, with the video before the first text of the user."""
        rendered, placed = [], not with_video
        for message in messages:
            content = self._content(message["content"])
            if not placed and message["role"] == "user":
                content.insert(0, {"type": "video"})
                placed = True
            rendered.append({"role": message["role"], "content": content})
        if not placed:
            raise ModelError(f"A prompt about a video needs a user message, got roles {[m['role'] for m in messages]}.")
        return rendered

    def _process(self, text: str, frames: Frames | None) -> Mapping[str, Any]:
        videos: dict[str, Any] = {}
        if frames is not None:
            from transformers.video_utils import VideoMetadata

            pixels = frames.pixels
            metadata = VideoMetadata(
                total_num_frames=max(1, round(frames.duration_seconds * _TICKS_PER_SECOND)),
                fps=_TICKS_PER_SECOND,
                duration=frames.duration_seconds,
                frames_indices=[round(seconds * _TICKS_PER_SECOND) for seconds in frames.timeline_seconds],
                height=pixels.shape[-2],
                width=pixels.shape[-1],
            )
            # Qwen3-VL refuses a single frame, though it repeats an odd last frame of a longer video.
            missing = (getattr(self.processor.video_processor, "temporal_patch_size", None) or 1) - len(pixels)
            if missing > 0:
                pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
            settings = {**self._video_settings, "do_sample_frames": False, "video_metadata": [metadata]}
            if self._family.takes_frame_rate:
                settings["fps"] = len(frames.pixels) / frames.duration_seconds
            videos = {"videos": [pixels], "videos_kwargs": settings, "return_text_replacement_offsets": True}
        # The chat template has written the special tokens already.
        return self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **videos)

    def _tokenize(self, text: str) -> list[int]:
        marks = {"sanitize_control_tokens": True} if _MARK in text else {}
        return self.processor.tokenizer(text, add_special_tokens=False, **marks)["input_ids"]

    def _text(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def control_tokens(tokenizer: Any, placeholders: Sequence[str] = ()) -> re.Pattern[str]:
    """A pattern of the tokens that are no text to a model, the longest first.

    Args:
        tokenizer: The model's; its special tokens count, and those are left out that are text to it (`<think>`).
        placeholders: What a processor takes for pictures and videos.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = {
        token
        for token in (*added, *tokenizer.all_special_tokens, *placeholders)
        if token.strip() and not TAG.fullmatch(token)
    }
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def visual_shapes(visual: Mapping[str, torch.Tensor]) -> Hashable:
    """A key that is equal for videos whose visual tensors can go into one model call."""
    return tuple((name, tensor.shape[1:]) for name, tensor in sorted(visual.items()))


def concatenate_visuals(visuals: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The visual tensors of several videos of equal `visual_shapes`, as one model call takes them; {} of none."""
    joined = {name: torch.cat([visual[name] for visual in visuals]) for name in (visuals[0] if visuals else ())}
    if _POOLED_PATCHES in joined:
        joined[_POOLED_PATCHES] = _counted_on(visuals)
    return joined


def _counted_on(visuals: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Places of patches, -1 for none, counted over the patches of all videos."""
    places, before = [], 0
    for visual in visuals:
        own = visual[_POOLED_PATCHES]
        places.append(torch.where(own < 0, own, own + before))
        before += visual["pixel_values_videos"].shape[:2].numel()
    return torch.cat(places)


def _lacks(processor: ProcessorMixin) -> list[str]:
    """What `PromptEncoder` needs and the processor lacks, in plain English."""
    from transformers import ProcessorMixin

    lacks = []
    video_processor = getattr(processor, "video_processor", None)
    video_token = getattr(processor, "video_token", None)
    replace = getattr(type(processor), "replace_video_token", None)
    if video_processor is None:
        lacks.append("a video_processor (it takes no videos)")
    elif family_of(processor).video_settings(video_processor) is None:
        lacks.append(
            f"a size rule that keeps whole frames: {type(video_processor).__name__} has size={video_processor.size} "
            f"and do_center_crop={video_processor.do_center_crop}, neither one fixed tile nor a patch grid"
        )
    if not video_token:
        lacks.append("a video_token")
    if replace is None or replace is ProcessorMixin.replace_video_token:
        lacks.append("replace_video_token, which writes a video's tokens into the prompt")
    if getattr(processor, "chat_template", None) is None:
        lacks.append("a chat template (set processor.chat_template to the model's own)")
    elif video_token:
        message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        if text.count(video_token) != 1:
            lacks.append(
                f"a chat template that writes {video_token!r} once for a video: it writes {text[:200]!r}; "
                "set processor.chat_template to the model's own"
            )
    return lacks


def _reason_in_trial(encoder: PromptEncoder) -> str | None:
    """Why a processor of no known family cannot be trusted with frames; None where two small videos show no fault.

    Its prompts must be what it makes of them itself, frames must keep their size but for its tile or its grid, and
    spacings that it returns must follow the frames' times.
    """
    shapes, spacings = set(), set()
    for size, scale in (((112, 112), 1.0), ((112, 224), 2.0)):
        noise = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, generator=noise)
        frames = Frames(pixels, tuple(scale * second for second in (0.5, 1.5, 4.0, 9.0)), (0,) * 4, 10.0 * scale)
        try:
            visual = _visual_in_trial(encoder, frames)
        except Exception as error:  # whatever it is, it would come in training too
            return str(error) if isinstance(error, ModelError) else f"it ended with {type(error).__name__}: {error}"
        shapes.add(tuple((name, tensor.shape) for name, tensor in sorted(visual.items())))
        spacings |= {(name, tuple(tensor.flatten().tolist())) for name, tensor in visual.items() if "second" in name}
    if len({name for name, _ in spacings}) == len(spacings) > 0:
        return f"its {spacings.pop()[0]} does not follow the times of the frames"
    if not encoder._video_settings and len(shapes) > 1:
        return "its size reads like one tile, but larger frames became more pixels"
    return None


def _visual_in_trial(encoder: PromptEncoder, frames: Frames) -> dict[str, torch.Tensor]:
    """The visual tensors of a trial's video.

    Raises:
        ModelError: If a second prompt about it, or its grid, is not as it should be.
    """
    processor, prompts = encoder.processor, [[{"role": "user", "content": text}] for text in ("Who?", "What then?")]
    encoded = encoder.encode(frames, prompts)
    own = encoder._process(encoder._conversations(prompts[1], (), with_video=True)[0], frames)
    if encoded.input_ids[1] != own["input_ids"][0].tolist():
        raise ModelError("it makes other tokens of a second prompt about a video than its template and tokenizer do")
    if encoder._video_settings:
        merge, size = processor.video_processor.merge_size, tuple(frames.pixels.shape[-2:])
        patches = [round(side / (processor.video_processor.patch_size * merge)) * merge for side in size]
        grids = [tensor[0, 1:].tolist() for name, tensor in encoded.visual.items() if name.endswith("grid_thw")]
        if grids != [patches]:
            raise ModelError(f"frames of {size} pixels became {grids} patches, expected {patches}")
    return encoded.visual
