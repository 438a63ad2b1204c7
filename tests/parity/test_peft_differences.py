"""Where jlora means to give another answer than PEFT 0.21.2: each with both numbers.

| what | PEFT | jlora |
|---|---|---|
| an entry of target_modules that matches nothing | ignored | a warning |
| a key behind `module.` or `_orig_mod.`, or with another adapter's name | passed over | read |
| a key of a file that fits nothing, or that lacks | passed over, or warned of | an error |
| an entry of adapter_config.json that it does not know | dropped with a warning | an error |
| "all-linear" in a plain module | takes the output head too | leaves a head of the usual names |
| `safe_merge` over bfloat16 | rounds the delta, then the sum | rounds once |
| unmerge | changes the weights | `detach` has them bit for bit |
| MultiheadAttention's output projection | adds its update twice | once |
| MultiheadAttention's lora_dropout | ignored | falls on A's input |
| MultiheadAttention's lora_bias | in its outputs, but gets no gradient | refused |
| several active adapters of MultiheadAttention | the last alone gets gradients | all do |
| several active DoRA adapters | in turn, by order; under dropout their sum | one gain a weight |
| lora_dropout of expert parameters | refused | falls on A's input |
| the random B of experts (`init_lora_weights=False`) | U(±1/√(r·E)) | U(±1/√r), as of a layer |
| a convolution with groups | A sees all channels, no merge | so without groups; with, its group's |
| DoRA of a convolution with groups | a norm of B A as if without | the kernel's own norm |
| DoRA of an output whose weights are all zero | 0 / 0 | g = 1 |
| a dilated convolution | fails | works |
| a convolution's padding_mode | not for A: merged is another | the program's own, for A too |
| the linear sum of adapters | has cross terms | A and B side by side are exact |
| the same, of rsLoRA | s = √r where 1 is meant | exact |
| "ties", "magnitude_prune" (test_peft_merging) | of A and B separately | of the updates |
| "olora" on transformers' Conv1D | fails | works |
| "pissa_niter_4" in a file | other random numbers, another base | refused |
| "pissa" over bfloat16 | rounds A and B too (test_peft_initial) | rounds the residual alone |
| an embedding saved whole that is the head too (test_peft_tied) | the head is the old one | both |
| adapters of tied layers that stay tied, merged (test_peft_tied) | the update twice | once |
| LoRA of an embedding that is the head too | the lookup alone, until merged | both, as merged |
| LoRA of a head that is the embedding, `jlora merge` | then in both | in the head, as trained |
| bfloat16 activations | A, B in float32 | in bfloat16, unless `dtype=` says otherwise |

The rows from MultiheadAttention's to padding_mode's are tested in test_peft_differences_of_layers.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from live import adapt, distance, plain, quiet, randomize, through_files
from safetensors.torch import load_file, save_file
from several import together
from twins import Holder, Twin, conv1d_hf, experts, linear, mlp

import jlora.peft
from jlora.cli import main


def test_an_entry_that_matches_nothing():
    config = peft.LoraConfig(target_modules=["up", "dwon"])
    model = quiet(peft.get_peft_model, mlp.make(), config)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 1
    with pytest.warns(UserWarning, match=r"\['dwon'\] of the configuration choose nothing.*down"):
        found = jlora.peft.rules(config.to_dict(), mlp.params(mlp.make()), names=mlp.names)
    assert list(found) == ["up/kernel"]


def test_keys_that_fit_nothing_or_lack(tmp_path):
    quiet(adapt(linear).save_pretrained, tmp_path)
    file, config = (
        tmp_path / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    first, said = load_file(file), json.loads(config.read_text())
    base, read = linear.params(plain(linear)), dict(names=linear.names)
    key = "base_model.model.layer.lora_B.weight"
    odd = key.replace("layer", "leyar")

    save_file({**first, odd: first[key].clone()}, file)
    peft.PeftModel.from_pretrained(plain(linear), str(tmp_path))  # a warning would be an error
    with pytest.raises(ValueError, match=r"1 keys are unexpected.*leyar.*Closest: .layer"):
        jlora.peft.load(tmp_path, base, **read)

    save_file({k: x for k, x in first.items() if k != key}, file)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = peft.PeftModel.from_pretrained(plain(linear), str(tmp_path))
    assert model.base_model.model.layer.lora_B["default"].weight.shape == (7, 4)
    with pytest.raises(ValueError, match=r"1 keys are missing: .*layer\.lora_B\.weight"):
        jlora.peft.load(tmp_path, base, **read)

    save_file(first, file)
    config.write_text(json.dumps({**said, "use_rslora2": True}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments.*use_rslora2"):
        peft.PeftModel.from_pretrained(plain(linear), str(tmp_path))
    with pytest.raises(ValueError, match=r'sets "use_rslora2" to True.*use_rslora'):
        jlora.peft.load(tmp_path, base, **read)


@pytest.mark.parametrize("odd", ["module.", "_orig_mod.", "lora_A.other."])
def test_keys_as_other_writers_leave_them(tmp_path, compare, odd):
    model = adapt(linear)
    want = through_files(linear, model, tmp_path)["layer"]["kernel"]
    file = tmp_path / "adapter_model.safetensors"
    prefix = "base_model.model."
    spelled = {
        key.replace("lora_A.", odd).replace("lora_B.", odd.replace("A", "B"))
        if "lora_A" in odd
        else prefix + odd + key.removeprefix(prefix): x
        for key, x in load_file(file).items()
    }
    save_file(spelled, file)
    theirs = quiet(peft.PeftModel.from_pretrained, plain(linear), str(tmp_path))
    left = theirs.base_model.model.layer.lora_B["default"].weight.detach().numpy()
    assert distance(left, want.lora_b.T) > 0.5  # as PEFT began it
    read = jlora.peft.load(tmp_path, linear.params(plain(linear)), names=linear.names)
    compare(read["layer"]["kernel"].lora_b, want.lora_b, "B", 0)
    compare(read["layer"]["kernel"].lora_a, want.lora_a, "A", 0)


def test_all_linear_in_a_plain_module():
    module = torch.nn.Sequential()
    module.add_module("up", torch.nn.Linear(4, 4))
    module.add_module("lm_head", torch.nn.Linear(4, 9))
    config = peft.LoraConfig(target_modules="all-linear")
    entries = config.to_dict()
    model = quiet(peft.get_peft_model, module, config)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2
    names = {"up/kernel": "up.weight", "lm_head/kernel": "lm_head.weight"}
    params = {"up": {"kernel": jnp.ones((4, 4))}, "lm_head": {"kernel": jnp.ones((4, 9))}}
    found = jlora.peft.rules(entries, params, names=names)
    assert list(found) == ["up/kernel"]


def wide() -> Twin:
    """A linear layer large enough for its rounding to show."""
    return dataclasses.replace(linear, make=lambda: Holder(torch.nn.Linear(256, 256)))


def test_safe_merge_rounds_twice(tmp_path):
    twin = wide()
    model = adapt(twin)
    quiet(model.save_pretrained, tmp_path)
    base = twin.params(plain(twin).to(torch.bfloat16))
    params = jlora.peft.load(tmp_path, base, names=twin.names)
    node = params["layer"]["kernel"]
    a, b = np.float64(node.lora_a), np.float64(node.lora_b)
    exact = np.float64(node.base.astype(jnp.float32)) + float(node.scaling) * a @ b
    rounded = np.float64(jnp.asarray(exact, jnp.bfloat16).astype(jnp.float32))
    module = plain(twin).to(torch.bfloat16)
    theirs = quiet(peft.PeftModel.from_pretrained, module, str(tmp_path))
    theirs = twin.params(quiet(theirs.merge_and_unload, safe_merge=True))["layer"]["kernel"]
    ours = jlora.merge(params)["layer"]["kernel"]
    wrong = [(np.float64(w.astype(jnp.float32)) != rounded).mean() for w in (theirs, ours)]
    assert wrong[0] > 0.02 and wrong[1] < 0.001, wrong


def test_unmerge_changes_the_weights(tmp_path):
    twin = wide()
    model = adapt(twin)
    params = through_files(twin, model, tmp_path)
    before = model.base_model.model.layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    model.unmerge_adapter()
    after = model.base_model.model.layer.base_layer.weight
    ours = jlora.detach(params)[0]["layer"]["kernel"]
    changed = [(after != before).float().mean().item(), (ours.T != before.numpy()).mean()]
    assert changed[0] > 0.1 and changed[1] == 0, changed


def test_the_random_b_of_experts():
    """PEFT packs the experts beside the rank, and takes them for a fan-in of r·E."""
    twin, n_experts, rank = experts(True), 4, 3
    options = dict(r=rank, target_parameters=list(twin.parameters), init_lora_weights=False)
    config = peft.LoraConfig(target_modules=None, **options)
    model = quiet(peft.get_peft_model, plain(twin), config)
    theirs = [x.detach().abs().max() for name, x in model.named_parameters() if "lora_B" in name]
    base = twin.params(plain(twin))
    rules = jlora.peft.rules(config.to_dict(), base, names=twin.names)
    params = jlora.attach(base, rules, key=jax.random.key(0), layouts=twin.layouts)
    ours = [jnp.abs(x.lora_b).max() for x in params["layer"].values()]
    assert len(theirs) == len(ours) == 2
    for bound, found in (((rank * n_experts) ** -0.5, theirs), (rank**-0.5, ours)):
        for x in found:
            assert 0.9 * bound < float(x) <= bound


def test_olora_on_conv1d_of_transformers(compare):
    """PEFT takes the weight for (out, in), so A and B have each other's widths."""
    options = dict(r=4, target_modules=["layer"], init_lora_weights="olora", **conv1d_hf.config)
    config, x = peft.LoraConfig(**options), conv1d_hf.x(np.random.default_rng(0))
    with pytest.raises(RuntimeError):
        quiet(peft.get_peft_model, plain(conv1d_hf), config)(torch.tensor(x))
    base = conv1d_hf.params(plain(conv1d_hf))
    rules = jlora.peft.rules(config.to_dict(), base, names=conv1d_hf.names)
    params = jlora.attach(base, rules, key=jax.random.key(0))
    compare(jlora.lora(conv1d_hf.fn)(params, x), conv1d_hf.fn(base, x), "as it was", 1e-6)


