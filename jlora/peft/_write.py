"""Write the two files of an adapter in PEFT's format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora import _tensor_file
from jlora._disk import replacing_files
from jlora.peft._config import CONFIG, PICKLE, TENSORS


def write(folder: Path, tensors: Mapping[str, np.ndarray], entries: Mapping[str, Any]) -> None:
    """Write to a temporary directory and rename; a configuration never meets other tensors."""
    text = json.dumps(entries, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with replacing_files(folder, last=CONFIG) as new:
        _tensor_file.write(new / TENSORS, tensors)
        (new / CONFIG).write_text(text, encoding="utf-8")
    (folder / PICKLE).unlink(missing_ok=True)
