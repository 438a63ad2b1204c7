"""Training, live: four layers of SmolLM2 with their real weights, PyTorch + PEFT and here."""

from typing import Any

import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import param_tree
import peft
import pytest
import torch
import transformers
import weights
from live import quiet

import jlora.peft

ROWS, LENGTH = 1, 32
LR, DECAY, CLIP = 3e-4, 0.05, 0.5
TEXT = (
    "The sea was calm that morning, and the boats went out early. An old man sat on the wall and "
    "mended a net; he had done so every day since his brother died. Nobody asked him why. When the "
    "wind turned, he looked up, counted the sails, and went on with his work until it was dark. "
)


def hugging_face(config: llama.Config, params: Any) -> transformers.LlamaForCausalLM:
    """The same decoder in transformers, with the very same weights."""
    c = config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab,
            hidden_size=c.width,
            intermediate_size=c.hidden,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim,
            max_position_embeddings=c.context,
            rope_theta=c.rope_theta,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tied,
            attn_implementation="eager",
        )
    )
    flat = dict(jlora._paths.leaves_with_paths(params))
    state = {}
    for path, _, name in param_tree.names(c):
        value = np.asarray(flat[path])
        state[name] = torch.tensor(value.T if path.endswith("kernel") else value)
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and result.missing_keys in ([], ["lm_head.weight"])
    return model


def batches(tokenizer: Any, steps: int) -> np.ndarray:
    ids = tokenizer.encode(TEXT).ids
    starts = np.random.default_rng(0).integers(0, len(ids) - LENGTH, (steps, ROWS))
    return np.array([[ids[s : s + LENGTH] for s in row] for row in starts], np.int32)


def train_in_torch(model: Any, data: np.ndarray) -> list[float]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=DECAY)
    losses = []
    for tokens in torch.tensor(data).long():
        logits = model(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_here(config: llama.Config, params: Any, data: np.ndarray) -> tuple[list[float], Any]:
    model = llama.Llama(config)
    apply = jlora.lora(lambda p, tokens: model.apply({"params": p}, tokens), fallback="error")
    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LR, weight_decay=DECAY))
    trainable, frozen = jlora.partition(params)

    def loss(trainable: Any, frozen: Any, tokens: Any) -> Any:
        logits = apply(jlora.combine(trainable, frozen), tokens)[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return each.mean()

    @jax.jit
    def step(trainable: Any, frozen: Any, state: Any, tokens: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(trainable, frozen, tokens)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    losses, state = [], tx.init(trainable)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for tokens in data:
            trainable, state, value = step(trainable, frozen, state, tokens)
            losses.append(float(value))
    return losses, jlora.combine(trainable, frozen)


@pytest.mark.nightly
@pytest.mark.parametrize(("layers", "steps"), [(1, 50), (4, 50)])
def test_steps_on_real_weights(layers, steps, tmp_path, compare):
    config, params, tokenizer, _ = weights.load(None, layers)
    data = batches(tokenizer, steps)
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    model = quiet(peft.get_peft_model, hugging_face(config, params), lora)
    quiet(model.save_pretrained, tmp_path / "first")
    adapted = jlora.peft.load(tmp_path / "first", params, names=jlora.peft.llama_names)

    theirs = train_in_torch(model.train(), data)
    ours, trained = train_here(config, adapted, data)
    assert theirs[-1] < 0.7 * theirs[0], "nothing was learned"
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        compare(our, their, f"the loss of step {number}", 1e-4)

    quiet(model.save_pretrained, tmp_path / "last")
    want = jlora.peft.load(tmp_path / "last", params, names=jlora.peft.llama_names)
    is_leaf = lambda x: isinstance(x, jlora.LoraArray)
    pairs = zip(*(jax.tree.leaves(tree, is_leaf=is_leaf) for tree in (trained, want)), strict=True)
    deltas = [(g.lora_a @ g.lora_b, w.lora_a @ w.lora_b) for g, w in pairs if is_leaf(g)]
    assert len(deltas) == 7 * layers
    off = [float(jnp.linalg.norm(g - d) / jnp.linalg.norm(d)) for g, d in deltas]
    losses = max(abs(o / t - 1) for o, t in zip(ours, theirs, strict=True))
    print(f"largest relative difference: {losses:.1e} of a loss, {max(off):.1e} of a final A · B")
    for got, delta in deltas:
        compare(got, delta, "A · B after training", 1e-3)

    # And back: what was trained here gives the same logits there.
    jlora.peft.save(tmp_path / "ours", trained, names=jlora.peft.llama_names)
    fresh = hugging_face(config, params)
    fresh = quiet(peft.PeftModel.from_pretrained, fresh, str(tmp_path / "ours"))
    logits = fresh.eval()(torch.tensor(data[0]).long()).logits.detach().numpy()
    apply = jlora.lora(lambda p, x: llama.Llama(config).apply({"params": p}, x))
    compare(jnp.asarray(apply(trained, data[0])), logits, "logits of transformers + PEFT")
