"""The model `longvpo` of lmms-eval: a checkpoint of this package's trainer, seen through its own sampler and prompts.

It joins lmms-eval to what the package has: frames come from `FrameSampler`, prompts from `PromptEncoder`, batches from
`LocalResponder`, weights from `load_checkpoint`. An error is raised, never turned into an answer.

Answers come from an iterator, so that lmms-eval's response cache keeps each one at once: an interrupted run continues
after the last one it kept (see `docs/evaluation.md`).
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import PurePath
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm
from transformers import AutoProcessor, ProcessorMixin

from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.protocol import THE_VIDEO, Shown
from longvpo_hf.evaluation.sampling import sampler_of, trained_sampling
from longvpo_hf.evaluation.serving import Server, parity
from longvpo_hf.evaluation.subtitles import shown_at
from longvpo_hf.families.encoding import PromptEncoder
from longvpo_hf.families.templates import may_reason
from longvpo_hf.frames import FrameSampler, UnreadableVideo, whole_clip
from longvpo_hf.public import public_name
from longvpo_hf.reasoning import without_reasoning
from longvpo_hf.record import Sampling
from longvpo_hf.responders import EndpointResponder, LocalResponder, Request, Result, Unanswered, Unreached
from longvpo_hf.responders.checkpoint import checkpoint_digest, load_checkpoint
from longvpo_hf.responders.generating import REASONING_TOKENS
from longvpo_hf.timeline import Clip, Timeline, View

#: Requests looked at together, in batches: among them those of equally many frames share a call.
_WINDOW_BATCHES = 8
#: How long a process waits for the slowest; lmms-eval's own bound.
_TIMEOUT = timedelta(hours=24)
#: Tasks that allow no more expect an answer without reasoning.
_SHORT_TOKENS = 128


class LongVPO(lmms):
    """A checkpoint that answers about videos, greedily by default.

    Under `accelerate launch` or `torchrun` every process loads the model onto its own device and answers its share.

    Args:
        pretrained: Folder or name on the Hub of a model, or of a PEFT adapter, whose base model is loaded with it.
        num_frames: At most so many frames per video. Like `fps` and `max_pixels`, by default what the checkpoint's card
            says it was trained with, else as `Sampling`.
        fps: At most so many frames per second; "none" for no such bound.
        max_pixels: At most so many pixels per frame; "none" keeps the source's size.
        batch_size: Requests per call of the model.
        device: Where the model runs; by default the accelerator of the process, else the CPU.
        max_new_tokens: Bound on an answer; by default what the task says, or 16,384 for a model that reasons first.
        temperature: See `Decoding`, as for `top_p`, `decoding_seed` and `thinking` ("none" leaves it to the template).
        server: Where the model `pretrained` is served; None for a model of this process. A served model sees the same
            frames; of the checkpoint only record and processor are read, if they are there.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_frames: int | None = None,
        fps: float | str | None = None,
        max_pixels: int | str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        decoding_seed: int = 0,
        thinking: bool | str | None = None,
        server: Server | None = None,
    ) -> None:
        super().__init__()
        self.pretrained = str(pretrained)
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = torch.device(device) if device else self.accelerator.device
        trained = trained_sampling(self.pretrained) or Sampling()
        self.sampling = Sampling(
            num_frames=trained.num_frames if num_frames is None else num_frames,
            fps=trained.fps if fps is None else _bound(fps, float),
            max_pixels=trained.max_pixels if max_pixels is None else _bound(max_pixels, int),
        )
        decoding = Decoding(float(temperature), float(top_p), int(decoding_seed), _switch(thinking))
        self._decoding = decoding
        self._server = server
        self._batch_size = _whole_number(batch_size)
        self._responder: LocalResponder | EndpointResponder
        if server is None:
            model, processor = load_checkpoint(self.pretrained, self._device)
            self._responder = LocalResponder(
                model,
                processor,
                sampler_of(self.sampling),
                batch_size=self._batch_size,
                name=public_name(self.pretrained),
                decoding=decoding,
            )
            self._encoder: PromptEncoder | None = self._responder.encoder
            self._reasons = self._responder.reasons
            #: Type of the weights, e.g. `bfloat16`.
            self.dtype = str(model.dtype).removeprefix("torch.")
        else:
            self._responder = server.responder(self.pretrained, sampler_of(self.sampling), self._batch_size, decoding)
            self._encoder = _encoder_of(self.pretrained, decoding)
            encoder = self._encoder
            self._reasons = encoder is not None and may_reason(encoder.processor, encoder.switch)
            self.dtype = "as served"
        self._clips: dict[str, Clip] = {}
        self._max_new_tokens = None if max_new_tokens is None else int(max_new_tokens)
        self._of_tasks: Mapping[str, int] = {}
        self._shown: Shown = THE_VIDEO

    def __repr__(self) -> str:
        """What its answers depend on: a name for the response cache."""
        weights = checkpoint_digest(self.pretrained) if self._server is None else self._server
        bounds = {"": self._max_new_tokens, **self._of_tasks} if self._max_new_tokens or self._of_tasks else {}
        more = f", max_new_tokens={bounds}" if bounds else ""
        more += "" if self._shown == THE_VIDEO else f", {self._shown}"
        decoding = self._responder.decoding
        more += f", {decoding}" if decoding != GREEDY else ""
        return f"longvpo({self.pretrained}{f' {weights}' * bool(weights)}, {self.sampling}{more})"

    @property
    def device(self) -> torch.device:
        """Where the model runs; lmms-eval asks for it where there are several processes."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Requests per call of the model."""
        return self._batch_size

    def backend(self, requests: Sequence[Request]) -> str:
        """Who runs the model and how it gets the frames, for the protocol.

        Args:
            requests: What a server's prompts are compared with ours for.
        """
        if self._server is None or not isinstance(self._responder, EndpointResponder):
            return "transformers"
        found = parity(self._responder, self._encoder, requests)
        if found.first and self.rank == 0:
            name = self._responder.name
            print(f"{name} does not get the prompts that it would get here: {found.first}", file=sys.stderr)
        return self._server.describe(found)

    def use(
        self,
        sampling: Sampling,
        max_new_tokens: Mapping[str, int] | None = None,
        shown: Shown = THE_VIDEO,
        repeat: int = 0,
    ) -> None:
        """From now on, see videos as `sampling` says; the weights stay where they are.

        Args:
            sampling: How.
            max_new_tokens: Bounds on answers, by task.
            shown: What of each video the model is shown; prompts, subtitles among them, are the same for all.
            repeat: How often sampled answers were drawn before: it is added to their seed.
        """
        self.sampling = sampling
        self._shown = shown
        self._responder.decoding = replace(self._decoding, decoding_seed=self._decoding.decoding_seed + repeat)
        self._of_tasks = dict(max_new_tokens or {})
        self._responder.sampler = sampler_of(sampling)

    def clean(self) -> None:
        """Nothing: the weights serve the next evaluation. They go with this object."""

    def generate_until(self, requests: Sequence[Instance]) -> Iterator[str]:
        """The answers, in order, as they come.

        Raises:
            longvpo_hf.frames.UnreadableVideo: If a video cannot be decoded.
            ValueError: If a request asks for sampling or several beams, or is no single turn about videos.
        """
        window = _WINDOW_BATCHES * self._batch_size
        with tqdm(total=len(requests), desc="answering", unit="question", disable=self.rank != 0) as bar:
            for limit, group in itertools.groupby(requests, self.bound):
                self._responder.max_new_tokens = limit
                while batch := list(itertools.islice(group, window)):
                    requests, failure = self._requests(batch)
                    answers = self._results(requests) if requests else ()
                    bar.update(len(batch))
                    for instance, answer in zip(batch, answers, strict=False):
                        if not isinstance(answer, str):
                            raise answer
                        yield _until(answer, _settings(instance).get("until"))
                    if failure is not None:
                        raise failure

    def bound(self, instance: Instance) -> int:
        """Bound on an answer's length.

        Raises:
            ConfigError: If the request asks for sampling or several beams.
        """
        settings, task = _settings(instance), instance.args[4]
        if settings.get("do_sample") or settings.get("temperature") or (settings.get("num_beams") or 1) > 1:
            raise ConfigError(
                "The model longvpo samples where its model_args say so (temperature=0.7,top_p=0.9), not where requests "
                f"do, and knows no beams; got {dict(settings)}."
            )
        return self.most_tokens(task, int(settings.get("max_new_tokens", _SHORT_TOKENS)))

    def most_tokens(self, task: str, own: int) -> int:
        """Bound on the answers of a task whose own bound is `own`."""
        if self._reasons and own <= _SHORT_TOKENS:  # it may write some, and the task did not think of it
            own = REASONING_TOKENS
        return self._of_tasks.get(task) or self._max_new_tokens or own

    def _requests(self, batch: Sequence[Instance]) -> tuple[list[Request], UnreadableVideo | None]:
        """The requests, up to the first whose video cannot be opened, and why it cannot."""
        requests: list[Request] = []
        for instance in batch:
            try:
                requests.append(self._request(instance))
            except UnreadableVideo as error:
                return requests, error
        return requests, None

    def _results(self, requests: Sequence[Request]) -> Sequence[Result | Unreached]:
        """The answers; in place of one that could not be had, why: those before it are kept."""
        try:
            return self._responder.respond(requests)
        except Unanswered as error:
            return error.results

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: the benchmarks of long video are answered in words."""
        raise NotImplementedError("The model longvpo answers in words (generate_until); it gives no log-likelihoods.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: rows of this package hold one question."""
        raise NotImplementedError("The model longvpo answers single questions (generate_until), not conversations.")

    def _request(self, instance: Instance) -> Request:
        _, doc_to_messages, _, doc_id, task, split = instance.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        if [message["role"] for message in messages] != ["user"]:
            raise ConfigError(f"{task}: the model longvpo takes one turn of the user, got {messages}.")
        content = messages[0]["content"]
        unknown = [part["type"] for part in content if part["type"] not in ("video", "text")]
        if unknown:
            raise ConfigError(f"{task}: the model longvpo takes videos and text, got {', '.join(unknown)}.")
        clips = tuple(self._clip(part["url"]) for part in content if part["type"] == "video")
        timeline = Timeline(clips) if clips else None
        texts = [self._text(part, timeline) for part in content if part["type"] == "text"]
        return _showing(self._shown, Request("".join(texts), timeline), self._responder.sampler)

    def _text(self, part: Mapping[str, Any], timeline: Timeline | None) -> str:
        """A text, or of subtitles the lines that belong to the frames of a timeline of one clip."""
        if "subtitles" not in part or timeline is None:
            return part["text"]
        start = timeline.clips[0].start_seconds
        instants = [start + seconds for seconds in self._responder.sampler.timeline_seconds(timeline)]
        return "\n".join(shown_at(part["subtitles"], instants)) or "No subtitles available"

    def _clip(self, path: str) -> Clip:
        """A video as a clip. Kept: opening a file reads all its packets."""
        if path not in self._clips:
            self._clips[path] = whole_clip(path)
        return self._clips[path]


