"""The loaders of a run: what is in a batch, exact resume, splits, and what is refused before a run begins."""

import pickle
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_images import picture, samples
from torch.utils.data import DataLoader

from smalti.data import augment
from smalti.data.decode import decode_image
from smalti.data.module import DataModule
from smalti.data.shards import write_image_folder, write_shards
from smalti.errors import UserError


def module(path, **options) -> DataModule:
    return DataModule(**{"path": str(path), "image_size": 16, "resize": 18, "batch_size": 8, "workers": 0} | options)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        for name in one
    )


def test_a_batch_is_what_the_training_loop_expects(shard_folder):
    batch = next(iter(module(shard_folder).train_loader()))
    assert batch["image"].shape == (8, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous()
    assert batch["label"].dtype == torch.int64
    numbers = [int(key) for key in batch["key"]]
    assert batch["label"].tolist() == [n % 3 for n in numbers]
    assert batch["caption"] == [f"picture {n}" for n in numbers]


def test_a_folder_without_classes_has_the_label_minus_one_and_no_captions(tmp_path):
    for n in range(6):
        Image.fromarray(picture(n)).save(tmp_path / f"{n}.png")
    batch = next(iter(module(tmp_path, batch_size=2).train_loader()))
    assert batch["label"].tolist() == [-1, -1]
    assert sorted(batch) == ["image", "key", "label"]


def test_pixels_pass_unchanged_where_nothing_is_to_be_done(shard_folder):
    data = module(shard_folder, image_size=20, resize=None, crop="center", flip=False)
    batch = next(iter(data.train_loader()))
    for image, key in zip(batch["image"], batch["key"], strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), picture(int(key))[:, 2:22])


@cache
def whole_run(folder: str, rank: int, world_size: int, remainder: str) -> list[dict]:
    data = module(folder, remainder=remainder)
    return list(data.train_loader(total=13, rank=rank, world_size=world_size))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@settings(deadline=None, max_examples=25)
@given(
    workers=st.sampled_from([0, 1, 3]),
    world_size=st.sampled_from([1, 2]),
    where=st.sampled_from(["start", "middle", "last batch of the epoch", "next epoch", "last batch"]),
    remainder=st.sampled_from(["drop", "pad"]),
)
def test_after_a_restore_at_any_batch_the_rest_is_identical(shard_folder, workers, world_size, where, remainder):
    data = module(shard_folder, workers=workers, remainder=remainder)
    epoch = data.batches_per_epoch(world_size=world_size)
    start = {
        "start": 0,
        "middle": epoch // 2,
        "last batch of the epoch": epoch - 1,
        "next epoch": epoch,
        "last batch": 12,
    }[where]
    for rank in range(world_size):
        loader = data.train_loader(start, total=13, rank=rank, world_size=world_size)
        assert len(loader) == 13
        rest, expected = list(loader), whole_run(str(shard_folder), rank, world_size, remainder)[start:]
        assert len(rest) == len(expected) == 13 - start
        assert all(map(equal, rest, expected))


