"""llama.cpp with our GGUF adapters, on a float32 SmolLM2.

    pip install '.[test,live]'      # llama-cpp-python is built: some twenty minutes on one core
    python -m pytest -m live tests/live/test_llama_cpp.py

It runs in a child process: a wrongly declared adapter makes it crash.
"""

import json
import subprocess
import sys

import gguf
import gguf_file
import jax
import llama
import numpy as np
import param_tree
import pytest
import safetensors.numpy
import tokenizers
import weights

import jlora
from jlora import peft
from jlora.cli import main

pytestmark = pytest.mark.live

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
TEXT = "Hello  world, 12345 times:\n\tdef f(x): return x**2  # naïve café, 東京 don't <|im_end|>\n"
TOKENS = [504, 3575, 282, 4649, 314, 7042, 30, 338, 1194]
CHILD = """
import json, sys
import llama_cpp
import numpy as np

model, adapter, out, *tokens = sys.argv[1:]
llm = llama_cpp.Llama(
    model_path=model, lora_path=adapter or None, logits_all=True, n_ctx=64, n_threads=2,
    type_k=0, type_v=0, verbose=False,
)
llm.eval(list(map(int, tokens)))
np.save(out, llm.scores[: len(tokens)])
text = sys.stdin.buffer.read()
print(json.dumps(llm.tokenize(text, add_bos=False, special=True) if text else []))
"""


def run_llama_cpp(folder, model, adapter="", text=""):
    """All logits, and the tokens of a text, of a process of its own."""
    out = folder / "logits.npy"
    words = [sys.executable, "-c", CHILD, str(model), str(adapter), str(out), *map(str, TOKENS)]
    done = subprocess.run(words, input=text.encode(), check=True, timeout=300, capture_output=True)
    found = np.load(out).astype(np.float64)
    out.unlink()
    return found, json.loads(done.stdout.splitlines()[-1])


def logits_of(folder, model, adapter):
    return run_llama_cpp(folder, model, adapter)[0]


def in_float32(source, target):
    """A copy of a GGUF model whose tensors are float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (
            "general.architecture",
            "general.file_type",
        ):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for x in reader.tensors:
        writer.add_tensor(x.name, gguf.dequantize(x.data, x.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def as_folder(source, folder):
    """The model of a GGUF file as a Hugging Face folder, in float32."""
    fields = gguf_file.open_gguf(source)[0]
    entry = lambda name: fields[f"llama.{name}"]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for key, name in SIZES.items():
        config[key] = entry(name)
    config |= {"tie_word_embeddings": True, "eos_token_id": fields["tokenizer.ggml.eos_token_id"]}
    own = {cpp: hf for _, cpp, hf in param_tree.names(gguf_file.read_gguf_sizes(source))}
    tensors = {}
    for name, x in jlora.gguf.read(source).items():
        w = x.dequantize() if isinstance(x, jlora.quant.QuantArray) else x
        tensors[own[name]] = np.asarray(w, np.float32)
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    gguf_file.gguf_tokenizer(source, fields).save(str(folder / "tokenizer.json"))
    return folder


def random_lora(folder, config, alpha, rank=4):
    """A PEFT folder of all seven projections of every layer."""
    rng = np.random.default_rng(0)
    width, kv = config.width, config.kv_heads * config.head_dim
    sizes = {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}
    sizes = {f"self_attn.{k}_proj": x for k, x in sizes.items()}
    sizes |= {f"mlp.{k}_proj": (config.hidden, width) for k in ("gate", "up")}
    sizes["mlp.down_proj"] = (width, config.hidden)
    tensors = {}
    for n in range(config.layers):
        for name, (out, ins) in sizes.items():
            module = f"base_model.model.model.layers.{n}.{name}"
            a, b = rng.normal(size=(rank, ins)), rng.normal(size=(out, rank))
            tensors[f"{module}.lora_A.weight"] = (a * ins**-0.5).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = (b * 0.05).astype(np.float32)
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in sizes]
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(said | {"alpha_pattern": alpha}))
    return folder


def far(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize("alpha", [{}, {"down_proj": 3}], ids=["one alpha", "alphas in B"])
def test_logits(tmp_path, monkeypatch, alpha):
    source = weights.path_of(None)
    config, base, _, _ = weights.load(None)
    said = {"model_type": "llama", "num_hidden_layers": config.layers, "tie_word_embeddings": True}
    said |= {"num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads}
    (tmp_path / "config.json").write_text(json.dumps(said))
    folder = random_lora(tmp_path / "lora", config, alpha)
    words = ["convert", str(folder), "--to", "gguf", "--base", str(tmp_path)]
    assert main([*words, str(tmp_path / "a.gguf")]) == 0
    own = jlora.gguf._adapter._ARCHITECTURES
    monkeypatch.setitem(own, "llama", (own["llama"][0], False))
    assert main([*words, str(tmp_path / "unpermuted.gguf")]) == 0

    apply = jlora.lora(lambda params, x: llama.Llama(config).apply({"params": params}, x))
    run = jax.jit(lambda params: apply(params, np.asarray([TOKENS], np.int32)))
    params = peft.load(folder, base, names=peft.llama_names)
    ours = np.asarray(jax.tree.leaves(run(params))[0], np.float64)[0]

    model = in_float32(source, tmp_path / "f32.gguf")
    plain, adapted, wrong = (
        logits_of(tmp_path, model, name and tmp_path / name)
        for name in ("", "a.gguf", "unpermuted.gguf")
    )
    error = far(adapted, ours)
    print(f"relative error {error:.2e}, unpermuted {far(wrong, ours):.2e}")
    print(f"the base without adapter: {far(plain, ours):.2e}")
    assert error < 1e-3 and far(plain, ours) > 0.1 and far(wrong, ours) > 50 * error


def test_a_folder_in_four_bits(tmp_path):
    """Tokens are those of the folder, logits those of the stored weights."""
    folder = as_folder(weights.path_of(None), tmp_path / "model")
    file = tmp_path / "q4_1.gguf"
    assert main(["quantize", str(folder), str(file), "--format", "q4_1"]) == 0
    logits, tokens = run_llama_cpp(tmp_path, file, text=TEXT)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokens == tokenizer.encode(TEXT).ids
    config, base, _, _ = weights.load(str(file))
    apply = lambda params, x: llama.Llama(config).apply({"params": params}, x)
    ours = jax.jit(apply)(base, np.asarray([TOKENS], np.int32))
    ours = np.asarray(jax.tree.leaves(ours)[0], np.float64)[0]
    same = logits_of(tmp_path, in_float32(file, tmp_path / "f32.gguf"), "")
    print(f"relative error {far(same, ours):.2e}, with inputs in 8 bits {far(logits, ours):.2e}")
    assert far(same, ours) < 1e-3 and far(logits, ours) < 0.05