def test_a_randomized_decomposition_is_not_in_its_file(tmp_path):
    options = dict(r=4, target_modules=["layer"], init_lora_weights="pissa_niter_4")
    model = quiet(peft.get_peft_model, wide().make(), peft.LoraConfig(**options)).eval()
    torch.manual_seed(1)
    x = torch.randn(3, 256)
    quiet(model.save_pretrained, tmp_path)
    with torch.no_grad():
        module = wide().make()
        layer = model.base_model.model.layer
        module.layer.weight.copy_(layer.base_layer.weight + layer.get_delta_weight("default"))
        module.layer.bias.copy_(layer.base_layer.bias)
        again = quiet(peft.PeftModel.from_pretrained, module, str(tmp_path)).eval()
        assert distance(again(x), model(x)) > 0.01
    with pytest.raises(ValueError, match="init_lora_weights='pissa_niter_4', which moves the base"):
        through_files(wide(), model, tmp_path)


@pytest.mark.parametrize(("kind", "rslora"), [("linear", False), ("cat", True)])
def test_the_sum_of_two_adapters(tmp_path, compare, kind, rslora):
    model = adapt(linear, use_rslora=rslora)
    config = model.peft_config["default"]
    quiet(model.add_adapter, "other", config)
    quiet(model.base_model.set_adapter, ["default", "other"])
    randomize(model)
    x = linear.x(np.random.default_rng(0))
    meant = model(torch.tensor(x)).detach().numpy()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type=kind)
    params = together(
        [through_files(linear, model, tmp_path, adapter=name) for name in ("default", "other")]
    )
    model.base_model.set_adapter("sum")
    theirs = model(torch.tensor(x)).detach().numpy()
    assert distance(theirs, meant) > 0.1
    compare(jlora.lora(linear.fn)(params, x), meant, "the exact sum")


