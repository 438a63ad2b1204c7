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
from begin import prepare

import jlora
from jlora import checkpoint


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
