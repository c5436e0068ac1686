"""All rows of a dataset are looked over before a run: what would end it hours later is said at once, with counts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longvpo_hf.errors import ConfigError, DatasetError, ModelError
from longvpo_hf.families import context_tokens, family_of, model_config
from longvpo_hf.families.positions import check_placeholders
from longvpo_hf.preference import ROW_PROBLEMS, RowError, VideoPreference, undecoded
from longvpo_hf.reasoning import TAG
from longvpo_hf.training.collator import VideoPreferenceCollator
from longvpo_hf.training.config import LongVPOConfig, OnBadRow

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

#: Why a row cannot be trained on with a model and settings, beside `preference.ROW_PROBLEMS`.
RUN_PROBLEMS = {
    "no_anchor": "reference='anchor' needs reference or evidence clips, and the row names none",
    "no_rejected_view": "view_preference_rejected needs evidence clips and others beside, or two whose order matters",
    "too_many_clips": "the frame budget has not one frame for each clip",
    "chat_template": "the model's chat template or tokenizer cannot make a prompt and an answer of the texts",
    "too_long": "the prompt and the longer answer have more tokens than the model's context or max_length",
}
_PROBLEMS = {**ROW_PROBLEMS, **RUN_PROBLEMS}
#: Of a stream, looked over before training, when nothing is lost yet; the others as they come.
_FIRST_ROWS = 256
_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 300
_MEND = "Mend or drop such rows, change the settings, or leave them out with on_bad_row='skip'."
#: More than a chat template writes around a message.
_TEMPLATE_TOKENS = 64
#: Of an answer, what its tokenizer could merge with the prompt's end.
_START_CHARACTERS = 12


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Rows that cannot be trained on for one reason.

    Args:
        kind: A key of `preference.ROW_PROBLEMS` or `RUN_PROBLEMS`.
        rows: Numbers of the rows, ascending, from 0.
        examples: What is wrong with the first of them.
    """

    kind: str
    rows: tuple[int, ...]
    examples: tuple[str, ...]

    def __str__(self) -> str:
        first = "".join(f"\n    row {row}: {example}" for row, example in zip(self.rows, self.examples, strict=False))
        return f"{len(self.rows)} {self.kind} ({_PROBLEMS[self.kind]}){first}"


@dataclass(frozen=True, slots=True)
class RowCheck:
    """What was found wrong with the rows of a dataset.

    Args:
        num_rows: Rows that were looked at.
        problems: By kind, the most frequent first; a row is in one of them at most.
    """

    num_rows: int
    problems: tuple[RowProblem, ...]

    @property
    def bad_rows(self) -> tuple[int, ...]:
        """Numbers of the rows that cannot be trained on, ascending."""
        return tuple(sorted(row for problem in self.problems for row in problem.rows))

    def __str__(self) -> str:
        if not self.problems:
            return f"All {self.num_rows} rows can be trained on."
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        return f"{len(self.bad_rows)} of {self.num_rows} rows cannot be trained on:{lines}"


def check_rows(
    rows: Dataset | IterableDataset,
    collator: VideoPreferenceCollator | None = None,
    config: PreTrainedConfig | None = None,
) -> RowCheck:
    """Looks over all rows of a dataset; no video is opened.

    Args:
        rows: Rows with clips; a stream is read to its end.
        collator: The run's, with the model's processor; None leaves out what depends on a model and settings.
        config: The model's; None counts a video as one token per pair of frames when lengths are bounded.
    """
    from tqdm.auto import tqdm

    checks = _Checks(collator, config)
    found: dict[str, tuple[list[int], list[str]]] = {}
    number = -1
    for number, row in enumerate(tqdm(undecoded(rows), desc="checking rows", unit="row", leave=False)):
        problem = checks(row)
        if problem is not None:
            kind, detail = problem
            numbers, examples = found.setdefault(kind, ([], []))
            numbers.append(number)
            if len(examples) < _EXAMPLES:
                examples.append(detail if len(detail) <= _EXAMPLE_CHARACTERS else f"{detail[:_EXAMPLE_CHARACTERS]}…")
    ranked = sorted(found.items(), key=lambda item: -len(item[1][0]))
    return RowCheck(number + 1, tuple(RowProblem(kind, tuple(nums), tuple(texts)) for kind, (nums, texts) in ranked))


def look_over(model: Any, args: LongVPOConfig, collator: Any, train: Any, evaluation: Any) -> tuple[Any, Any]:
    """The rows of a run, undecoded, without those that cannot be trained on.

    Args:
        model: The model, or its name or path.
        args: Settings of the run; `on_bad_row` decides what happens.
        collator: The run's. With a collator of another kind, rows are returned unchecked.
        train: Rows to train on. The first of a stream are looked over, and each again when it comes.
        evaluation: Rows to evaluate on, several datasets by name, or None.

    Raises:
        DatasetError: With all problems of a dataset at once if there is one and `on_bad_row="raise"`, or if no row of
            it is left.
        ConfigError: If the collator's processor is not the model's.
    """
    if not isinstance(collator, VideoPreferenceCollator):
        return undecoded(train), evaluation
    revision = (args.model_init_kwargs or {}).get("revision") or "main"
    config = model_config(model, revision) if isinstance(model, str) else model.config
    check_placeholders(collator.encoder.processor, config)
    collator.context_tokens = context_tokens(config)

    def checked(rows: Any, name: str) -> Any:
        return None if rows is None else _trainable(undecoded(rows), name, collator, config, args.on_bad_row)

    if isinstance(evaluation, Mapping):
        held_out: Any = {name: checked(rows, name) for name, rows in evaluation.items()}
    else:
        held_out = checked(evaluation, "evaluation")
    return checked(train, "training"), held_out


