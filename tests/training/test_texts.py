"""Files of texts are read as what they are, under any usual name."""

import json
from pathlib import Path

import pytest

from moejax import MoejaxError
from moejax.training.texts import read_texts

pytestmark = pytest.mark.fast

ROWS = [{"text": "one\u2028line", "label": "a"}, {"text": "another"}]
LINES = "\n".join(map(json.dumps, ROWS)) + "\n\n"
WANT = (["one\u2028line", "another"], ["a", None])


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "X.JSONL", "x.jsonlines", "x.jl", "x.json"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_of_json(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / name).write_text(mark + LINES, "utf-8")
    assert read_texts(tmp_path / name) == WANT


@pytest.mark.parametrize(("value", "want"), [(ROWS, WANT), (ROWS[1], (["another"], [None]))])
def test_json(tmp_path: Path, value: object, want: object) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value, indent=1))
    assert read_texts(tmp_path / "x.json") == want


@pytest.mark.parametrize("name", ["x.txt", "x", "x.data"])
def test_lines_of_json_are_never_one_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LINES)
    with pytest.raises(MoejaxError, match=r"lines of JSON, each a document of its own; name the file \.jsonl"):
        read_texts(tmp_path / name)
    plain = '{ no json }\n{"text": "a set"} and more\n'
    (tmp_path / name).write_text(plain)
    assert read_texts(tmp_path / name) == ([plain], [None])


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{**row, "other": 3} for row in ROWS]), tmp_path / "x.parquet")
    assert read_texts(tmp_path / "x.parquet") == WANT
    (tmp_path / "y.parquet").write_bytes(b"PAR1")
    with pytest.raises(MoejaxError, match="not a Parquet file"):
        read_texts(tmp_path / "y.parquet")


def test_an_object_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.ndjson").write_text('{"text": "a"}\n{"txt": "b"}')
    with pytest.raises(MoejaxError, match=r'x\.ndjson, line 2: not an object with a string "text"'):
        read_texts(tmp_path / "x.ndjson")
