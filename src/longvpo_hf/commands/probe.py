"""`longvpo probe`: whether a model understands long videos, by needles and by position."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from cyclopts.validators import Number

from longvpo_hf.commands.cli import (
    ConfigFile,
    WholeNumbers,
    checked_by,
    decoded,
    flat,
    new_app,
    options_of_file,
    resumable,
    whole_numbers,
)
from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ConfigError

if TYPE_CHECKING:
    from longvpo_hf.evaluation.probes import Filler, ProbeQuestion
    from longvpo_hf.responders import Responder

app = new_app("probe", "Shows whether a model understands long videos.", config=options_of_file)

_AROUND, _MODEL = Group("What stands around", sort_key=1), Group("Model", sort_key=2)


@dataclass(frozen=True, slots=True)
class AskedModel:
    """How the model is asked.

    Args:
        max_pixels: Larger frames are scaled down. None: as in training, if the card says it.
        batch_size: Questions in one call, as long as they fit in memory.
        max_new_tokens: Bound on an answer. None: 16, and 16384 for models that reason before they answer.
        decoding: How answers are decoded.
    """

    max_pixels: PositiveInt | None = None
    batch_size: PositiveInt = 1
    max_new_tokens: PositiveInt | None = None
    decoding: Annotated[Decoding, decoded(_MODEL)] = GREEDY

    def load(self, checkpoint: str, num_frames: int) -> tuple[Responder, dict[str, Any]]:
        """The checkpoint as a responder, and what its answers depend on."""
        from longvpo_hf.evaluation.sampling import trained_sampling
        from longvpo_hf.record import Sampling
        from longvpo_hf.responders.checkpoint import checkpoint_digest, load_responder

        max_pixels = self.max_pixels
        if max_pixels is None:
            max_pixels = (trained_sampling(checkpoint) or Sampling()).max_pixels
        responder = load_responder(
            checkpoint, num_frames, max_pixels, self.batch_size, self.max_new_tokens, self.decoding
        )
        return responder, {
            "weights": checkpoint_digest(checkpoint),
            "max_pixels": max_pixels,
            "max_new_tokens": responder.max_new_tokens,
            "decoding": asdict(self.decoding),
            "dtype": str(responder.model.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What stands around the clips that are asked about.

    Args:
        haystack: Any video; its frames stand around the clips. None: other clips of the world, or black frames.
        world: A miniature's world, for a miniature's model: <demo>/world/evaluation.
        seed: Draws questions and places.
    """

    haystack: Path | None = None
    world: Path | None = None
    seed: NonNegativeInt = 0


def _check_model(checkpoint: str) -> None:
    """Makes sure that the model is there before videos are made for it."""
    from longvpo_hf.hub import go_offline_if_unreachable
    from longvpo_hf.responders.checkpoint import check_checkpoint

    go_offline_if_unreachable([checkpoint])
    check_checkpoint(checkpoint)


def _check_needle(
    checkpoint: str,
    /,
    *,
    needle: Path | None = None,
    question: str | None = None,
    answer: str | None = None,
    option: list[str] | None = None,
    needle_frames: int | None = None,
    needles: Path | None = None,
    number: int | None = None,
    around: Surroundings = Surroundings(),
    **_: object,
) -> None:
    if needle is not None and needles is not None:
        raise ConfigError("--needle and --needles exclude each other; give one of them.")
    if needle is None and (question is not None or answer is not None or option):
        raise ConfigError("--question, --answer and --option are about a --needle; name it.")
    if needle is not None and (question is None or answer is None):
        raise ConfigError("--needle needs --question and --answer.")
    given = needle or needles
    if given is None and needle_frames is not None:
        raise ConfigError("--needle-frames is about a video of your own: give --needle or --needles too.")
    _check_given(given, number, around)
    if given is not None and around.haystack is None:
        raise ConfigError("A needle of your own needs a --haystack: any long video.")


