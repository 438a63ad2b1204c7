"""What a finished run leaves for other programs: the model card and the GGUF adapter."""

import json
from pathlib import Path
from typing import Any

import card
import exports
import finetune
import gguf
import numpy as np
import peft
import pytest
import yaml

import jlora
from jlora import checkpoint


def test_the_card_says_how_the_adapter_was_made(finished: Any) -> None:
    text = (finished.exported / "README.md").read_text()
    report = json.loads((finished.out / "report.json").read_text())
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": finished.flags[1],
        "library_name": "peft",
        "tags": ["lora", "jlora"],
    }
    for said in (report["data_sha256"], report["base_sha256"], "pairs.jsonl", "licence is not kn"):
        assert said in body
    assert "| rank | `4` |" in body and "| lr | `0.02` |" in body and "| examples | `40` |" in body
    assert f"| jax | `{json.dumps(report['versions']['jax'])}` |" in body
    assert f"{report['loss_before']:.3f}" in body and f"{report['loss_after']:.3f}" in body
    peft.PeftConfig.from_pretrained(str(finished.exported))  # the card is no obstacle


def test_the_license_of_the_base(tiny_path: Path, tmp_path: Path) -> None:
    assert card.license_of(tiny_path) is None
    for text, found in [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ('---\nlicense: "llama3.2"\n---\n', "llama3.2"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ]:
        (tmp_path / "README.md").write_text(text)
        assert card.license_of(tmp_path) == found
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("mit")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert card.license_of(tmp_path / "m.gguf") == "mit"
    report = {"trainable": 1, "total": 2, "loss_before": 2.0, "loss_after": 1.0, "versions": {}}
    report |= {"base_sha256": "b", "data_sha256": "d", "step_of_adapter": 3, "data": {}}
    settings = dict.fromkeys((*card.SETTINGS, *card.ADAPTER, "model", "data"))
    text = card.card(tmp_path / "m.gguf", report | {"settings": settings})
    assert '\nlicense: "mit"\n' in text and "Its licence is mit" in text
    assert f'base_model: "{card.DEFAULT}"' in text and "made by the example" in text
    text = card.card(tiny_path, report | {"settings": settings, "phoneme_error_rate_after": 0.25})
    assert "CMUdict" in text and "Phoneme error rate: 0.250" in text


def test_the_gguf_adapter_has_the_updates(finished: Any, tiny: Any) -> None:
    params = checkpoint.restore(finished.out / "adapter", tiny[1])
    node = params["layers_1"]["mlp"]["up_proj"]["kernel"]
    file = gguf.GGUFReader(finished.exported.parent / "adapter.gguf")
    found = {tensor.name: np.asarray(tensor.data) for tensor in file.tensors}
    assert len(found) == 2 * 2 * 7
    a, b = (found[f"blk.1.ffn_up.weight.lora_{part}"] for part in "ab")
    scale = file.fields["adapter.lora.alpha"].contents() / len(a)
    delta = jlora.merge(node) - jlora.detach(node)[0]
    np.testing.assert_allclose(scale * (b @ a).T, delta, rtol=1e-4, atol=1e-6)


def test_exports_that_cannot_be_written_are_refused_before_training(
    finished: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--out", str(tmp_path / "out"), "--export-gguf", str(finished.out / "report.json")]
    assert finetune.main([*finished.flags, *more]) == 2
    assert "it exists. Name a new file" in " ".join(capsys.readouterr().err.split())
    entries = json.loads((Path(finished.flags[1]) / "config.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(exports, "config_of", lambda *_: {**entries, "model_type": "other"})
        more = ["--out", str(tmp_path / "out"), "--export-gguf", str(tmp_path / "a.gguf")]
        assert finetune.main([*finished.flags, *more]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "a.gguf`: `jlora.gguf.save" in error and "model_type 'other'" in error
    assert not (tmp_path / "out").exists()
    for wrong, match in [
        (["--export-gguf", "a", "--dora"], "llama.cpp has no DoRA"),
        (["--export-gguf", "a", "--init", "pissa"], "--export-gguf writes plain LoRA"),
        (["--generate", "x", "--export-gguf", "a"], "--generate trains nothing"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            finetune.main(wrong)
        assert match in capsys.readouterr().err
