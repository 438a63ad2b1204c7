"""PEFT live on a twin: make its adapter, read and write its files, compare everything."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import torch
from safetensors.torch import load_file
from twins import Twin

import jlora.peft

RANK, ALPHA = 4, 6
VARIANTS = {"plain": {}, "rslora": {"use_rslora": True}}


def adapt(twin: Twin, **more: Any) -> Any:
    """The module under PEFT, every trainable tensor random."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(twin.targets) or None,
        target_parameters=list(twin.parameters) or None,
        init_lora_weights=False,
        **twin.config,
        **more,
    )
    model = quiet(peft.get_peft_model, twin.make(), config)
    randomize(model)
    return model.eval()


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) / 2)


def quiet(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT warns of biases, Conv1D and targeted embeddings, rightly or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **kwargs)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def entries(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def save(folder: Path, params: Any, twin: Twin, **config: Any) -> dict[str, torch.Tensor]:
    given = {"declared": list(twin.parameters)} if twin.parameters else {}
    jlora.peft.save(
        folder,
        params,
        names=twin.names,
        layouts=twin.layouts,
        kinds=twin.kinds,
        **given,
        **twin.config,
        **config,
    )
    return tensors(folder)


def load(folder: Path, base: Any, twin: Twin, **more: Any) -> Any:
    known = {"names": twin.names, "layouts": twin.layouts, "kinds": twin.kinds}
    return jlora.peft.load(folder, base, **known, **more)


def hold(twin: Twin, model: Any, folder: Path, compare: Any, **config: Any) -> None:
    """Forward, every gradient, the merged weights; and the file written again, bit for bit."""
    quiet(model.save_pretrained, folder)
    base = twin.params(plain(twin))
    params = load(folder, base, twin)
    computed = twin.as_peft(params)
    apply = jlora.lora(twin.fn, fallback="error")
    tx, out, slopes = slopes_of(twin, model, computed, apply, compare)
    gradients = jlora.combine(slopes, jlora.partition(params)[1])
    gradients = save(folder / "gradients", gradients, twin, **config)
    theirs = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    theirs = quiet(peft.get_peft_model_state_dict, model, state_dict=theirs)
    assert set(gradients) == set(theirs)
    compare_slopes(twin, gradients, theirs, compare)

    again = save(folder / "again", params, twin, **config)
    first = tensors(folder)
    assert set(again) == set(first)
    for key, tensor in first.items():
        assert again[key].dtype == tensor.dtype and torch.equal(again[key], tensor), key
    reloaded, result = into_peft(twin, folder / "again")
    assert not result.missing_keys and not result.unexpected_keys
    # MultiheadAttention's forward pass merges and unmerges, which is not exact.
    compare(reloaded(tx).detach().numpy(), out.detach().numpy(), "PEFT", 1e-6 if twin.slopes else 0)

    if not twin.merges:
        return
    merged = twin.params(quiet(model.merge_and_unload))
    ours = dict(jax.tree.leaves_with_path(jlora.merge(computed)))
    for path, want in jax.tree.leaves_with_path(merged):
        compare(ours[path], want, f"merged {path}")


def slopes_of(
    twin: Twin, run: Callable[..., Any], params: Any, fn: Callable[..., Any], compare: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Compare `fn(params, x)` and the gradient of x with PEFT's, `run(x)`.

    Returns PEFT's input and output, and the gradients of what trains in `params`.
    """
    x = twin.x(np.random.default_rng(0))
    floating = x.dtype == np.float32
    tx = torch.tensor(x, requires_grad=True) if floating else torch.tensor(x)
    out = run(tx)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    trainable, frozen = jlora.partition(params)

    def loss(trainable: Any, x: Any) -> Any:
        y = fn(jlora.combine(trainable, frozen), x)
        return (y * weight.numpy()).sum(), y

    argnums = (0, 1) if floating else (0,)
    grads, y = jax.grad(loss, argnums, has_aux=True)(trainable, x)
    compare(y, out.detach().numpy(), "forward")
    if floating:
        compare(grads[1], tx.grad.numpy(), "gradient of the input")
    return tx, out, grads[0]


def compare_slopes(
    twin: Twin, ours: Mapping[str, Any], theirs: Mapping[str, Any], compare: Any, of: str = ""
) -> None:
    """Compare gradients under the names of PEFT's file."""
    for key, grad in theirs.items():
        slope = next((s for part, s in twin.slopes.items() if part in key), 1.0)
        compare(slope * ours[key].numpy(), grad.numpy(), f"{of}gradient of {key}")


def plain(twin: Twin) -> torch.nn.Module:
    """The module before PEFT, always the same."""
    torch.manual_seed(1)
    return twin.make()


def into_peft(twin: Twin, folder: Path) -> tuple[Any, Any]:
    """Load a folder into PEFT on fresh base weights; every warning of PEFT's is an error."""
    config = peft.PeftConfig.from_pretrained(str(folder))
    model = quiet(peft.PeftModel, plain(twin), config)
    result = model.load_adapter(str(folder), "default")
    return model.eval(), result


def through_files(twin: Twin, model: Any, folder: Any, base: Any = None, **more: Any) -> Any:
    quiet(model.save_pretrained, folder)
    read = dict(names=twin.names, layouts=twin.layouts, kinds=twin.kinds)
    return jlora.peft.load(folder, base or twin.params(plain(twin)), **read, **more)


def distance(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def step(k: torch.Tensor) -> torch.Tensor:
    """A step at the rank; what is left behind it is large enough to be known to 1e-6 in float32."""
    return torch.where(k < RANK, 2.0 - 0.1 * k, 0.6 - 0.02 * k)


def decaying(twin: Twin, values: Callable[[torch.Tensor], torch.Tensor] = step) -> torch.nn.Module:
    """The module before PEFT, its singular values such as a randomized decomposition finds."""
    module = plain(twin)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 2:
                u, s, vt = torch.linalg.svd(p, full_matrices=False)
                p.copy_((u * values(torch.arange(len(s)))) @ vt)
    return module


def nodes(params: Any) -> dict[str, Any]:
    is_leaf = lambda x: isinstance(x, jlora.LoraArray)
    return {p: x for p, x in jlora._paths.leaves_with_paths(params, is_leaf) if is_leaf(x)}
