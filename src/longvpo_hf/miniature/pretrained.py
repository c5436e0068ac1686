"""The miniature's model with a pretrained language model inside: an InternVL that sees the world and speaks English.

Its text model is a small causal language model as it was published, with its own tokenizer and chat template; its
vision tower is the miniature's, trained on naming clips and then frozen. A frame is four tokens. What is between them
is learnt in two steps: the projector by regression, so that the four tokens of a frame say its wall, its frame, its
shape's colour and a line's end in the model's own embeddings, which uses the world's truth about single clips; then
adapters (LoRA, merged afterwards) on questions about one clip and two.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from longvpo_hf.errors import ModelError
from longvpo_hf.miniature.language import SENTENCES
from longvpo_hf.miniature.model import FRAME, VIDEO, VIDEO_END, VIDEO_START, processor_of, tokenizer_of
from longvpo_hf.miniature.pretraining import (
    PairSampler,
    Stepper,
    TextCoder,
    answer_losses,
    ask_for_caption,
    ask_one,
    ask_two,
    frame_features,
)
from longvpo_hf.miniature.settings import AlignmentSettings, PretrainingSettings
from longvpo_hf.miniature.world import FRAME_COLOURS, SHAPE_COLOURS, WALL_COLOURS, WorldClip
from longvpo_hf.precision import is_computed

TOKENS_PER_FRAME = 4  # 2×2 of the tower's 4×4 patches each
_PAD = "<|video_pad|>"
_HELD_OUT_SHARE = 0.1  # of the clips, to see whether the projector says clips that it was not trained on
_COSINE_SCALE = 10.0  # of the cosines that choose among eight words: the prototype's

# The language model's own template knows texts; a video becomes one of them.
_TEXTS_OF_MESSAGES = """
{%- set texts = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set text = namespace(content='') -%}
    {%- if message['content'] is string -%}
        {%- set text.content = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- set text.content = text.content + ('<video>\\n' if part['type'] == 'video' else part['text']) -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set texts.messages = texts.messages + [{'role': message['role'], 'content': text.content}] -%}
{%- endfor -%}
{%- set messages = texts.messages -%}
"""


@dataclass(frozen=True, slots=True)
class AlignmentHistory:
    """How a language model learnt to see.

    Args:
        words_right: Shares of held-out frames whose wall, frame and colour the projector says: the nearest of each
            eight words is the right one.
        losses: Mean loss per answer token of every step of the adapters.
    """

    words_right: tuple[float, float, float]
    losses: tuple[float, ...]


def build_processor(tokenizer: PreTrainedTokenizerFast) -> InternVLProcessor:
    """The processor for a language model: its chat template with a video before the question, four tokens a frame.

    Args:
        tokenizer: The language model's, unchanged.

    Raises:
        ModelError: If it has no chat template.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise ModelError("The language model has no chat template: name an instruction-tuned one.")
    pad = tokenizer.pad_token
    # Answers end in the end of a turn; where padding is the same token, a collator cannot tell them apart.
    has_pad = pad is not None and pad != tokenizer.eos_token
    special = (VIDEO_START, VIDEO_END, FRAME, VIDEO, *(() if has_pad else (_PAD,)))
    roles = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    seeing = tokenizer_of(backend, special, pad_token=pad if has_pad else _PAD, **roles)
    return processor_of(seeing, _TEXTS_OF_MESSAGES + tokenizer.chat_template, TOKENS_PER_FRAME)


def build_model(
    processor: InternVLProcessor,
    language_model: PreTrainedModel,
    seeing: InternVLForConditionalGeneration,
    seed: int,
) -> InternVLForConditionalGeneration:
    """The model: vision tower of `seeing`, an untrained projector, and `language_model`, which becomes part of it.

    Args:
        processor: Of `build_processor`.
        language_model: With a head; takes the new tokens into its vocabulary.
        seeing: A trained miniature.
        seed: Decides the projector's weights and the new tokens' embeddings.
    """
    tokenizer = processor.tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        known = language_model.get_input_embeddings().num_embeddings
        language_model.resize_token_embeddings(max(known, len(tokenizer)), mean_resizing=False)
        text_config = copy.deepcopy(language_model.config)
        text_config.pad_token_id = tokenizer.pad_token_id
        is_tied = bool(text_config.tie_word_embeddings)
        config = InternVLConfig(
            vision_config=seeing.config.vision_config,
            text_config=text_config,
            image_token_id=processor.image_token_id,
            image_seq_length=TOKENS_PER_FRAME,
            downsample_ratio=TOKENS_PER_FRAME**0.5 / 4,
            tie_word_embeddings=is_tied,
        )
        model = InternVLForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    embeddings = model.get_input_embeddings().weight.data
    for token, like in ((VIDEO_START, ":"), (VIDEO_END, "\n")):
        embeddings[tokenizer.convert_tokens_to_ids(token)] = embeddings[_ids(processor, like)].mean(0)
    ends = {tokenizer.eos_token_id, *_as_list(language_model.generation_config.eos_token_id)}
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=SENTENCES.max_answer_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def align(
    model: InternVLForConditionalGeneration,
    processor: InternVLProcessor,
    frames: Tensor,
    clips: Sequence[WorldClip],
    seed: int,
    settings: AlignmentSettings,
) -> AlignmentHistory:
    """Teaches `model`, in place, to answer about one clip and two.

    Args:
        model: Of `build_model`.
        processor: Its processor.
        frames: One of each of `clips`, uint8 `[len(clips), 1, 3, H, W]`.
        clips: The truth about them.
        seed: Decides which examples are drawn, and the adapters' weights.
        settings: See `AlignmentSettings`.

    Returns:
        How well it went.
    """
    model.requires_grad_(False)
    rng = np.random.default_rng(seed)
    words_right = _train_projector(model, processor, frames, clips, rng, settings)
    features = frame_features(model, processor, frames)
    language_model = model.model.language_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")
        model.model.language_model = get_peft_model(language_model, adapters)
    losses = _train_adapters(model, processor, features, clips, rng, settings)
    model.model.language_model = model.model.language_model.merge_and_unload()
    model.eval()
    return AlignmentHistory(words_right, tuple(losses))


