"""The forms of the update other than A and B, each over some programs of every kind."""

import dataclasses

import cases_dora
import form_loha
import form_miss

# Forms from outside the package, one file each.
OUTSIDE = (form_loha, form_miss)

SOME = ("attention_kernels", "tied", "experts", "scan_stacked", "conv_2d", "bfloat16")
FORMS = {
    "lora_fa": ("tied", "scan_stacked"),
    "lora_xs": SOME,
    "vera": SOME,
    "adalora": ("tied", "scan_stacked"),
    "lora_xs_dora": ("scan_stacked",),
    "vera_dora": ("tied",),
    "mica": ("tied",),
    "miss": SOME,
    "miss_dora": ("scan_stacked",),
    "loha": SOME,
    "loha_dora": ("tied",),
}
CASES = [*cases_dora.CASES]
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
