"""What the reference model says of rows, computed beforehand and kept with them, and the fingerprints of what for.

Scores, where views are rejected those of the chosen answer on them, and where rows are distilled the likeliest tokens
for each token of the chosen answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from accelerate.logging import get_logger
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher

from longvpo_hf import __version__
from longvpo_hf.artifacts import whole_file
from longvpo_hf.preference import VideoPreference
from longvpo_hf.training.collator import SCORE_COLUMNS, TOP_COLUMNS, VideoPreferenceCollator
from longvpo_hf.training.distillation import TopTokens
from longvpo_hf.training.view_preference import REJECTED_VIEW_COLUMN

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

logger = get_logger(__name__)

#: Column beside `SCORE_COLUMNS`: a hash of everything a row's scores depend on.
FINGERPRINT_COLUMN = "ref_fingerprint"
#: Column beside `TOP_COLUMNS`: the row's fingerprint, how many tokens, and at which temperature.
TOP_FINGERPRINT_COLUMN = "ref_top_fingerprint"
#: Column beside `REJECTED_VIEW_COLUMN`: a hash of everything that this score depends on.
REJECTED_VIEW_FINGERPRINT_COLUMN = "ref_rejected_view_fingerprint"


def reference_fingerprints(
    collator: VideoPreferenceCollator, rows: Sequence[Mapping[str, Any]], model: str, of_rejected_views: bool = False
) -> list[str]:
    """A hash, for each row, of everything its reference scores depend on.

    That is its question and answers; name, size in bytes and span of the clips of the view; the frame budget and
    whether reasoning is dropped; the processor with its tokenizer and chat template; this package's version.

    Args:
        collator: Chooses the view and its frames.
        rows: Preference rows.
        model: Stands for the reference model, and whatever else the scores depend on.
        of_rejected_views: Whether the scores are those on the rejected views; else on the reference views.
    """
    sampler = collator.sampler if of_rejected_views else collator.reference_sampler
    view_of = collator.rejected_view if of_rejected_views else collator.reference_view
    settings: dict[str, Any] = {
        "frames": [sampler.num_frames, sampler.fps, sampler.max_pixels],
        "processor": _processor_hash(collator.encoder.processor),
        "version": __version__,
        "model": model,
    }
    if collator.encoder.answer_reasoning != "keep":
        settings["answer_reasoning"] = collator.encoder.answer_reasoning
    sizes: dict[str, int] = {}
    hashes = []
    for row in rows:
        preference = VideoPreference.from_row(row)
        clips = view_of(preference).of(preference.timeline).clips
        for clip in clips:
            if clip.path not in sizes:
                sizes[clip.path] = os.path.getsize(clip.path) if os.path.isfile(clip.path) else -1
        content = {
            **settings,
            "texts": [*preference.context, preference.question, preference.chosen, preference.rejected],
            "clips": [
                [os.path.basename(clip.path), sizes[clip.path], clip.start_seconds, clip.end_seconds] for clip in clips
            ],
        }
        hashes.append(hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24])
    return hashes


def has_scores(dataset: Dataset, fingerprints: Sequence[str], name: str) -> bool:
    """Whether a dataset holds reference scores with these fingerprints; the log says why it does not.

    Args:
        dataset: Rows, perhaps with `SCORE_COLUMNS` and `FINGERPRINT_COLUMN`.
        fingerprints: Those of the run at hand, in row order.
        name: What the log calls the dataset.
    """
    columns = [column for column in (*SCORE_COLUMNS, FINGERPRINT_COLUMN) if column in dataset.column_names]
    if len(columns) <= len(SCORE_COLUMNS):
        if columns:
            logger.warning(f"The {name} dataset's {', '.join(columns)} do not say what they belong to: computed anew.")
        return False
    stale = sum(mine != stored for mine, stored in zip(fingerprints, dataset[FINGERPRINT_COLUMN], strict=True))
    if stale:
        logger.warning(
            f"{stale} of {len(fingerprints)} rows of the {name} dataset hold reference log-probs of other rows, views, "
            "frame budgets, processors or models (ref_fingerprint differs): all are computed anew."
        )
        return False
    logger.info(f"All {len(fingerprints)} rows of the {name} dataset hold reference log-probs of this run's settings.")
    return True


def score_columns(dataset: Dataset) -> list[str]:
    """The columns that a dataset has of a reference model."""
    of_views = (REJECTED_VIEW_COLUMN, REJECTED_VIEW_FINGERPRINT_COLUMN)
    columns = (*SCORE_COLUMNS, FINGERPRINT_COLUMN, *TOP_COLUMNS, TOP_FINGERPRINT_COLUMN, *of_views)
    return [column for column in columns if column in dataset.column_names]


def has_top_tokens(dataset: Dataset, fingerprints: Sequence[str], name: str) -> bool:
    """Whether a dataset holds the reference's likeliest tokens with these fingerprints; the log says if it does not."""
    other = "the likeliest tokens of another reference, or at another temperature, or another number of them"
    return _holds(
        dataset, TOP_COLUMNS, TOP_FINGERPRINT_COLUMN, fingerprints, f"Rows of the {name} dataset hold {other}"
    )


