"""Shards and folders of images, read by offset."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from sample_images import encoded, picture, samples

from smalti.data import offsets
from smalti.data.decode import decode_image
from smalti.data.folder import FolderSource
from smalti.data.shards import ShardSource, find_shards, read_index, verify, write_image_folder, write_shards
from smalti.errors import UserError


def opened(folder: Path, cache: Path | None = None) -> ShardSource:
    return ShardSource(find_shards(str(folder)), cache or folder / "cache")


def tar(file: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(file, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def test_webdataset_reads_what_we_write(shard_folder):
    shards = [str(path) for path in sorted(shard_folder.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    ours = opened(shard_folder)
    assert [sample["__key__"] for sample in theirs] == [ours.key(n) for n in range(len(ours))]
    for number, sample in enumerate(theirs):
        read = ours.read(number)
        assert (read.label, read.caption) == (sample["cls"], sample["txt"])
        assert np.array_equal(decode_image(read.image), sample["png"])


def test_we_read_what_webdataset_writes(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "foreign.tar")) as writer:
        for number in range(5):
            writer.write({"__key__": f"a/b{number}", "png": picture(number), "cls": number, "json": {"n": number}})
    ours = opened(tmp_path)
    assert [ours.key(n) for n in range(5)] == [f"a/b{n}" for n in range(5)]
    assert [ours.read(n).label for n in range(5)] == list(range(5))
    assert np.array_equal(decode_image(ours.read(3).image), picture(3))
    assert json.loads(ours.members(4)["json"]) == {"n": 4}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read_with_long_names_and_folders(tmp_path, format):
    name = "/".join(["folder" * 5] * 5) + "/" + "x" * 60
    members = [(f"{name}.PNG", encoded(picture(1))), (f"{name}.cls", b"3"), ("__meta__", b"?"), ("README", b"none")]
    ours = opened(tar(tmp_path / "a.tar", members, format).parent)
    assert (len(ours), ours.key(0), ours.read(0).label) == (1, name, 3)


def test_the_index_has_the_layout_of_wids_and_its_sums_are_verified(tmp_path):
    write_shards(tmp_path, samples(7), samples_per_shard=4, classes=["a", "b", "c"])
    index = read_index(tmp_path)
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    assert [(entry["url"], entry["nsamples"]) for entry in index["shardlist"]] == [
        ("shard-000000.tar", 4),
        ("shard-000001.tar", 3),
    ]
    assert verify(tmp_path) == 2
    data = bytearray((tmp_path / "shard-000001.tar").read_bytes())
    data[600] ^= 1
    (tmp_path / "shard-000001.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"shard-000001.tar has another sha256"):
        verify(tmp_path)


def test_equal_samples_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        write_shards(tmp_path / name, samples(5))
    assert (tmp_path / "one/shard-000000.tar").read_bytes() == (tmp_path / "two/shard-000000.tar").read_bytes()


def test_a_table_is_built_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    write_shards(tmp_path, samples(6))
    table = tmp_path / "shard-000000.offsets.npz"
    table.unlink()
    opened(tmp_path)
    assert table.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(offsets, "_members", lambda shard: pytest.fail("the table was there"))
        assert opened(tmp_path).read(5).caption == "picture 5"
    tar(tmp_path / "shard-000000.tar", [("new.png", encoded(picture(0)))])
    (tmp_path / "index.json").unlink()
    assert opened(tmp_path).key(0) == "new"


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 nothing", pickle.dumps([1])])
def test_a_damaged_table_is_built_again(tmp_path, damage):
    write_shards(tmp_path, samples(6))
    (tmp_path / "shard-000000.offsets.npz").write_bytes(damage)
    assert opened(tmp_path).read(5).caption == "picture 5"


def test_a_folder_that_cannot_be_written_has_its_tables_in_the_cache(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", samples(6))
    table = tmp_path / "data/shard-000000.offsets.npz"
    table.unlink()
    save = offsets.OffsetTable.save

    def refuse(self, file, shard):
        if file.parent == shard.parent:
            raise PermissionError(13, "Permission denied", str(file))
        save(self, file, shard)

    monkeypatch.setattr(offsets.OffsetTable, "save", refuse)
    assert opened(tmp_path / "data", tmp_path / "cache").read(2).label == 2
    assert not table.exists()
    assert len(list((tmp_path / "cache/offsets").glob("*.npz"))) == 1


@pytest.mark.parametrize("cut", [100, 512, 700, -512, -1024, -1025, -2000])
def test_a_shard_that_is_cut_off_is_refused_by_name(tmp_path, cut):
    write_shards(tmp_path, samples(4))
    file = tmp_path / "shard-000000.tar"
    whole = file.read_bytes()
    (tmp_path / "index.json").unlink()
    file.write_bytes(whole[:cut])
    if cut == -512:  # one block of zeros still ends it
        assert len(opened(tmp_path)) == 4
        return
    with pytest.raises(UserError, match=r"shard-000000.tar"):
        opened(tmp_path)


def test_a_shard_shorter_than_the_index_says_is_refused(tmp_path):
    write_shards(tmp_path, samples(4))
    file = tmp_path / "shard-000000.tar"
    file.write_bytes(file.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"index.json says \d+; copy it again"):
        opened(tmp_path)


def test_a_shard_that_shrinks_while_it_is_read_is_reported(tmp_path):
    write_shards(tmp_path, samples(4))
    ours = opened(tmp_path)
    os.truncate(tmp_path / "shard-000000.tar", 700)
    with pytest.raises(UserError, match="sample '0003' is cut off"):
        ours.read(3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"alone")], r"sample 'a' has no image"),
        ([("a.png", b"1"), ("a.png", b"2")], r"sample 'a' has two members .png"),
        ([("a.b.txt", b"1"), ("a.png", b""), ("a.b.txt", b"2")], r"keys end at the first dot"),
    ],
)
def test_samples_that_are_no_samples_are_refused_by_name(tmp_path, members, message):
    with pytest.raises(UserError, match=message):
        opened(tar(tmp_path / "x.tar", members).parent)


def test_shards_are_named_by_folder_glob_braces_and_lists(tmp_path):
    write_shards(tmp_path, samples(8), samples_per_shard=2)
    everything = find_shards(str(tmp_path))
    assert len(everything) == 4
    assert find_shards(f"{tmp_path}/*.tar") == everything
    assert find_shards(f"{tmp_path}/shard-{{000000..000003}}.tar") == everything
    assert find_shards([f"{tmp_path}/shard-00000{{0,1}}.tar", str(everything[2]), str(everything[3])]) == everything


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none-{0..3}.tar", r"data.path=.*none-0.tar does not exist"),
        ("*.nothing", "does not exist"),
        (".", "names no .tar shard"),
        ("a.tar.gz", "unpack it first"),
    ],
)
def test_shards_that_are_not_there_are_named(tmp_path, name, message):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        find_shards(str(tmp_path / name))


def test_members_that_could_run_code_are_not_even_indexed(tmp_path):
    ours = opened(tar(tmp_path / "x.tar", [("a.png", encoded(picture(1))), ("a.pyd", b"cos\nsystem\n.")]).parent)
    assert list(ours.members(0)) == ["png"]


def test_a_source_is_pickled_without_its_files(shard_folder):
    ours = opened(shard_folder)
    ours.read(0)
    assert len(ours._files) == 1
    copy = pickle.loads(pickle.dumps(ours))
    assert len(copy._files) == 0
    assert copy.read(40) == ours.read(40)


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("smalti.data.shards._OPEN_FILES", 3)
    write_shards(tmp_path, samples(10), samples_per_shard=1)
    ours = opened(tmp_path)
    assert [ours.read(n).caption for n in (0, 5, 9, 0, 3, 7, 5)] == [f"picture {n}" for n in (0, 5, 9, 0, 3, 7, 5)]
    assert len(ours._files) == 3


def test_writing_over_shards_and_keys_with_dots_is_refused(tmp_path):
    write_shards(tmp_path, samples(1))
    with pytest.raises(UserError, match="has shards already"):
        write_shards(tmp_path, samples(1))
    with pytest.raises(ValueError, match=r"'a\.b'"):
        write_shards(tmp_path / "other", [{"__key__": "a.b", "png": b""}])
    assert not list((tmp_path / "other").glob("*"))


def test_an_image_folder_is_read_in_place(image_folder):
    source = FolderSource(image_folder)
    assert source.classes == ["cat", "dog", "emu"]
    assert len(source) == 10
    for n in range(10):
        number = int(source.key(n).rpartition("/")[2])
        assert source.read(n).label == number % 3
        if number % 4 != 1 and number % 4 != 2:
            assert np.array_equal(decode_image(source.read(n).image), picture(number))


def test_a_flat_folder_has_no_classes(tmp_path):
    Image.fromarray(picture(1)).save(tmp_path / "one.png")
    source = FolderSource(tmp_path)
    assert (source.classes, source.read(0).label, source.key(0)) == (None, -1, "one")


def test_images_beside_class_folders_are_not_skipped_in_silence(image_folder):
    Image.fromarray(picture(1)).save(image_folder / "sheet.png")
    with pytest.raises(UserError, match="1 images beside its class folders"):
        FolderSource(image_folder)


def test_an_image_folder_becomes_shards(image_folder, tmp_path):
    (image_folder / "cat" / "0.0.png").write_bytes((image_folder / "cat" / "0.png").read_bytes())
    command = [sys.executable, "-m", "smalti.data.shards"]
    run = partial(subprocess.run, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    written = run([*command, "write", str(image_folder), str(tmp_path / "out")])
    assert "wrote 11 samples" in written.stdout
    source, shards = FolderSource(image_folder), opened(tmp_path / "out")
    assert shards.classes == source.classes
    keys = {shards.key(n): n for n in range(len(shards))}
    for n in range(len(source)):
        read = shards.read(keys[source.key(n).replace("0.0", "0_0")])
        assert read.label == source.read(n).label
        assert np.array_equal(decode_image(read.image), decode_image(source.read(n).image))
    refused = run([*command, "write", "nowhere", str(tmp_path / "no")])
    assert (refused.returncode, refused.stderr) == (2, "error: source=nowhere is not a folder\n")
    assert not (tmp_path / "no").exists()


def test_two_files_with_one_name_keep_two_keys(tmp_path):
    for kind in ("png", "bmp"):
        (tmp_path / "in" / "x").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(1)).save(tmp_path / "in" / "x" / f"a.{kind}")
    write_image_folder(tmp_path / "in", tmp_path / "out")
    shards = opened(tmp_path / "out")
    assert sorted(shards.key(n) for n in range(2)) == ["x/a", "x/a_"]
