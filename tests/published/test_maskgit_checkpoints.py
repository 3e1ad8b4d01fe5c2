"""Published MaskGIT and RAR files from end to end: a hub folder or a state dict in, a generator out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import smalti
from smalti.errors import UserError
from smalti.generators.base import Condition
from smalti.published import maskgit, rar
from smalti.published.export import SOURCES

files = pytest.mark.family("maskgit-bert", "maskgit-uvit", "rar", runner="loss")


def source_of(case: Any) -> tuple[str, Any]:
    return ("rar", rar) if case.meta["family"] == "rar" else ("maskgit", maskgit)


@files
def test_a_hub_folder_becomes_an_export_with_equal_tokens(case: Any, tmp_path: Path) -> None:
    source, published = source_of(case)
    save_file(case.weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    model = SOURCES[source](str(tmp_path), None)
    state = published.to_published(model)
    published_state = case.weights
    if source == "rar":  # rows that nothing reads are not kept
        n = model.spec.length + 2
        state, published_state = (
            {name: x[:, :n] if name in rar.TABLES else x for name, x in given.items()}
            for given in (state, published_state)
        )
    assert state.keys() == published_state.keys()
    assert all(torch.equal(state[name], published_state[name]) for name in state)
    model.save_pretrained(tmp_path / "export")
    loaded = smalti.load(tmp_path / "export")
    assert loaded.metadata["licence"] == "Apache-2.0" and "bytedance/1d-tokenizer" in loaded.metadata["source"]
    condition, seeds = Condition(torch.arange(3)), torch.arange(3)
    sampling = {"guidance": 2.0} if model.label_dropout else {"guidance": 1.0}
    made = [one.generate(condition, seeds=seeds, sampling=sampling).indices for one in (model, loaded)]
    assert torch.equal(*made)


@files
def test_a_state_dict_alone_gives_a_model_of_the_same_sizes(case: Any, tmp_path: Path) -> None:
    source, published = source_of(case)
    config = published.infer(case.weights)["model"]["generator"]
    said = maskgit.resolved(case.config)["model"]["generator"]
    seen = ("hidden_size", "num_hidden_layers", "intermediate_size", "image_seq_len", "condition_num_classes")
    assert {key: config[key] for key in seen} == {key: said[key] for key in seen}
    if said["hidden_size"] % 16 == 0:
        old = {"model.embeddings.position_ids": torch.arange(9)} if said.get("model_type") == "ViT" else {}
        torch.save({**case.weights, **old}, tmp_path / "x.bin")
        assert SOURCES[source](str(tmp_path / "x.bin"), None).spec.length == said["image_seq_len"]


@files
def test_a_config_of_other_sizes_is_refused_by_the_name_of_a_key(case: Any, tmp_path: Path) -> None:
    source, _ = source_of(case)
    save_file(case.weights, tmp_path / "model.safetensors")
    config = json.loads(json.dumps(case.config))
    config["model"]["generator"]["intermediate_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"checkpoint does not fit its config: .* in the file and .* in the model"):
        SOURCES[source](str(tmp_path), None)
    del config["model"]["generator"]["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="generator: lacks 'hidden_size'; check config="):
        SOURCES[source](str(tmp_path), None)


@pytest.mark.parametrize("source", ["maskgit", "rar"])
def test_weights_of_something_else_are_refused(source: str, tmp_path: Path) -> None:
    torch.save({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"its names are encoder.conv_in.weight, …; check the file"):
        SOURCES[source](str(tmp_path / "x.bin"), None)


@pytest.mark.family("maskgit-shapes", "rar-shapes")
def test_published_sizes_alone_tell_the_published_settings_of_sampling(case: Any) -> None:
    published: Any = rar if case.meta["family"] == "rar-shapes" else maskgit
    with torch.device("meta"):
        state = published.to_published(published.build_generator(case.config))
        alone = published.build_generator(published.infer(state))
        model = published.build_generator(case.config)
    assert alone.sampling == model.sampling
    assert alone.arguments == {**model.arguments, "tokens": alone.arguments["tokens"]}
    assert alone.spec == model.spec
