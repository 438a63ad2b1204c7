""" "all-linear": select the weights of linear layers by name and shape, without output heads.

PEFT checks the class of each module. A tree of arrays has no classes, so whatever a path does not
tell is assumed, with a warning.
"""

import re
import warnings
from collections.abc import Mapping

from jlora.peft._keys import Found
from jlora.peft._match import ends_with
from jlora.peft._names import Place, kind_of

# What PEFT adds to `modules_to_save` by default, by task.
HEADS: Mapping[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Output heads, which "all-linear" excludes in Hugging Face's models.
_OUTPUT = ("lm_head", "embed_out", "cls.predictions.decoder")
# Common names of modules that are not linear layers.
_EMBEDDING = re.compile(r"(.*_)?(embed|embeds|embeddings?|embd)|embed_.*|w[tp]e|shared")
_ROUTER = ("router", "gate")
_SHOWN = 5


def all_linear(where: Found, task: str | None, call: str) -> set[str]:
    """Return the names of the weights of linear layers; warn about assumed ones."""
    heads = _OUTPUT + (HEADS["SEQ_CLS"] if task == "SEQ_CLS" else ())
    linear, assumed = set(), {}
    for place in where.places.values():
        is_weight = place.parameter in ("weight", "in_proj_weight")
        if len(place.shape) < 2 or not is_weight or ends_with(place.module, heads):
            continue
        kind, told = _kind(place, where)
        if kind in ("linear", "Conv1D"):
            linear.add(place.name)
        if not told:
            assumed[place.path] = f'"{place.path}" is "{kind}"'
    if assumed:
        more = f", and {len(assumed) - _SHOWN} more" if len(assumed) > _SHOWN else ""
        warnings.warn(
            f'`{call}`: "all-linear" depends on what each module is in PyTorch, which paths do not '
            f"tell. Assumed: {', '.join([*assumed.values()][:_SHOWN])}{more}. Give "
            f'`kinds={{"{next(iter(assumed))}": ...}}`: "linear", "embedding", "conv", or '
            '"parameter" for what is no layer\'s weight.',
            stacklevel=4,
        )
    return linear


def _kind(place: Place, where: Found) -> tuple[str, bool]:
    """Return the kind of a weight, and whether its path, its shape or `kinds` determines it."""
    leaf, own = place.path.rpartition("/")[2], place.module.rpartition(".")[2].lower()
    layout = where.layouts.get(place.path)
    kind = kind_of(place, layout, where.kinds)
    if place.path in where.kinds or "embedding" in leaf or kind == "conv":
        return kind, True
    dims = len(layout) if layout else len(place.shape)
    if dims == 3 and "conv" in own:
        return "conv", False
    if own in _ROUTER:
        return "parameter", False
    if "kernel" in leaf:
        return "linear", dims == 2 or layout not in (None, "iio")
    return ("embedding" if _EMBEDDING.fullmatch(own) else "linear"), False
