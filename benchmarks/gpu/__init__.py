"""What `benchmarks/gpu_check.py` measures, one module for each part.

Importing it puts the packages of this checkout on the path: nothing need be installed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [folder for folder in (str(ROOT), str(ROOT / "python")) if folder not in sys.path]
