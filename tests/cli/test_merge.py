"""`jlora merge`: every tensor byte for byte as in memory, for every kind of file and adapter."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import (
    BFLOAT16,
    FFN,
    TARGETS,
    VOCAB,
    D,
    adapter,
    checkpoint,
    drawn,
    pair,
    q_and_up,
    read,
    tensors_of,
    update,
)
from helpers import bits

from jlora.cli import _ahead, _changes, main


def run(*words, code=0):
    assert main(["merge", *map(str, words)]) == code


def merged_in_memory(base, lora, s=3.0):
    want = dict(base)
    for name, w in base.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in lora:
            wide = np.float32 if w.itemsize == 2 else np.float64
            want[name] = (np.float32(w) + update(lora, module, s, wide)).astype(w.dtype)
    return want


def equal(folder, want):
    got = read(folder)
    assert list(sorted(got)) == sorted(want)
    for name, x in want.items():
        assert bits(got[name]) == bits(x), name


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32], ids=str)
def test_is_byte_equal_to_the_merge_in_memory(tmp_path, files, dtype):
    base, lora = tensors_of(dtype=dtype), q_and_up()
    folder = checkpoint(tmp_path / "base", base, files)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    run(folder, adapter(tmp_path / "lora", lora, **TARGETS), tmp_path / "out")
    equal(tmp_path / "out", merged_in_memory(base, lora))
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    same = {"config.json", "tokenizer.json"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == set(before)
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def test_memory_is_used_again_only_when_what_was_in_it_is_written():
    def job(k, memory):
        out = memory.array("out", (8,), np.int64)
        out[:] = k
        return out.data

    pieces = _ahead.in_order(functools.partial(job, k) for k in range(40))
    for k, piece in enumerate(pieces):
        time.sleep(2e-3)  # a slow disk: all jobs that may run have run
        assert np.asarray(piece).tolist() == [k] * 8


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=str)
def test_blocks_are_computed_ahead(tmp_path, monkeypatch, dtype):
    base, lora = tensors_of(dtype=dtype), q_and_up()
    monkeypatch.setattr("jlora.cli._safetensors.CHUNK", D * 32)
    run(checkpoint(tmp_path / "b", base), adapter(tmp_path / "a", lora, **TARGETS), tmp_path / "o")
    equal(tmp_path / "o", merged_in_memory(base, lora))


def test_blocks_of_rows(tmp_path, monkeypatch):
    """A tensor is read and written a few rows at a time, with the same bytes."""
    base, lora = tensors_of(), q_and_up()
    monkeypatch.setattr("jlora.cli._safetensors.CHUNK", 3 * D * 4)
    run(checkpoint(tmp_path / "b", base), adapter(tmp_path / "a", lora, **TARGETS), tmp_path / "o")
    equal(tmp_path / "o", merged_in_memory(base, lora))


@pytest.mark.parametrize("fails", ["at once", "on the way", "is missing"])
def test_bytes_that_the_kernel_does_not_copy(tmp_path, monkeypatch, fails):
    """As between file systems that cannot, or on other systems than Linux."""
    base, lora = tensors_of(), q_and_up()
    real, calls = os.copy_file_range, []

    def copy(source, target, count, at):
        calls.append(count)
        if fails == "at once" or len(calls) > 1:
            raise OSError("not supported")
        return real(source, target, min(count, 7), at)

    monkeypatch.setattr(os, "copy_file_range", copy)
    if fails == "is missing":
        monkeypatch.delattr(os, "copy_file_range")
    run(checkpoint(tmp_path / "b", base), adapter(tmp_path / "a", lora, **TARGETS), tmp_path / "o")
    equal(tmp_path / "o", merged_in_memory(base, lora))
    assert bool(calls) == (fails != "is missing")


@pytest.mark.parametrize("columns", [1, 3, 64, 1000])
def test_tiles_are_the_product(monkeypatch, columns):
    """Whatever the number of columns, and when the second factor is a view."""
    monkeypatch.setattr("jlora.cli._changes._ALONE", 2048)
    p, q = drawn((40, 5), np.float64), drawn((columns, 5), np.float64, 1).T
    out = np.full((40, columns), np.nan)
    _changes._multiply(p, q, out)
    np.testing.assert_allclose(out, p @ q, rtol=1e-12)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16], ids=str)
def test_sixteen_bits_are_those_of_a_product_in_float64(tmp_path, dtype):
    """But for a few sums near the middle of two neighbors, which are one step apart."""
    at = "model.layers.0.mlp.up_proj"
    w, lora = drawn((300, 200), dtype), pair(at, 300, 200, 64)
    folder = checkpoint(tmp_path / "b", {f"{at}.weight": w})
    path = adapter(tmp_path / "a", lora, r=64, lora_alpha=8, target_modules=["up_proj"])
    run(folder, path, tmp_path / "o")
    got = read(tmp_path / "o")[f"{at}.weight"]
    delta = update(lora, at, 8 / 64)
    want = (np.float32(w) + delta).astype(dtype)
    apart = np.abs(np.float64(got) - np.float64(want))
    assert (apart > 0).mean() < 1e-3
    size = np.abs(np.float64(w)) + np.abs(delta)
    assert (apart <= float(jnp.finfo(dtype).eps) * size).all()


def test_sharded_by_size_and_cast(tmp_path):
    base, lora = tensors_of(), q_and_up()
    base["model.rope.indices"] = np.arange(5, dtype=np.int32)
    config = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    folder = checkpoint(tmp_path / "base", base, config=config)
    out = tmp_path / "out"
    words = ["--dtype", "float32", "--max-shard-size", "1.5KB"]
    run(folder, adapter(tmp_path / "lora", lora, **TARGETS), out, *words)
    wide = {k: np.float32(x) if x.dtype == BFLOAT16 else x for k, x in base.items()}
    equal(out, merged_in_memory(wide, lora))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = sum(x.nbytes for x in wide.values())
    assert set(index["weight_map"]) == set(base) and index["metadata"]["total_size"] == total
    for file in set(index["weight_map"].values()):
        assert (out / file).stat().st_size < 1500 + 1500, "the header is counted apart"
    said = json.loads((out / "config.json").read_text())
    assert said == {"torch_dtype": "float32", "text_config": {"dtype": "float32"}}


def test_scalings(tmp_path):
    """alpha and rank patterns, rsLoRA, negative and several weights."""
    base, lora = tensors_of(), {}
    lora |= pair("model.layers.0.self_attn.q_proj", D, D, 4)
    lora |= pair("model.layers.1.self_attn.q_proj", D, D, 2, seed=1)
    said = {
        "rank_pattern": {r"0\.self_attn\.q_proj": 4},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
    }
    one = adapter(tmp_path / "one", lora, use_rslora=True, target_modules=["q_proj"], **said)
    other = adapter(tmp_path / "other=0.5", q_and_up(), **TARGETS)
    folder = checkpoint(tmp_path / "base", base)
    run(folder, f"{one}=0.5", f"{other}=-2", tmp_path / "out")
    got = read(tmp_path / "out")
    for n, s in ((0, 6 / 2), (1, 5 / np.sqrt(2))):
        module = f"model.layers.{n}.self_attn.q_proj"
        w = np.float64(np.float32(base[f"{module}.weight"]))
        want = w + 0.5 * s * np.float64(update(lora, module, 1.0))
        want = want - 2 * 3 * np.float64(update(q_and_up(), module, 1.0))
        np.testing.assert_allclose(
            np.float64(np.float32(got[f"{module}.weight"])), want, rtol=2**-8
        )


def dora(w, a, b, m, s, axis):
    v = np.float64(np.float32(w)) + s * (np.float64(b) @ np.float64(a))
    return v * m / np.linalg.norm(v, axis=axis, keepdims=True)


def test_magnitudes_and_biases(tmp_path):
    base = tensors_of()
    q, name = "model.layers.{}.self_attn.q_proj", "model.layers.0.self_attn.q_proj"
    lora = pair(q.format(0), D, D) | pair(q.format(1), D, D, seed=1)
    ms = {n: np.abs(drawn(D, seed=n)) for n in range(2)}
    with_m = lora | {f"{q.format(n)}.lora_magnitude_vector": m for n, m in ms.items()}
    biases = {f"{q.format(n)}.base_layer.bias": drawn(D, seed=7 + n) for n in range(2)}
    said = {"use_dora": True, "bias": "lora_only", "target_modules": ["q_proj"]}
    folder = checkpoint(tmp_path / "base", base)
    path = adapter(tmp_path / "dora", with_m | biases, **said)
    run(folder, path, tmp_path / "out")
    got = read(tmp_path / "out")
    a, b = (lora[f"{name}.lora_{x}.weight"] for x in "AB")
    want = dora(base[f"{name}.weight"], a, b, ms[0][:, None], 3.0, 1)
    np.testing.assert_allclose(np.float32(got[f"{name}.weight"]), want, rtol=2**-8)
    assert bits(got[f"{name}.bias"]) == bits(biases[f"{name}.base_layer.bias"].astype(BFLOAT16))
    other = lora | {f"{q.format(n)}.lora_B.bias": drawn(D, seed=n) for n in range(2)}
    path = adapter(tmp_path / "bias", other, lora_bias=True, target_modules=["q_proj"])
    run(folder, path, tmp_path / "out2")
    got = read(tmp_path / "out2")[f"{name}.bias"]
    want = np.float32(base[f"{name}.bias"]) + 3 * other[f"{name}.lora_B.bias"]
    assert bits(got) == bits(want.astype(BFLOAT16))


def test_conv1d_embeddings_and_tokens(tmp_path):
    """GPT-2's names and orientation, and a checkpoint whose names lack the model's prefix."""
    shapes = {"wte.weight": (VOCAB, D), "h.0.attn.c_attn.weight": (D, 3 * D)}
    shapes |= {"h.0.attn.c_proj.weight": (D, D), "wpe.weight": (6, D)}
    base = tensors_of(shapes)
    at = "transformer.h.0.attn."
    lora = pair(at + "c_attn", 3 * D, D) | pair(at + "c_proj", D, D, seed=1)
    lora["transformer.wte.lora_embedding_A"] = drawn((2, VOCAB), seed=3)
    lora["transformer.wte.lora_embedding_B"] = drawn((D, 2), seed=4)
    lora["transformer.wpe.token_adapter.trainable_tokens_delta"] = drawn((2, D), seed=5)
    said = {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "wte"]}
    said["trainable_token_indices"] = {"wpe": [4, 1]}
    folder = checkpoint(tmp_path / "base", base)
    run(folder, adapter(tmp_path / "lora", lora, **said), tmp_path / "out")
    got = read(tmp_path / "out")
    for name in ("c_attn", "c_proj"):
        want = np.float32(base[f"h.0.attn.{name}.weight"]) + update(lora, at + name).T
        assert bits(got[f"h.0.attn.{name}.weight"]) == bits(want.astype(BFLOAT16))
    a, b = (lora[f"transformer.wte.lora_embedding_{x}"] for x in "AB")
    want = np.float32(base["wte.weight"]) + np.float32(3 * (np.float64(b) @ np.float64(a))).T
    np.testing.assert_allclose(np.float32(got["wte.weight"]), want, rtol=2**-8, atol=2**-8)
    want = base["wpe.weight"].copy()
    want[[4, 1]] = lora["transformer.wpe.token_adapter.trainable_tokens_delta"].astype(BFLOAT16)
    assert bits(got["wpe.weight"]) == bits(want)


def test_dora_of_conv1d(tmp_path):
    """The norm of an output is that of a column, which takes a pass of its own."""
    base = tensors_of({"h.0.c_attn.weight": (D, 3 * D)}, np.float32)
    lora = pair("h.0.c_attn", 3 * D, D)
    m = np.abs(drawn(3 * D))
    path = adapter(
        tmp_path / "lora",
        lora | {"h.0.c_attn.lora_magnitude_vector": m},
        use_dora=True,
        fan_in_fan_out=True,
        target_modules=["c_attn"],
    )
    run(checkpoint(tmp_path / "base", base), path, tmp_path / "out")
    a, b = (lora[f"h.0.c_attn.lora_{x}.weight"] for x in "AB")
    want = dora(base["h.0.c_attn.weight"].T, a, b, m[:, None], 3.0, 1).T
    np.testing.assert_allclose(read(tmp_path / "out")["h.0.c_attn.weight"], want, rtol=1e-5)


def test_convolutions_and_experts(tmp_path):
    shapes = {"conv.weight": (6, 4, 3, 3), "mlp.experts.down_proj": (3, 5, 7)}
    base = tensors_of(shapes, np.float32)
    a, b = drawn((2, 4, 3, 3), seed=1), drawn((6, 2, 1, 1), seed=2)
    ea, eb = drawn((6, 5), seed=3), drawn((7, 6), seed=4)  # (E·r, in), (out, r·E)
    lora = {"conv.lora_A.weight": a, "conv.lora_B.weight": b}
    lora |= {"mlp.experts.lora_A.weight": ea, "mlp.experts.lora_B.weight": eb}
    said = {"target_modules": ["conv"], "target_parameters": ["experts.down_proj"]}
    run(
        checkpoint(tmp_path / "base", base),
        adapter(tmp_path / "lora", lora, **said),
        tmp_path / "out",
    )
    got = read(tmp_path / "out")
    want = base["conv.weight"] + 3 * np.einsum("or,ri...->oi...", b[:, :, 0, 0], a)
    np.testing.assert_allclose(got["conv.weight"], want, rtol=1e-5, atol=1e-5)
    delta = np.einsum("ore,eri->eio", eb.reshape(7, 2, 3), ea.reshape(3, 2, 5))
    want = base["mlp.experts.down_proj"] + 3 * delta
    np.testing.assert_allclose(got["mlp.experts.down_proj"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True], ids=["(E, out, in)", "(E, in, out)"])
def test_experts_of_both_layouts(tmp_path, turned, capsys):
    """The shapes tell the layout, and those of the other parameter that of a square one."""
    e, d, f, r = 3, 8, 8, 2
    sizes = {"gate_up_proj": (2 * f, d), "down_proj": (d, f)}  # out, in
    swap = (lambda x: x.swapaxes(-1, -2)) if turned else lambda x: x
    name = "model.layers.0.mlp.experts"
    base = {f"{name}.{k}": drawn((e, *x), np.float32, n) for n, (k, x) in enumerate(sizes.items())}
    lora, want = {}, {}
    for n, (key, (out, ins)) in enumerate(sizes.items()):
        own = f"{name}.base_layer" * (key == "gate_up_proj") or name
        a, b = drawn((e * r, ins), seed=10 + n), drawn((out, r * e), seed=20 + n)
        lora |= {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
        delta = np.einsum("ore,eri->eoi", b.reshape(out, r, e), a.reshape(e, r, ins))
        want[f"{name}.{key}"] = swap(base[f"{name}.{key}"] + 3 * delta)
    base = {key: np.ascontiguousarray(swap(x)) for key, x in base.items()}
    said = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    path = adapter(tmp_path / "lora", lora, **said)
    run(checkpoint(tmp_path / "base", base), path, tmp_path / "out")
    for key, x in read(tmp_path / "out").items():
        np.testing.assert_allclose(x, want[key], rtol=1e-5, atol=1e-5)
    alone = {f"{name}.down_proj": base[f"{name}.down_proj"]}
    own = {k: x for k, x in lora.items() if "base_layer" not in k}
    path = adapter(tmp_path / "square", own, target_parameters=["mlp.experts.down_proj"])
    run(checkpoint(tmp_path / "one", alone), path, tmp_path / "o", code=2)
    assert "is square, so neither it nor the adapter tells" in capsys.readouterr().err


TIED = {"model_type": "llama"}  # transformers' default


def test_a_head_that_is_tied(tmp_path):
    base = tensors_of(without=["lm_head.weight"])
    folder = checkpoint(tmp_path / "base", base, 2, TIED)
    lora = pair("lm_head", VOCAB, D)
    run(folder, adapter(tmp_path / "lora", lora, target_modules=["lm_head"]), tmp_path / "out")
    embedding = base["model.embed_tokens.weight"]
    want = (np.float32(embedding) + update(lora, "lm_head")).astype(BFLOAT16)
    equal(tmp_path / "out", base | {"lm_head.weight": want})
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"].startswith("model-00002")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    # Two trained copies that are equal stay one.
    value = drawn((VOCAB, D), BFLOAT16, 9)
    saved = {"lm_head.weight": value, "model.embed_tokens.weight": value}
    said = {"modules_to_save": ["lm_head", "embed_tokens"]}
    run(folder, adapter(tmp_path / "full", saved, **said), tmp_path / "out2")
    equal(tmp_path / "out2", base | {"model.embed_tokens.weight": value})
    assert json.loads((tmp_path / "out2/config.json").read_text()) == TIED


def test_an_embedding_that_was_trained_apart_from_its_head(tmp_path):
    """PEFT trains a copy of the embedding; the head that was tied to it stays as it was."""
    base = tensors_of(without=["lm_head.weight"])
    config = TIED | {"architectures": ["LlamaForCausalLM"]}
    folder = checkpoint(tmp_path / "base", base, 2, config)
    value, name = drawn((VOCAB, D), BFLOAT16, 9), "model.embed_tokens.weight"
    path = adapter(tmp_path / "full", {name: value}, modules_to_save=["embed_tokens"])
    run(folder, path, tmp_path / "out")
    equal(tmp_path / "out", base | {name: value, "lm_head.weight": base[name]})
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said == config | {"tie_word_embeddings": False}
    # A low-rank update of a tied embedding changes the head too; other models have no such head.
    lora = {
        f"model.embed_tokens.lora_embedding_{x}": drawn(s)
        for x, s in (("A", (2, VOCAB)), ("B", (D, 2)))
    }
    run(folder, adapter(tmp_path / "lora", lora, target_modules=["embed_tokens"]), tmp_path / "o2")
    assert "lm_head.weight" not in read(tmp_path / "o2")
    folder = checkpoint(tmp_path / "encoder", base, config={"architectures": ["BertModel"]})
    run(folder, path, tmp_path / "o3")
    equal(tmp_path / "o3", base | {name: value})


def test_a_base_weight_of_a_tied_head_in_the_adapter(tmp_path, capsys):
    """PEFT saves the base weight of an adapted head too; it is compared with the embedding."""
    base = tensors_of(without=["lm_head.weight"])
    folder = checkpoint(tmp_path / "base", base, config=TIED)
    embedding = base["model.embed_tokens.weight"]
    lora = pair("lm_head", VOCAB, D) | {"lm_head.base_layer.weight": embedding}
    run(folder, adapter(tmp_path / "a", lora, target_modules=["lm_head"]), tmp_path / "out")
    want = (np.float32(embedding) + update(lora, "lm_head")).astype(BFLOAT16)
    equal(tmp_path / "out", base | {"lm_head.weight": want})
    lora["lm_head.base_layer.weight"] = -embedding
    run(folder, adapter(tmp_path / "b", lora, target_modules=["lm_head"]), tmp_path / "o", code=2)
    assert "was trained on other weights" in capsys.readouterr().err


def test_a_stored_head_that_would_be_tied_on_loading(tmp_path, capsys):
    """transformers would replace the changed head by the embedding."""
    base = tensors_of()
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    folder = checkpoint(tmp_path / "base", base, config=config)
    lora = pair("lm_head", VOCAB, D)
    run(folder, adapter(tmp_path / "lora", lora, target_modules=["lm_head"]), tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())
    off = {"tie_word_embeddings": False}
    assert said == {**off, "text_config": off} and "untied" in capsys.readouterr().out
    run(folder, lora_folder(tmp_path / "q"), tmp_path / "same")
    assert json.loads((tmp_path / "same/config.json").read_text()) == config


def test_names_without_the_prefix_of_the_checkpoint(tmp_path):
    """As of an adapter of the model without its head."""
    base, lora = tensors_of(), {k.removeprefix("model."): x for k, x in q_and_up().items()}
    run(
        checkpoint(tmp_path / "base", base),
        adapter(tmp_path / "lora", lora, **TARGETS),
        tmp_path / "out",
    )
    equal(tmp_path / "out", merged_in_memory(base, q_and_up()))


def test_modules_to_save(tmp_path, capsys):
    base = tensors_of()
    saved = {"score.weight": drawn((3, D), seed=5), "model.norm.weight": drawn(D, seed=6)}
    said = {"modules_to_save": ["model.norm"], "task_type": "SEQ_CLS"}
    folder, path = checkpoint(tmp_path / "base", base), adapter(tmp_path / "a", saved, **said)
    run(folder, path, tmp_path / "out", "--json")
    norm = saved["model.norm.weight"]
    want = base | {
        "score.weight": saved["score.weight"],
        "model.norm.weight": norm.astype(BFLOAT16),
    }
    equal(tmp_path / "out", want)
    report = json.loads(capsys.readouterr().out)
    assert report["new tensors"] == ["score.weight"] and report["changed"] == {"replaced": 2}
    assert report["keys used"] == {str(path): "2 of 2"} and report["unchanged"] == len(base) - 1
    only = {"model.norm.weight": norm}
    half = adapter(tmp_path / "half", only, modules_to_save=["model.norm"])
    run(folder, f"{half}=0.5", tmp_path / "half_out")
    old = np.float32(base["model.norm.weight"])
    got = read(tmp_path / "half_out")["model.norm.weight"]
    assert bits(got) == bits((old + np.float32(0.5) * (norm - old)).astype(BFLOAT16))


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    folder = checkpoint(tmp_path / "base", tensors_of())
    path = adapter(tmp_path / "lora", q_and_up(), **TARGETS)
    run(folder, path, tmp_path / "out", "--dry-run")
    text = capsys.readouterr().out
    assert "low-rank  4" in text and "written: nothing (--dry-run)" in text
    assert {p.name for p in tmp_path.iterdir()} == {"base", "lora"}


def lora_folder(tmp_path, **more):
    return adapter(tmp_path / "lora", q_and_up() | more, **TARGETS)


def test_what_fails_leaves_nothing(tmp_path, monkeypatch, capsys):
    """A merge that fails on the way leaves the old OUT as it was, and no other folder."""
    folder = checkpoint(tmp_path / "base", tensors_of(), 2)
    path, out = lora_folder(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    seen = []

    def fails(self, size):
        seen.append(size)
        if len(seen) > 12:
            raise OSError("no space left on device")

    monkeypatch.setattr("jlora.cli._output.Progress.__call__", fails)
    run(folder, path, out, "--overwrite", code=2)
    assert capsys.readouterr().err == "error: no space left on device\n"
    assert (out / "old").read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"base", "lora", "out"}
    monkeypatch.undo()
    run(folder, path, out, "--overwrite")
    equal(out, merged_in_memory(tensors_of(), q_and_up()))
    assert not (out / "old").exists()


def test_the_disk_is_asked_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    run(checkpoint(tmp_path / "b", tensors_of()), lora_folder(tmp_path), tmp_path / "o", code=2)
    assert "has 1 KB free. Nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


SCRIPT = """
import re, sys, time
from pathlib import Path
from jlora.cli import _ahead, main


