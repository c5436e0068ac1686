"""Ray: two machines of which one is lost in mid-job give the rows of one process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longvpo_hf.building import engine
from longvpo_hf.building.cluster import Cluster, WorkersLost
from longvpo_hf.building.executors import HERE, Executor
from longvpo_hf.building.rehearsal import rehearsal
from longvpo_hf.commands.build.models import _identity
from longvpo_hf.errors import EndpointError
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.responders import Deferred, Request, ScriptedResponder, one_by_one
from scenes import rows_of, same_files, unfilmed

ray = pytest.importorskip("ray")

MEMORY = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that works nothing, and two machines of one CPU; all three are processes here."""
    from ray.cluster_utils import Cluster as Nodes

    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # leaves no token at home
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **MEMORY})
        machines = [nodes.add_node(num_cpus=1, **MEMORY) for _ in range(2)]
        yield nodes, machines
        ray.shutdown()
        nodes.shutdown()


@dataclass(frozen=True)
class Slow:
    """A rehearsal that takes its time."""

    seconds: float
    name: str = "slow"

    def respond(self, requests: list[Request], *callbacks: Any) -> list[str]:
        time.sleep(self.seconds * len(requests))
        return rehearsal().respond(requests, *callbacks)


def build(folder: Path, executor: Executor, model: Any) -> None:
    pool = [clip for video in unfilmed(folder.parent / "media", [3] * 8) for clip in video.timeline.clips]
    settings = Stage1Settings(num_rows=40, max_clips=4)
    build_stage1(pool, model, model, folder / "rows", settings, executor=executor)


def test_a_machine_that_is_lost_costs_its_pieces(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_TIMELINES_PER_PIECE", 4)
    nodes, machines = cluster
    build(tmp_path / "one", HERE, Slow(0.0))
    lost_after: list[int] = []

    def lose() -> None:
        while len(list((tmp_path / "many").glob("rows.job/*.jsonl"))) < 3:
            time.sleep(0.02)
        nodes.remove_node(machines.pop(), allow_graceful=False)
        lost_after.append(len(list((tmp_path / "many").glob("rows.job/*.jsonl"))))

    everyone = Cluster(nodes.address)
    make = partial(Slow, 0.05)  # each worker makes its own, as of a model of its own GPU
    thread = threading.Thread(target=lose)
    thread.start()
    build(tmp_path / "many", everyone, Deferred(make, *everyone.ask(partial(_identity, make))))
    thread.join()
    assert lost_after[0] < 10, "the machine was lost in mid-job"
    assert len(rows_of(tmp_path / "many" / "rows")) == 40
    same_files(tmp_path / "one" / "rows", tmp_path / "many" / "rows")


def test_what_ends_a_worker_s_piece_ends_the_build(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error is raised as it was on the worker; a piece that kills its workers is given up after two."""
    monkeypatch.setattr("longvpo_hf.building.cluster._LOST_WORKERS", 2)
    nodes, _ = cluster

    def fail(request: Request) -> str:
        raise EndpointError("the server is gone.")

    with pytest.raises(EndpointError, match=r"^the server is gone\.$"):
        build(tmp_path / "a", Cluster(nodes.address), ScriptedResponder("failing", fail))

    class Deadly:
        name = "deadly"

        def respond(self, requests: list[Request], *callbacks: Any) -> list[str]:
            return one_by_one(requests, lambda request: os._exit(1))

    with pytest.raises(WorkersLost, match=r"Piece 0-00-00000 has cost 2 workers"):
        build(tmp_path / "b", Cluster(nodes.address), Deadly())
    assert Cluster(nodes.address).ask(lambda: 6 * 7) == 42


def test_without_an_address_no_cluster_of_others_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray joins any cluster of this machine, as one that another run started, unless it is told `local`."""
    asked: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **options: asked.append(address))
    for everyone in (Cluster(), Cluster("auto")):
        everyone._connected()
    assert asked == ["local", "auto"]
