"""The names of modules in Stable Diffusion 1.5 and SDXL, as diffusers builds them.

    unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj

SDXL's own U-Net, sgm's, has the same modules in numbered lists: `input_blocks.4.1`, and so on.
"""

import dataclasses
import functools
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class UNet:
    """What names the modules of a `UNet2DConditionModel`.

    Attributes:
        channels: of each block.
        depths: the number of transformer blocks in each attention of a block; 0 without attention.
        layers: `layers_per_block`.
        added: whether there is an `add_embedding`, of sizes and pooled texts.
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    layers: int = 2
    added: bool = False


SD15 = UNet((320, 640, 1280, 1280), (1, 1, 1, 0))
SDXL = UNet((320, 640, 1280), (0, 2, 10), added=True)
_ATTENTION = [
    f"{a}.{to}" for a in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out.0")
]
_TEXT = [f"self_attn.{x}_proj" for x in "qkvo"] + ["mlp.fc1", "mlp.fc2"]
# sgm's names inside of a block.
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def unet_names(unet: UNet) -> Iterator[str]:
    """List the linear layers and convolutions of a U-Net."""
    yield from (n for n in _OUTSIDE if unet.added or not n.startswith("add_"))
    last = len(unet.channels) - 1
    before = unet.channels[0]
    for n, (channels, depth) in enumerate(zip(unet.channels, unet.depths, strict=True)):
        for k in range(unet.layers):
            yield from _layer(f"down_blocks.{n}", k, depth, shortcut=k == 0 and channels != before)
        before = channels
        if n < last:
            yield f"down_blocks.{n}.downsamplers.0.conv"
    for k in range(2):
        depth = (unet.depths[-1] or 1) if k == 0 else 0
        yield from _layer("mid_block", k, depth, shortcut=False)
    for n, depth in enumerate(reversed(unet.depths)):
        for k in range(unet.layers + 1):
            yield from _layer(f"up_blocks.{n}", k, depth, shortcut=True)
        if n < last:
            yield f"up_blocks.{n}.upsamplers.0.conv"


def _layer(block: str, k: int, depth: int, shortcut: bool) -> Iterator[str]:
    for name in _RESNET:
        if shortcut or name != "conv_shortcut":
            yield f"{block}.resnets.{k}.{name}"
    if depth:
        attention = f"{block}.attentions.{k}"
        yield from (f"{attention}.proj_in", f"{attention}.proj_out")
        for n in range(depth):
            for name in (*_ATTENTION, "ff.net.0.proj", "ff.net.2"):
                yield f"{attention}.transformer_blocks.{n}.{name}"


def text_names(layers: int, projection: bool = False) -> Iterator[str]:
    """List the linear layers of a CLIP text encoder."""
    for n in range(layers):
        for name in _TEXT:
            name = name.replace("o_proj", "out_proj")
            yield f"text_model.encoder.layers.{n}.{name}"
    if projection:
        yield "text_projection"


def sgm_name(name: str, unet: UNet = SDXL) -> str:
    """Return the name of a module in sgm's U-Net."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    block, *rest = name.split(".")
    if block == "mid_block":
        kind, k, *inside = rest
        place = f"middle_block.{2 * int(k) if kind == 'resnets' else 1}"
    else:
        n, kind, k, *inside = rest
        down = block == "down_blocks"
        first = (unet.layers + 1) * int(n) + down
        depth = (unet.depths if down else unet.depths[::-1])[int(n)]
        if kind == "downsamplers":
            return f"input_blocks.{first + unet.layers}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{first + unet.layers}.{2 if depth else 1}.conv"
        lists = "input_blocks" if down else "output_blocks"
        place = f"{lists}.{first + int(k)}.{0 if kind == 'resnets' else 1}"
    inside = [_RESNET[inside[0]]] if kind == "resnets" else inside
    return ".".join([place, *inside])


@functools.cache
def modules(unet: UNet) -> frozenset[str]:
    """Return the modules of a U-Net, to ask for one."""
    return frozenset(unet_names(unet))


@functools.cache
def stable_diffusion() -> dict[str, str]:
    """Return kohya's names, `lora_unet_...`, and the modules that they mean, of both models."""
    found = {}
    for name in (*unet_names(SD15), *unet_names(SDXL)):
        found[flat("lora_unet", name)] = f"unet.{name}"
    for name in unet_names(SDXL):
        found[flat("lora_unet", sgm_name(name))] = f"unet.{name}"
    for prefix, component in TEXT.items():
        for name in text_names(32, projection=True):
            found[flat(prefix, name)] = f"{component}.{name}"
    return found


TEXT = {"lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}


def flat(prefix: str, name: str) -> str:
    """Return kohya's name of a module."""
    return f"{prefix}_{name.replace('.', '_')}"