def _train_projector(
    model: InternVLForConditionalGeneration,
    processor: InternVLProcessor,
    frames: Tensor,
    clips: Sequence[WorldClip],
    rng: np.random.Generator,
    settings: AlignmentSettings,
) -> tuple[float, float, float]:
    """Regresses the projector on embeddings of words; returns the shares of held-out words that it says."""
    projector = model.model.multi_modal_projector
    model.model.multi_modal_projector = nn.Identity()
    seen = frame_features(model, processor, frames).reshape(len(clips), TOKENS_PER_FRAME, -1)
    model.model.multi_modal_projector = projector
    words, told = _words(model, processor), _told(clips)
    end = model.get_input_embeddings().weight[_ids(processor, "\n")].mean(0).expand(len(clips), 1, -1)
    wanted = torch.cat([torch.stack([words[kind][told[:, kind]] for kind in range(3)], dim=1), end], dim=1)
    num_trained = len(clips) - max(1, int(_HELD_OUT_SHARE * len(clips)))
    scale = wanted.std()
    projector.requires_grad_(True)
    stepper = _stepper(projector.parameters(), settings.projector_learning_rate, settings.projector_steps, settings)
    for _ in tqdm(range(settings.projector_steps), desc="aligning: projector", unit="step"):
        drawn = torch.from_numpy(rng.integers(0, num_trained, size=settings.projector_frames))
        said = projector(seen[drawn])
        choices = [
            F.cross_entropy(_COSINE_SCALE * _cosines(said[:, kind], words[kind]), told[drawn, kind])
            for kind in range(3)
        ]
        stepper.step(((said - wanted[drawn]) / scale).square().mean() + sum(choices))
    projector.requires_grad_(False)
    with torch.no_grad():
        said = projector(seen[num_trained:])
    hits = [_cosines(said[:, kind], words[kind]).argmax(1) == told[num_trained:, kind] for kind in range(3)]
    wall, frame, colour = (hit.float().mean().item() for hit in hits)
    return wall, frame, colour


def _train_adapters(
    model: InternVLForConditionalGeneration,
    processor: InternVLProcessor,
    features: Tensor,
    clips: Sequence[WorldClip],
    rng: np.random.Generator,
    settings: AlignmentSettings,
) -> list[float]:
    """Trains what of the model has gradients on questions about one clip and two; returns the losses."""
    coder, pairs = TextCoder(processor), PairSampler(clips, rng)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = _stepper(trained, settings.learning_rate, settings.steps, settings)
    model.train()
    for number in tqdm(range(settings.steps), desc="aligning: adapters", unit="step"):
        rows, seen = [], []
        for _ in range(settings.videos):
            if number % settings.single_every == 0:
                indices = [int(rng.integers(0, len(clips)))]
                clip = clips[indices[0]]
                asked = [ask_one(clip, SENTENCES), ask_for_caption(clip, SENTENCES)]
            else:
                indices = pairs.draw(settings.hard_share)
                first, second = (clips[index] for index in indices)
                asked = [(text, answer) for _, text, answer in ask_two(first, second, True, rng, SENTENCES)]
            for question, answer in asked:
                rows.append((coder.prompt_ids(len(indices), question), coder.answer_ids(answer)))
                seen.append(features[indices])
        # Weights stay in float32; matrix products take half the time where a CPU computes in bfloat16.
        with torch.autocast("cpu", torch.bfloat16, enabled=is_computed(torch.bfloat16)):
            losses = answer_losses(model, rows, torch.stack(seen))
        stepper.step(torch.cat(losses).float().mean())
    return stepper.losses


def _stepper(
    parameters: Iterable[nn.Parameter], learning_rate: float, steps: int, settings: AlignmentSettings
) -> Stepper:
    given = replace(
        PretrainingSettings(), learning_rate=learning_rate, warmup_steps=settings.warmup_steps, weight_decay=0.0
    )
    stepper = Stepper(parameters, given)
    stepper.decay(settings.warmup_steps, steps)
    return stepper


def _words(model: InternVLForConditionalGeneration, processor: InternVLProcessor) -> list[Tensor]:
    """Embeddings of the names of walls, frames and colours, float `[8, hidden]` each."""
    weight = model.get_input_embeddings().weight.detach()
    palettes = (WALL_COLOURS, FRAME_COLOURS, SHAPE_COLOURS)
    return [torch.stack([weight[_ids(processor, f" {name}")].mean(0) for name in names]) for names in palettes]


def _told(clips: Sequence[WorldClip]) -> Tensor:
    """Which wall, frame and colour each clip has: `[len(clips), 3]`."""
    places = [
        {name: place for place, name in enumerate(names)} for names in (WALL_COLOURS, FRAME_COLOURS, SHAPE_COLOURS)
    ]
    return torch.tensor([[places[0][c.wall], places[1][c.frame], places[2][c.colour]] for c in clips])


def _cosines(said: Tensor, words: Tensor) -> Tensor:
    return F.normalize(said, dim=-1) @ F.normalize(words, dim=-1).T


def _ids(processor: InternVLProcessor, text: str) -> list[int]:
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else value
