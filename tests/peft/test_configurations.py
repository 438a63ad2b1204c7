"""Configurations as other programs and other years of PEFT wrote them."""

import jax.numpy as jnp
import pytest
from helpers import says
from peft_cases import SMALL_NAMES, base, config, entries, load, tensors, write, zeros

from jlora import peft


@pytest.mark.parametrize(("key", "value"), [("merge_weights", True), ("context_length", 4096)])
def test_what_changes_no_number_is_passed_over(tmp_path, key, value):
    plain = entries(target_modules=["q_proj"])
    said = {**plain, key: value}
    assert peft.rules(said, base(), names=SMALL_NAMES) == peft.rules(
        plain, base(), names=SMALL_NAMES
    )
    params = load(write(tmp_path, tensors(), entries(**{key: value})))
    assert bool((params["k"]["kernel"].lora_b == 4).all())
    assert config(tmp_path)[key] == value


MLX = {
    "fine_tune_type": "lora",
    "num_layers": 8,
    "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
}
FOREIGN = {
    "mlx": (MLX, says("'fine_tune_type' is one of MLX-LM's", "transposed", "lora_alpha = scale *")),
    "mlx_parameters": ({"lora_parameters": {"rank": 8}}, says("is one of MLX-LM's")),
    "tunix": (
        {"module_path": ".*q_einsum", "rank": 16, "alpha": 2.0},
        says("'module_path' is one of Tunix or Qwix's", "`LoraArray`, with s = alpha / rank"),
    ),
    "tunix_rank": ({"rank": 16, "alpha": 2.0}, says("'rank' is one of Tunix or Qwix's")),
    "nobody": ({"r": 8}, 'has no "peft_type".$'),
}


@pytest.mark.parametrize(("said", "match"), FOREIGN.values(), ids=FOREIGN)
def test_another_programs_configuration_is_named(tmp_path, said, match):
    with pytest.raises(ValueError, match=match):
        peft.rules(said, {"q": jnp.ones((4, 4))}, names={"q": "q.weight"})
    with pytest.raises(ValueError, match=match):
        load(write(tmp_path, tensors(), said))


def test_another_programs_folder_is_named(tmp_path):
    """MLX-LM's tensors have another file's name, so they are looked for before anything is read."""
    write(tmp_path, tensors(), MLX)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapters.safetensors")
    match = says("there is no", "adapter_model.safetensors", "'fine_tune_type' is one of MLX-LM's")
    with pytest.raises(FileNotFoundError, match=match):
        load(tmp_path)


def test_an_alpha_that_is_each_rank(tmp_path):
    """Files without a configuration, of several ranks, whose writers scale by 1."""
    file = tensors(m__k_proj__lora_A__weight=zeros(1, 5), m__k_proj__lora_B__weight=zeros(3, 1))
    write(tmp_path, file, {})
    (tmp_path / "adapter_config.json").unlink()
    got = load(tmp_path, alpha="rank")
    assert got["q"]["kernel"].scaling == got["k"]["kernel"].scaling == 1
    got = load(tmp_path, alpha=2)
    assert (got["q"]["kernel"].scaling, got["k"]["kernel"].scaling) == (1, 2)
