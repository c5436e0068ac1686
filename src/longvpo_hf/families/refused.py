"""Models that are known and cannot be used, each with its reason.

What is not listed here and is of no family is tried at the door (`encoding.py`) and refused with what went wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Refused:
    """A kind of model that is refused by name.

    Args:
        model_type: `config.model_type`.
        processor: Class name of its processor; "" where transformers has none, or a family has the same.
        reason: What is in the way, and what to use instead if anything. Goes on after "cannot be used:".
    """

    model_type: str
    processor: str
    reason: str


_UNTRIED = (
    "no test of this package runs it, so it is not known whether it would be trained on the right times and positions"
)
_INDEXED = (
    "its layers attend to tokens that an index over the whole sequence chooses, and no test of this package runs it"
)
_SLICED = (
    "its processor lays the patches of all frames side by side along the last axis and cuts frames into slices, so "
    "that the videos of a batch cannot be joined"
)
_OWN_CODE = "these weights run with their repository's own code only, which is never run here"

REFUSED = (
    Refused(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeProcessor",
        "its experts are chosen by one more number for each token (moe_mm_token_type_ids), which answers would lack, "
        "and its processor draws times onto the frames",
    ),
    Refused(
        "kimi_k25",
        "Kimi_K25Processor",
        "in transformers 5.23 it fails on videos whose number of frames is no multiple of four",
    ),
    Refused("minicpmv4_6", "MiniCPMV4_6Processor", _SLICED),
    Refused("minicpmv4_7", "MiniCPMV4_7Processor", _SLICED),
    Refused("minicpm_ocr", "MiniCPMOcrProcessor", _SLICED),
    Refused(
        "minimax_m3_vl",
        "MiniMaxM3VLProcessor",
        "its processor has a size that reads like one tile, and scales frames to bounds of its own",
    ),
    Refused(
        "qwen2_5_omni",
        "",
        "it speaks too, and only its thinker is trained here: save that alone, with the processor beside it, by "
        "Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(…).save_pretrained(…)",
    ),
    Refused(
        "diffusion_gemma",
        "",
        "it writes an answer by diffusion and not token after token, so that answers have no log-probabilities",
    ),
    Refused(
        "instructblipvideo",
        "InstructBlipVideoProcessor",
        "its Q-Former reads a question together with the frames, so that questions cannot share a video",
    ),
    Refused(
        "video_llava",
        "VideoLlavaProcessor",
        "its processor cuts the sides of frames off, and no test of this package runs it in another way",
    ),
    Refused(
        "nemotron_h_omni",
        "NemotronH_Omni_Reasoning_V3Processor",
        "its processor writes a video with the tokens of pictures, and no test of this package runs it",
    ),
    Refused("dots3_note", "Dots3NoteProcessor", _INDEXED),
    Refused("glm5_next", "Glm5NextProcessor", _INDEXED),
    Refused("qwen4_exp", "", _INDEXED),
    Refused("cohere_compass", "CohereCompassProcessor", _UNTRIED),
    Refused(
        "cosmos3_edge",
        "Cosmos3EdgeProcessor",
        "in transformers 5.23 its processor fails on a video whose metadata it is not told to return (KeyError: "
        "'video_metadata'), and no test of this package runs it in another way",
    ),
    Refused("gemma4_unified", "Gemma4UnifiedProcessor", _UNTRIED),
    Refused(
        "glmga",
        "",
        "its video processor rounds the sides of frames to a multiple (patch_expand_factor) that the model's config "
        "does not tell, so that the tokens of a frame are not known",
    ),
    Refused(
        "hyperclovax_vision_v2",
        "HyperCLOVAXVisionV2Processor",
        "its prompts tell a video's duration by a mark of its own (<|video_duration|>), which its processor fills in "
        "for the first prompt of a video alone",
    ),
    Refused("muse_glimmer", "MuseGlimmerProcessor", _UNTRIED),
    Refused("muse_spark", "MuseSparkProcessor", _UNTRIED),
    Refused(
        "qwen3_omni_moe",
        "",
        "it speaks too, and only its thinker is trained here: save that alone, with the processor beside it, by "
        "Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(…).save_pretrained(…)",
    ),
    Refused(
        "llava_qwen",
        "",
        f"{_OWN_CODE} (LongVA, LLaVA-Video, LLaVA-OneVision as first released): use a conversion to a class of "
        "transformers, such as LLaVA-Video's to llava_onevision; for LongVA none is known, see docs/families.md",
    ),
    Refused(
        "internvl_chat",
        "",
        f"{_OWN_CODE} (InternVL and InternVideo2.5 as first released): use the repository that ends in -hf; for "
        "InternVideo2.5 there is none, see docs/families.md",
    ),
    Refused(
        "videollama3_qwen2",
        "",
        f"{_OWN_CODE} (VideoLLaMA3 as first released): use a repository of model type video_llama_3",
    ),
)


def refusal(source: Any) -> str | None:
    """Why a model cannot be used, as one sentence; None where it is not listed.

    Args:
        source: Its config, its processor, or its `model_type`.
    """
    model_type = source if isinstance(source, str) else getattr(source, "model_type", None)
    classes = {ancestor.__name__ for ancestor in type(source).__mro__}
    for refused in REFUSED:
        if refused.model_type == model_type or (refused.processor and refused.processor in classes):
            return f"Models of type {refused.model_type} cannot be used: {refused.reason}."
    return None
