"""MVBench (arXiv 2311.17005): 20 tasks about short videos; its score is the mean of theirs."""

from __future__ import annotations

from longvpo_hf.evaluation.official import by_first_word
from longvpo_hf.evaluation.scoring import by_group
from longvpo_hf.evaluation.suite import LETTERS, Question, Row, Suite

_FOLDERS = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}


def _read(row: Row, subset: str) -> Question:
    candidates, answer = row.options("candidates"), row.word("answer")
    options = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, candidates, strict=False))
    folder = _FOLDERS[subset]
    # A video may also be in data0613, as lmms-eval intends.
    folders = [folder, *([f"data0613/{folder}"] if folder.startswith(("clevrer/", "star/")) else [])]
    return Question(
        text=f"Question:{row.text('question')}\nOption:\n{options}Only give the best option.\n",
        letters=LETTERS[: len(candidates)],
        answer=LETTERS[candidates.index(answer)] if answer in candidates else "",
        videos=tuple(f"mvbench_video/{each}/{row.text('video')}" for each in folders),
        group=subset,
    )


SUITES = (
    Suite(
        name="mvbench",
        title="MVBench",
        dataset="OpenGVLab/MVBench",
        split="train",
        read=_read,
        media="mvbench_video",
        unpack="cp -rn {archives}/. {media}",
        official=by_first_word,
        units=by_group,
        revision="video",
        subsets=tuple(_FOLDERS),
        groups=tuple(_FOLDERS),
    ),
)
