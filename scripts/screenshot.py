"""The picture of a report: `python scripts/screenshot.py runs/default/report.html docs/report.png`.

Needs playwright and a chromium on PATH.
"""

import argparse
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval.core.errors import UserError, entry

WIDTH, HEIGHT = 1280, 1180  # of the part that is shown, in CSS pixels
SCALE = 1.5  # picture pixels to one of them


@entry
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="a report.html")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        raise UserError("chromium", "not on PATH", "install it")
    if not args.report.is_file():
        raise UserError(f"report {args.report}", "no such file", "run python -m eval.report first")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE, color_scheme="light"
        )
        page.goto(args.report.resolve().as_uri())
        page.wait_for_selector(".bar:not([hidden])")
        page.screenshot(path=args.picture)
        browser.close()
    print(args.picture)


if __name__ == "__main__":
    main()