def peak():  # not `getrusage`, whose maximum a process inherits from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


main(["merge", sys.argv[1], sys.argv[2], sys.argv[3] + "_small"])  # what JAX and the CLI need
before = peak()
begun = time.monotonic()
assert main(["merge", *sys.argv[4:]]) == 0
print("KB", peak(), before, time.monotonic() - begun)
"""


def large(folder, count, rows):
    """A sharded checkpoint of `count` tensors of `rows` x 1024 in bfloat16, written one by one."""
    folder.mkdir()
    x = drawn((rows, 1024), BFLOAT16)
    weights = {}
    for n in range(count):
        file = f"model-{n + 1:05d}-of-{count:05d}.safetensors"
        name = f"model.layers.{n}.mlp.up_proj.weight"
        safetensors.numpy.save_file({name: x}, folder / file, metadata={"format": "pt"})
        weights[name] = file
    index = {"metadata": {"total_size": count * x.nbytes}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def peak_of_merge(tmp_path, base, path):
    """The peak of memory of a merge, alone and over that of a tiny one, in MB, and its seconds."""
    small = checkpoint(tmp_path / "small", tensors_of())
    first = adapter(tmp_path / "first", q_and_up(), **TARGETS)
    words = [small, first, tmp_path / "out", base, path, tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, check=True
    )
    peak, before, seconds = map(float, done.stdout.rpartition("KB")[2].split())
    return peak / 1024, (peak - before) / 1024, seconds


def lora_of(tmp_path, count, rows, rank):
    lora = {}
    for n in range(count):
        lora |= pair(f"model.layers.{n}.mlp.up_proj", rows, 1024, rank, seed=n)
    factors = sum(x.nbytes for x in lora.values()) / 2**20
    return lora, adapter(tmp_path / "lora", lora, r=rank, target_modules=["up_proj"]), factors


@pytest.mark.nightly
def test_the_peak_of_memory(tmp_path):
    """The memory does not grow with the tensors: blocks of rows are read, changed and written."""
    base = large(tmp_path / "large", 6, 16384)
    _, path, factors = lora_of(tmp_path, 6, 16384, 8)
    _, grown, _ = peak_of_merge(tmp_path, base, path)
    assert 0 < grown < 120 + 3 * factors, f"{grown:.0f} MB, of which factors {factors:.0f} MB"


@pytest.mark.nightly
def test_ten_gigabytes(tmp_path):
    """160 tensors of 64 MB in 160 files: two tensors and 200 MB, and the bytes of a small merge."""
    count, rows = 160, 32768
    base = large(tmp_path / "large", count, rows)
    lora, path, factors = lora_of(tmp_path, count, rows, 2)
    begun = time.monotonic()
    shutil.copytree(base, tmp_path / "copy")
    os.sync()
    copied = time.monotonic() - begun
    shutil.rmtree(tmp_path / "copy")
    peak, grown, seconds = peak_of_merge(tmp_path, base, path)
    print(f"peak {peak:.0f} MB, {grown:.0f} MB over a tiny merge, factors {factors:.0f} MB")
    print(f"{seconds:.0f} s, a copy {copied:.0f} s, {count * rows * 2048 / seconds / 1e6:.0f} MB/s")
    for n in range(count):
        name = f"model.layers.{n}.mlp.up_proj"
        file = f"model-{n + 1:05d}-of-{count:05d}.safetensors"
        tensors = {f"{name}.weight": drawn((rows, 1024), BFLOAT16)}
        own = {key: x for key, x in lora.items() if key.startswith(f"{name}.")}
        want = merged_in_memory(tensors, own)[f"{name}.weight"]
        ((_, got),) = safetensors.deserialize((tmp_path / "out" / file).read_bytes())
        assert bytes(got["data"]) == want.tobytes(), name
    assert grown < 2 * 64 + 200


@pytest.mark.nightly
def test_a_killed_merge_leaves_nothing_that_opens(tmp_path):
    base, path = large(tmp_path / "large", 6, 16384), tmp_path / "lora"
    lora = pair("model.layers.0.mlp.up_proj", 16384, 1024)
    adapter(path, lora, target_modules=["layers.0.mlp.up_proj"])
    words = [sys.executable, "-m", "jlora", "merge", base, path, tmp_path / "out"]
    hidden = lambda: [p for p in tmp_path.iterdir() if p.name.startswith(".out-saving-")]
    for wait in (0.0, 0.05, 0.2):
        process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL)
        while process.poll() is None and not hidden():
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists()
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)
    assert len(read(tmp_path / "out")) == 6 and not hidden()


KILLED = """
import os, signal, sys
from jlora.cli import _ahead, main
from jlora.cli._output import Progress

