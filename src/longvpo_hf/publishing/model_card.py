"""The model card of a training run, and its curve.

Takes the `CardFacts` of a run, or gathers them from its trainer; gives `README.md` with the Hub's YAML, and
`training_curve.png` beside it. The text stands in `model_cards/longvpo.md`. What comes from outside (names of models,
datasets, benchmarks) is escaped wherever the template shows it; of a local path only the last name is told. Knows
nothing of how training works.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from longvpo_hf.public import markdown, public_name
from longvpo_hf.publishing.curves import save_curves
from longvpo_hf.publishing.dataset import LONGVPO_CITATION, citation
from longvpo_hf.shipped import shipped

if TYPE_CHECKING:
    pass

CURVE_FILE = "training_curve.png"

_CURVES = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
_PACKAGES = ("longvpo-hf", "trl", "transformers", "torch", "datasets", "peft", "torchcodec")
_TRL_CITATION = """\
@software{vonwerra2020trl,
    title   = {{TRL: Transformers Reinforcement Learning}},
    author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
               Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
    license = {Apache-2.0},
    url     = {https://github.com/huggingface/trl},
    year    = {2020}
}"""


@dataclass(frozen=True, slots=True)
class Source:
    """A model or dataset that others can find, or that lies on this machine alone.

    Args:
        name: Its name on the Hub, or the last part of its path; empty for a model built from a configuration.
        revision: Commit on the Hub; empty where not known.
        on_hub: Whether `name` is one on the Hub.
    """

    name: str
    revision: str = ""
    on_hub: bool = False

    @classmethod
    def of(cls, name: str, revision: str = "") -> Source:
        """What `from_pretrained` or `load_dataset` would find under `name`."""
        public = public_name(name)
        try:
            validate_repo_id(public)
        except HFValidationError:
            return cls(public)
        return cls(public, revision, on_hub=True) if public == name else cls(public)

    @property
    def load_from(self) -> str:
        """The name as it stands in code."""
        return self.name if self.on_hub else f"path/to/{self.name or 'the/base/model'}"


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a model card tells.

    Args:
        name: Heading.
        load_from: What `from_pretrained` takes.
        base: The model that was trained.
        sampling: `num_frames`, `fps` and `max_pixels` of the policy's `FrameSampler`.
        adapter: Kind of adapter, e.g. `LoRA`; empty where the model itself was trained.
        datasets: What it was trained on, as far as it has a name.
        methods: Names of the methods that made the rows.
        settings: Label and value of each setting, in order; shown as a table.
        licence: The base model's `license`, `license_name`, `license_link`, as far as known.
        log_history: As `TrainerState.log_history`.
        eval_results: Measured after training.
        tags: Beside those every card has.
        runs: Name and address of where the run was logged.
        method_citation: BibTeX of the method of TRL's that was used.
    """

    name: str
    load_from: str
    base: Source
    sampling: Mapping[str, float | None]
    adapter: str = ""
    datasets: tuple[Source, ...] = ()
    methods: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    licence: Mapping[str, str] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, float]] = ()
    eval_results: Sequence[EvalResult] = ()
    tags: tuple[str, ...] = ()
    runs: tuple[tuple[str, str], ...] = ()
    method_citation: str = ""


def write_model_card(folder: Path, facts: CardFacts) -> None:
    """Writes `README.md`, and the training curve where anything was logged, into `folder`.

    The card shows the curve that stands in the folder, also one of an earlier run that logged it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [entry for entry in facts.log_history if "loss" in entry]
    if logs:
        save_curves(facts.log_history, folder / CURVE_FILE)
    _card(facts, logs, (folder / CURVE_FILE).is_file()).save(folder / "README.md")


# ---------------------------------------------------------------------------------------------- the text


class _Verbatim(str):
    """Text the template shows unescaped: made here, not taken from outside."""


def _card(facts: CardFacts, logs: Sequence[Mapping[str, float]], has_curve: bool) -> ModelCard:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, _Verbatim) else markdown(value),
    )
    environment.filters["code"] = _code
    metadata = ModelCardData(
        base_model=facts.base.name if facts.base.on_hub else None,
        base_model_relation=("adapter" if facts.adapter else "finetune") if facts.base.on_hub else None,
        datasets=[source.name for source in facts.datasets if source.on_hub] or None,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="video-text-to-text",
        model_name=facts.name,
        tags=["generated_from_trainer", *facts.tags],
        eval_results=list(facts.eval_results) or None,
    )
    for field_name, value in facts.licence.items():
        metadata[field_name] = value
    text = environment.from_string(shipped("model_cards/longvpo.md").read_text(encoding="utf-8")).render(
        metadata=_Verbatim(metadata.to_yaml()),
        name=facts.name,
        load_from=facts.load_from,
        base=facts.base,
        base_link=_link(facts.base, ""),
        adapter=facts.adapter,
        sampling=facts.sampling,
        settings=[
            *([("method", ", ".join(facts.methods))] if facts.methods else []),
            *[("dataset", _link(source, "datasets/")) for source in facts.datasets],
            *facts.settings,
        ],
        runs=[(label, _Verbatim(url)) for label, url in facts.runs if re.fullmatch(r"https?://[^\s()<>]+", url)],
        curve=_Verbatim(CURVE_FILE) if has_curve else None,
        progress=[
            (label, f"{values[0]:.4g}", f"{values[-1]:.4g}")
            for key, label in _CURVES.items()
            if (values := [entry[key] for entry in logs if key in entry])
        ],
        evaluations=facts.eval_results,
        licence=facts.licence.get("license_name") or facts.licence.get("license"),
        versions=[(package, version(package)) for package in _PACKAGES],
        citations=[
            _Verbatim(entry)
            for entry in dict.fromkeys(
                [LONGVPO_CITATION, *map(citation, facts.methods), facts.method_citation, _TRL_CITATION]
            )
            if entry
        ],
    )
    return ModelCard(text)


def _code(value: object) -> _Verbatim:
    """A Python literal that also leaves the fence around it alone."""
    return _Verbatim(json.dumps(value).replace("`", "\\u0060") if isinstance(value, str) else repr(value))


def _link(source: Source, kind: str) -> _Verbatim:
    """A source as Markdown, with its revision."""
    if not source.on_hub:
        return _Verbatim(f"{markdown(source.name)} (not on the Hub)")
    at = f" at revision [{source.revision[:10]}](https://huggingface.co/{kind}{source.name}/tree/{source.revision})"
    return _Verbatim(
        f"[{markdown(source.name)}](https://huggingface.co/{kind}{source.name})" + (at if source.revision else "")
    )


__all__ = ["CURVE_FILE", "CardFacts", "Source", "write_model_card"]
