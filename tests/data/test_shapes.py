"""The embedded set: the same pictures everywhere, captions that are true, and a cache that is whole or absent."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from webdataset import WebDataset

from smalti.data import shapes
from smalti.data.shapes import CLASSES, COLOURS, draw, prepare
from smalti.data.shards import read_index, verify
from smalti.data.textures import _TEXTURES
from smalti.errors import UserError

PHRASE = rf"an? (?:(?:large|small) )?(?:{'|'.join(COLOURS)}) (?P<kind>{'|'.join(CLASSES)})"
REPOSITORY = Path(__file__).resolve().parents[2]


def centre(masks: np.ndarray, number: int) -> np.ndarray:
    return np.argwhere(masks == number).mean(axis=0)


def test_a_picture_depends_on_seed_split_and_index_alone():
    one, again = draw(3, 7), draw(3, 7)
    assert (one.image == again.image).all() and one.caption == again.caption
    others = [draw(4, 7), draw(3, 8), draw(3, 7, split=1)]
    assert all((one.image != other.image).mean() > 0.3 for other in others)


@pytest.mark.parametrize("side", [16, 33, 64, 160])
def test_any_size_is_drawn(side):
    for index in range(8):
        drawing = draw(0, index, side)
        assert drawing.image.shape == (side, side, 3) and drawing.masks.shape == (side, side)
        assert drawing.image.dtype == drawing.masks.dtype == np.uint8


def test_a_larger_picture_of_the_same_index_shows_the_same():
    for index in range(20):
        small, large = draw(0, index, 48), draw(0, index, 96)
        assert small.caption == large.caption
        assert (small.masks == large.masks[::2, ::2]).mean() > 0.95


def test_captions_and_labels_say_what_the_masks_show():
    # y grows downwards; a shape half under another may have its visible centre moved, hence a few exceptions.
    true = total = 0
    for index in range(300):
        drawing = draw(0, index)
        first = re.match(PHRASE, drawing.caption)
        assert first and CLASSES[drawing.label] == first["kind"]
        assert re.fullmatch(
            rf"{PHRASE}( .+)? on a ({'|'.join(_TEXTURES)}) background".replace("?P<kind>", "?:"), drawing.caption
        )
        relations = re.findall(r"(left of|right of|above|below) an? ", drawing.caption)
        assert set(np.unique(drawing.masks)) <= set(range(len(relations) + 2))
        for number, relation in enumerate(relations, start=2):
            if (drawing.masks == number).any():
                dy, dx = centre(drawing.masks, 1) - centre(drawing.masks, number)
                holds = {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}
                true, total = true + holds[relation], total + 1
    assert true > 0.97 * total


def test_every_class_colour_and_texture_occurs_and_shapes_are_rarely_hidden():
    drawings = [draw(0, index, 32) for index in range(600)]
    words = " ".join(drawing.caption for drawing in drawings).split()
    assert {*CLASSES, *COLOURS, *_TEXTURES, "small", "large"} <= set(words)
    shapes_drawn = sum(len(re.findall(PHRASE, drawing.caption)) for drawing in drawings)
    seen = sum(len(set(np.unique(drawing.masks)) - {0}) for drawing in drawings)
    assert seen > 0.99 * shapes_drawn


def test_the_set_is_shards_that_webdataset_reads(tmp_path):
    folder = prepare(tmp_path, side=16, count=30)
    assert folder == prepare(tmp_path, side=16, count=30)
    assert verify(folder / "train") == 1
    assert read_index(folder / "validation")["shardlist"][0]["nsamples"] == 2
    read = list(WebDataset(str(folder / "train/shapes-000000.tar"), shardshuffle=False).decode("l8"))
    assert len(read) == 30
    assert (read[4]["masks.png"] == draw(0, 4, 16).masks).all()
    assert read[4]["txt"] == draw(0, 4, 16).caption


def test_validation_pictures_are_others(tmp_path):
    folder = prepare(tmp_path, side=16, count=40)
    captions = [
        [sample["txt"] for sample in WebDataset(str(folder / split / "shapes-000000.tar"), shardshuffle=False)]
        for split in ("train", "validation")
    ]
    assert captions[0][:2] != captions[1]


def test_other_arguments_and_other_code_have_their_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_write", lambda part, *arguments: part.mkdir())
    names = {prepare(tmp_path, side=16, count=10).name, prepare(tmp_path, side=16, count=11).name}
    code = Path(shapes.__file__).read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: code() + b"# other")
    names.add(prepare(tmp_path, side=16, count=10).name)
    assert len(names) == 3


def test_processes_of_their_own_write_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SAMPLES_PER_SHARD", 8)
    jobs = [
        (str(tmp_path / name / f"{start:02d}.tar"), 0, 0, start, start + 8, 16)
        for name in ("one", "two")
        for start in (0, 8, 16)
    ]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone, shared = shapes._run(jobs[:3]), shapes._in_processes(jobs[3:], 2)
    assert list(alone.values()) == [shared[file] for file in sorted(shared)]


def _prepare_and_count(cache: str, times) -> None:
    write = shapes._write

    def counted(*arguments) -> None:
        with times.get_lock():
            times.value += 1
        time.sleep(0.3)
        write(*arguments)

    shapes._write = counted
    prepare(Path(cache), side=16, count=20)


def test_of_two_processes_one_draws_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context("fork")
    times = context.Value("i", 0)
    processes = [context.Process(target=_prepare_and_count, args=(str(tmp_path), times)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert times.value == 1
    assert verify(prepare(tmp_path, side=16, count=20) / "train") == 1


def test_a_killed_process_leaves_nothing_that_is_used(tmp_path):
    code = "import sys, pathlib; from smalti.data.shapes import prepare; prepare(pathlib.Path(sys.argv[1]), count=3000)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("shapes/.*.part-*/train/.*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    names = [re.sub(r"-\w{12}\.|-\d+$", ".", path.name) for path in (tmp_path / "shapes").iterdir()]
    assert sorted(names) == [".shapes-64px-3000.lock", ".shapes-64px-3000.part."]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    name = prepare(tmp_path, side=16, count=10).name
    (tmp_path / "shapes" / name).rename(tmp_path / "shapes" / f".{name}.part-99999")
    assert verify(prepare(tmp_path, side=16, count=10) / "train") == 1
    assert not list((tmp_path / "shapes").glob(".*.part-*"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache=.*/file cannot hold the embedded shapes"):
        prepare(tmp_path / "file", count=1)