def test_bfloat16_activations(tmp_path):
    """Both are a rounding away from the exact result; PEFT's narrow products are in float32."""
    twin = dataclasses.replace(
        linear,
        make=lambda: Holder(torch.nn.Linear(13, 7, bias=False)),
        fn=lambda p, x: x @ p["layer"]["kernel"],
        moves={"layer/kernel": ("layer.weight", lambda w: w.T)},
    )
    quiet(adapt(twin).save_pretrained, tmp_path)
    base = twin.params(plain(twin).to(torch.bfloat16))
    params = jlora.peft.load(tmp_path, base, names=twin.names)
    x = jnp.asarray(twin.x(np.random.default_rng(0)), jnp.bfloat16)
    node = params["layer"]["kernel"]
    w, a, b = (np.float64(t.astype(jnp.float32)) for t in (node.base, node.lora_a, node.lora_b))
    exact = np.float64(x.astype(jnp.float32)) @ (w + float(node.scaling) * a @ b)
    module = plain(twin).to(torch.bfloat16)
    model = quiet(peft.PeftModel.from_pretrained, module, str(tmp_path))
    theirs = model(torch.tensor(np.float32(x)).bfloat16()).detach().float().numpy()
    ours = [jlora.lora(twin.fn, dtype=dtype)(params, x) for dtype in (None, jnp.float32)]
    errors = [distance(theirs, exact), *(distance(np.float32(y), exact) for y in ours)]
    assert errors[0] < 2**-8 and errors[1] < 2**-7 and errors[2] < 2**-8, errors


