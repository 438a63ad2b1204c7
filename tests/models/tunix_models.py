"""Tunix's model files, without the rest of Tunix.

`import tunix` pulls in its trainers, and with them a tokenizer of each kind, data sets and servers;
the model files themselves need JAX, Flax and einops. So the packages on the way to them are made
and never executed: Python finds the model files below them all the same.
"""

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType

import flax


def _import(family: str) -> ModuleType:
    for name in ("tunix", f"tunix.models.{family}"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(
                "Tunix is not installed. The README's test command installs it, without its "
                "dependencies: pip install --no-deps google-tunix"
            )
        sys.modules[name] = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        # Qwen's files import `shard_map` from where JAX no longer wants it.
        warnings.filterwarnings("ignore", "jax.experimental.shard_map", DeprecationWarning)
        return importlib.import_module(f"tunix.models.{family}.model")


# A model file switches this setting of Flax's off for the whole process; the other tests keep it.
_always_shard = flax.config.flax_always_shard_variable
llama3, qwen2, qwen3, gemma3 = map(_import, ("llama3", "qwen2", "qwen3", "gemma3"))
flax.config.update("flax_always_shard_variable", _always_shard)
