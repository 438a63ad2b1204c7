"""Directories of a model, each damaged at random, read within bounds of time and memory.

Run as a program, it prints one line of JSON for each directory: what became of it.
"""

import json
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import llama
import numpy as np
import weights
from safetensors.numpy import save_file
from tiny_llama import TINY, tiny_tensors, write_model

from jlora import peft

SECONDS, BYTES = 10, 1 << 30  # for one directory, and above what the process has before
ODD = [
    *(0, -1, 1, 3, 2**31, 2**63, 10**9, 10**18, 10**400, 0.5, 1e308, math.nan, math.inf),
    *("", "2", "x" * 30_000, "../config.json", None, True, False),
    *([], {}, [10**9], [[]], {"": 0}, [None] * 1000),
]


class TooLong(BaseException):
    """So that no `except Exception` takes it for an error of the file."""


def odd(rng: random.Random) -> Any:
    """A value that a file should not have; some are nested as deep as JSON can be read."""
    if rng.random() < 0.05:
        return json.loads("[" * 900 + "]" * 900)
    return rng.choice(ODD)


def change(tree: Any, rng: random.Random) -> Any:
    """Replace, remove or add one value, at any depth."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.2:
        return odd(rng)
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    if rng.random() < 0.15:
        del copy[key]
    elif isinstance(copy, dict) and rng.random() < 0.1:
        copy[str(odd(rng))[:50]] = copy[key]
    else:
        copy[key] = change(copy[key], rng)
    return copy


def flip(content: bytes, rng: random.Random, most: int) -> bytes:
    """Change, cut or repeat bytes among the first `most`."""
    at = rng.randrange(min(most, len(content)))
    kind = rng.randrange(3)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    return content[: at + 8] + content[at:]


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file; return which."""
    names = ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"]
    name = rng.choice(names)
    file = folder / name
    if name == names[3]:
        in_shards(folder)
    if name == names[1]:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        if rng.random() < 0.3:
            file.write_bytes(flip(content, rng, 8 + length))
        else:
            header = change(json.loads(content[8 : 8 + length]), rng)
            text = json.dumps(header).encode()
            size = odd(rng) if rng.random() < 0.2 else len(text)
            size = size if isinstance(size, int) and 0 <= size < 2**64 else len(text)
            file.write_bytes(size.to_bytes(8, "little") + text + content[8 + length :])
    elif rng.random() < 0.2:
        content = file.read_bytes()
        file.write_bytes(flip(content, rng, len(content)))
    else:
        file.write_text(json.dumps(change(json.loads(file.read_text()), rng)))
    return name


def in_shards(folder: Path) -> None:
    """Divide the weights into two files, with an index."""
    (folder / "model.safetensors").unlink()
    items = list(tiny_tensors(TINY).items())
    listed = {}
    for k, part in enumerate((items[:5], items[5:]), 1):
        shard = f"model-{k:05}-of-00002.safetensors"
        save_file(dict(part), folder / shard)
        listed |= {key: shard for key, _ in part}
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def outcome(folder: Path, name: str, clean: Any) -> str:
    """Read a directory: "same", "other" numbers than those of the intact one, or the message."""
    try:
        config, params, *_ = weights.load(str(folder))
    except (ValueError, OSError) as error:
        return str(error)
    model, tokens = llama.Llama(config), np.zeros((1, 4), np.int32)
    jax.eval_shape(model.apply, {"params": params}, tokens, tokens, tokens, None, None)
    known = dict(jax.tree_util.tree_leaves_with_path(clean))
    same = all(
        np.array_equal(x, known[path])
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if path in known
    )
    return "same" if same or name == "model.safetensors" else "other"


def matched(folder: Path, clean: Any) -> str:
    """The same of `jlora.peft.match`, which reads such a directory on its own."""
    try:
        peft.match(clean, folder)
    except (ValueError, OSError) as error:
        return str(error)
    return "same"


def main(first: int, count: int) -> None:
    def stop(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    with tempfile.TemporaryDirectory() as place:
        intact = write_model(Path(place) / "intact", TINY)
        clean = weights.load(str(intact))[1]
        matched(intact, clean)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.RLIM_INFINITY))
        for seed in range(first, first + count):
            folder = Path(shutil.copytree(intact, Path(place) / "damaged"))
            name = damage(folder, random.Random(seed))
            print(json.dumps({"seed": seed, "file": name}), end=" ", flush=True)
            for read in (
                lambda f=folder, n=name: outcome(f, n, clean),
                lambda f=folder: matched(f, clean),
            ):
                start = time.perf_counter()
                signal.alarm(SECONDS)
                try:
                    said = read()
                except BaseException as error:
                    said = f"{type(error).__name__}: {error!s:.200}"
                    said = "UNEXPECTED " + " ".join(said.split())
                signal.alarm(0)
                print(json.dumps([said, time.perf_counter() - start]), end=" ", flush=True)
            print(flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
