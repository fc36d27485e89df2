from __future__ import annotations

import os
import signal
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfusion.data.index import ShardError, load_index, scan
from mmfusion.data.shards import Shards
from mmfusion.data.writer import ShardWriter
from tests.data.tars import offsets_with_tarfile, read_with_webdataset

RECORDS = [(f"k{i:04d}", {"jpg": bytes(i * 37 % 1500), "json": b"{}"}) for i in range(25)]


def write(
    folder: Path,
    records: list[tuple[str, dict[str, bytes]]],
    pattern: str = "train-%06d.tar",
    **options: int,
) -> list[Path]:
    with ShardWriter(str(folder / pattern), **options) as writer:
        write_all(writer, records)
    assert writer.num_samples == len(records)
    return [Path(path) for path in writer.paths]


def test_webdataset_tarfile_and_shards_read_what_was_written(tmp_path: Path) -> None:
    paths = write(tmp_path, RECORDS, max_samples=10)
    assert [path.name for path in paths] == [f"train-00000{i}.tar" for i in range(3)]
    assert [sample for path in paths for sample in read_with_webdataset(path)] == RECORDS
    shards = Shards(str(tmp_path))
    assert shards.counts == [10, 10, 5]
    assert [(key, record) for record, _, key in map(shards.read, range(25))] == RECORDS
    for path in paths:
        assert load_index(str(path)).tolist() == offsets_with_tarfile(path)
        with tarfile.open(path) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}


