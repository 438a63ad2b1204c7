"""A bridge that fails while it writes leaves the files that were there, and nothing else."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from modules import LLAMA

import jlora.diffusers
import jlora.gguf
import jlora.kohya
import jlora.mlx
from jlora import _plot
from jlora._modules import Module

A, B = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)
ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN = "model.layers.0.mlp.down_proj"
SAVE = {
    "kohya": lambda to: jlora.kohya.save(to / "a.safetensors", [Module(ATTENTION, A, B, 0.5)]),
    "diffusers": lambda to: jlora.diffusers.save(to, [Module(ATTENTION, A, B, 0.5)]),
    "mlx": lambda to: jlora.mlx.save(to, [Module(DOWN, A, B, 0.5)], 1),
    "gguf": lambda to: jlora.gguf.save(to / "a.gguf", [Module(DOWN, A, B, 0.5)], LLAMA),
    "picture": lambda to: _plot.plot(to / "a.png", {"layers.0.w": {"norm": 1.0}}),
}


def cut_off(*args, **kwargs):
    raise OSError("No space left on device")


@pytest.mark.parametrize("name", SAVE)
def test_the_old_files_stay(name, tmp_path, monkeypatch):
    contents = lambda: {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    SAVE[name](tmp_path)
    before = contents()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", cut_off)
    real = _plot.FigureCanvasAgg.print_png  # the layout of a figure draws in memory

    def picture(self, file):
        return cut_off(file.write_bytes(b"half")) if isinstance(file, Path) else real(self, file)

    monkeypatch.setattr(_plot.FigureCanvasAgg, "print_png", picture)
    half = lambda tensors, file, metadata: cut_off(Path(file).write_bytes(b"half"))
    monkeypatch.setattr(safetensors.numpy, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        SAVE[name](tmp_path)
    assert before and contents() == before
