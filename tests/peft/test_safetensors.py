"""The traps of safetensors: each as its own writer or reader falls into it, and not here."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
import safetensors.torch
import torch

from jlora._tensor_file import read, write


def test_an_array_that_is_not_contiguous(tmp_path):
    """The writer copies memory as it lies, and PEFT's files are transposes."""
    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    careless = safetensors.numpy.load(safetensors.numpy.save({"w": w.T}))["w"]
    assert careless.shape == (4, 3) and (careless != w.T).any()
    for x in (
        w.T,
        w[:, ::2],
        w[::-1],
        np.asarray(jnp.asarray(w).T),
        np.broadcast_to(w[:1], (3, 4)),
    ):
        write(tmp_path / "a.safetensors", {"w": x})
        np.testing.assert_array_equal(read(tmp_path / "a.safetensors", "f()")["w"], x)


def test_the_dict_that_was_given_stays_as_it_was(tmp_path):
    """The writer for JAX puts numpy's arrays into the caller's dict."""
    careless = {"w": jnp.ones((2, 3))}
    safetensors.flax.save(careless)
    assert isinstance(careless["w"], np.ndarray)
    given = {"b": np.ones((3, 2), np.float32).T, "a": np.ones(2, np.float32)}
    before = dict(given)
    write(tmp_path / "a.safetensors", given)
    assert list(given) == list(before) and all(given[k] is before[k] for k in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_of_every_dtype(tmp_path, dtype):
    """Of bfloat16 the reader for JAX, given bytes, knows nothing."""
    x = torch.tensor([[1.0, -0.0, 3.140625], [float("inf"), 1e-3, -2.5]]).to(dtype)
    content = safetensors.torch.save({"w": x})
    if dtype == torch.bfloat16:
        with pytest.raises(KeyError, match="BF16"):
            safetensors.flax.load(content)
    (tmp_path / "a.safetensors").write_bytes(content)
    got = read(tmp_path / "a.safetensors", "f()")["w"]
    assert got.dtype.name == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(np.float32(got), x.float().numpy())
    write(tmp_path / "b.safetensors", {"w": got})
    again = safetensors.torch.load_file(tmp_path / "b.safetensors")["w"]
    assert again.dtype == dtype and torch.equal(again, x)
    assert (tmp_path / "b.safetensors").read_bytes()[-x.nbytes :] == content[-x.nbytes :]
