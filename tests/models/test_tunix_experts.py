"""The names of Tunix's mixture of experts, against transformers' model and PEFT's files of it."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from holds import distance
from safetensors.torch import load_file
from tunix_small import (
    MARKS,
    MARKS_OF_TRANSFORMERS,
    SIZES,
    TOLERANCE,
    VOCAB,
    WIDTH,
    arranged,
    forward,
    layouts,
    model,
    prompt,
)

import jlora.peft
from jlora._paths import map_with_paths

pytestmark = [*MARKS, *MARKS_OF_TRANSFORMERS]
MOE = {"num_experts": 3, "num_experts_per_tok": 2}
EXPERTS = ("gate_proj", "up_proj", "down_proj")


def mixture() -> torch.nn.Module:
    """transformers' mixture of experts of the sizes of Tunix's, with random weights."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        moe_intermediate_size=SIZES["hidden_dim"],
        num_hidden_layers=SIZES["num_layers"],
        num_attention_heads=SIZES["num_heads"],
        num_key_value_heads=SIZES["num_kv_heads"],
        head_dim=SIZES["head_dim"],
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
        **MOE,
    )
    net = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if "norm" in name else 1 / math.sqrt(p.shape[-1])))
    return net


class Mixture(NamedTuple):
    """Tunix's mixture of experts with the weights of transformers', and how to run both."""

    net: Callable[[], torch.nn.Module]
    fn: Callable[..., Any]
    state: Any
    sides: dict[str, str]

    def ours(self, params: Any) -> np.ndarray:
        tokens, *rest = prompt()
        run = jax.jit(jlora.lora(self.fn, fallback="error"))
        return np.asarray(run(params, tokens, *rest)[0])

    def theirs(self, net: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return net(torch.tensor(np.asarray(prompt()[0])).long()).logits.numpy()

    def load(self, folder: Path, names: Any = jlora.peft.tunix_names) -> Any:
        return jlora.peft.load(folder, self.state, names=names, layouts=self.sides)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: Any) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    mixture().save_pretrained(folder)  # as checkpoints are: one weight for each expert
    tensors = {k: x.numpy() for k, x in load_file(folder / "model.safetensors").items()}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        graph, state = model("qwen3", embed_dim=WIDTH, **MOE)
        sides = layouts("qwen3", graph, state)

    def take(path: str, like: Any) -> Any:
        name = jlora.peft.tunix_names(path)
        assert name is not None, path
        if "{}" in name:
            each = [tensors.pop(name.format(k)).T for k in range(MOE["num_experts"])]
            return jnp.asarray(np.stack(each))
        w = tensors.pop(name)
        return jnp.asarray(w if "embed" in path else arranged(w, like.shape, sides.get(path)))

    state = map_with_paths(take, state)
    assert not tensors, f"without a leaf: {sorted(tensors)}"
    return Mixture(mixture, forward(graph), state, sides)


def layers_of_transformers_4() -> torch.nn.Module:
    """The adapted modules alone, named as transformers 4 has them: one for each expert."""
    d, h = WIDTH, SIZES["hidden_dim"]
    wide = SIZES["num_heads"] * SIZES["head_dim"]
    root = torch.nn.Module()
    for layer in range(SIZES["num_layers"]):
        sizes = {"self_attn.q_proj": (d, wide), "self_attn.o_proj": (wide, d)}
        for k in range(MOE["num_experts"]):
            both = {"gate_proj": (d, h), "up_proj": (d, h), "down_proj": (h, d)}
            sizes |= {f"mlp.experts.{k}.{name}": size for name, size in both.items()}
        for name, size in sizes.items():
            *parents, last = f"model.layers.{layer}.{name}".split(".")
            module = root
            for part in parents:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.add_module(last, torch.nn.Linear(*size, bias=False))
    return root


def into_mixture(net: torch.nn.Module, folder: Path) -> torch.nn.Module:
    net = peft.PeftModel(net, peft.PeftConfig.from_pretrained(str(folder)))
    result = net.load_adapter(str(folder), "default")
    assert not result.missing_keys and not result.unexpected_keys
    return net.eval()


fused = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")


