"""Small checkpoints and PEFT folders on disk, and what they merge to, in memory by NumPy."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jlora.cli import main

BFLOAT16 = np.dtype(jnp.bfloat16)
UP = "model.layers.0.mlp.up_proj"
D, FFN, VOCAB, LAYERS = 8, 12, 20, 2
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, D),
    **{
        f"model.layers.{n}.{name}": shape
        for n in range(LAYERS)
        for name, shape in {
            "self_attn.q_proj.weight": (D, D),
            "self_attn.q_proj.bias": (D,),
            "self_attn.v_proj.weight": (4, D),
            "mlp.up_proj.weight": (FFN, D),
            "mlp.down_proj.weight": (D, FFN),
            "input_layernorm.weight": (D,),
        }.items()
    },
    "model.norm.weight": (D,),
    "lm_head.weight": (VOCAB, D),
}


def run(*words, code=0):
    """Run `jlora` with these words."""
    assert main(list(map(str, words))) == code


def drawn(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def tensors_of(shapes=SHAPES, dtype=BFLOAT16, without=()):
    return {
        name: drawn(shape, dtype, seed)
        for seed, (name, shape) in enumerate(shapes.items())
        if name not in without
    }


def checkpoint(folder: Path, tensors, files=1, config=None):
    """Write a checkpoint, sharded with an index where there are several files."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "tie_word_embeddings": False} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"tokens": []}')
    names = list(tensors)
    parts = np.array_split(names, files)
    named = [f"model-{k + 1:05d}-of-{files:05d}.safetensors" for k in range(files)]
    named = named if files > 1 else ["model.safetensors"]
    for file, part in zip(named, parts, strict=True):
        safetensors.numpy.save_file(
            {n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"}
        )
    if files > 1:
        weights = {n: file for file, part in zip(named, parts, strict=True) for n in part.tolist()}
        index = {"metadata": {"total_size": 1}, "weight_map": weights}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path):
    """Every tensor of a folder by safetensors' own reader, which checks the header."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, x in safetensors.deserialize(file.read_bytes()):
            dtype = {"F32": np.float32, "F16": np.float16, "BF16": BFLOAT16, "I32": np.int32}
            dtype |= {"U8": np.uint8, "I8": np.int8}
            found[name] = np.frombuffer(x["data"], dtype[x["dtype"]]).reshape(x["shape"])
    return found


def adapter(folder: Path, tensors, **config):
    """Write a PEFT folder; `tensors` have no prefix."""
    folder.mkdir(parents=True)
    entries = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": [], **config}
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    named = {f"base_model.model.{name}": x for name, x in tensors.items()}
    safetensors.numpy.save_file(named, folder / "adapter_model.safetensors")
    return folder


def pair(module, out, ins, rank=2, seed=0):
    """A and B of a linear module."""
    return {
        f"{module}.lora_A.weight": drawn((rank, ins), seed=100 + seed),
        f"{module}.lora_B.weight": drawn((out, rank), seed=200 + seed),
    }


def update(tensors, module, s=3.0, dtype=np.float64):
    """`s · B A` in this dtype, and then float32 as it is added."""
    a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
    return np.float32((np.float32(b) * np.float32(s)).astype(dtype) @ a.astype(dtype))


def q_and_up():
    """An adapter of q_proj and up_proj in both layers."""
    found = {}
    for n in range(LAYERS):
        found |= pair(f"model.layers.{n}.self_attn.q_proj", D, D, seed=n)
        found |= pair(f"model.layers.{n}.mlp.up_proj", FFN, D, seed=10 + n)
    return found


TARGETS = {"target_modules": ["q_proj", "up_proj"]}
