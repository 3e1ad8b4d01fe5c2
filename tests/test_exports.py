"""Exports: what is written is read back; what is damaged, missing or foreign is one line."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import smalti
from smalti.errors import UserError
from smalti.exports import _digest
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN
from smalti.tokenizers.quantizers.fsq import FSQ
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.regularizers import NestedDropout, TailDrop
from smalti.tokenizers.titok import TiTok
from smalti.training.initialise import initialise

TOWER = {"width": 32, "depth": 2, "heads": 2, "patch_size": 4}
PIXEL_DECODER = {"dim": 8, "channels": 32, "channel_mult": [1, 1, 1], "num_res_blocks": 1}


def titok(**options: Any) -> TiTok:
    quantizer = options.pop("quantizer", None) or VectorQuantizer(codebook_size=16, dim=6)
    defaults = {"image_size": 16, "num_latent_tokens": 5, "encoder": TOWER, "decoder": TOWER}
    return TiTok(quantizer=quantizer, **{**defaults, **options})


def vqgan(**options: Any) -> MaskGITVQGAN:
    quantizer = VectorQuantizer(codebook_size=20, dim=8)
    defaults = {"image_size": 16, "channels": 32, "channel_mult": [1, 1, 1], "num_res_blocks": 1}
    return MaskGITVQGAN(quantizer=quantizer, **{**defaults, **options})


def images(b: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(b, 3, size, size)


def export(model: Tokenizer, folder: Path, **metadata: Any) -> str:
    model.save_pretrained(folder, metadata=metadata)
    return str(folder)


STAGE_2 = {"head": "soft_codes", "proxy_codebook_size": 20, "pixel_decoder": PIXEL_DECODER, "freeze_encoder": True}
MODELS = {
    "vq": lambda: titok(),
    "vae": lambda: titok(quantizer=GaussianQuantizer(dim=3)),
    "ema codebook": lambda: titok(quantizer=VectorQuantizer(codebook_size=16, dim=6, ema_decay=0.9, restart_after=2)),
    "stage 2": lambda: titok(**STAGE_2),
    "vqgan": lambda: vqgan(channel_mult=(1, 2, 1), shortcut="published"),
    "half": lambda: titok().bfloat16(),
    "tail drop": lambda: titok(regularizer=TailDrop(per="sample")),
}
every_model = pytest.mark.parametrize("model", [pytest.param(make, id=name) for name, make in MODELS.items()])


@every_model
def test_what_is_saved_is_loaded(model: Any, tmp_path: Path) -> None:
    model = model().eval()
    loaded = smalti.load(export(model, tmp_path / "export"))
    assert not loaded.training and loaded.spec == model.spec and loaded.fingerprint() == model.fingerprint()
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    x = images()
    tokens = model.encode(x)
    assert torch.equal(loaded.encode(x).latents, tokens.latents)
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))


def test_the_fingerprint_sees_weights_and_arguments() -> None:
    torch.manual_seed(0)
    first = titok()
    again = titok()
    again.load_state_dict(first.state_dict())
    assert first.fingerprint() == again.fingerprint()
    with torch.no_grad():
        again.latent_tokens[0, 0] += 1e-6
    assert first.fingerprint() != again.fingerprint()
    legacy = titok(latent_layout="legacy")
    legacy.load_state_dict(first.state_dict())
    assert first.fingerprint() != legacy.fingerprint()


def test_an_argument_that_a_later_version_adds_changes_no_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = titok()
    before = model.fingerprint()
    model.arguments["regularizer"] = NestedDropout()
    assert model.fingerprint() != before
    del model.arguments["regularizer"]  # as a version would describe it that has no such argument
    assert model.fingerprint() == before
    export(model, tmp_path)
    assert smalti.load(str(tmp_path)).fingerprint() == before


def test_a_default_tuple_leaves_no_trace_in_a_fingerprint_as_the_list_that_a_file_gives_back(tmp_path: Path) -> None:
    model = titok(quantizer=FSQ(levels=[8, 5, 5]))  # whose corrupt_share is (0.5, 0.5)
    export(model, tmp_path)
    assert smalti.load(str(tmp_path)).fingerprint() == model.fingerprint()


def test_an_export_whose_fingerprint_is_over_all_arguments_still_loads(tmp_path: Path) -> None:
    """As they were written before arguments at their default were left out of it."""
    model = titok()
    export(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model"]["regularizer"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "fingerprint": _digest(config["model"], model)}))
    assert smalti.load(str(tmp_path)).fingerprint() == model.fingerprint()


def test_the_config_holds_names_of_the_registry_and_no_importable_path(tmp_path: Path) -> None:
    config = json.loads((Path(export(titok(), tmp_path)) / "config.json").read_text())
    assert config["model"]["name"] == "titok" and config["model"]["quantizer"]["name"] == "vq"
    assert "smalti." not in json.dumps(config["model"])


def test_metadata_is_kept_shown_and_written_again(tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"png")
    says = {"licence": "MIT", "training_data": "my photos", "results": {"PSNR": 21.5}, "steps": {"trained": 7}}
    export(titok(), tmp_path / "one", picture=str(picture), **says)
    loaded = smalti.load(str(tmp_path / "one"))
    export(loaded, tmp_path / "two")
    card = (tmp_path / "two" / "README.md").read_text()
    for words in (
        "license: mit",
        "my photos",
        "| PSNR | 21.5 |",
        "trained 7",
        "(picture.png)",
        "16 × 16 pixels as 5 tokens",
    ):
        assert words in card
    assert (tmp_path / "two" / "picture.png").read_bytes() == b"png"
    with pytest.raises(ValueError, match="fingerprint"):
        export(titok(), tmp_path / "three", fingerprint="mine")


def test_an_export_in_its_own_folder_is_replaced_whole(tmp_path: Path) -> None:
    export(titok(), tmp_path)
    second = titok()
    export(second, tmp_path)
    assert smalti.load(str(tmp_path)).fingerprint() == second.fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_failed_export_leaves_the_one_before_it(tmp_path: Path) -> None:
    first = titok()
    export(first, tmp_path)
    with mock.patch("smalti.exports.save_file", side_effect=OSError("No space left on device")):
        with pytest.raises(UserError, match=r"cannot be written \(No space left"):
            export(titok(), tmp_path)
    assert smalti.load(str(tmp_path)).fingerprint() == first.fingerprint()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_in_the_place_of_the_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export(titok(), tmp_path / "file")


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def _rename_key(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["latent_token"] = state.pop("latent_tokens")
    save_file(state, folder / "model.safetensors")


def _reshape(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["latent_tokens"] = state["latent_tokens"][:3].clone()
    save_file(state, folder / "model.safetensors")


def _config(change: Any) -> Any:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


DAMAGES = {
    "truncated weights": (_truncate, "model.safetensors is damaged"),
    "a flipped bit": (_flip, "does not have the fingerprint"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), "is not an export of smalti: it has no config.json"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model": '), "config.json is damaged"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is damaged"),
    "a renamed key": (_rename_key, "latent_token is .* in the file and missing in the model"),
    "another shape": (_reshape, r"latent_tokens is \(3, 32\) in the file and \(5, 32\) in the model"),
    "an unknown model": (_config(lambda c: c["model"].update(name="titokk")), "did you mean 'titok'"),
    "an unknown argument": (_config(lambda c: c["model"].update(colour=1)), "does not describe a model"),
    "a missing argument": (_config(lambda c: c["model"].pop("encoder")), "does not describe a model"),
    "a wrong value": (_config(lambda c: c["model"].update(image_size=18)), "image_size=18 is not a multiple"),
    "a foreign config": (_config(lambda c: c.update(model={"vq_model": {}})), "was not written by smalti"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "was not written by smalti"),
    "an importable path": (_config(lambda c: c["model"].update(name="os:system")), "is not a model that smalti knows"),
    "a quantizer as model": (_config(lambda c: c.update(model=c["model"]["quantizer"])), "holds a VectorQuantizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_export_is_one_line(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    export(titok(), tmp_path / "export")
    change(tmp_path / "export")
    with pytest.raises(UserError, match=message) as caught:
        smalti.load(str(tmp_path / "export"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a b", "..", ""])
def test_a_path_that_is_no_export_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"neither a folder nor|not an export"):
        smalti.load(name)


def test_a_hub_id_that_is_not_there_is_one_line() -> None:
    with mock.patch("huggingface_hub.snapshot_download", side_effect=OSError("no network\nsecond line")):
        with pytest.raises(UserError, match=r"Hugging Face did not give it either \(no network\)"):
            smalti.load("someone/something")


def test_a_hub_id_is_downloaded_without_pickles(tmp_path: Path) -> None:
    export(titok(), tmp_path)
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(tmp_path)) as download:
        assert isinstance(TiTok.from_pretrained("someone/something", revision="v1"), TiTok)
    assert download.call_args.args == ("someone/something",) and download.call_args.kwargs["revision"] == "v1"
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in download.call_args.kwargs["allow_patterns"])


def test_push_to_hub_uploads_the_folder_that_save_pretrained_writes(tmp_path: Path) -> None:
    model, seen = titok(), []

    def upload(folder_path: Path, **_: Any) -> str:
        seen.extend(sorted(path.name for path in Path(folder_path).iterdir()))
        assert smalti.load(str(folder_path)).fingerprint() == model.fingerprint()
        return "url"

    with mock.patch("huggingface_hub.hub_mixin.HfApi") as api:
        api.return_value.create_repo.return_value.repo_id = "me/mine"
        api.return_value.upload_folder.side_effect = upload
        assert model.push_to_hub("me/mine") == "url"
    assert seen == ["README.md", "config.json", "model.safetensors"]


def test_a_model_of_another_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a MaskGITVQGAN, not a TiTok"):
        TiTok.from_pretrained(export(vqgan(), tmp_path))


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/never").write_text, ("run",))


def test_no_pickle_is_run_by_the_converter(tmp_path: Path) -> None:
    from smalti.published.titok import convert

    for name, content in (("a.bin", Trap()), ("b.bin", {"latent_tokens": Trap()})):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match="pickled objects, which are never run"):
            convert(tmp_path / name)
    (tmp_path / "c.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="never run"):
        convert(tmp_path / "c.bin")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: f.write_bytes(b""), "cannot be read|pickled"),
        (lambda f: f.write_bytes(b"not a checkpoint"), "pickled objects|cannot be read"),
        (lambda f: torch.save({"a": torch.zeros(1)}, f), "neither a TiTok nor a MaskGIT-VQGAN"),
        (lambda f: torch.save([1, 2], f), "no dictionary of tensors"),
        (lambda f: None, "does not exist"),
        (lambda f: f.mkdir(), "holds none of model.safetensors, pytorch_model.bin"),
    ],
)
def test_a_file_that_is_no_published_checkpoint_is_one_line(write: Any, message: str, tmp_path: Path) -> None:
    from smalti.published.titok import convert

    write(tmp_path / "file.bin")
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path / "file.bin")
    assert "\n" not in str(caught.value)


# Starting a training from an export.


def test_an_export_of_the_same_sizes_starts_a_training_unchanged(tmp_path: Path) -> None:
    source, fresh = titok(), titok(init="fan_in")
    assert initialise(fresh, export(source, tmp_path)) == []
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), fresh.state_dict().values(), strict=True)
    )


def test_another_resolution_resizes_the_position_tables(tmp_path: Path) -> None:
    source, larger = titok(), titok(image_size=32)
    notes = initialise(larger, export(source, tmp_path))
    assert notes == ["image_size 16 -> 32: position tables resized bicubically, class position kept"]
    for part in ("encoder", "decoder"):
        ours, theirs = (getattr(model, part).positional_embedding for model in (larger, source))
        assert len(ours) == 65 and torch.equal(ours[0], theirs[0])
    assert torch.equal(larger.latent_tokens, source.latent_tokens)
    assert larger(images(size=32)).reconstruction.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("count", "words"), [(3, "the first 3 latent tokens"), (8, "the last 3 latent tokens .* fresh")]
)
def test_another_token_count_cuts_or_extends_the_latent_tokens(count: int, words: str, tmp_path: Path) -> None:
    source, other = titok(), titok(num_latent_tokens=count)
    fresh = other.latent_tokens.clone()
    (note,) = initialise(other, export(source, tmp_path))
    kept = min(count, 5)
    assert torch.equal(other.latent_tokens[:kept], source.latent_tokens[:kept])
    assert torch.equal(other.latent_tokens[kept:], fresh[kept:])
    assert re.search(words, note)


def test_a_legacy_model_says_that_another_token_count_starts_its_latents_anew(tmp_path: Path) -> None:
    path = export(titok(latent_layout="legacy"), tmp_path)
    (note,) = initialise(titok(latent_layout="legacy", num_latent_tokens=4), path)
    assert "mixes all positions" in note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantizer": VectorQuantizer(codebook_size=17, dim=6)},
            r"quantizer.codebook_size=17 but .* has 16",
        ),
        ({"quantizer": VectorQuantizer(codebook_size=16, dim=5)}, r"tokenizer.quantizer.dim=5 but .* has 6"),
        ({"quantizer": VectorQuantizer(codebook_size=16, dim=6, distance="cosine")}, "quantizer.distance=cosine"),
        ({"quantizer": GaussianQuantizer(dim=6)}, r"tokenizer.quantizer"),
        ({"encoder": {**TOWER, "width": 64}}, "tokenizer.encoder.width=64 but"),
        ({"decoder": {**TOWER, "patch_size": 2}}, "tokenizer.decoder.patch_size=2 but"),
        ({"latent_layout": "legacy"}, "tokenizer.latent_layout=legacy but"),
        ({"head": "codes", "proxy_codebook_size": 20}, "tokenizer.head=codes but"),
        ({"text": {"width": 4, "length": 2}}, "tokenizer.text"),
    ],
)
def test_an_export_that_does_not_fit_is_refused_before_anything_is_loaded(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path, model = export(titok(), tmp_path), titok(**options)
    before = model.fingerprint()
    with pytest.raises(UserError, match=message):
        initialise(model, path)
    assert model.fingerprint() == before


def test_an_export_of_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a MaskGITVQGAN, but this run trains a TiTok"):
        initialise(titok(), export(vqgan(), tmp_path))


def test_codebook_rules_may_change_between_trainings(tmp_path: Path) -> None:
    path = export(titok(quantizer=VectorQuantizer(codebook_size=16, dim=6, ema_decay=0.9)), tmp_path)
    model = titok(quantizer=VectorQuantizer(codebook_size=16, dim=6, restart_after=5, commitment_weight=1.0))
    assert initialise(model, path) == []


def test_a_vqgan_starts_at_another_resolution(tmp_path: Path) -> None:
    source, larger = vqgan(), vqgan(image_size=32)
    assert initialise(larger, export(source, tmp_path)) == ["image_size 16 -> 32: the same weights serve both"]
    assert larger(images(size=32)).reconstruction.shape == (2, 3, 32, 32)


def test_stage_2_starts_from_stage_1_and_its_teacher(tmp_path: Path) -> None:
    stage1, teacher, stage2 = titok(head="codes", proxy_codebook_size=20), vqgan(), titok(**STAGE_2)
    first, second = export(stage1, tmp_path / "stage1"), export(teacher, tmp_path / "teacher")
    with pytest.raises(UserError, match="stage 2 also needs teacher_path=DIR"):
        initialise(stage2, first)
    with pytest.raises(UserError, match="holds a TiTok, not a MaskGITVQGAN"):
        initialise(stage2, first, first)
    assert initialise(stage2, first, second) == []
    assert torch.equal(stage2.decoder.ffn[2].weight, stage1.decoder.ffn[2].weight)
    assert torch.equal(stage2.proxy_embedding, teacher.quantizer.embedding)
    assert torch.equal(stage2.pixel_decoder.conv_out.weight, teacher.decoder.conv_out.weight)
    again = titok(**STAGE_2)
    assert initialise(again, export(stage2, tmp_path / "stage2")) == []  # a finished stage 2 needs no teacher
    assert again.fingerprint() == stage2.fingerprint()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: vqgan(shortcut="published"), "set tokenizer.pixel_decoder.shortcut=published"),
        (lambda: vqgan(num_res_blocks=2), "set tokenizer.pixel_decoder.num_res_blocks=2"),
        (lambda: vqgan(channel_mult=[1, 1, 2]), r"set tokenizer.pixel_decoder.channel_mult=\[1, 1, 2\]"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher: Any, message: str, tmp_path: Path) -> None:
    first = export(titok(head="codes", proxy_codebook_size=20), tmp_path / "stage1")
    with pytest.raises(UserError, match=message):
        initialise(titok(**STAGE_2), first, export(teacher(), tmp_path / "teacher"))


def test_an_export_without_a_regularizer_is_fine_tuned_with_one(tmp_path: Path) -> None:
    source, flexible = titok(), titok(regularizer=TailDrop())
    assert initialise(flexible, export(source, tmp_path / "plain")) == []
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in flexible.state_dict().items())
    nested = titok(regularizer=NestedDropout(mode="zipf"))
    assert initialise(nested, export(flexible, tmp_path / "flexible")) == []
    assert nested.spec.prefix_decodable and initialise(titok(), tmp_path / "flexible") == []