@pytest.mark.nightly
@fused
def test_experts_have_their_names_and_an_adapter_its_numbers(experts, tmp_path):
    """A file of PEFT's with one layer for each expert, in Tunix's model and in transformers 5's."""
    plain = experts.theirs(experts.net())
    assert distance(experts.ours(experts.state), plain) <= TOLERANCE
    targets = ["q_proj", "o_proj", *EXPERTS]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    net = peft.get_peft_model(layers_of_transformers_4(), config)
    net.save_pretrained(tmp_path / "peft")
    adapted = experts.theirs(into_mixture(experts.net(), tmp_path / "peft"))
    assert distance(adapted, plain) > 0.05, "the adapter does nothing here"
    params = experts.load(tmp_path / "peft")
    node = params["layers"][0]["mlp"]["gate_proj"].value
    assert node.lora_a.shape == (3, WIDTH, 4) and node.layout == "io"
    assert distance(experts.ours(params), adapted) <= TOLERANCE

    # And back: the same tensors, which PEFT takes without a missing or an unexpected key.
    jlora.peft.save(tmp_path / "ours", params, names=jlora.peft.tunix_names)
    files = [(tmp_path / x / "adapter_model.safetensors").read_bytes() for x in ("peft", "ours")]
    assert files[0] == files[1]
    again = experts.theirs(into_mixture(experts.net(), tmp_path / "ours"))
    np.testing.assert_array_equal(again, adapted)


def test_what_transformers_5_cannot_take_of_experts(experts, tmp_path):
    """PEFT fuses gate and up by the file's own r, so it refuses one of them, and another rank."""

    def attached(ranks: dict[str, int]) -> Any:
        rules = {f"layers/./mlp/{name}": jlora.LoraSpec(r) for name, r in ranks.items()}
        rules["layers/./attn/[qkvo]_proj/w"] = jlora.LoraSpec(2)
        return jlora.attach(experts.state, rules, key=jax.random.key(0), layouts=experts.sides)

    jlora.peft.save(tmp_path / "a", attached({"gate_proj": 2}), names=jlora.peft.tunix_names)
    with pytest.raises(ValueError, match="gate_proj without also targeting up_proj"):
        into_mixture(experts.net(), tmp_path / "a")
    other = attached(dict.fromkeys(EXPERTS, 2) | {"down_proj": 3})
    jlora.peft.save(tmp_path / "b", other, names=jlora.peft.tunix_names)
    with (
        pytest.warns(RuntimeWarning, match="keys did not match"),
        pytest.raises(RuntimeError, match="size mismatch"),
    ):
        into_mixture(experts.net(), tmp_path / "b")


@fused
def test_what_peft_writes_of_experts_over_transformers_5(experts, tmp_path):
    """One A for gate and up together is refused by its keys; the other parameter loads alone."""
    options = dict(r=4, lora_alpha=6, target_modules=None, init_lora_weights=False)
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    net = peft.get_peft_model(experts.net(), peft.LoraConfig(target_parameters=both, **options))
    net.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match=r"unexpected: .*mlp\.experts\.base_layer\.lora_A\.weight"):
        experts.load(tmp_path / "both")

    def names(path: str) -> Any:
        layer = re.fullmatch(r"layers/(\d+)/mlp/down_proj", path)
        down = layer and f"model.layers.{layer[1]}.mlp.experts.down_proj"
        return down or jlora.peft.tunix_names(path)

    with pytest.raises(ValueError, match=r"unexpected: .*mlp\.experts\.base_layer\.lora_A\.weight"):
        experts.load(tmp_path / "both", names)
    config = peft.LoraConfig(target_parameters=both[1:], **options)
    net = peft.get_peft_model(experts.net(), config).eval()
    net.save_pretrained(tmp_path / "down")
    plain, adapted = experts.theirs(experts.net()), experts.theirs(net)
    assert distance(adapted, plain) > 0.02
    params = experts.load(tmp_path / "down", names)
    assert distance(experts.ours(params), adapted) <= TOLERANCE
    jlora.peft.save(tmp_path / "ours", params, names=names)
    files = [(tmp_path / x / "adapter_model.safetensors").read_bytes() for x in ("down", "ours")]
    assert files[0] == files[1]
