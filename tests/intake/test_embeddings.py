"""Embeddings of clips: what they are the mean of, and that finished ones are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from conftest import write_clip
from longvpo_hf.building.executors import Merge, Shard, Unfinished
from longvpo_hf.commands.build.sharing import Embedding
from longvpo_hf.frames import FrameSampler
from longvpo_hf.intake import embeddings
from longvpo_hf.intake.embeddings import VisionEmbedder
from longvpo_hf.timeline import Clip, Timeline


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("clips")
    colours = [(220, 30, 30), (30, 200, 40), (218, 32, 30)]
    return [Clip(str(write_clip(folder / f"{i}.mp4", colour)), 0.0, 4.0) for i, colour in enumerate(colours)]


@pytest.fixture(scope="module")
def dinov2() -> tuple[Dinov2Model, BitImageProcessor]:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    processor = BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return Dinov2Model(config).eval(), processor


def test_a_vector_is_the_unit_mean_of_the_frames_features(clips, dinov2) -> None:
    model, processor = dinov2
    vectors = VisionEmbedder(model, processor, num_frames=3, batch_clips=2)(clips)
    assert vectors.dtype == np.float32
    for clip, vector in zip(clips, vectors, strict=True):
        features = []
        for image in FrameSampler(3)(Timeline((clip,))).pixels:  # one by one, another way
            with torch.no_grad():
                features.append(model(**processor(images=image, return_tensors="pt")).pooler_output[0])
        mean = torch.stack(features).mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    # The two reds are nearer to one another than to the green.
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1]


def test_finished_vectors_are_kept_and_stale_ones_never_met(clips, dinov2, tmp_path: Path, monkeypatch) -> None:
    model, processor = dinov2
    first = VisionEmbedder(model, processor, cache=tmp_path)(clips)
    again = VisionEmbedder(model, processor, cache=tmp_path)
    monkeypatch.setattr(again, "_embed", lambda clips: pytest.fail("embedded again"))
    np.testing.assert_array_equal(again(clips), first)
    other_frames = VisionEmbedder(model, processor, num_frames=1, cache=tmp_path)(clips)
    assert not np.array_equal(other_frames, first)


def test_shards_share_the_pieces(clips, dinov2, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(embeddings, "_CLIPS_PER_PIECE", 2)
    model, processor = dinov2
    whole = VisionEmbedder(model, processor)(clips)
    for shard in (0, 1):
        embedder = VisionEmbedder(model, processor, cache=tmp_path)
        by_shard = Embedding(embedder, Shard(shard, 2))
        if shard == 0:
            with pytest.raises(Unfinished, match="1 of 2 pieces are missing: 00001"):
                by_shard(clips)
        else:
            np.testing.assert_array_equal(by_shard(clips), whole)
        assert len(list(tmp_path.glob("*.npy"))) == shard + 1
    np.testing.assert_array_equal(Embedding(VisionEmbedder(model, processor, cache=tmp_path), Merge())(clips), whole)


def test_by_name(clips, dinov2, tmp_path: Path) -> None:
    model, processor = dinov2
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    np.testing.assert_allclose(VisionEmbedder(str(tmp_path))(clips), VisionEmbedder(model, processor)(clips), atol=1e-5)


def test_a_model_without_its_processor_is_refused(dinov2) -> None:
    with pytest.raises(ValueError, match="image processor"):
        VisionEmbedder(dinov2[0])
