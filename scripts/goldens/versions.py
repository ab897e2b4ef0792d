"""What all goldens note about their making."""

import json
import platform

import peft
import torch
import transformers


def used() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def compact_json(value: dict) -> str:
    """JSON with one line a key of the outermost object, so that a file stays short and a diff readable."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
    return f"{{\n{lines}\n}}\n"
