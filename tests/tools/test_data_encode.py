"""`mmfusion data encode`: the same samples, with what frozen parts give for their media."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
import yaml

from mmfusion.cli import main
from mmfusion.data.features import MANIFEST, Features
from mmfusion.data.index import load_index, scan
from mmfusion.data.shards import Shards
from mmfusion.data.source import Source
from mmfusion.data.writer import ShardWriter
from mmfusion.processing.stored import FEATURES, read_header, read_item
from mmfusion.tools.data_rewriter import Rewriter, Runner
from mmfusion.training.callbacks import audit
from mmfusion.training.rebuild import from_recipe
from mmfusion.types import DataError, Media
from tests.data.held import held
from tests.make_debug import make_debug
from tests.training import pictures
from tests.training.tiny import TinyConverter, fit, write_recipe

DEBUG = Path(__file__).parents[2] / "recipes" / "debug.yaml"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data_encode")
    make_debug(folder / "debug")
    with ShardWriter(str(folder / "debug" / "train-9%05d.tar")) as writer:  # a second shard
        png = next(iter(Shards(f"{folder}/debug/val-*.tar").read(0)[0].values()))
        writer.write("train0000", {"png": png, "txt": b"w1"})  # a key that the first has too
        writer.write("torn", {"png": png[:45], "txt": b"w1"})
        writer.write("bare", {"png": png})
    return folder


@pytest.fixture(autouse=True)
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFUSION_CACHE", str(cache))


@pytest.fixture(scope="module")
def encoded(cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMFUSION_CACHE", str(cache))
        main(["data", "encode", str(DEBUG), "--out", str(cache / "f"), "--batch_size", "5"])
    return cache / "f"


def records(shards: Shards) -> list[tuple[dict[str, bytes], str]]:
    return [(record, key) for record, _, key in map(shards.read, range(len(shards)))]


def test_samples_keys_and_order_are_the_source_s(encoded: Path, cache: Path) -> None:
    for section, name in (("sources", "train"), ("val_sources", "val")):
        live = Shards(f"{cache}/debug/{name}-*.tar")
        stored = Shards(str(encoded / section / "squares"))
        assert stored.counts == live.counts
        for (before, key), (after, same) in zip(records(live), records(stored), strict=True):
            assert same == key
            assert before.items() <= after.items()
            more = after.keys() - before.keys()
            assert more == ({"media.0.safetensors"} if "txt" in before else set())


def test_features_are_what_the_encoder_gives_for_each_item_alone(
    encoded: Path, cache: Path
) -> None:
    module, data = from_recipe(str(DEBUG))
    encoder = module.model.encoders["image"]
    encoder.build()
    processor = encoder.media_processor()
    specs = Features.read(encoded, "").parts["encoders.image"].specs
    assert specs == {FEATURES: ("F32", (None, 16))}
    for index in (0, 7, 64):
        record = Shards(str(encoded / "sources")).read(index)[0]
        found = read_item(record["media.0.safetensors"], specs)[FEATURES]
        (media,) = data.sources["squares"][index].media
        with torch.no_grad():
            alone = encoder(processor.collate([processor(media)]))[0]
        torch.testing.assert_close(found, alone, atol=1e-6, rtol=1e-5)
        assert read_header(record["media.0.safetensors"])[1] == {"num_features": "4"}


def test_a_torn_medium_keeps_its_error(encoded: Path) -> None:
    record = Shards(str(encoded / "sources")).read(65)[0]
    about = read_header(record["media.0.safetensors"])[1]
    assert about["error"] == "corrupt_image"
    assert about["num_features"] == "4"  # its header promised them: so is it planned


def test_webdataset_and_the_strict_scanner_read_the_shards(encoded: Path) -> None:
    paths = sorted(str(path) for path in (encoded / "sources").rglob("*.tar"))
    assert all(load_index(path).tolist() == scan(path).tolist() for path in paths)
    keys = [sample["__key__"] for sample in webdataset.WebDataset(paths, shardshuffle=False)]
    assert keys == [key for _, key in records(Shards(paths))]


def test_keys_with_folders_stay_and_those_that_lead_out_are_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = next(iter(Shards(f"{cache}/debug/val-*.tar").read(0)[0].values()))
    for name, key in (("folders", "birds/0001"), ("out", "../0001")):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "000000.tar", "w") as tar:
            for member, content in ((f"{key}.PNG", png), (f"{key}.txt", b"w1")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        main(["data", "index", str(tmp_path / name)])
    encode = ["data", "encode", str(DEBUG)]
    shards = f"--data.sources.squares.shards={tmp_path}"
    main([*encode, f"{shards}/folders", "--out", str(tmp_path / "f")])
    assert [key for _, key in records(Shards(f"{tmp_path}/f/sources"))] == ["birds/0001"]
    with pytest.raises(SystemExit):
        main([*encode, f"{shards}/out", "--out", str(tmp_path / "g")])
    said = capsys.readouterr().err
    assert f"{tmp_path}/out/000000.tar: key '../0001': expected a name, or folders" in said


def test_features_instead_of_media_leave_no_picture(cache: Path, encoded: Path) -> None:
    out = cache / "instead"
    main(["data", "encode", str(DEBUG), "--out", str(out), "--media=instead", "--batch_size=5"])
    specs = Features.read(out, "").parts["encoders.image"].specs
    for (beside, _), (record, _) in zip(
        *(records(Shards(str(folder / "sources"))) for folder in (encoded, out)), strict=True
    ):
        if "txt" not in beside:  # the converter takes no such record: it stays as it is
            assert record == beside
            continue
        assert set(record) == {"txt", "media.0.safetensors"}
        file = record["media.0.safetensors"]
        assert read_header(file)[1]["instead_of"] == "png"
        if "error" not in read_header(file)[1]:
            first, second = (
                read_item(content["media.0.safetensors"], specs)[FEATURES]
                for content in (beside, record)
            )
            assert first.equal(second)


def test_an_interrupted_start_leaves_no_set_and_is_gone_on_with(
    cache: Path, encoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = cache / "interrupted"
    args = ["data", "encode", str(DEBUG), "--out", str(out), "--batch_size=5"]
    written: list[int] = []
    write = Rewriter.write

    def stop_at_the_second(self: Rewriter, shard: int, *rest: Any) -> None:
        if shard == 1 and not written.count(1):
            written.append(1)
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, *rest)

    monkeypatch.setattr(Rewriter, "write", stop_at_the_second)
    with pytest.raises(SystemExit):
        main(args)
    assert not (out / MANIFEST).exists()
    assert not (out / "sources").exists()
    main(args)
    assert written == [0, 1, 1, 0]  # the first shard of training, then validation's
    files = [path.relative_to(encoded) for path in encoded.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    whole, again = (records(Shards(str(folder / "sources"))) for folder in (encoded, out))
    assert [(set(record), key) for record, key in again] == [(set(r), key) for r, key in whole]


@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_is_named_where_the_cpu_has_no_instructions_for_it(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(audit, "computes_bfloat16", lambda device: fast)
    out = str(cache / f"half-{fast}")
    main(["data", "encode", str(DEBUG), "--out", out, "--trainer.precision=bf16-mixed"])
    said = "trainer.precision: half precision, for which this CPU has no instructions"
    assert (said in capsys.readouterr().err) == (not fast)


def test_two_processes_do_not_write_one_set(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cache / "twice"
    with held(out / ".lock"), pytest.raises(SystemExit):
        main(["data", "encode", str(DEBUG), "--out", str(out), "--batch_size=5"])
    said = f"another process is making features in {out} (it holds {out}/.lock); wait for it"
    assert said in capsys.readouterr().err
    assert not (out / ".unfinished").exists()


def test_what_another_recipe_left_unfinished_is_begun_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = cache / "anew"

    def stop(self: Runner, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "write_empty", stop)
        with pytest.raises(SystemExit):
            main(["data", "encode", str(DEBUG), "--out", str(out)])
    layer = "--model.encoders.image.init_args.feature_layer=-1"
    main(["data", "encode", str(DEBUG), "--out", str(out), layer])
    other, first = (Shards(str(cache / name / "sources")).read(0)[0] for name in ("f", "anew"))
    assert other["png"] == first["png"]
    assert other["media.0.safetensors"] != first["media.0.safetensors"]


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit):
        main(["data", "encode", *map(str, args)])
    return capsys.readouterr().err


def test_a_set_that_is_there_is_replaced_only_when_asked(
    cache: Path, tmp_path: Path, encoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sources").mkdir()
    assert "already holds sources;" in refused(capsys, DEBUG, "--out", tmp_path)
    assert "--overwrite" in refused(capsys, DEBUG, f"--data.features={encoded}")
    before = json.loads((encoded / MANIFEST).read_text())
    main(["data", "encode", str(DEBUG), f"--data.features={encoded}", "--overwrite",
          "--batch_size=5"])  # fmt: skip
    after = json.loads((encoded / MANIFEST).read_text())
    assert after["parts"] == before["parts"]
    assert after["sources"].keys() == before["sources"].keys()
    assert not (encoded / ".unfinished").exists()


def test_what_no_encode_made_is_never_replaced(
    cache: Path, tmp_path: Path, encoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(message: str) -> None:
        before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert message in refused(capsys, DEBUG, "--out", tmp_path / "f", "--overwrite")
        assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    mine = tmp_path / "f" / "sources" / "squares"
    mine.mkdir(parents=True)
    (mine / "000000-0.tar").write_bytes(b"dear")
    refuses("f holds sources, and no features.json: no `mmfusion data encode` made that")
    shutil.rmtree(tmp_path / "f")
    shutil.copytree(encoded, tmp_path / "f")
    (mine / "mine-000000.tar").write_bytes(b"dear")
    refuses("f holds sources/squares/mine-000000.tar: no `mmfusion data encode` made that")
    (mine / "mine-000000.tar").unlink()
    shutil.move(mine, tmp_path / "moved")
    mine.symlink_to(tmp_path / "moved")
    refuses("f holds sources/squares: no `mmfusion data encode` made that")


def test_data_of_the_recipe_are_not_where_features_go(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cache / "debug", tmp_path / "debug")
    raw = f"--data.sources.squares.init_args.shards={tmp_path}/debug/train-*.tar"
    (tmp_path / "link").symlink_to(tmp_path)
    error = refused(capsys, DEBUG, "--out", tmp_path / "link", raw, "--overwrite")
    assert "train-000000.tar is data of the recipe, in the folder that is to hold" in error


def test_a_set_broken_off_on_its_way_to_its_place_is_replaced(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Features, folder: Path) -> None:
        raise KeyboardInterrupt

    args = ["data", "encode", str(DEBUG), "--out", str(tmp_path), "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(Features, "write", stop)
        with pytest.raises(SystemExit):
            main(args)
    assert (tmp_path / "sources").is_dir()
    assert not (tmp_path / MANIFEST).exists()
    main(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        MANIFEST, "sources", "val_sources",
    ]  # fmt: skip


def test_what_came_while_features_were_made_is_not_replaced(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def come(self: Runner, folder: Path) -> None:
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "a.tar").write_bytes(b"dear")

    args = ["data", "encode", str(DEBUG), "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "write_empty", come)
        with pytest.raises(SystemExit):
            main(args)
    assert (tmp_path / "sources" / "a.tar").read_bytes() == b"dear"
    shutil.rmtree(tmp_path / "sources")
    main(args)
    assert (tmp_path / MANIFEST).is_file()


@pytest.mark.slow
def test_what_cannot_be_stored_is_refused(
    cache: Path, tmp_path: Path, encoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "f"]
    assert "Give --out, or data.features" in refused(capsys, DEBUG)
    error = refused(capsys, DEBUG, *out, "--parts=[encoders.video]")
    assert "names ['encoders.video']; the recipe runs ['encoders.image']" in error
    trained = '--model.tuning={"encoders": {"class_path": "Full", "init_args": {"lr": 0.1}}}'
    error = refused(capsys, DEBUG, *out, trained)
    assert "no part of the recipe can be stored: {'encoders.image': 'model.tuning.encoders" in error
    error = refused(capsys, DEBUG, *out, trained, "--parts=[encoders.image]")
    assert "encoders.image cannot be stored: model.tuning.encoders trains it." in error
    again = f"--data.sources.squares.init_args.shards={encoded}/sources"
    assert "holds stored features already" in refused(capsys, DEBUG, *out, again)
    of_its_own = f"--data.sources.squares.class_path={__name__}.Doubled"
    assert "data.sources.squares is a Doubled" in refused(capsys, DEBUG, *out, of_its_own)
    assert not (tmp_path / "f" / MANIFEST).exists()


class Doubled(Source):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index // 2)


def test_what_an_earlier_stage_trained_stays_live(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = {"encoders": pictures.FULL, "input_projectors": pictures.FULL}
    steps = {"trainer__max_steps": 1, "model__schedule": {"warmup_steps": 0}}
    first = fit(write_recipe(tmp_path, model__tuning=tuning, **steps)).path
    later = write_recipe(tmp_path, model__init_from=str(first))
    error = refused(capsys, later, "--out", tmp_path / "f")
    assert "no part of the recipe can be stored" in error
    assert "an earlier stage trained it" in error


class Alike(TinyConverter):
    """Two members, one after the other."""

    def __call__(self, record: Any, shard: str, key: str) -> Any:
        from mmfusion.types import Message, Sample, Text

        shown = tuple(Media("image", record[name], "png") for name in ("a.png", "b.png"))
        return Sample((Message("user", shown), Message("assistant", (Text("w1"),))))


def test_members_of_the_same_bytes_are_all_put_back(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "alike-%06d.tar")) as writer:
        writer.write("0", {"a.png": b"same", "b.png": b"same"})
    converter = {"class_path": f"{__name__}.Alike"}
    source = {"shards": f"{tmp_path}/alike-*.tar", "converter": converter}
    recipe = write_recipe(tmp_path, data__sources={"alike": source})
    main(["data", "encode", str(recipe), "--out", str(tmp_path / "f"), "--media=instead"])
    assert set(Shards(str(tmp_path / "f" / "sources")).read(0)[0]) == {
        "media.0.safetensors", "media.1.safetensors",
    }  # fmt: skip
    _, data = from_recipe(str(recipe), [f"--data.features={tmp_path / 'f'}"])
    first, second = data.sources["alike"][0].media
    assert first.stored
    assert first.stored != second.stored
    assert first.data == second.data == b""


class Edited(TinyConverter):
    """Asks with a picture and answers with the same one."""

    def __call__(self, record: Any, shard: str, key: str) -> Any:
        from mmfusion.types import Message, Sample, Text

        if "txt" not in record:
            raise DataError("missing_member", "no txt")
        words = record["txt"].decode()
        picture = Media("image", record["png"], "png", caption=words)
        asked = Message("user", (picture, Text("w31")))
        return Sample((asked, Message("assistant", (picture,))))


@pytest.mark.slow
def test_a_medium_that_a_live_part_reads_too_is_kept(tmp_path: Path) -> None:
    """The encoder's features of it are stored, the generator's VAE reads it."""
    home = pictures.prepare(tmp_path)
    recipe = pictures.recipe(
        home,
        data__sources={
            "pairs": {
                "shards": f"{home}/pairs-*.tar",
                "converter": {"class_path": f"{__name__}.Edited"},
            }
        },
        model__encoders={"image": {"class_path": "tests.models.tiny.TinyEncoder"}},
        model__input_projectors={
            "image": {"class_path": "mmfusion.models.projectors.linear.Linear"}
        },
    )
    kept = {
        "[encoders.image]": {"png", "txt", "media.0.safetensors"},
        "[encoders.image,generators.image.text_encoder]": {
            "png", "txt", "media.0.safetensors", "target.0.safetensors",
        },
        "[encoders.image,generators.image.vae]": {
            "txt", "media.0.safetensors", "target.0.safetensors",
        },
    }  # fmt: skip
    for number, (parts, members) in enumerate(kept.items()):
        out = tmp_path / f"f{number}"
        args = ["--out", str(out), "--media=instead", f"--parts={parts}", "--batch_size=16"]
        main(["data", "encode", str(recipe), *args])
        assert set(Shards(str(out / "sources")).read(0)[0]) == members
        manifest = json.loads((out / MANIFEST).read_text())
        assert list(manifest["parts"]) == yaml.safe_load(parts)
        assert (out / "generators.image.empty.safetensors").exists() == ("text" in parts)