def test_an_embedding_that_is_the_head_too(tmp_path, compare):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.embed(ids)))

    torch.manual_seed(0)
    net = Tied()
    base = {"embed": jnp.asarray(net.embed.weight.detach().numpy())}
    model = quiet(peft.get_peft_model, net, peft.LoraConfig(target_modules=["embed"]))
    randomize(model)
    quiet(model.save_pretrained, tmp_path)
    params = jlora.peft.load(tmp_path, base, names={"embed": "embed.weight"})
    ids = np.arange(9)

    def fn(p, ids):
        return jnp.tanh(p["embed"][ids]) @ p["embed"].T

    ours = jlora.lora(fn, fallback="error")(params, ids)
    theirs = model(torch.tensor(ids)).detach().numpy()
    merged = quiet(model.merge_and_unload)(torch.tensor(ids)).detach().numpy()
    compare(ours, merged, "PEFT, merged")
    assert distance(theirs, merged) > 0.01


def test_a_head_that_is_the_embedding_too(tmp_path, compare):
    """Merged on the command line, the head has weights of its own."""
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config).eval()
    net.save_pretrained(tmp_path / "base")
    model = quiet(peft.get_peft_model, net, peft.LoraConfig(target_modules=["lm_head"]))
    randomize(model)
    quiet(model.save_pretrained, tmp_path / "lora")
    ids = torch.arange(12)[None]
    logits = lambda module: module.eval()(ids).logits.detach().numpy()
    trained = logits(model)
    assert main(["merge", *(str(tmp_path / x) for x in ("base", "lora", "out"))]) == 0
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    compare(logits(ours), trained, "PEFT, not merged")
    assert distance(logits(quiet(model.merge_and_unload)), trained) > 0.01