@app.command
@checked_by(_check_needle)
@resumable
def needle(
    checkpoint: str,
    /,
    *,
    frames: WholeNumbers = "64,256,1024",
    depths: PositiveInt = 10,
    needle: Path | None = None,
    question: str | None = None,
    answer: str | None = None,
    option: list[str] | None = None,
    needle_frames: PositiveInt | None = None,
    needles: Path | None = None,
    number: PositiveInt | None = None,
    around: Annotated[Surroundings, flat(_AROUND)] = Surroundings(),
    model: Annotated[AskedModel, flat(_MODEL)] = AskedModel(),
    output: Path = Path("runs/needle"),
    config: ConfigFile = None,
) -> None:
    """Needle in a haystack: right answers by number of frames and depth, as a heat map and JSON.

    Without a needle, clips of the miniature's world are hidden and asked about in plain English; without a haystack,
    among other clips of that world. The same command goes on where it was stopped.

    Args:
        checkpoint: A model or a LoRA adapter: a folder or a name on the Hub.
        frames: Lengths of the video in frames.
        depths: Places of the needle, from the start to the end.
        needle: A picture or video to hide, with --question and --answer.
        question: What is asked about the needle.
        answer: The right answer: an option, its letter, or a text.
        option: An option of the question; give each of them.
        needle_frames: Frames of a needle that is a video. None: 1.
        needles: In place of --needle, JSON lines: video, question, answer and perhaps options.
        number: Questions drawn of the world, where no others are given. None: 10.
        output: Folder of the results.
    """
    lengths = whole_numbers(frames)
    questions = None
    _check_model(checkpoint)
    from longvpo_hf.evaluation.probes import make_question, read_questions

    if needle is not None:
        media = output / "media"
        questions = [make_question(needle, question or "", answer or "", option or (), needle_frames or 1, media)]
    elif needles is not None:
        questions = read_questions(needles, needle_frames or 1, output / "media")
    questions, filler = _asked(questions, around, number or 10, max(lengths), output)

    from longvpo_hf.evaluation.needle import probe_needle

    responder, facts = model.load(checkpoint, max(lengths))
    result = probe_needle(responder, questions, filler, lengths, depths, output, facts)
    if result["stopped"] is not None:
        print(f"Stopped at {result['stopped']['frames']} frames: {result['stopped']['reason']}")
    cells = result["cells"]
    _warn_of_cut_offs(sum(cell["cut_off"] for cell in cells) / max(1, sum(cell["number"] for cell in cells)))
    _say_protocol(result)
    print(f"Heat map: {output / 'needle.png'}, numbers: {output / 'needle.json'}")


def _check_position(
    checkpoint: str,
    /,
    *,
    questions: Path | None = None,
    video_frames: int | None = None,
    distractors: bool = False,
    number: int | None = None,
    around: Surroundings = Surroundings(),
    **_: object,
) -> None:
    if questions is None and video_frames is not None:
        raise ConfigError("--video-frames is about videos of your own: give --questions too.")
    if distractors and (around.haystack is not None or questions is not None):
        raise ConfigError("--distractors are clips of the world: give neither --haystack nor --questions with it.")
    _check_given(questions, number, around)


def _check_given(questions: Path | None, number: int | None, around: Surroundings) -> None:
    if questions is not None and number is not None:
        raise ConfigError(f"--number is of questions drawn of the world, and {questions} has its own: leave it out.")
    if questions is not None and around.world is not None:
        raise ConfigError("--world has questions of its own; leave it out, or the other questions.")


