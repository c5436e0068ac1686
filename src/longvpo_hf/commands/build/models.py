"""The models of a build, each loaded once, however many roles it has."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from longvpo_hf.commands.build.options import (
    FPS,
    FRAMES,
    MAX_PIXELS,
    JudgeSettings,
    ModelSettings,
    WriterSettings,
    is_asked_elsewhere,
)
from longvpo_hf.errors import ModelError

if TYPE_CHECKING:
    from longvpo_hf.building.executors import Executor
    from longvpo_hf.responders import Responder


class Models:
    """Gives models by name.

    Args:
        settings: How they are asked.
        num_frames: Most frames one call is shown.
        seed: For endpoints.
        executor: Who asks them. Workers of a cluster load models themselves.
    """

    def __init__(self, settings: ModelSettings, num_frames: int, seed: int, executor: Executor | None = None) -> None:
        self._settings = settings
        self._seed = seed
        self._num_frames = num_frames
        self._executor = executor
        from longvpo_hf.frames import FrameSampler

        self._sampler = FrameSampler(max(FRAMES, num_frames), fps=FPS, max_pixels=MAX_PIXELS)
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._made: dict[tuple[str, int], Responder] = {}

    def seeing(self, name: str) -> Responder:
        """The model that is shown frames: answers, captions."""
        return self._responder(name, self._settings.max_new_tokens)

    def reading(self, name: str) -> Responder:
        """The model that reads captions: writes questions, sums up, judges. May be a language model."""
        settings = self._settings
        most = settings.writer_max_new_tokens if isinstance(settings, WriterSettings) else settings.max_new_tokens
        return self._responder(name, most)

    def judging(self, name: str, sees_video: bool = False) -> Responder:
        """The model that says yes or no, read by its words or by probability; it is shown frames, or reads captions."""
        judge = self.seeing(name) if sees_video else self.reading(name)
        assert isinstance(self._settings, JudgeSettings)
        yes_from = self._settings.judge_yes_from
        if yes_from is None:
            return judge
        from longvpo_hf.building.judging import ByProbability

        return ByProbability(judge, yes_from)

    def _responder(self, name: str, max_new_tokens: int) -> Responder:
        key = (name, max_new_tokens)
        if key not in self._made:
            self._made[key] = self._make(name, max_new_tokens)
        return self._made[key]

    def _make(self, name: str, max_new_tokens: int) -> Responder:
        from longvpo_hf.building.cluster import Cluster

        if isinstance(self._executor, Cluster) and not is_asked_elsewhere(name):
            from longvpo_hf.responders import Deferred

            make = partial(_model_of_worker, self._settings, self._num_frames, self._seed, name, max_new_tokens)
            known_as, settings = self._executor.ask(partial(_identity, make))
            return Deferred(make, known_as, settings)
        return self.load(name, max_new_tokens)

    def load(self, name: str, max_new_tokens: int) -> Responder:
        """The model itself, in this process."""
        settings = self._settings
        if name == "scripted":
            from longvpo_hf.building.rehearsal import rehearsal

            return rehearsal()
        kind, _, model = name.partition(":")
        if kind == "endpoint":
            from longvpo_hf.responders import EndpointResponder

            return EndpointResponder(
                model or str(settings.model),
                str(settings.base_url),
                self._sampler,
                max_tokens=max_new_tokens,
                concurrency=settings.concurrency,
                seed=self._seed,
                api_key=_api_key(settings),
                patience_seconds=settings.patience_seconds,
                plain_http_key=settings.plain_http_key,
                drop_unanswered=settings.drop_unanswered,
                decoding=settings.decoding,
            )
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        from transformers.utils.peft_utils import find_adapter_config_file

        from longvpo_hf.precision import computable
        from longvpo_hf.responders import LocalResponder
        from longvpo_hf.responders.checkpoint import load_checkpoint
        from longvpo_hf.responders.text import TextResponder

        try:
            adapted = find_adapter_config_file(name) is not None
            sees = adapted or type(AutoConfig.from_pretrained(name)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        except OSError as error:
            raise ModelError(f"The model {name} cannot be loaded: {error}") from error
        if name not in self._loaded:
            if sees:
                # An adapter of a recipe's own training is merged in the base's own type; the recipes merge in float32.
                self._loaded[name] = load_checkpoint(name, torch.device(device_of(settings)), merged=True)
            else:
                reader = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval().to(device_of(settings))
                self._loaded[name] = (computable(reader), AutoProcessor.from_pretrained(name))
        loaded, processor = self._loaded[name]
        if not sees:
            return TextResponder(loaded, processor, max_new_tokens, settings.batch_size, settings.decoding)
        return LocalResponder(
            loaded, processor, self._sampler, max_new_tokens, settings.batch_size, decoding=settings.decoding
        )


@cache
def _models_of_worker(settings: ModelSettings, num_frames: int, seed: int) -> Models:
    return Models(settings, num_frames, seed)


def _model_of_worker(settings: ModelSettings, num_frames: int, seed: int, name: str, max_new_tokens: int) -> Responder:
    """A model in a worker's process, its weights loaded once for all its roles."""
    return _models_of_worker(settings, num_frames, seed).load(name, max_new_tokens)


