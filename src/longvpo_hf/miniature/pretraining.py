"""Pretraining of the miniature: from nothing to a model that answers well about one or two clips, and badly about many.

There are two phases. *Naming* trains vision and language together on one clip, mostly on captions, so that vision
learns to name the marker. *Recall* freezes vision, whose features are computed once, and trains on one or two clips
with questions that name the clips whose colours are asked for: first about one of any two clips, until the model finds
the named one; then also about both, until it answers these too; then half of the pairs share wall or frame colour.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import InternVLForConditionalGeneration, InternVLProcessor

from longvpo_hf.errors import ConfigError
from longvpo_hf.miniature.language import WORDS, Language
from longvpo_hf.miniature.settings import PretrainingSettings
from longvpo_hf.miniature.world import SHAPE_COLOURS, WorldClip

_IGNORED_LABEL = -100  # torch's cross-entropy skips it.
_RUNNING_MEAN_WEIGHT = 0.05  # Of the newest loss: the mean of about the last 20 steps.
_FEATURE_CHUNK_CLIPS = 256  # Clips per vision pass: bounds memory, changes no result.


@dataclass(frozen=True, slots=True)
class PretrainingHistory:
    """Mean loss per answer token of every step, phase by phase."""

    naming_losses: tuple[float, ...]
    recall_losses: tuple[float, ...]


class TextCoder:
    """Token ids of prompts and answers, as the processor makes them for the same messages and a video of that length.

    The processor needs the pixels for every prompt; here each text is tokenized once and remembered.
    """

    def __init__(self, processor: InternVLProcessor) -> None:
        self._processor = processor
        self._prompts: dict[tuple[int, str], list[int]] = {}
        self._answers: dict[str, list[int]] = {}

    def prompt_ids(self, num_frames: int, question: str) -> list[int]:
        """Ids up to the start of the answer, for a video of `num_frames` followed by `question`."""
        key = (num_frames, question)
        if key not in self._prompts:
            content = [{"type": "video"}, {"type": "text", "text": question}]
            text = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            video = {"pixel_values_videos": [torch.empty(num_frames, 0)]}  # Only its length counts.
            text = text.replace(self._processor.video_token, self._processor.replace_video_token(video, 0))
            self._prompts[key] = self._processor.tokenizer(text)["input_ids"]
        return self._prompts[key]

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of `answer` with all that the chat template writes after it: its end, and a line's end in some."""
        if answer not in self._answers:
            asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
            turns = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            before = self._processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            whole = self._processor.apply_chat_template(turns, tokenize=False)
            ids, whole_ids = (self._processor.tokenizer(text)["input_ids"] for text in (before, whole))
            if whole_ids[: len(ids)] != ids:
                raise ConfigError(
                    f"The chat template renders {before[-60:]!r} differently once an answer follows: take a language "
                    "model whose template only appends."
                )
            self._answers[answer] = whole_ids[len(ids) :]
        return self._answers[answer]


def pixel_values(processor: InternVLProcessor, frames: Tensor) -> Tensor:
    """Frames, uint8 `[clips, frames, 3, H, W]`, as the model takes them: float `[clips * frames, 3, H, W]`."""
    videos = processor.video_processor(videos=list(frames), return_tensors="pt")["pixel_values_videos"]
    return videos.flatten(0, 1)


def frame_features(model: InternVLForConditionalGeneration, processor: InternVLProcessor, frames: Tensor) -> Tensor:
    """What the language model sees of each frame: float `[clips, frames, hidden]`, without a graph."""
    with torch.no_grad():
        chunks = [
            model.get_image_features(pixel_values(processor, chunk)).pooler_output
            for chunk in frames.split(_FEATURE_CHUNK_CLIPS)
        ]
    return torch.cat(chunks).reshape(frames.shape[0], frames.shape[1], -1)


