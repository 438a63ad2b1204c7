"""Damaged files of every reader: a clear error or success, soon, and in little memory."""

import contextlib
import io
import json
import re
import time
from pathlib import Path

import gguf as library
import h5py
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import TARGETS, adapter, checkpoint, pair, q_and_up, tensors_of
from modules import module

import jlora.diffusers
import jlora.gguf
import jlora.keras
import jlora.kohya
import jlora.mlx
from jlora import peft
from jlora.cli import main

LLAMA = {"model_type": "qwen2", "num_hidden_layers": 1}
UP = "model.layers.0.mlp.up_proj"
UNET = "unet.mid_block.resnets.0.conv1"


class Layer:
    """A layer with a kernel, as `jlora.keras.load` asks for it."""

    name, path = "kernel", "kernel"

    @property
    def weights(self):
        return [self]

    def _flatten_layers(self, include_self):
        return [self]


def make(folder):
    """Write good files of every format; return what reads them, by the file that is damaged."""
    jlora.kohya.save(folder / "k.safetensors", [module(UNET, window=3, dora=True)])
    jlora.diffusers.save(folder / "d.safetensors", [module(UNET, window=3)])
    jlora.mlx.save(folder / "mlx", [module(UP)], 1)
    jlora.gguf.save(folder / "a.gguf", [module(UP)], LLAMA)
    with h5py.File(folder / "a.lora.h5", "w") as f:
        f["lora/vars/rank"] = 2
        f["lora/0/vars/lora_kernel_a"] = np.ones((4, 2), np.float32)
        f["lora/0/vars/lora_kernel_b"] = np.ones((2, 6), np.float32)
    writer = library.GGUFWriter(folder / "m.gguf", "llama")
    rows = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    packed = library.quantize(rows, library.GGMLQuantizationType.Q4_1)
    writer.add_tensor("a", packed, raw_dtype=library.GGMLQuantizationType.Q4_1)
    writer.add_tensor("b", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = checkpoint(folder / "base", tensors_of())
    lora = adapter(folder / "lora", q_and_up(), **TARGETS)
    one = adapter(folder / "one", pair("q", 6, 4), target_modules=["q"])
    weights = {"q": jnp.ones((4, 6))}
    keras = lambda: jlora.keras.load(folder / "a.lora.h5", Layer(), {"kernel": weights["q"]})
    load = lambda: peft.load(one, weights, names={"q": "q.weight"})
    merge = lambda: verb("merge", base, lora, folder / "out", "--dry-run")
    convert = lambda name: lambda: verb("convert", folder / name, folder / "o", "--to", "peft")
    mlx = lambda: jlora.mlx.load(folder / "mlx")
    return {
        folder / "k.safetensors": lambda: jlora.kohya.load(folder / "k.safetensors"),
        folder / "d.safetensors": lambda: jlora.diffusers.load(folder / "d.safetensors"),
        folder / "mlx/adapters.safetensors": mlx,
        folder / "mlx/adapter_config.json": mlx,
        folder / "a.gguf": lambda: jlora.gguf.load(folder / "a.gguf", LLAMA),
        folder / "m.gguf": lambda: jlora.gguf.read(folder / "m.gguf"),
        folder / "a.lora.h5": keras,
        one / "adapter_model.safetensors": load,
        one / "adapter_config.json": load,
        base / "model.safetensors": merge,
        base / "config.json": merge,
        lora / "adapter_model.safetensors": merge,
        lora / "adapter_config.json": convert("lora"),
    }


def verb(*words):
    """Run `jlora`; raise the error that it prints."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main([*map(str, words), *(["--dry-run"] if words[0] == "convert" else [])])
    if status:
        assert status == 2 and said.getvalue().startswith("error: ")
        raise ValueError(said.getvalue().removeprefix("error: ").strip())


def mutated(data, rng):
    """Change, cut, repeat or insert bytes, mostly of the header; some with the sense of JSON."""
    data = bytearray(data)
    first = min(len(data), int(rng.choice([16, 200, 900, 10**9])))
    for _ in range(rng.integers(1, 6)):
        data[rng.integers(first)] = rng.integers(256)
    match rng.integers(6):
        case 0:
            return bytes(data[: rng.integers(len(data))])
        case 1:
            at, size = rng.integers(first), rng.integers(1, 64)
            return bytes(data[:at] + data[at : at + size] * 2 + data[at + size :])
        case 2:
            digits = [m.span() for m in re.finditer(rb"\d+", data[:first])]
            if digits:
                begin, end = digits[rng.integers(len(digits))]
                new = [b"-1", b"0", b"9" * 18, b"1e999", b"null", b'"x"', b"[]"][rng.integers(7)]
                return bytes(data[:begin] + new + data[end:])
    return bytes(data)


def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.parametrize("count", [39, pytest.param(2002, marks=pytest.mark.nightly)])
def test_mutated_files(tmp_path, count):
    readers = make(tmp_path)
    for read in readers.values():
        read()
    before, failed, slowest = peak(), 0, 0.0
    rng = np.random.default_rng(count)
    for n in range(count):
        file = list(readers)[n % len(readers)]
        good = file.read_bytes()
        file.write_bytes(mutated(good, rng))
        begun = time.monotonic()
        try:
            readers[file]()
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            text = str(error.args[0]) if error.args else ""
            assert text.startswith(("`", '"')) and len(text) < 4000, (file, error)
            failed += 1
        slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 2, file
        file.write_bytes(good)
    grown = peak() - before
    print(f"{failed} of {count} refused, slowest {slowest:.2f} s, {grown:.0f} MB")
    assert failed > count / 2 and grown < 1000
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())