def _showing(shown: Shown, request: Request, sampler: FrameSampler) -> Request:
    """A request about a video as a baseline asks it."""
    if request.timeline is None or shown == THE_VIDEO:
        return request
    if shown == "no video":
        return replace(request, timeline=None)
    if shown == "one frame":  # that of the middle
        return replace(request, view=View.sparse(len(request.timeline)))
    # The very frames, and the very times; which frame stands at which of them is drawn, for each video alike.
    (clip,) = request.timeline.clips
    number = len(sampler.timeline_seconds(request.timeline))
    bounds = [clip.start_seconds + clip.duration_seconds * i / number for i in range(number)] + [clip.end_seconds]
    parts = tuple(Clip(clip.path, start, end) for start, end in itertools.pairwise(bounds))
    order = random.Random(f"{number} {PurePath(clip.path).name}").sample(range(number), number)
    return replace(request, timeline=Timeline(parts), view=View.ordered(order))


def _encoder_of(checkpoint: str, decoding: Decoding) -> PromptEncoder | None:
    """What makes the prompts of a checkpoint here; None where its processor is not at hand."""
    try:
        processor = AutoProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError):
        return None
    return PromptEncoder(processor, decoding.thinking) if isinstance(processor, ProcessorMixin) else None


def _settings(instance: Instance) -> Mapping[str, Any]:
    return instance.args[2]


def _until(reply: str, stops: str | Sequence[str] | None) -> str:
    """The reply up to the first of `stops` in its answer: a stop within its reasoning does not count."""
    answer = without_reasoning(reply)
    before = reply[: len(reply) - len(answer)] if reply.endswith(answer) else ""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        answer = answer.split(stop)[0]
    return before + answer


def _bound(value: float | str, kind: type[Any]) -> Any:
    return None if str(value).lower() == "none" else kind(value)


def _switch(value: bool | str | None) -> bool | None:
    """True, False or None, as lmms-eval or a caller writes it."""
    known = {"true": True, "false": False, "none": None}
    if str(value).lower() not in known:
        raise ConfigError(f"thinking must be true, false or none, got {value!r}.")
    return known[str(value).lower()]


def _whole_number(batch_size: int | str) -> int:
    try:
        return int(batch_size)
    except ValueError:
        raise ConfigError(f"batch_size must be a whole number, got {batch_size!r}.") from None