def pretrain(
    model: InternVLForConditionalGeneration,
    processor: InternVLProcessor,
    frames: Tensor,
    clips: Sequence[WorldClip],
    seed: int,
    settings: PretrainingSettings | None = None,
) -> PretrainingHistory:
    """Trains `model` in place.

    Args:
        model: Untrained, from `build_model`.
        processor: Its processor.
        frames: Decoded frames of `clips`, uint8 `[len(clips), frames per clip, 3, H, W]`.
        clips: The truth about them.
        seed: Decides which examples are drawn.
        settings: `PretrainingSettings()` if None.

    Returns:
        The losses.

    Raises:
        ConfigError: If `frames` and `clips` do not belong together.
    """
    settings = settings or PretrainingSettings()
    if frames.dtype != torch.uint8 or frames.dim() != 5 or len(frames) != len(clips):
        raise ConfigError(
            f"frames must be uint8 [{len(clips)} clips, frames, 3, H, W], got {frames.dtype} {list(frames.shape)}. "
            "Decode every clip once, in the order of clips."
        )
    rng = np.random.default_rng(seed)
    coder = TextCoder(processor)
    model.train()
    naming_losses = _train_naming(model, processor, coder, frames, clips, rng, settings)
    features = frame_features(model, processor, frames)
    recall_losses = _train_recall(model, coder, features, clips, rng, settings)
    model.eval()
    return PretrainingHistory(tuple(naming_losses), tuple(recall_losses))


def _train_naming(
    model: InternVLForConditionalGeneration,
    processor: InternVLProcessor,
    coder: TextCoder,
    frames: Tensor,
    clips: Sequence[WorldClip],
    rng: np.random.Generator,
    settings: PretrainingSettings,
) -> list[float]:
    stepper = Stepper(model.parameters(), settings)
    stepper.decay(settings.warmup_steps, settings.naming_steps)
    for _ in tqdm(range(settings.naming_steps), desc="pretraining: naming", unit="step"):
        drawn = rng.integers(0, len(clips), size=settings.naming_clips)
        rows = []
        for index in drawn:
            clip = clips[index]
            wants_caption = rng.random() < settings.caption_share
            question, answer = ask_for_caption(clip, WORDS) if wants_caption else ask_one(clip, WORDS)
            rows.append((coder.prompt_ids(frames.shape[1], question), coder.answer_ids(answer)))
        pixels = pixel_values(processor, frames[torch.from_numpy(drawn)])
        stepper.step(torch.cat(answer_losses(model, rows, model.get_image_features(pixels).pooler_output)).mean())
    return stepper.losses


def _train_recall(
    model: InternVLForConditionalGeneration,
    coder: TextCoder,
    features: Tensor,
    clips: Sequence[WorldClip],
    rng: np.random.Generator,
    settings: PretrainingSettings,
) -> list[float]:
    trained = (*model.model.language_model.parameters(), *model.lm_head.parameters())
    stepper = Stepper(list(dict.fromkeys(trained)), settings)
    pairs = PairSampler(clips, rng)
    running_losses = {"one": math.log(len(SHAPE_COLOURS))}  # By kind of question about two clips that is asked so far.
    searched, end = 0, 2 * settings.recall_search_steps + settings.recall_steps
    bar = tqdm(total=end, desc="pretraining: recall", unit="step")
    while len(stepper.losses) < end:
        is_single = len(stepper.losses) % settings.single_every == 0
        rows, row_kinds, seen = [], [], []
        for _ in range(settings.recall_videos):
            if is_single:
                indices = [int(rng.integers(0, len(clips)))]
                clip = clips[indices[0]]
                asked = [("single", *ask_one(clip, WORDS)), ("single", *ask_for_caption(clip, WORDS))]
            else:
                indices = pairs.draw(settings.hard_share if stepper.is_decaying else 0.0)
                asked = ask_two(clips[indices[0]], clips[indices[1]], "both" in running_losses, rng, WORDS)
            for kind, question, answer in asked:
                rows.append((coder.prompt_ids(len(indices) * features.shape[1], question), coder.answer_ids(answer)))
                row_kinds.append(kind)
                seen.append(features[indices])
        losses = answer_losses(model, rows, torch.stack(seen))
        stepper.step(torch.cat(losses).mean())
        bar.update()
        for kind, running_loss in running_losses.items():
            of_kind = [loss.detach() for loss, row_kind in zip(losses, row_kinds, strict=True) if row_kind == kind]
            if of_kind:
                running_losses[kind] += _RUNNING_MEAN_WEIGHT * (torch.cat(of_kind).mean().item() - running_loss)
        if stepper.is_decaying:
            continue
        searched += 1
        is_found = all(loss < settings.recall_found_loss for loss in running_losses.values())
        if not is_found and searched < settings.recall_search_steps:
            continue
        searched = 0
        if "both" not in running_losses:
            running_losses["both"] = math.log(len(SHAPE_COLOURS))
        else:
            end = len(stepper.losses) + settings.recall_steps
            stepper.decay(len(stepper.losses), end)
            bar.total = end
    bar.close()
    return stepper.losses