def write_all(writer: ShardWriter, records: list[tuple[str, dict[str, bytes]]]) -> None:
    for key, record in records:
        writer.write(key, record)


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.lists(
            st.text(st.characters(exclude_characters="./", exclude_categories=["Cs", "Cc"]),
                    min_size=1).filter(lambda name: not name.startswith("__")),
            min_size=1, max_size=3,
        ).map("/".join),
        st.dictionaries(
            st.sampled_from(["jpg", "0.jpg", "seg.png", "größe", "x" * 120]),
            st.binary(max_size=1100), min_size=1,
        ),
        max_size=5,
    )
)  # fmt: skip
def test_any_accepted_record_comes_back(
    tmp_path_factory: pytest.TempPathFactory, records: dict[str, dict[str, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("w")
    paths = write(folder, list(records.items()), max_samples=100)
    if not records:
        assert paths == []
        return
    shards = Shards(str(folder))
    read = {key: record for record, _, key in map(shards.read, range(len(shards)))}
    assert read == records == dict(read_with_webdataset(paths[0]))


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", RECORDS)
    time.sleep(0.01)
    second = write(tmp_path / "b", RECORDS)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_shards_roll_over_by_bytes_and_a_large_record_stands_alone(tmp_path: Path) -> None:
    sizes = [400, 400, 400, 5000, 100, 100]
    records = [(f"k{i}", {"bin": bytes(size)}) for i, size in enumerate(sizes)]
    paths = write(tmp_path, records, max_bytes=1000)
    assert [len(scan(str(path))) - 1 for path in paths] == [2, 1, 1, 2]


@pytest.mark.parametrize(
    "key",
    ["", "a.b", "/a", "a//b", "a/", "../a", "a/../b", "a.b/c", "__a", "a/__b__", "a\0b", "\udce9"],
)
def test_keys_that_readers_would_change_are_refused(tmp_path: Path, key: str) -> None:
    with (
        ShardWriter(str(tmp_path / "%d.tar")) as writer,
        pytest.raises(ValueError, match=r"UTF|key"),
    ):
        writer.write(key, {"txt": b""})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("extension", ["", ".jpg", "JPG", "a/b", "__key__", "\udce9"])
def test_extensions_that_readers_would_change_are_refused(tmp_path: Path, extension: str) -> None:
    with (
        ShardWriter(str(tmp_path / "%d.tar")) as writer,
        pytest.raises(ValueError, match=r"UTF|ext"),
    ):
        writer.write("a", {extension: b""})


def test_empty_record_text_content_and_repeated_key_are_refused(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "%d.tar")) as writer:
        with pytest.raises(ValueError, match="holds no files"):
            writer.write("a", {})
        with pytest.raises(TypeError, match=r"a.txt is str, expected bytes"):
            writer.write("a", {"txt": "text"})  # type: ignore[dict-item]
        writer.write("a", {"txt": b""})
        with pytest.raises(ValueError, match="already written"):
            writer.write("a", {"txt": b""})


@pytest.mark.parametrize("pattern", ["a.tar", "a-%d-%d.tar", "a-%06d", "%06d/a.tar", "%s-%d.tar"])
def test_pattern_without_one_number_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match="one number"):
        ShardWriter(str(tmp_path / pattern))


def test_earlier_shards_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    write(tmp_path, RECORDS, max_samples=5)
    (tmp_path / "train-x.tar").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"train-000000.tar and 9 more files.*--overwrite"):
        write(tmp_path, RECORDS[:3])
    write(tmp_path, RECORDS[:3], overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [
        "train-000000.tar",
        "train-000000.tar.idx",
        "train-x.tar",
    ]


def test_exception_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    before = [path.read_bytes() for path in write(tmp_path, RECORDS, pattern="%d.tar")]
    writer = ShardWriter(str(tmp_path / "%d.tar"), max_samples=10, overwrite=True)
    with pytest.raises(ValueError, match="already written"), writer:
        write_all(writer, [*RECORDS, RECORDS[-1]])
    assert writer.paths == []
    assert sorted(os.listdir(tmp_path)) == ["0.tar", "0.tar.idx"]
    assert [(tmp_path / "0.tar").read_bytes()] == before


def test_a_failure_among_the_names_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are given last; here the third of them cannot be. The earlier shards stay."""
    write(tmp_path, RECORDS[:9], pattern="%d.tar", max_samples=2)
    earlier = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    names = []

    def publish_two(temporary: str, path: str) -> None:
        names.append(path)
        if len(names) > 2:
            raise OSError(5, "Input/output error", path)
        os.replace(temporary, path)

    monkeypatch.setattr("mmfusion.data.writer.publish", publish_two)
    with (
        pytest.raises(OSError, match="Input/output"),
        ShardWriter(str(tmp_path / "%d.tar"), max_samples=10, overwrite=True) as writer,
    ):
        write_all(writer, RECORDS)
    assert names == [str(tmp_path / name) for name in ("0.tar.idx", "0.tar", "1.tar.idx")]
    assert writer.paths == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == earlier


def test_shards_that_came_meanwhile_are_refused_not_removed(tmp_path: Path) -> None:
    late = ShardWriter(str(tmp_path / "train-%06d.tar"))
    write_all(late, RECORDS[:3])
    theirs = [path.read_bytes() for path in write(tmp_path, RECORDS, max_samples=5)]
    with pytest.raises(FileExistsError, match=r"train-000000.tar and 9 more"):
        late.close()
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.tar"))] == theirs
    assert len(os.listdir(tmp_path)) == 10


def test_a_folder_may_have_a_percent_sign(tmp_path: Path) -> None:
    assert write(tmp_path / "100%", RECORDS) == [tmp_path / "100%" / "train-000000.tar"]


def test_closing_twice_changes_nothing(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "%d.tar")) as writer:
        write_all(writer, RECORDS)
        writer.close()
    assert sorted(os.listdir(tmp_path)) == ["0.tar", "0.tar.idx"]


def test_killed_writer_leaves_nothing_that_looks_like_a_data_set(tmp_path: Path) -> None:
    for delay in (0.0, 0.01, 0.03, 0.06):
        folder = tmp_path / str(delay)
        child = os.fork()
        if child == 0:
            with ShardWriter(str(folder / "%06d.tar"), max_samples=3) as writer:
                for number in range(10**6):
                    writer.write(f"{number:07d}", {"bin": bytes(5000)})
            os._exit(0)
        while not folder.exists() or len(os.listdir(folder)) < 3:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with pytest.raises(ShardError, match=r"holds no \.tar file"):
            Shards(str(folder))
        write(folder, RECORDS, pattern="%06d.tar", overwrite=True)
        assert sorted(os.listdir(folder)) == ["000000.tar", "000000.tar.idx"]
