"""The model card of an exported adapter: README.md, as the Hugging Face Hub shows it."""

import json
from pathlib import Path
from typing import Any

SETTINGS = ("steps", "batch", "length", "accumulate", "lr", "lora_plus", "dtype", "seed")
SETTINGS += ("quantize",)
ADAPTER = ("rank", "alpha", "targets", "form", "init", "dora", "rslora")
CARD = "README.md"
DEFAULT = "SmolLM2-135M-Instruct"  # the model without --model, whose licence is known
UNKNOWN = "Its licence is not known: its files do not state one. See where it was published."


def write_card(folder: Path, model: Path, found: dict[str, Any]) -> None:
    """Write the card. `found` is the report of the run; `model` is the base on disk."""
    (folder / CARD).write_text(card(model, found), encoding="utf-8")


def card(model: Path, found: dict[str, Any]) -> str:
    """The text of the card."""
    settings, license = found["settings"], license_of(model)
    base = settings["model"] or DEFAULT
    head = {"base_model": base, "library_name": "peft", "tags": ["lora", "jlora"]}
    head |= {"license": license} if license else {}
    rate = found.get("phoneme_error_rate_after")
    default = "made by the example" if rate is None else "CMUdict, words of 3 to 12 letters"
    data = ", ".join(settings["data"] or [default])
    score = "" if rate is None else f" Phoneme error rate: {rate:.3f}."
    return f"""---
{"".join(f"{key}: {json.dumps(value)}" + chr(10) for key, value in head.items())}---

# LoRA adapter of {base}

{found["trainable"]:,} trainable of {found["total"]:,} parameters. Held-out loss before training
{found["loss_before"]:.3f}, after {found["step_of_adapter"]} steps {found["loss_after"]:.3f}.{score}

## Base

{base}, SHA-256 `{found["base_sha256"]}` (of the names, the sizes, and the first and last MiB of its
files). {f"Its licence is {license}, as its files state." if license else UNKNOWN}

## Data

{data}; SHA-256 `{found["data_sha256"]}` (of its tokens).

{rows(found["data"])}

This card makes no statement about the licence of the data.

## Settings

{rows({name: settings[name] for name in (*ADAPTER, *SETTINGS)})}

## Versions

{rows(found["versions"])}
"""


def rows(entries: dict[str, Any]) -> str:
    """A table of two columns."""
    shown = {name: f"`{json.dumps(value)}`" for name, value in entries.items() if value is not None}
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in shown.items())])


def license_of(model: Path) -> str | None:
    """What the metadata of a GGUF file, or the card of a directory, says."""
    if model.is_file():
        from gguf_file import open_gguf

        said = open_gguf(model)[0].get("general.license")
        return str(said) if said else None
    card = model / CARD
    lines = (
        card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    )
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        key, _, value = line.partition(":")
        if line.strip() == "---":
            return None
        if key == "license" and value.strip():
            return value.strip().strip("'\"")
    return None