@app.command
@checked_by(_check_position)
@resumable
def position(
    checkpoint: str,
    /,
    *,
    questions: Path | None = None,
    video_frames: PositiveInt | None = None,
    frames: Annotated[int, Parameter(validator=Number(gte=2))] = 100,
    placements: PositiveInt = 4,
    distractors: bool = False,
    number: PositiveInt | None = None,
    around: Annotated[Surroundings, flat(_AROUND)] = Surroundings(),
    model: Annotated[AskedModel, flat(_MODEL)] = AskedModel(),
    output: Path = Path("runs/position"),
    config: ConfigFile = None,
) -> None:
    """Position bias: accuracy against a short video's distance to the question, with the upper bound and the dip.

    The short video stands among black frames, or among those of --haystack. Without questions, clips of the miniature's
    world are asked about in plain English. The same command goes on where it was stopped.

    Args:
        checkpoint: A model or a LoRA adapter: a folder or a name on the Hub.
        questions: Short videos, JSON lines: video, question, answer and perhaps options.
        video_frames: Frames of each short video. None: 8.
        frames: Frames in all; the paper has 10 × 10 and 12 × 12.
        placements: Random places for each question.
        distractors: Other clips of the world instead of black frames.
        number: Questions drawn of the world, where no others are given. None: 100.
        output: Folder of the results.
    """
    _check_model(checkpoint)
    from longvpo_hf.evaluation.probes import BlankFiller, read_questions

    given = None if questions is None else read_questions(questions, video_frames or 8, output / "media")
    black = BlankFiller(output / "media") if around.haystack is None and not distractors else None
    asked, filler = _asked(given, around, number or 100, frames, output, black)

    from longvpo_hf.evaluation.position import probe_position

    responder, facts = model.load(checkpoint, frames)
    result = probe_position(responder, asked, filler, frames, placements, output, around.seed, facts)
    upper, dip = result["upper_bound"], result["dip"]
    middle = f"{dip['percent']:.1f} points {dip['band_95']}" if dip["percent"] is not None else "not measured"
    print(f"Video alone {upper['percent']:.1f} %, dip in the middle: {middle}")
    _warn_of_cut_offs(result["cut_off_percent"] / 100)
    _say_protocol(result)
    print(f"Curve: {output / 'position.png'}, numbers: {output / 'position.json'}")


def _say_protocol(result: dict[str, Any]) -> None:
    from longvpo_hf.evaluation.protocol import Protocol

    protocol = Protocol.from_json(result["protocol"])
    print(f"protocol {protocol.hash}: {protocol.line}")


def _warn_of_cut_offs(share: float) -> None:
    if share:
        print(f"{share:.0%} of the answers ended inside their reasoning and count as wrong: raise --max-new-tokens.")


def _asked(
    questions: list[ProbeQuestion] | None,
    around: Surroundings,
    number: int,
    num_frames: int,
    output: Path,
    filler: Filler | None = None,
) -> tuple[list[ProbeQuestion], Filler]:
    """What a probe asks, and among what: as given, and else of a miniature's world."""
    from longvpo_hf.evaluation.probes import VideoFiller
    from longvpo_hf.miniature.language import language_of
    from longvpo_hf.miniature.probes import WorldFiller, clips_needed, world_questions
    from longvpo_hf.miniature.world import TRUTH_FILE, read_world, write_world

    haystack, world, seed = around.haystack, around.world, around.seed
    if haystack is not None:
        filler = VideoFiller(haystack)
    if questions is not None:
        assert filler is not None, "questions of one's own stand among black frames or those of a haystack"
        return questions, filler
    if world is not None:
        clips = read_world(world)
    else:
        # Of one size however many frames are asked for, so that longer videos can be added to a finished probe.
        num_clips = max(2048, clips_needed(num_frames))
        folder = output / "media" / f"world-{num_clips}-{seed}"
        clips = read_world(folder) if (folder / TRUTH_FILE).is_file() else write_world(folder, num_clips, seed)
    per_clip = {} if haystack is None else {"frames_per_clip": 1}  # a film's clips are one frame each
    questions = world_questions(clips, number, seed, language=None if world is None else language_of(world), **per_clip)
    return questions, filler or WorldFiller(clips, seed)
