"""Write the two files of an adapter in PEFT's format."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora import _tensor_file
from jlora.peft._config import CONFIG, PICKLE, TENSORS


def write(folder: Path, tensors: Mapping[str, np.ndarray], entries: Mapping[str, Any]) -> None:
    """Write to a temporary directory and rename; a configuration never meets other tensors."""
    text = json.dumps(entries, indent=2, sort_keys=True, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".jlora-", dir=folder) as temporary:
        _tensor_file.write(Path(temporary) / TENSORS, tensors)
        (Path(temporary) / CONFIG).write_text(text, encoding="utf-8")
        (folder / CONFIG).unlink(missing_ok=True)
        (Path(temporary) / TENSORS).replace(folder / TENSORS)
        (Path(temporary) / CONFIG).replace(folder / CONFIG)
        (folder / PICKLE).unlink(missing_ok=True)
