"""`mmfusion data build LIST OUTPUT`: media files and a list of samples -> shards with indexes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from jsonargparse.typing import NonNegativeInt, PositiveInt
from tqdm import tqdm

from mmfusion.data.converters.conversation import Conversation
from mmfusion.data.converters.members import MODALITY_OF, file_format
from mmfusion.data.index import MAX_RECORD_BYTES
from mmfusion.data.writer import ShardWriter
from mmfusion.processing.processor import check_answers
from mmfusion.tools.data_list import BadEntry, Entry, read_list
from mmfusion.types import DataError

_MOST_LISTED = 20

Bad = list[tuple[str, str]]
"""(place in the list, what is wrong) of each bad entry."""


def build(
    list_path: str,
    output: str,
    media_root: str | None = None,
    shard_samples: PositiveInt = 10_000,
    shard_bytes: PositiveInt = 1 << 30,
    decode: bool = False,
    max_bad: NonNegativeInt = 0,
    allow_outside: bool = False,
    overwrite: bool = False,
) -> None:
    """Make WebDataset shards of media files and a list.

    An entry of the list is a medium with a caption ({"image": "a.jpg", "caption": "..."}; also
    video, audio or path) or a conversation ({"image": "a.jpg", "conversations": [...]} or
    {"messages": [...]}). A captioned medium becomes KEY.jpg and KEY.txt, a conversation KEY.json
    and KEY.jpg (of several media: KEY.0.jpg, KEY.1.png, ...); KEY is the number of the entry. A
    conversation is kept as it is, but that parts of content lists then name the stored media (jpg,
    0.jpg). All entries are checked before anything is written, conversations by reading them.

    Args:
        list_path: JSON (a list), JSONL, CSV or TSV (first line: names of columns).
        output: folder, or path with a number such as data/train-%06d.tar.
        media_root: folder that paths in the list start from; by default the list's own.
        shard_samples: samples in a shard at most.
        shard_bytes: bytes in a shard at most.
        decode: also decode each image, the first frame of each video, and each sound.
        max_bad: bad entries (missing file, empty caption, ...) to leave out; with more, nothing is
            made.
        allow_outside: allow files outside of media_root.
        overwrite: replace earlier shards of this output.

    Raises:
        ValueError: where there are more than max_bad bad entries, with the first of them.
    """
    pattern = _pattern(output, list_path)
    root = os.path.realpath(media_root or os.path.dirname(list_path) or ".")
    bad: Bad = []
    good = []
    for number, (place, entry) in enumerate(
        tqdm(read_list(list_path), "checking", unit=" entries")
    ):
        try:
            if isinstance(entry, BadEntry):
                raise entry
            files = _files(entry, root, allow_outside)
            _check_files(files)
            _check_texts(entry, files)
            good.append(number)
        except BadEntry as error:
            bad.append((place, str(error)))
    _refuse_many(bad, max_bad, list_path)
    if not good:
        raise ValueError(f"{list_path}: none of its {len(bad)} entries makes a sample")
    with ShardWriter(pattern, shard_samples, shard_bytes, overwrite) as writer:
        for key, entry, place in _entries(list_path, good):
            try:
                writer.write(key, _record(entry, _files(entry, root, allow_outside), decode))
            except BadEntry as error:
                bad.append((place, str(error)))
                _refuse_many(bad, max_bad, list_path)
    _report(writer, pattern, bad)


def _pattern(output: str, list_path: str) -> str:
    if output.endswith(".tar"):
        return output
    name = os.path.splitext(os.path.basename(list_path))[0].replace("%", "-")
    return os.path.join(output, f"{name}-%06d.tar")


def _entries(list_path: str, good: list[int]) -> Iterator[tuple[str, Entry, str]]:
    """(key, entry, place) of the entries that passed the check."""
    wanted = iter(good)
    following = next(wanted)
    progress = tqdm(total=len(good), desc="writing", unit=" samples")
    with progress:
        for number, (place, entry) in enumerate(read_list(list_path)):
            if number != following:
                continue
            if isinstance(entry, BadEntry):
                raise ValueError(f"{place} changed while the shards were made: {entry}")
            yield f"{number:08d}", entry, place
            progress.update()
            following = next(wanted, -1)


def _files(entry: Entry, root: str, allow_outside: bool) -> list[tuple[str, str]]:
    """(extension in the record, path) of each media file."""
    files = []
    for number, written in enumerate(entry.media):
        if not written.isprintable():
            raise BadEntry(f"{written!r} is no path of a file: it holds what no file name has")
        if "://" in written:
            raise BadEntry(f"{written!r} is no path of a file; addresses are not fetched")
        path = os.path.realpath(os.path.join(root, written))
        if not allow_outside and os.path.commonpath([root, path]) != root:
            raise BadEntry(
                f"{written!r} lies outside of {root}; where that is meant, use --media_root or "
                "--allow_outside true"
            )
        extension = os.path.splitext(written)[1][1:].lower()
        if extension not in MODALITY_OF:
            raise BadEntry(
                f"{written!r}: {extension!r} is no extension of a media file, expected one of "
                f"{[*MODALITY_OF]}"
            )
        files.append((f"{number}.{extension}" if len(entry.media) > 1 else extension, path))
    return files


def _check_files(files: list[tuple[str, str]]) -> None:
    sizes = []
    for _, path in files:
        if not os.path.isfile(path):
            raise BadEntry(f"{path} does not exist or is no file")
        sizes.append(os.path.getsize(path))
        if not sizes[-1]:
            raise BadEntry(f"{path} is empty")
    if sum(sizes) > MAX_RECORD_BYTES:
        raise BadEntry(f"{sum(sizes)} bytes of media; at most {MAX_RECORD_BYTES} are read")


def _check_texts(entry: Entry, files: list[tuple[str, str]]) -> None:
    """Read a conversation as training will; its media need not be there for that."""
    record = dict.fromkeys([name for name, _ in files], b"") | _texts(entry, files)
    if entry.caption is not None:
        return
    try:
        check_answers(Conversation()(record, "", "").messages)
    except DataError as error:
        raise BadEntry(f"the conversation cannot be used: {error}") from None


def _record(entry: Entry, files: list[tuple[str, str]], decode: bool) -> dict[str, bytes]:
    record = {}
    for extension, path in files:
        try:
            with open(path, "rb") as file:
                record[extension] = file.read()
        except OSError as error:
            raise BadEntry(f"{path} cannot be read: {error}") from None
        if decode:
            _check_media(record[extension], file_format(extension), path)
    return record | _texts(entry, files)


def _texts(entry: Entry, files: list[tuple[str, str]]) -> dict[str, bytes]:
    """The members of a record that are text."""
    texts = {}
    try:
        if entry.caption is not None:
            texts["txt"] = entry.caption.encode()
        if entry.json is not None:
            document = entry.naming([name for name, _ in files])
            texts["json"] = json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BadEntry(f"a text cannot be written as UTF-8: {error}") from None
    except (RecursionError, ValueError) as error:
        raise BadEntry(f"the entry cannot be written as JSON: {error}") from None
    return texts


def _check_media(data: bytes, extension: str, path: str) -> None:
    # the decoders are heavy, and most lists are built without
    import av

    from mmfusion.processing.audios import decode_audio
    from mmfusion.processing.containers import open_container
    from mmfusion.processing.images import decode_image

    try:
        if MODALITY_OF[extension] == "image":
            decode_image(data, extension)
        elif MODALITY_OF[extension] == "audio":
            decode_audio(data, extension, 16_000)
        else:
            with open_container(data) as container:
                streams = container.streams.video
                if not streams or next(container.decode(streams[0]), None) is None:
                    raise BadEntry(f"{path} is a video without frames")
    except (DataError, av.FFmpegError) as error:
        raise BadEntry(f"{path} cannot be decoded: {error}") from None


def _refuse_many(bad: Bad, max_bad: int, list_path: str) -> None:
    if len(bad) > max_bad:
        raise ValueError(
            f"{list_path}: {len(bad)} bad entries, --max_bad is {max_bad}; nothing was made.\n"
            + _listed(bad)
        )


def _listed(bad: Bad) -> str:
    lines = [f"  {place}: {problem}" for place, problem in bad[:_MOST_LISTED]]
    return "\n".join(
        lines + ([f"  and {len(bad) - len(lines)} more"] if len(bad) > len(lines) else [])
    )


def _report(writer: ShardWriter, pattern: str, bad: Bad) -> None:
    size = sum(os.path.getsize(path) for path in writer.paths)
    print(
        f"{writer.num_samples:,} samples, {size:,} bytes in {len(writer.paths)} shards: "
        f"{writer.paths[0]} to {os.path.basename(writer.paths[-1])}"
        if writer.paths
        else f"no sample was written to {pattern}"
    )
    if bad:
        print(f"{len(bad)} bad entries were left out:\n{_listed(bad)}")