words = sys.argv[2:]
most, seen = int(sys.argv[1]), 0


def event(name, args):
    global seen
    if counting and name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        seen += 1
        if seen == most:
            os.kill(os.getpid(), signal.SIGKILL)


def written(self, size):
    event("open", ())


counting = False
Progress.__call__ = written
sys.addaudithook(event)
counting = True
assert main(["merge", *words]) == 0
print("events", seen)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("old", [False, True], ids=["new", "over another"])
def test_killed_anywhere(tmp_path, old):
    """Killed at its n-th file operation or piece: a complete folder or none, and the same after."""
    base, path = checkpoint(tmp_path / "base", tensors_of(), 3), lora_folder(tmp_path)
    want, out = merged_in_memory(tensors_of(), q_and_up()), tmp_path / "out"
    words = [base, path, out, "--overwrite"]
    run(*words[:2], tmp_path / "other", "--dtype", "float32")
    other = {f.name: f.read_bytes() for f in (tmp_path / "other").iterdir()}

    def child(n):
        done = [sys.executable, "-c", KILLED, n, *words]
        return subprocess.run(list(map(str, done)), capture_output=True, text=True)

    if old:
        shutil.copytree(tmp_path / "other", out)
    count = int(child(0).stdout.rpartition("events")[2])
    complete = {f.name: f.read_bytes() for f in out.iterdir()}
    equal(out, want)
    shutil.rmtree(out)
    states = set()
    last = range(max(1, count - 14), count + 1)
    for n in sorted({*range(count // 3, count, max(1, count // 12)), *last}):
        if old:
            shutil.copytree(tmp_path / "other", out)
        assert child(n).returncode == -signal.SIGKILL, n
        found = {f.name: f.read_bytes() for f in out.iterdir()} if out.exists() else None
        assert found in (None, complete, *([other] if old else [])), n
        states.add("none" if found is None else "old" if found == other else "new")
        run(*words)  # again: the same bytes, and nothing is left of the killed one
        assert {f.name: f.read_bytes() for f in out.iterdir()} == complete
        assert not [f for f in tmp_path.iterdir() if f.name.startswith(".") and not _kept(f)]
        shutil.rmtree(out)
    print(count, sorted(states))
    assert {"new", "old" if old else "none"} <= states


def _kept(hidden):
    """Whether a hidden folder has the only copy of what OUT was."""
    return (hidden / "old").exists()


def broken(tmp_path, case):
    """Arguments, and what is said."""
    base, lora = tensors_of(), q_and_up()
    said, words, key = dict(TARGETS), [], next(iter(lora))
    out, weight, folder = tmp_path / "out", "", None
    match case:
        case "unexpected":
            lora["model.layers.0.self_attn.qproj.lora_A.weight"] = drawn((2, D))
        case "missing":
            del lora[key]
        case "misshaped":
            lora[key] = drawn((2, D + 1))
        case "quantized":
            base["model.layers.0.self_attn.q_proj.weight"] = np.zeros((D, D), np.int32)
        case "dora":
            said["use_dora"], weight = True, "=0.5"
            for name in [k for k in lora if k.endswith("lora_A.weight")]:
                m = name.replace("lora_A.weight", "lora_magnitude_vector")
                lora[m] = drawn(FFN if "up" in name else D)
        case "residual":
            said["init_lora_weights"] = "pissa"
        case "overflow":
            base = tensors_of(dtype=np.float16)
            lora = {k: x * np.float32(1e4) for k, x in lora.items()}
        case "overflow_unchanged":
            base["model.norm.weight"] = drawn(D, BFLOAT16) * BFLOAT16.type(1e6)
            words = ["--dtype", "float16"]
        case "same_folder":
            out = tmp_path / "base"
        case "inside":
            out = tmp_path / "base" / "out"
        case "file":
            out.write_text("")
        case "full_folder":
            out.mkdir()
            (out / "x").write_text("")
        case "no_base":
            folder = tmp_path / "nothing"
        case "weight":
            weight = "=much"
        case "new_twice":
            lora = {"score.weight": drawn((3, D))}
            said, weight = {"modules_to_save": ["score"]}, "=0.5"
        case "experts":
            base = {f"model.layers.0.moe.experts.{n}.w1.weight": drawn((D, D)) for n in range(2)}
            name = "model.layers.0.mlp.experts"
            lora = {f"{name}.lora_A.weight": drawn((4, D)), f"{name}.lora_B.weight": drawn((D, 4))}
            said = {"target_parameters": ["experts.down_proj"]}
        case "no_config" | "pickle" | "no_adapter":
            pass
    folder = folder or checkpoint(tmp_path / "base", base)
    path = adapter(tmp_path / "lora", lora, **said)
    if case == "no_config":
        (path / "adapter_config.json").unlink()
    if case in ("pickle", "no_adapter"):
        (path / "adapter_model.safetensors").unlink()
    if case == "pickle":
        (path / "adapter_model.bin").write_text("")
    return [folder, f"{path}{weight}", out, *words]


SAID = {
    "experts": 'stores them one by one, as "model.layers.0.moe.experts.0.w1.weight"',
    "unexpected": '1 keys are unexpected: "base_model.model.model.layers.0.self_attn.qproj',
    "missing": "keys are missing",
    "misshaped": "keys have another shape",
    "quantized": "is stored as I32, quantized",
    "dora": "uses DoRA, whose update is not A B alone",
    "residual": "began with init_lora_weights='pissa'",
    "overflow": "has values beyond the range of F16",
    "overflow_unchanged": '"model.norm.weight" has values beyond the range of F16',
    "same_folder": "is or contains",
    "inside": "is or contains",
    "file": "is a file. Give a folder",
    "full_folder": "has files. Give another folder, or `--overwrite`",
    "no_base": "there is no",
    "weight": "neither a folder nor a folder with a weight",
    "new_twice": "is not in BASE, so it cannot be weighted with 0.5",
    "no_config": "so alpha is not known",
    "pickle": "adapter_model.bin is a pickle, which is never loaded",
    "no_adapter": "there is no",
}


@pytest.mark.parametrize("case", SAID)
def test_refused(tmp_path, capsys, case):
    words = broken(tmp_path, case)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    run(*words, code=2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and SAID[case] in err and err.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }


def test_two_adapters_of_one_magnitude(tmp_path, capsys):
    folder = checkpoint(tmp_path / "base", tensors_of())
    lora = pair("model.layers.0.self_attn.q_proj", D, D)
    lora["model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = drawn(D)
    targets = {"target_modules": ["layers.0.self_attn.q_proj"]}
    one = adapter(tmp_path / "one", lora, use_dora=True, **targets)
    run(folder, one, lora_folder(tmp_path), tmp_path / "out", code=2)
    assert "has DoRA, whose update is not A B alone, in one adapter" in capsys.readouterr().err
