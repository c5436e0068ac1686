"""The class of all tasks for lmms-eval: questions of a `Suite` as it asks and scores them.

A task's YAML, which `task_files.py` writes, names the suite under `metadata`. Unlike in lmms-eval's own tasks nothing
is downloaded or unpacked unasked, an error is raised instead of retried into a `RetryError`, and media are looked for
under the data root.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from datasets import DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask

from longvpo_hf.evaluation import scoring
from longvpo_hf.evaluation.preflight import check
from longvpo_hf.evaluation.subtitles import read_srt
from longvpo_hf.evaluation.suite import Question, Suite, data_root
from longvpo_hf.evaluation.suites import suites

#: Metrics that are better the lower they are.
_SHARES = ("unparsed", "cut_off")


class MultipleChoice(ConfigurableMessagesTask):
    """A suite, or one subset of it (`dataset_name`), as a task.

    Args:
        config: The task's YAML.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.suite = suites()[config["metadata"]["suite"]]
        self.root = data_root()
        self.subset: str = config.get("dataset_name") or ""
        metrics: dict[str, Callable[..., float]] = {
            "score": scoring.mean,
            "official": partial(_of_records, scoring.official, self.suite),
            "unparsed": fmean,
            "cut_off": fmean,
        }
        if not self.subset:
            metrics |= {f"score_{group}": scoring.mean for group in self.suite.groups}
        if self.suite.headline != "overall":
            metrics[self.suite.headline] = partial(_of_records, scoring.headline, self.suite)
        super().__init__(
            config={
                "dataset_path": self.suite.dataset,
                "test_split": self.suite.split,
                "output_type": "generate_until",
                "generation_kwargs": {
                    "max_new_tokens": self.suite.max_new_tokens,
                    "do_sample": False,
                    "until": [],
                },
                "process_results": self.process_results,
                "cluster_key": "video",
                "metric_list": [
                    {"metric": name, "aggregation": metric, "higher_is_better": name not in _SHARES}
                    for name, metric in metrics.items()
                ],
                **{key: value for key, value in config.items() if key != "class"},
            }
        )

    def download(self, dataset_kwargs: object = None) -> None:
        """Loads the rows, once all is there that the task needs; the name is lmms-eval's."""
        check([replace(self.suite, subsets=(self.subset,)) if self.subset else self.suite], self.root)
        rows = self.suite.rows(self.root, self.subset)
        self.dataset = self.dataset_no_image = DatasetDict({self.suite.split: rows})

    def question(self, doc: Mapping[str, Any]) -> Question:
        """What a row asks."""
        return self.suite.question(doc, self.subset)

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """The question without its subtitles."""
        return self.question(doc).text

    def doc_to_target(self, doc: Mapping[str, Any]) -> str:
        """The right letter."""
        return self.question(doc).answer

    def doc_to_visual(self, doc: Mapping[str, Any]) -> list[str]:
        """The path of the video."""
        question = self.question(doc)
        path = self.suite.locate(self.root, *question.videos)
        if path is None:
            raise FileNotFoundError(f"{self.config.task}: {self.root / question.videos[0]} is missing.")
        return [str(path)]

    def doc_to_messages(self, doc: Mapping[str, Any], **_: Any) -> list[dict[str, Any]]:
        """One turn of the user: the video, its subtitles where the benchmark has them, the question.

        The part with the subtitles holds all of them as its text, for models that take any text, and as
        `subtitles` with their times, for those that show the ones of the frames they sample.
        """
        question = self.question(doc)
        content: list[dict[str, Any]] = [{"type": "video", "url": path} for path in self.doc_to_visual(doc)]
        if question.subtitles:
            path = self.suite.locate(self.root, question.subtitles)
            subtitles = read_srt(path) if path else []
            content += [
                {"type": "text", "text": "This video's subtitles are listed below: \n"},
                {"type": "text", "text": "\n".join(line.text for line in subtitles), "subtitles": subtitles},
                {"type": "text", "text": "\n"},
            ]
        content.append({"type": "text", "text": question.text})
        return [{"role": "user", "content": content}]

    def process_results(
        self, doc: Mapping[str, Any], results: Sequence[str], full_docs: object = None
    ) -> dict[str, Any]:
        """What one answer adds to each metric: to a group's score nothing unless it is of the group.

        lmms-eval computes standard errors of numbers and of the key `score`; `official` and the suite's own headline
        have none.
        """
        question = self.question(doc)
        record = scoring.record(self.suite, results[0], question)
        metrics = {
            "score": record,
            "official": {"record": record},
            "unparsed": scoring.unparsed([record]),
            "cut_off": scoring.cut_off([record]),
            f"score_{question.group}": record,
            self.suite.headline: {"record": record},
        }
        return {name: value for name, value in metrics.items() if name in self.aggregation()}


def _of_records(
    score: Callable[[Suite, Sequence[scoring.Record]], float],
    suite: Suite,
    items: Sequence[Mapping[str, scoring.Record]],
) -> float:
    return score(suite, [item["record"] for item in items])
