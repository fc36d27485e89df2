import struct

import numpy as np
import pytest

from mmfusion.tools.quickstart.ctranslate2 import read_variables

CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def variable(name: str, array: np.ndarray, code: int | None = None) -> bytes:
    head = text(name) + struct.pack("<B", array.ndim)
    head += b"".join(struct.pack("<I", size) for size in array.shape)
    code = CODES[str(array.dtype)] if code is None else code
    return head + struct.pack("<BI", code, array.nbytes) + array.tobytes()


def model(variables: list[bytes], aliases: dict[str, str], version: int = 6) -> bytes:
    out = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    out += b"".join(variables) + struct.pack("<I", len(aliases))
    return out + b"".join(text(alias) + text(name) for alias, name in aliases.items())


ARRAYS = {
    "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "b": np.array([[-7]], dtype=np.int32),
    "scalar": np.array(8, dtype=np.int8),
    "c": np.linspace(0, 1, 4, dtype=np.float32),
}


def test_every_type_shape_and_alias_comes_back():
    file = model([variable(n, a) for n, a in ARRAYS.items()], {"d": "a/weight"})
    name, found = read_variables(file)
    assert name == "WhisperSpec"
    assert set(found) == {*ARRAYS, "d"}
    for key, array in {**ARRAYS, "d": ARRAYS["a/weight"]}.items():
        assert found[key].dtype == array.dtype
        assert np.array_equal(found[key], array)
        assert found[key].shape == array.shape


@pytest.mark.parametrize("end", [3, 20, 60, -1])
def test_a_file_that_ends_early_is_refused(end):
    file = model([variable(n, a) for n, a in ARRAYS.items()], {"d": "b"})
    with pytest.raises(ValueError, match="ends early"):
        read_variables(file[:end])


def test_bytes_after_the_end_are_refused():
    with pytest.raises(ValueError, match="5 bytes after its end"):
        read_variables(model([], {}) + b"extra")


def test_another_version_is_refused():
    with pytest.raises(ValueError, match="version 5, expected 6"):
        read_variables(model([], {}, version=5))


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="type 9"):
        read_variables(model([variable("x", np.zeros(2, np.float32), code=9)], {}))


def test_a_size_that_does_not_fit_the_shape_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        read_variables(model([variable("x", np.zeros(2, np.float32), code=4)], {}))