def test_ranks_read_different_images_in_equally_many_batches(shard_folder):
    data = module(shard_folder, batch_size=4)
    ranks = [list(data.train_loader(rank=rank, world_size=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    keys = [key for batches in ranks for batch in batches for key in batch["key"]]
    assert len(set(keys)) == len(keys)


def test_accumulated_micro_batches_are_smaller(shard_folder):
    loader = module(shard_folder).train_loader(total=5, accumulate=2, world_size=2)
    assert {len(batch["key"]) for batch in loader} == {2}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_may_be_forked_or_spawned_after_files_were_opened(shard_folder, method):
    loader = module(shard_folder).train_loader()
    first = next(iter(loader))  # opens files in this process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        again = DataLoader(
            loader.dataset,
            batch_sampler=loader.batch_sampler,
            collate_fn=loader.collate_fn,
            num_workers=1,
            multiprocessing_context=method,
        )
        assert equal(next(iter(again)), first)


def test_a_loader_leaves_the_global_random_state_alone(shard_folder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    next(iter(module(shard_folder, workers=1).train_loader()))
    next(iter(module(shard_folder).validation_loader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_and_flips_change_with_the_epoch_and_not_with_the_batch_size(shard_folder):
    def by_key(**options) -> dict:
        data = module(shard_folder, **options)
        loader = data.train_loader(total=data.batches_per_epoch())
        return {key: image for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)}

    one, other = by_key(batch_size=4), by_key(batch_size=11)
    both = one.keys() & other.keys()
    assert len(both) > 20 and all(torch.equal(one[key], other[key]) for key in both)
    data = module(shard_folder, batch_size=1, val_fraction=0.01)
    epoch = data.batches_per_epoch()
    first = {batch["key"][0]: batch["image"] for batch in data.train_loader(0, total=epoch)}
    second = {batch["key"][0]: batch["image"] for batch in data.train_loader(epoch, total=2 * epoch)}
    assert np.mean([torch.equal(first[key], second[key]) for key in first]) < 0.3


def test_adms_random_crop_trains_on_its_draws_and_validates_on_adms_centre(shard_folder):
    data = module(shard_folder, resize=None, crop="adm_random", flip=False, seed=3)
    batch = next(iter(data.train_loader()))
    numbers = {data.train.source.key(n): n for n in data.train.samples.tolist()}
    for key, image in zip(batch["key"], batch["image"], strict=True):
        decoded = decode_image(data.train.source.read(numbers[key]).image)
        cut = augment.adm_random_crop(decoded, 16, augment.draw(3, 0, numbers[key]))
        assert np.array_equal(image.numpy().transpose(1, 2, 0), cut)
    centre = next(iter(module(shard_folder, resize=None, crop="adm").validation_loader()))
    assert equal(next(iter(data.validation_loader())), centre)


# Splits


def test_without_validation_images_a_stated_fraction_is_held_out_by_key(shard_folder, tmp_path):
    write_shards(tmp_path, samples(60))
    small, grown = module(shard_folder, val_fraction=0.2), module(tmp_path, val_fraction=0.2)
    held = {small.validation.source.key(n) for n in small.validation.samples}
    assert not held & {small.train.source.key(n) for n in small.train.samples}
    assert len(small.train) + len(small.validation) == 47
    assert 3 <= len(held) <= 17
    assert held <= {grown.validation.source.key(n) for n in grown.validation.samples}


def test_train_and_test_folders_are_used(tmp_path):
    for split, numbers in (("train", range(6)), ("test", range(6, 9)), ("val", range(9, 11))):
        for n in numbers:
            folder = tmp_path / split / ("ant", "bee", "cow")[n % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(n)).save(folder / f"{n}.png")
    data = module(tmp_path, batch_size=2)
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 2, 3)
    assert data.classes == ["ant", "bee", "cow"]
    for loader, numbers in ((data.validation_loader(), [9, 10]), (data.test_loader(), [6, 7, 8])):
        pairs = [pair for batch in loader for pair in zip(batch["key"], batch["label"].tolist(), strict=True)]
        assert sorted((int(key[4:]), label) for key, label in pairs) == [(n, n % 3) for n in numbers]


def test_classes_are_the_union_when_splits_have_different_ones(tmp_path):
    for split, name in (("train", "zebra"), ("train", "ant"), ("test", "bee")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.fromarray(picture(1)).save(tmp_path / split / name / "1.png")
    data = module(tmp_path, batch_size=1)
    assert data.classes == ["ant", "bee", "zebra"]
    assert next(iter(data.test_loader()))["label"].tolist() == [1]


def test_shards_in_split_folders_and_a_path_of_their_own(tmp_path, image_folder):
    write_shards(tmp_path / "set/train", samples(12))
    write_shards(tmp_path / "set/validation", samples(5, start=50))
    assert len(module(tmp_path / "set").validation) == 5
    write_image_folder(image_folder, tmp_path / "other")
    data = module(tmp_path / "set/train", val_path=[str(tmp_path / "other/shard-{000000..000000}.tar")])
    assert (len(data.train), len(data.validation)) == (12, 10)


def test_a_class_named_train_is_a_class(tmp_path):
    for name in ("bus", "train"):
        (tmp_path / name).mkdir()
        for n in range(4):
            Image.fromarray(picture(n)).save(tmp_path / name / f"{n}.png")
    assert module(tmp_path, batch_size=1).classes == ["bus", "train"]


def test_validation_reads_each_image_once_on_two_ranks_and_mixes_classes(shard_folder):
    data = module(shard_folder, val_path=str(shard_folder))
    ranks = [list(data.validation_loader(rank=rank, world_size=2)) for rank in range(2)]
    keys = [key for batches in ranks for batch in batches for key in batch["key"]]
    assert sorted(keys) == [f"{n:04d}" for n in range(47)]
    assert len(ranks[0]) == len(ranks[1])
    first = [key for batch in data.validation_loader(images=12) for key in batch["key"]]
    assert first == [key for batch in data.validation_loader() for key in batch["key"]][:12]
    assert max(map(int, first)) > 20


def test_validation_cuts_the_middle_of_the_image_at_its_own_size(shard_folder):
    batch = next(iter(module(shard_folder, image_size=20, resize=30).validation_loader()))
    for image, key in zip(batch["image"], batch["key"], strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), picture(int(key))[:, 2:22])


def test_the_embedded_shapes_need_no_path(tmp_path):
    data = DataModule(size=40, image_size=16, batch_size=4, workers=0, cache=str(tmp_path))
    data.check()
    batch = next(iter(data.train_loader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert all(" on a " in caption for caption in batch["caption"])
    assert (len(data.train), len(data.validation)) == (40, 2)
    assert data.describe()["name"] == "smalti shapes"


def test_the_description_names_the_data_but_no_place_on_this_machine(tmp_path, shard_folder):
    described = module(shard_folder).describe()
    assert described["name"] == shard_folder.name
    assert (described["images"] + described["validation_images"], described["classes"]) == (47, 3)
    assert described == module(shard_folder, seed=9).describe()
    write_shards(tmp_path, samples(60))
    assert module(tmp_path).describe()["fingerprint"] != described["fingerprint"]


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "data.image_size=0 must be a whole number, at least 1"),
        ({"image_size": 64.0}, "data.image_size=64.0 must be a whole number"),
        ({"batch_size": -1}, "data.batch_size=-1 must be"),
        ({"workers": -1}, "data.workers=-1 must be a whole number, at least 0"),
        ({"workers": True}, "data.workers=True must be"),
        ({"seed": "x"}, "data.seed=x must be"),
        ({"size": 0}, "data.size=0 must be"),
        ({"crop": "centre"}, "data.crop=centre is not one of random, center, adm, adm_random; did you mean 'center'?"),
        ({"remainder": "keep"}, "data.remainder=keep is not one of drop, pad"),
        ({"resize": 10}, "data.resize=10 is smaller than data.image_size=16; use null or more"),
        ({"resize": 18, "crop": "adm"}, "data.resize=18 has no effect with data.crop=adm"),
        ({"resize": 18, "crop": "adm_random"}, "data.resize=18 has no effect with data.crop=adm_random"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0 must lie between 0 and 1"),
    ],
)
def test_values_that_cannot_work_are_refused_at_once(options, message):
    with pytest.raises(UserError) as refused:
        DataModule(**{"image_size": 16, "batch_size": 8} | options)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def no_images(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


@pytest.mark.parametrize(
    ("options", "check", "message"),
    [
        ({"path": "nowhere"}, {}, r"data.path=nowhere does not exist; check the path"),
        ({"path": "pictures.zip"}, {}, r"data.path=pictures.zip is a zip file; unpack it"),
        ({"val_path": "nowhere"}, {}, r"data.val_path=nowhere does not exist"),
        ({"path": None, "val_path": "x"}, {}, r"data.val_path=x needs data.path"),
        ({"batch_size": 100}, {}, r"data.batch_size=100 is larger than the \d+ training images of .*remainder=pad"),
        ({"batch_size": 10}, {"world_size": 4}, r"data.batch_size=10 is not divisible by 4 processes; use 8 or 12"),
        ({"batch_size": 6}, {"world_size": 2, "accumulate": 2}, r"by 2 processes x 2 accumulated batches; use 4 or 8"),
        ({"val_fraction": 0.01}, {"world_size": 8}, r"\d validation images are fewer than 8 processes"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(shard_folder, options, check, message):
    data = module(options.pop("path", shard_folder), **options) if options.get("path", 1) else DataModule(**options)
    with pytest.raises(UserError, match=message) as refused:
        data.check(**check)
    assert "\n" not in str(refused.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.path=.*/empty holds no images \(.jpg, .*check the path"):
        module(no_images(tmp_path)).check()


def test_a_batch_larger_than_the_set_may_be_padded(shard_folder):
    data = module(shard_folder, batch_size=100, remainder="pad")
    (batch,) = data.train_loader()
    assert len(batch["key"]) == 100 and len(set(batch["key"])) == len(data.train)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_in_one_line_also_from_a_worker(tmp_path, workers):
    broken = [{"__key__": f"{n:04d}", "jpg": b"\xff\xd8 no image"} for n in range(4)]
    write_shards(tmp_path, broken)
    with pytest.raises(UserError) as refused:
        list(module(tmp_path, batch_size=1, workers=workers).train_loader())
    place = f"{tmp_path}/shard-000000.tar: sample '000"
    assert str(refused.value).startswith(place) and "cannot be decoded: " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_command_ends_after_a_worker_met_a_corrupt_image(tmp_path):
    write_shards(tmp_path, [{"__key__": f"{n:04d}", "jpg": b"\xff\xd8 no image"} for n in range(4)])
    code = """
import sys
from smalti.data.module import DataModule
from smalti.errors import run_command
run_command(lambda: list(DataModule(path=sys.argv[1], image_size=16, batch_size=1, workers=1).train_loader()))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_a_worker_outlives_signals_that_are_not_its_parents(shard_folder):
    loader = iter(module(shard_folder, workers=1).train_loader(total=20))
    (worker,) = loader._workers
    next(loader)  # it is there and has set its handlers
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        subprocess.run(["kill", f"-{name[3:]}", str(worker.pid)], check=True)
    assert len(list(loader)) == 19


def test_a_corrupt_label_and_a_lost_file_are_named(tmp_path):
    write_shards(tmp_path / "a", [sample | {"cls": "cat"} for sample in samples(3)])
    with pytest.raises(UserError, match=r"sample '000.' cannot be decoded: invalid literal for int"):
        next(iter(module(tmp_path / "a", batch_size=1).train_loader()))
    (tmp_path / "b").mkdir()
    for n in range(3):
        Image.fromarray(picture(n)).save(tmp_path / "b" / f"{n}.png")
    data = module(tmp_path / "b", batch_size=1)
    data.check()
    for n in range(3):
        (tmp_path / "b" / f"{n}.png").unlink()
    with pytest.raises(UserError, match=r"/b/\d.png cannot be read: No such file"):
        list(data.train_loader())


def test_the_dataset_is_a_plain_map(shard_folder):
    images = module(shard_folder).validation_loader().dataset
    assert pickle.loads(pickle.dumps(images))[0]["key"] == images[0]["key"]
    source = images.split.source
    assert len(images) == len(images.split) and decode_image(source.read(0).image).shape == (20, 24, 3)
