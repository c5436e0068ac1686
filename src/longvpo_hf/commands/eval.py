"""`longvpo eval`: benchmarks of long video."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group
from cyclopts.types import PositiveInt

from longvpo_hf.commands.cli import (
    ConfigFile,
    WholeNumbers,
    checked_by,
    decoded,
    quiet_libraries,
    resumable,
    whole_numbers,
)
from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ConfigError

_DECODING = Group("Decoding", sort_key=1)


def _check_server(
    *models: str,
    backend: str = "transformers",
    base_url: str | None = None,
    api_key_env: str | None = None,
    **_: object,
) -> None:
    for option, value in (("base-url", base_url), ("api-key-env", api_key_env)):
        if backend == "transformers" and value is not None:
            raise ConfigError(f"--{option} is about a server: add --backend vllm or openai, or leave it out.")
    if backend != "transformers" and base_url is None:
        raise ConfigError(f"--backend {backend} needs --base-url, e.g. http://localhost:8000/v1")


@checked_by(_check_server)
@resumable
@quiet_libraries(TQDM_DISABLE="1")  # lmms-eval's two bars for each task; the adapter's own is shown
def evaluate(
    *models: str,
    tasks: str = "longvideobench,mlvu,videomme,mvbench",
    frames: WholeNumbers | None = None,
    data_root: Path | None = None,
    output: Path = Path("runs/eval"),
    protocol: str | None = None,
    fps: str | None = None,
    max_pixels: PositiveInt | None = None,
    batch_size: PositiveInt = 1,
    limit: PositiveInt | None = None,
    max_new_tokens: str | None = None,
    backend: Literal["transformers", "vllm", "openai"] = "transformers",
    base_url: str | None = None,
    api_key_env: str | None = None,
    baselines: bool = False,
    repeats: PositiveInt = 1,
    mixed_protocols: bool = False,
    decoding: Annotated[Decoding, decoded(_DECODING)] = GREEDY,
    tasks_dir: bool = False,
    config: ConfigFile = None,
) -> None:
    """Runs benchmarks of long video through lmms-eval, with the frames of training, and prints the table.

    Several models are compared question by question: the table says which differences are within noise, and how many
    questions it would take to show them. Every number has its protocol. The same command goes on where it was stopped.

    Args:
        models: Folder or name on the Hub of a model or a LoRA adapter. Several stand side by side in the table;
            STAGE=MODEL gives one a name, e.g. base=… stage1=… stage2=…
        tasks: Suites with commas between them; videomme is asked without and with subtitles. A name that is none of
            them, e.g. `--tasks all`, lists them.
        frames: Numbers of frames, e.g. 64,128,512. None: as each model was trained.
        data_root: Folder of annotations and videos. None: HF_HOME, as for lmms-eval.
        output: Folder of the results.
        protocol: Measure as published numbers were, as far as their authors say it: longvpo, tpo, qwen3vl or lmms.
            Other options override it, and the table says where.
        fps: Most frames per second; `none` for no bound. None: as in training.
        max_pixels: Most pixels of a frame. None: as in training.
        batch_size: Questions per call of the model, or under way at the server at once.
        limit: Ask only this many questions of each task, to try. None: all.
        max_new_tokens: Bound on an answer, N or SUITE=N,…. None: 32, and 16384 for models that reason before they
            answer.
        backend: Who runs the models: this process, or a server at --base-url, which is sent our own frames: vllm as one
            video, openai (any compatible server) as pictures. A model is served under the name given here.
        base_url: Address of the server, e.g. http://localhost:8000/v1. None: no server is asked.
        api_key_env: Variable that holds the server's key. None: none, but for api.openai.com (OPENAI_API_KEY).
        baselines: Ask the same questions also without the video, with one frame, and with its frames in another order:
            what of a score is owed to the video.
        repeats: Ask every question so many times, where answers are sampled (--temperature), and show mean and spread.
        mixed_protocols: Set models side by side that were not measured alike, with the protocol at each number.
            Otherwise that is refused.
        tasks_dir: Print the folder for lmms-eval's --include_path, and do nothing else.
    """
    if tasks_dir:
        from longvpo_hf.evaluation.task_files import tasks_folder

        print(tasks_folder())
        return
    if not models:
        raise ConfigError("Name at least one model.")
    if find_spec("lmms_eval") is None:
        raise ConfigError("lmms-eval is missing: pip install 'longvpo-hf[eval]'")
    from longvpo_hf.evaluation.preflight import bounds_named, suites_named
    from longvpo_hf.evaluation.protocol import published
    from longvpo_hf.evaluation.run import Contestant, Settings
    from longvpo_hf.evaluation.run import evaluate as run_evaluation
    from longvpo_hf.evaluation.serving import Server
    from longvpo_hf.evaluation.suite import data_root as default_root
    from longvpo_hf.hub import go_offline_if_unreachable

    asked = suites_named(tasks.split(","))
    contestants = [Contestant.of(model) for model in models]
    root = data_root or default_root()
    data = (str(root / suite.dataset) for suite in asked)
    go_offline_if_unreachable([*(contestant.checkpoint for contestant in contestants), *data])
    settings = Settings(
        frames=whole_numbers(frames) if frames else [],
        fps=fps,
        max_pixels=max_pixels,
        batch_size=batch_size,
        limit=limit,
        max_new_tokens=bounds_named(max_new_tokens, asked) if max_new_tokens else {},
        published=published(protocol) if protocol else None,
        baselines=baselines,
        decoding=decoding,
        repeats=repeats,
        mixed_protocols=mixed_protocols,
        server=None if backend == "transformers" else Server(backend, base_url or "", api_key_env),
    )
    if run_evaluation(contestants, asked, root, output, settings):
        print(f"\n{(output / 'table.md').read_text(encoding='utf-8')}")
        print(f"Scores, answers and a section for the model card: {output}")
