"""Responders that go to other processes: a model is made where it is asked, and is the same model to finished work."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from longvpo_hf.building.cluster import Cluster
from longvpo_hf.building.judging import ByProbability
from longvpo_hf.commands.build import models as loading
from longvpo_hf.commands.build.models import Models
from longvpo_hf.commands.build.options import ModelSettings
from longvpo_hf.frames import FrameSampler
from longvpo_hf.responders import Deferred, EndpointResponder, LocalResponder, Request, identity


def test_a_model_is_made_where_it_is_asked_and_answers_as_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_models.build("internvl")
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    asked: list[Callable[[], Any]] = []

    def on_a_worker(cluster: Cluster, question: Callable[[], Any]) -> Any:
        asked.append(question)
        return pickle.loads(pickle.dumps(question))()

    monkeypatch.setattr(Cluster, "ask", on_a_worker)
    settings, request = ModelSettings(max_new_tokens=4, device="cpu"), Request("What is it?")
    here = Models(settings, 4, 0).seeing(str(tmp_path / "tiny"))
    assert isinstance(here, LocalResponder)
    models = Models(settings, 4, 0, Cluster())
    there = models.seeing(str(tmp_path / "tiny"))
    assert models.reading(str(tmp_path / "tiny")) is there
    assert len(asked) == 1
    assert isinstance(there, Deferred)
    assert identity(there) == identity(here)
    sent = pickle.loads(pickle.dumps(ByProbability(there, 0.5)))
    assert identity(sent) == identity(ByProbability(here, 0.5))
    assert sent.judge.respond([request]) == here.respond([request])
    assert loading._models_of_worker.cache_info().currsize == 1, "weights are loaded once"


def test_an_endpoint_goes_to_other_processes() -> None:
    sampler = FrameSampler(8, fps=1.0, max_pixels=448 * 448)
    responder = EndpointResponder("m", "http://localhost:1/v1", sampler, api_key="k", concurrency=3)
    sent = pickle.loads(pickle.dumps(responder))
    assert identity(sent) == identity(responder)
    assert sent.concurrency == 3
