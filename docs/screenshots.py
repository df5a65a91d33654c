"""Screenshots for the README from a page that `simdiff run`, `report` or `compare` wrote.

python docs/screenshots.py out/report.html docs/report      # docs/report.png, docs/report-dark.png
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# The values of Chromium's setting preferredColorScheme.
DARK, LIGHT = 0, 1


def screenshot(page: Path, picture: Path, width: int, height: int, scheme: int) -> None:
    """What Chromium shows at the top of a page, in 256 colours.

    Raises:
        SystemExit: no Chromium on the path.
        subprocess.CalledProcessError: it failed.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        sys.exit(f"screenshots: one of {', '.join(NAMES)} must be on the path, got none")
    with tempfile.TemporaryDirectory() as profile:
        raw = Path(profile, "page.png")
        subprocess.run(
            [
                browser,
                *FLAGS,
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                f"--blink-settings=preferredColorScheme={scheme}",
                f"--screenshot={raw}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        image = Image.open(raw).convert("RGB")
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(picture, optimize=True)


def main() -> None:
    """Light and dark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", type=Path)
    parser.add_argument("output", help="path without its ending")
    parser.add_argument("--width", type=int, default=1080, help="pixels")
    parser.add_argument("--height", type=int, default=3060, help="pixels")
    arguments = parser.parse_args()
    for ending, scheme in (("", LIGHT), ("-dark", DARK)):
        picture = Path(f"{arguments.output}{ending}.png")
        screenshot(arguments.page, picture, arguments.width, arguments.height, scheme)
        print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
