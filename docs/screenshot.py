"""Pictures of a report for the docs: `python docs/screenshot.py REPORT.html [FOLDER] [--whole] [--dark]`.

Writes report-desktop.png (1280 wide) and report-phone.png (390 wide), the top of the page or with --whole all of it, by
headless Chromium: `chromium`, `chromium-browser`, `google-chrome`, or what the environment variable CHROMIUM names.
On Debian: apt-get install chromium.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {"desktop": 1280, "phone": 390}
TALLEST = {"desktop": 1900, "phone": 1900}
WHOLE = 16_000
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-device-scale-factor=1",
)  # fmt: skip
FRAME = """<!doctype html><style>body{{margin:0}}iframe{{border:0;display:block;width:{width}px;height:{height}px}}</style>
<iframe src="{page}"></iframe><script>onload=()=>{{const d=document.querySelector("iframe").contentDocument;
document.title="tall "+d.documentElement.scrollHeight}}</script>"""


def main(arguments: list[str]) -> int:
    """Take both pictures; 2 if something that is needed is not there."""
    options, arguments = {a for a in arguments if a.startswith("--")}, [a for a in arguments if not a.startswith("--")]
    if not arguments or options - {"--whole", "--dark"}:
        print(__doc__, file=sys.stderr)
        return 2
    page = Path(arguments[0]).resolve()
    folder = Path(arguments[1]) if len(arguments) > 1 else Path(__file__).parent / "images"
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if name and (found := shutil.which(name))), None)
    if browser is None or not page.is_file():
        print("chromium is not installed" if browser is None else f"there is no {page}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    for name, width in SIZES.items():
        picture = folder / f"report-{name}.png"
        shoot(browser, page, width, WHOLE if "--whole" in options else TALLEST[name], "--dark" in options, picture)
        print(picture)
    return 0


def shoot(browser: str, page: Path, width: int, tallest: int, dark: bool, picture: Path) -> None:
    """One picture of a page. A frame holds the width, since a headless window may not be as narrow as a phone."""
    with tempfile.TemporaryDirectory() as scratch:
        frame = Path(scratch) / "frame.html"

        def chromium(*flags: str) -> str:
            command = [browser, *FLAGS, f"--user-data-dir={scratch}/profile", "--allow-file-access-from-files", *flags]
            command += ["--blink-settings=preferredColorScheme=0"] if dark else []
            done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
            return done.stdout

        frame.write_text(FRAME.format(width=width, height=800, page=page.as_uri()))
        found = re.search(r"<title>tall (\d+)", chromium("--dump-dom", "--virtual-time-budget=3000"))
        height = min(int(found[1]) if found else tallest, tallest)
        frame.write_text(FRAME.format(width=width, height=height, page=page.as_uri()))
        chromium(f"--window-size={width},{height}", f"--screenshot={picture.resolve()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
