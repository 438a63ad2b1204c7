"""The forms of the update other than A and B, each over some programs of every kind."""

import dataclasses

from cases_dora import CASES

SOME = ("attention_kernels", "tied", "experts", "scan_stacked", "conv_2d", "bfloat16")
FORMS = {
    "lora_fa": ("tied", "scan_stacked"),
    "lora_xs": SOME,
    "vera": SOME,
    "adalora": ("tied", "scan_stacked"),
    "lora_xs_dora": ("scan_stacked",),
    "vera_dora": ("tied",),
}
PLAIN = {case.name: case for case in CASES}

for form, names in FORMS.items():
    CASES += [
        dataclasses.replace(
            PLAIN[name],
            name=f"{form}_{name}",
            form=form.removesuffix("_dora"),
            dora=form.endswith("_dora"),
        )
        for name in names
    ]