def _trainable(rows: Any, name: str, collator: VideoPreferenceCollator, config: Any, on_bad_row: OnBadRow) -> Any:
    from datasets import Dataset, IterableDataset

    is_stream = isinstance(rows, IterableDataset)
    if not isinstance(rows, (Dataset, IterableDataset)):
        return rows
    check = check_rows(rows.take(_FIRST_ROWS) if is_stream else rows, collator, config)
    which = f"The start of the {name} stream" if is_stream else f"The {name} dataset"
    bad = set(check.bad_rows)
    if bad and (on_bad_row == "raise" or len(bad) == check.num_rows):
        raise DatasetError(f"{which}: {check}\n{_MEND}")
    if is_stream:
        return rows.filter(_Sieve(_Checks(collator, config), name, on_bad_row))
    if not bad:
        return rows
    logger.warning(f"on_bad_row='skip': the {name} dataset is used without some rows. {check}")
    return rows.select([number for number in range(len(rows)) if number not in bad])


class _Sieve:
    """Lets those rows of a stream through that can be trained on; the others are logged, or end the run."""

    def __init__(self, checks: _Checks, name: str, on_bad_row: OnBadRow) -> None:
        self._checks = checks
        self._name = name
        self._on_bad_row = on_bad_row

    def __call__(self, row: Mapping[str, Any]) -> bool:
        problem = self._checks(row)
        if problem is None:
            return True
        kind, detail = problem
        said = f"row {row.get('id', '')!r} of the {self._name} stream: {kind} ({_PROBLEMS[kind]}): {detail}"
        said = said if len(said) <= 2 * _EXAMPLE_CHARACTERS else f"{said[: 2 * _EXAMPLE_CHARACTERS]}…"
        if self._on_bad_row == "raise":
            raise DatasetError(f"{said}\n{_MEND}")
        logger.warning(f"on_bad_row='skip': without {said}")
        return False


class _Checks:
    """Says what is wrong with a row, for one model and one run's settings."""

    def __init__(self, collator: VideoPreferenceCollator | None, config: PreTrainedConfig | None) -> None:
        self._collator = collator
        self._tried: set[tuple[str, ...]] = set()
        family = None if config is None else family_of(config)
        is_tiled = family is not None and bool(family.processor) and not family.is_sized_by_frames
        self._shapes = family.frame_shapes(config, 448, 448) if family is not None and is_tiled else None

    def __call__(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """Kind and detail of what is wrong; None if the row can be trained on."""
        try:
            preference = VideoPreference.from_row(row)
        except RowError as error:
            return error.kind, str(error)
        except (ValueError, TypeError, ArithmeticError) as error:
            return "malformed", str(error)
        return None if self._collator is None else self._of_run(preference, self._collator)

    def _of_run(self, preference: VideoPreference, collator: VideoPreferenceCollator) -> tuple[str, str] | None:
        try:
            view = collator.reference_view(preference)
        except ConfigError as error:
            return "no_anchor", str(error)
        try:
            if collator.rejected is not None:
                collator.rejected_view(preference)
        except ConfigError as error:
            return "no_rejected_view", str(error)
        try:
            seen = [
                collator.sampler.timeline_seconds(preference.timeline),
                collator.reference_sampler.timeline_seconds(preference.timeline, view),
            ]
        except ValueError as error:
            return "too_many_clips", str(error)
        return self._of_texts(preference, collator, self._fewest_tokens(max(map(len, seen))))

    def _of_texts(
        self, preference: VideoPreference, collator: VideoPreferenceCollator, visual: int
    ) -> tuple[str, str] | None:
        """What is wrong with the texts beside a video of at least so many tokens.

        Rendering and tokenizing takes milliseconds, so a row whose texts hold nothing new is not tokenized: no
        control token, no reasoning, no start of an answer that was not tried after such a prompt, and too few bytes to
        be too long.
        """
        bounds = {"max_length": collator.max_length, "the model's context": collator.context_tokens}
        name, bound = min(bounds.items(), key=lambda item: math.inf if item[1] is None else item[1])
        answers = (preference.chosen, preference.rejected)
        roles = tuple(message["role"] for message in preference.prompt)
        texts = "".join([*(message["content"] for message in preference.prompt), *answers])
        starts = {(*roles, answer[:_START_CHARACTERS]) for answer in answers}
        fits = bound is None or len(texts.encode()) + len(roles) * _TEMPLATE_TOKENS + visual <= bound
        is_plain = not TAG.search(texts) and not collator.encoder.holds_control_token(texts)
        if fits and starts <= self._tried and is_plain:
            return None
        try:
            prompt_ids, answer_ids = collator.encoder.encode_texts(preference.prompt, answers)
        except ModelError as error:
            return "chat_template", str(error)
        self._tried |= starts
        tokens = len(prompt_ids) + max(map(len, answer_ids)) - 1 + visual
        if bound is not None and tokens > bound:
            return "too_long", f"at least {tokens} tokens, {visual} of them visual, exceed {name} = {bound}"
        return None

    def _fewest_tokens(self, frames: int) -> int:
        """A bound on a video's tokens that needs no file: where larger frames are more tokens, one for each pair."""
        return -(-frames // 2) if self._shapes is None else self._shapes.visual_tokens(frames)
