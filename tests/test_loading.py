# SPDX-License-Identifier: Apache-2.0
"""kvstore/engines/loading.py: a GGUF file is converted once, silently, and what the disk refuses has a name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from kvstore.engines.loading import load_model  # noqa: E402
from kvstore.errors import ConfigError, StoreIOError  # noqa: E402

WIDTH = 32
WEIGHTS = {
    "token_embd": (8, WIDTH),
    "output_norm": (WIDTH,),
    "output": (8, WIDTH),
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (16, WIDTH),
    "blk.0.attn_v": (16, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.ffn_gate": (WIDTH, WIDTH),
    "blk.0.ffn_up": (WIDTH, WIDTH),
    "blk.0.ffn_down": (WIDTH, WIDTH),
    "blk.0.ffn_norm": (WIDTH,),
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A random Llama of one layer and eight tokens."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdef", "ab", "abc"])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(4)
    writer.add_eos_token_id(5)
    random = np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once_and_silently(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = load_model(tiny, tmp_path / "converted")
    assert capfd.readouterr() == ("", "")
    (kept,) = (tmp_path / "converted").iterdir()
    made = (kept / "model.safetensors").stat().st_mtime_ns
    again = load_model(tiny, tmp_path / "converted")
    assert (kept / "model.safetensors").stat().st_mtime_ns == made
    assert first.encode("abca") == again.encode("abca") == [7, 0]


def test_a_folder_for_converted_models_that_cannot_be_made_has_a_name(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreIOError, match="cannot keep the converted model"):
        load_model(tiny, tiny / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_damaged_gguf_file_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="not a GGUF file that transformers can load"):
        load_model(tiny, tmp_path / "converted")
    assert not any((tmp_path / "converted").iterdir())