def _identity(make: Callable[[], Responder]) -> Any:
    from longvpo_hf.responders import identity

    return identity(make())


def check_models(
    settings: ModelSettings,
    seeing: Sequence[str | None],
    reading: Sequence[str | None] = (),
    judge: str | None = None,
    embedder: str | None = None,
) -> None:
    """Makes sure, before a build cuts anything, that its models are there: endpoints answer, folders are whole.

    Args:
        settings: How models are asked.
        seeing: Names of the models that are shown frames; None is left alone.
        reading: Names of those that read captions.
        judge: Name of the judge, which is among these.
        embedder: Name of a vision model; None for none.

    Raises:
        EndpointError: If an endpoint does not answer: no server, another model, a wrong key, no images.
        ModelError: If another model is missing or incomplete, or sees no video where it must.
    """
    from longvpo_hf.hub import go_offline_if_unreachable

    local = [name for name in (*seeing, *reading, embedder) if name and not is_asked_elsewhere(name)]
    go_offline_if_unreachable(local)
    models = Models(settings, FRAMES, seed=0)
    by_probability = isinstance(settings, JudgeSettings) and settings.judge_yes_from is not None
    for names, get, sees_video in ((seeing, models.seeing, True), (reading, models.reading, False)):
        for name in dict.fromkeys(name for name in names if name and name not in ("none", "scripted")):
            if name.partition(":")[0] == "endpoint":
                endpoint: Any = get(name)
                endpoint.check(sees_video, lambda why: print(why, file=sys.stderr), by_probability and name == judge)
                continue
            from longvpo_hf.responders.checkpoint import check_checkpoint

            sees = check_checkpoint(name)
            if sees_video and not sees:
                raise ModelError(f"{name} is a language model and sees no video: name a vision-language model.")
            _check_processor(name, by_probability and name == judge)
    if embedder is not None:
        from longvpo_hf.responders.checkpoint import check_checkpoint

        check_checkpoint(embedder)


def _check_processor(name: str, gives_probabilities: bool) -> None:
    """Opens a model's processor or tokenizer, which is small, before any work."""
    from longvpo_hf.responders.checkpoint import processor_of

    processor = processor_of(name)
    if gives_probabilities:
        from longvpo_hf.responders.local import verdict_tokens

        verdict_tokens(getattr(processor, "tokenizer", processor))


def device_of(settings: ModelSettings) -> str:
    """Where models of this machine run."""
    import torch

    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _api_key(settings: ModelSettings) -> str | None:
    """The endpoint's key: of the variable that was named, or that belongs to the address."""
    from longvpo_hf.responders.chat import key_variable

    variable = settings.api_key_env or key_variable(str(settings.base_url))
    return os.environ.get(variable) or None if variable else None
