"""How every JSON file of the toolkit is written."""

from __future__ import annotations

import json
from typing import Any


def json_text(content: dict[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