def has_rejected_view_scores(dataset: Dataset, fingerprints: Sequence[str], name: str) -> bool:
    """Whether a dataset holds scores on rejected views with these fingerprints; the log says if it does not."""
    other = "reference log-probs on other rejected views, or of another reference"
    columns, fingerprint = (REJECTED_VIEW_COLUMN,), REJECTED_VIEW_FINGERPRINT_COLUMN
    return _holds(dataset, columns, fingerprint, fingerprints, f"Rows of the {name} dataset hold {other}")


def _holds(dataset: Dataset, columns: Sequence[str], fingerprint: str, expected: Sequence[str], otherwise: str) -> bool:
    if not {*columns, fingerprint} <= set(dataset.column_names):
        return False
    if list(dataset[fingerprint]) == list(expected):
        return True
    logger.warning(f"{otherwise} ({fingerprint} differs): all are computed anew.")
    return False


class TopTokenWriter:
    """Writes the reference's likeliest tokens into a file, in the order of the rows.

    Args:
        file: Where to; None on processes that do not write.
        accelerator: Of the run.
    """

    def __init__(self, file: IO[bytes] | None, accelerator: Any) -> None:
        kinds = (List(List(Value("int32"))), List(List(Value("float32"))), List(Value("float32")))
        features = Features(dict(zip(TOP_COLUMNS, kinds, strict=True)))
        self._accelerator = accelerator
        self._writer = None if file is None else ArrowWriter(features=features, stream=file)

    def add(self, top: TopTokens, kept: Sequence[int], num_rows: int, is_counted: bool) -> None:
        """Adds a batch of all processes; rows that were left out have no tokens.

        Args:
            top: Of this process's rows.
            kept: Which of its rows they are.
            num_rows: Of its batch.
            is_counted: Whether it speaks for the batch: of processes that share one, the first does.
        """
        rows: list[Any] = [([], [], [])] * num_rows
        for place, *fields in zip(kept, top.tokens, top.log_probs, top.own, strict=False):
            rows[place] = tuple(field.tolist() for field in fields)
        everyone = self._accelerator.gather_for_metrics(rows if is_counted else [], use_gather_object=True)
        if self._writer is not None:
            self._writer.write_batch(dict(zip(TOP_COLUMNS, map(list, zip(*everyone, strict=True)), strict=True)))

    def finish(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.finalize(close_stream=False)


@contextmanager
def top_token_file(dataset: Dataset, model_hash: Any, accelerator: Any) -> Iterator[tuple[Path, TopTokenWriter | None]]:
    """The file of the reference's likeliest tokens in a dataset's cache, and what writes it while scores are computed.

    Args:
        dataset: Rows without what a reference said.
        model_hash: Under which TRL caches their scores.
        accelerator: Of the run.

    Yields:
        The file, whole when the block ends, and its writer; None where the file is there already.
    """
    scores, tokens = (
        Path(dataset._get_cache_file_path(Hasher.hash((dataset._fingerprint, model_hash, *more))))
        for more in ((), TOP_COLUMNS)
    )
    if tokens.exists():
        yield tokens, None
        return
    with whole_file(tokens) if accelerator.is_main_process else nullcontext() as file:
        if accelerator.is_main_process:
            scores.unlink(missing_ok=True)  # of a run that was killed between the two files
        accelerator.wait_for_everyone()
        writer = TopTokenWriter(file, accelerator)
        yield tokens, writer
        writer.finish()
    accelerator.wait_for_everyone()


def config_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """A model's config without what does not change a score: where it came from and who wrote it."""
    facts = config.to_dict()
    return {name: value for name, value in facts.items() if name not in ("_name_or_path", "transformers_version")}


def _processor_hash(processor: ProcessorMixin) -> str:
    """A hash of everything the processor writes when it is saved: settings, tokenizer, chat template."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
