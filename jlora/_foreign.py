"""What users of PEFT, loralib and lorax look for in jlora, and what to write instead."""

import sys
from typing import NoReturn

# Modules that `import jlora` does not import, and the library that each needs.
_APART = {"checkpoint": "Orbax", "gguf": "gguf-py"}
_APART["keras"] = "h5py"
_APART |= dict.fromkeys(("diffusers", "kohya", "mlx", "peft"), "safetensors")
# Names, lower-case and without "_".
_INSTEAD = {
    "attach an adapter with `jlora.attach(params, rules, key=key)`": (
        *("getpeftmodel", "peftmodel", "peftmodelforcausallm", "autopeftmodelforcausallm"),
        *("injectadapter", "injectadapterinmodel", "addadapter", "applylora", "initlora"),
        *("applyloratomodel", "loramodel", "addlora"),
    ),
    'describe it with `jlora.LoraSpec(rank=8, alpha=16)`, in rules `{r".*/kernel": spec}`': (
        *("loraconfig", "peftconfig", "loraweight", "simplespec"),
    ),
    'it is `jlora.LoraSpec(form="adalora")`, with `jlora.optim.adalora`': ("adaloraconfig",),
    'it is `jlora.LoraSpec(form="vera")`': ("veraconfig",),
    "no layer is replaced, `jlora.lora(model.apply)` takes the parameters of `jlora.attach`": (
        *("linear", "embedding", "conv1d", "conv2d", "conv3d", "mergedlinear", "convlora"),
        *("loralayer", "loralinear", "loradense", "loraembedding", "loraconv"),
    ),
    "wrap the optimizer, `jlora.freeze(tx)`, or take `jlora.partition(params)`": (
        *("markonlyloraastrainable", "preparemodelforkbittraining", "wrapoptimizer"),
        *("splitloraparams", "splittrainablefrozen"),
    ),
    "build the plain weights with `jlora.merge(params)`": (
        *("mergeandunload", "mergeadapter", "mergelora", "mergeparams", "mergeweights"),
    ),
    "subtract the update with `jlora.unmerge(merged, params)`": ("unmergeadapter",),
    "split it off with `base, adapter = jlora.detach(params)`": (
        *("lorastatedict", "getpeftmodelstatedict", "unload", "deleteadapter", "disableadapter"),
        *("disableadapters", "disableadapterlayers"),
    ),
    "put it on the weights with `jlora.bind(base, adapter)`": (
        *("setpeftmodelstatedict", "setadapter", "setadapters"),
    ),
    "count with `print(jlora.summary(params))`": (
        *("printtrainableparameters", "getnbtrainableparameters"),
    ),
    "read PEFT's files with `jlora.peft.load(directory, params, names=...)`": (
        *("frompretrained", "loadadapter", "loadpeftweights"),
    ),
    "write PEFT's files with `jlora.peft.save(directory, params, names=...)`": (
        *("savepretrained", "saveadapter"),
    ),
    'it is an entry of the configuration: `jlora.peft.save(..., task_type="CAUSAL_LM")`': (
        *("tasktype", "pefttype"),
    ),
    "use a function of `jlora.initializers`, such as `pissa`": ("initloraweights",),
}
_HINTS = {name: hint for hint, names in _INSTEAD.items() for name in names}


def hint_in(module: str) -> None:
    """Give a module a `__getattr__` that hints at what replaces a name of another library.

    It is set here, where type checkers do not see it: a module that defines it has, for them, every
    attribute.
    """

    def __getattr__(name: str) -> NoReturn:
        """Raise, with what to write instead of a name of another library."""
        hint = _HINTS.get(name.replace("_", "").lower())
        if module == "jlora" and name in _APART:
            text = (
                f"`jlora.{name}` needs {_APART[name]}, so `import jlora` does not import it. Write "
                f"`from jlora import {name}`."
            )
        elif hint is not None:
            text = f"`{module}` has no `{name}`: {hint}."
        else:
            text = f"module '{module}' has no attribute '{name}'"
        raise AttributeError(text, name=name, obj=sys.modules[module])

    vars(sys.modules[module])["__getattr__"] = __getattr__
