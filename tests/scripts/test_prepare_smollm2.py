"""``scripts/prepare_smollm2.py`` reads GGUF: compared with values written by hand."""

import importlib.util
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import moejax
from moejax.checkpoints.verify import verify

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "data" / "smollm2"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_smollm2", ROOT / "scripts" / "prepare_smollm2.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # dataclasses look up their module in sys.modules
        patch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def test_blocks(script: ModuleType) -> None:
    block = struct.pack("<ee", 0.5, -3.0) + bytes([0x21, 0xF0, *[0] * 14])
    values = script.q4_1(np.frombuffer(block, np.uint8)).ravel()
    assert values[[0, 1, 2, 16, 17, 18]].tolist() == [-2.5, -3.0, -3.0, -2.0, 4.5, -3.0]
    block = struct.pack("<e32b", 0.25, -128, 127, *range(30))
    values = script.q8_0(np.frombuffer(block, np.uint8)).ravel()
    assert values[[0, 1, 2, 31]].tolist() == [-32.0, 31.75, 0.0, 7.25]


def test_file(script: ModuleType) -> None:
    tensors = [("a", (3, 2), 0, 0), ("b", (1, 32), 8, 32)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 3)
    head += string("n") + struct.pack("<Ii", 5, -7)
    head += string("t") + struct.pack("<I", 8) + string("caf")
    head += string("l") + struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 5, 6)
    for name, shape, kind, offset in tensors:
        head += string(name) + struct.pack("<IQQIQ", 2, *shape[::-1], kind, offset)
    data = head + b"\0" * (-len(head) % 32)
    data += np.arange(6, dtype=np.float32).tobytes() + b"\0" * 8 + struct.pack("<e32b", 2.0, *range(32))
    metadata, arrays = script.read_gguf(data)
    assert metadata == {"n": -7, "t": "caf", "l": [5, 6]}
    assert arrays["a"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert arrays["b"].tolist() == [[2.0 * i for i in range(32)]]
    with pytest.raises(SystemExit, match="not a GGUF file of version 3"):
        script.read_gguf(b"GGML" + data[4:])


def test_rows_of_rotated_pairs(script: ModuleType) -> None:
    """Neighbouring rows 2i, 2i+1 of a head become rows i, i + C/2, for two heads of width C = 6."""
    rows = np.arange(12)[:, None]
    assert script.unpermuted(rows, 2).ravel().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.exists(), reason="run scripts/prepare_smollm2.py to have data/smollm2")
def test_smollm2() -> None:
    lm = moejax.load(FOLDER, dtype="float32")
    assert lm.generate("The capital of France is", max_new_tokens=2) == " Paris."
    rel = moejax.explain(lm, "The capital of France is", target=moejax.Contrast(" Paris", " London"))
    assert np.abs(rel.ledger.residual / rel.ledger.target).max() <= 1e-5
    assert verify(FOLDER).passed
