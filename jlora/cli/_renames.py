"""The names that tensors have in files, and those that an adapter has for them.

transformers renames the modules of some families as it loads a checkpoint, and renames them back as
it saves one, so adapters have names that no file of the model has. The names alone tell the family:
a renaming is used only if it finds every module of the adapter.

Source: transformers 5, `conversion_mapping.py`, whose patterns these summarize.
"""

import re
from collections.abc import Callable, Collection, Iterable

from jlora.cli._checkpoint import Checkpoint

_Table = tuple[tuple[str, str], ...]

_ATTENTION: _Table = (
    (r"\battention\.(attention|self)\.query\b", "attention.q_proj"),
    (r"\battention\.(attention|self)\.key\b", "attention.k_proj"),
    (r"\battention\.(attention|self)\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
)
_FEED_FORWARD: _Table = (
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
    (r"\bmlp\.weights_out\b", "mlp.down_proj"),
)
_STAGES: _Table = (
    (r"\bencoder\.block\.(\d+)\.", r"stages.\1.blocks."),
    (r"\bencoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"\bencoder\.layer_norm\.(\d+)\b", r"stages.\1.layer_norm"),
    (r"\battention\.self\.sr\b", "attention.sequence_reduction.sequence_reduction"),
    (r"\bmlp\.dense([12])\b", r"mlp.fc\1"),
    (r"\bdecode_head\.linear_c\b", "decode_head.linear_projections"),
)
_TOWERS: _Table = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^((vision|image|video|audio)_tower|vision_model|multi_modal_projector)\b", r"model.\1"),
)
_FAMILIES: tuple[_Table, ...] = (
    ((r"encoder\.layer\.", "layers."), *_ATTENTION, *_FEED_FORWARD),  # ViT, DeiT, BEiT, AST
    (*_ATTENTION, *_FEED_FORWARD),  # DINOv2, Swin
    (*_STAGES, *_ATTENTION),  # SegFormer
    _TOWERS,  # LLaVA, PaliGemma, Gemma 3, Mistral 3, InternVL, Mllama
    (*_TOWERS, (r"_tower\.vision_model\.", "_tower.")),  # those, with the tower of CLIP or SigLIP
    (
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!visual\.)", "model.language_model."),
    ),  # Qwen-VL
    ((r"^model\.language_model\.", "model."),),  # the text model of a multi-modal checkpoint
    ((r"^embed_out\b", "lm_head"),),  # GPT-NeoX
    ((r"\.out_proj\b", ".o_proj"), (r"\.(layers\.\d+)\.(fc[12])\b", r".\1.mlp.\2")),  # DETR
)
# Modules that transformers makes of one tensor: by the last part of its name.
_SPLIT = {
    "weights_in": ("gate_proj", "up_proj"),  # DINOv2 with SwiGLU
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "Wqkv": ("q_proj", "k_proj", "v_proj"),
}


def renaming(modules: Iterable[str], checkpoint: Checkpoint, call: str) -> Callable[[str], str]:
    """Return a function from the checkpoint's names to the adapter's."""
    wanted = [m for m in modules if m]
    for table in ((), *_FAMILIES):
        names = [_renamed(key, table) for key in checkpoint.entries]
        prefix = _prefixing(wanted, {name.rpartition(".")[0] for name in names})
        if prefix is not None:
            return lambda key, table=table, prefix=prefix: prefix(_renamed(key, table))
    _check_split(wanted, checkpoint, call)
    return lambda key: key


def _renamed(key: str, table: _Table) -> str:
    for pattern, replacement in table:
        key = re.sub(pattern, replacement, key)
    return key


def _prefixing(wanted: Collection[str], own: set[str]) -> Callable[[str], str] | None:
    """Return what adds or removes a prefix, such as "model.", so that all are found."""
    known = own | {m.rpartition(".")[0] for m in own}
    first = next((m for m in wanted if m not in known), None)
    if first is None:
        return lambda key: key
    parts = first.split(".")
    drops = [".".join(parts[:k]) + "." for k in range(1, len(parts))]
    adds = [m.removesuffix(first) for m in known if m.endswith(f".{first}")]
    for prefix in drops:
        if all(m in known or m.removeprefix(prefix) in known for m in wanted):
            return lambda key: key if key.rpartition(".")[0] in wanted else prefix + key
    for prefix in adds:
        if all(m in known or prefix + m in known for m in wanted):
            return lambda key: key.removeprefix(prefix)
    return None


def _check_split(wanted: Collection[str], checkpoint: Checkpoint, call: str) -> None:
    """Refuse a module that is a part of a stored tensor."""
    parts = {m.rpartition(".")[2]: m for m in wanted}
    for key in checkpoint.entries:
        own = key.rpartition(".")[0].rpartition(".")[2]
        asked = next((parts[p] for p in _SPLIT.get(own, ()) if p in parts), None)
        if asked:
            raise ValueError(
                f'`{call}`: the adapter changes "{asked}" as transformers has it in memory, and '
                f'BASE stores it as a part of another tensor, such as "{key}". Write BASE as it is '
                "in memory: `model.save_pretrained(NEW, save_original_format=False)` of "
                "transformers, and pass NEW."
            )
