"""What was fine-tuned here, in transformers + PEFT: the same logits; and from there back."""

from pathlib import Path
from typing import Any

import finetune
import jax
import llama
import numpy as np
import peft
import pytest
import torch
import transformers
import weights
from begin import attach, load_model, prepare
from flags import parse
from merged import write_merged
from safetensors.flax import load_file, save_file

import jlora
from jlora import checkpoint


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_export_and_back(finished: Any, tiny_path: Path, tmp_path: Path, capsys: Any) -> None:
    out, exported, common = finished.out, finished.exported, finished.flags
    common = [flag for flag in common if flag not in ("--rank", "4")]
    config, base, *_ = weights.load(str(tiny_path))
    params = checkpoint.restore(out / "adapter", base)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 17)).astype(np.int32)
    apply = jlora.lora(lambda p, x: llama.Llama(config).apply({"params": p}, x))
    ours = np.asarray(apply(params, tokens))
    with torch.no_grad():
        model = transformers.LlamaForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
        before = model(torch.tensor(tokens).long()).logits.numpy()
        model = peft.PeftModel.from_pretrained(model, str(exported)).eval()
        theirs = model(torch.tensor(tokens).long()).logits.numpy()
        plain = transformers.LlamaForCausalLM.from_pretrained(finished.merged, dtype=torch.float32)
        merged = plain(torch.tensor(tokens).long()).logits.numpy()
    assert np.linalg.norm(ours - merged) < 1e-5 * np.linalg.norm(merged)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
    assert np.linalg.norm(ours - before) > 0.01 * np.linalg.norm(before), "nothing was learned"

    # The exported adapter is the trained one, for generation and to go on from.
    said = []
    for source in (["--out", str(out)], ["--adapter", str(exported)]):
        assert finetune.main([*common[:2], *source, "--generate", "3 + 1 ="]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    more = [*common, "--out", str(tmp_path / "more"), "--adapter", str(exported)]
    args = finetune.parse(more)
    begun = prepare(args).params
    for got, want in zip(jax.tree.leaves(begun), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_merged_model_has_the_dtypes_and_files_of_its_source(
    tiny_dir: Path, tmp_path: Path
) -> None:
    """A stacked tree gives the same file; bfloat16 weights are rounded once."""
    tensors = {k: np.asarray(v) for k, v in load_file(tiny_dir / "model.safetensors").items()}
    half = {k: jax.numpy.asarray(v, "bfloat16") for k, v in tensors.items()}
    save_file(half, tiny_dir / "model.safetensors")
    (tiny_dir / "chat_template.jinja").write_text("{{ messages }}")
    written = []
    for more in ((), ("--scan",)):
        args = parse(["--model", str(tiny_dir), *more])
        config, base, *_ = load_model(args)
        params = attach(args, base)
        folder = tmp_path / "".join(("merged", *more))
        write_merged(folder, tiny_dir, config, params)
        written.append(load_file(folder / "model.safetensors"))
        names = {"chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"}
        assert {path.name for path in folder.iterdir()} == names
    for found in written:  # B is zero, so the merged weights are those of the source
        assert found.keys() == half.keys()
        for name, value in found.items():
            assert value.dtype == half[name].dtype
            np.testing.assert_array_equal(value, half[name])


def test_where_a_merged_model_cannot_be_written(
    tiny_path: Path, sums: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").touch()
    (tmp_path / "m.gguf").touch()
    for model, folder, match in (
        (tiny_path, "full", "there are files in it. Name a new directory"),
        (tmp_path / "m.gguf", "new", "m.gguf is a GGUF file, without the config.json"),
    ):
        flags = ["--model", str(model), "--data", str(sums), "--merge", str(tmp_path / folder)]
        assert finetune.main([*flags, "--out", str(tmp_path / "out")]) == 2
        assert match in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()