def ask_one(clip: WorldClip, language: Language) -> tuple[str, str]:
    """The question about a clip's colour, and its answer."""
    return language.question(clip.marker), language.answer(clip.colour)


def ask_for_caption(clip: WorldClip, language: Language) -> tuple[str, str]:
    """The question about all that a clip shows, and its answer."""
    return language.caption_question, language.caption(clip.marker, clip.colour)


def ask_two(
    first: WorldClip, second: WorldClip, also_both: bool, rng: np.random.Generator, language: Language
) -> list[tuple[str, str, str]]:
    """Two questions about a video of two clips, as kind, question and answer."""
    if rng.random() < 0.5:
        first, second = second, first
    one = ("one", *ask_one(first, language))
    if not also_both:
        return [one, ("one", *ask_one(second, language))]
    if rng.random() < 0.5:
        first, second = second, first
    both = language.pair_question(first.marker, second.marker), language.pair_answer(first.colour, second.colour)
    return [one, ("both", *both)]


class PairSampler:
    """Draws two clips with different markers; a given share of the pairs is hard: their markers share a word."""

    def __init__(self, clips: Sequence[WorldClip], rng: np.random.Generator) -> None:
        self._clips, self._rng = clips, rng
        self._of_wall: dict[str, list[int]] = defaultdict(list)
        self._of_frame: dict[str, list[int]] = defaultdict(list)
        for index, clip in enumerate(clips):
            self._of_wall[clip.wall].append(index)
            self._of_frame[clip.frame].append(index)
        if len({clip.marker for clip in clips}) < 2:
            raise ConfigError("Pairs need clips of at least 2 markers, got 1. Write more clips (64 give dozens).")

    def draw(self, hard_share: float) -> list[int]:
        while True:
            first = int(self._rng.integers(0, len(self._clips)))
            if self._rng.random() < hard_share:
                same_wall = self._rng.random() < 0.5
                pool = self._of_wall[self._clips[first].wall] if same_wall else self._of_frame[self._clips[first].frame]
                second = pool[int(self._rng.integers(0, len(pool)))]
            else:
                second = int(self._rng.integers(0, len(self._clips)))
            if self._clips[first].marker != self._clips[second].marker:
                return [first, second]


class Stepper:
    """AdamW with clipping; warms up, stays at the peak until told to `decay`; remembers the losses."""

    def __init__(self, parameters: Iterable[nn.Parameter], settings: PretrainingSettings) -> None:
        self.losses: list[float] = []
        self._decay_steps: tuple[int, int] | None = None
        self._parameters = list(parameters)
        self._max_grad_norm = settings.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )

        def share_of_peak(step: int) -> float:
            if step < settings.warmup_steps:
                return (step + 1) / settings.warmup_steps
            if self._decay_steps is None:
                return 1.0
            begin, end = self._decay_steps
            done = min(1.0, max(0, step - begin) / max(1, end - begin))
            return settings.final_share + (1 - settings.final_share) * (1 + math.cos(math.pi * done)) / 2

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, share_of_peak)

    @property
    def is_decaying(self) -> bool:
        return self._decay_steps is not None

    def decay(self, begin: int, end: int) -> None:
        """From step `begin` on, follow a cosine that reaches `final_share` of the peak at step `end`."""
        self._decay_steps = (begin, end)

    def step(self, loss: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self.losses.append(loss.item())


def answer_losses(
    model: InternVLForConditionalGeneration, rows: Sequence[tuple[list[int], list[int]]], features: Tensor
) -> tuple[Tensor, ...]:
    """Cross-entropy of each row's answer tokens. `features`: one per frame token, in the order of the rows."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    pad_id = model.config.text_config.pad_token_id
    ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), _IGNORED_LABEL)
    for row, (prompt, answer) in enumerate(rows):
        inputs = torch.tensor([*prompt, *answer[:-1]])
        ids[row, : len(inputs)] = inputs
        labels[row, len(prompt) - 1 : len(inputs)] = torch.tensor(answer)
    embeddings = model.get_input_embeddings()(ids)
    is_frame = (ids == model.config.image_token_id)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(is_frame, features)
    # Rows are padded on the right, where a causal model's answers cannot see: the mask may be all ones.
    hidden = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), use_cache=False
    ).last_hidden_state
    is_answer = labels != _IGNORED_LABEL
    losses = F.cross_entropy(model.lm_head(hidden[is_answer]), labels[is_answer], reduction="none")
    return losses.split([len(answer) for _, answer in rows])
