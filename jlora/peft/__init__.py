"""Load and save adapters in PEFT's file format, and turn PEFT's configurations into rules.

Intended differences from PEFT: `tests/parity/test_peft_differences.py`.
"""

from jlora import _foreign
from jlora.peft._by_value import match as match
from jlora.peft._load import load as load
from jlora.peft._ready import llama_names as llama_names
from jlora.peft._ready import tunix_gemma3_names as tunix_gemma3_names
from jlora.peft._ready import tunix_names as tunix_names
from jlora.peft._rules import rules as rules
from jlora.peft._save import save as save

__all__ = ["llama_names", "load", "match", "rules", "save", "tunix_gemma3_names", "tunix_names"]

_foreign.hint_in(__name__)
