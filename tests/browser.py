"""Headless Chromium, driven by selenium: for the test of the demo page, and for images of it in docs/figures.

    python demo.py & python tests/browser.py --output_dir docs/figures --photo astronaut.png

Needs `pip install selenium` and Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
import urllib.parse
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from common.cli import ArgumentParser, UserError, run


class NoBrowserError(UserError):
    """No browser: the message is a sentence that says which part is missing."""


class Visitor:
    """A browser on one page. Raises NoBrowserError; TimeoutError when something waited for does not come."""

    def __init__(self, url, downloads, *, width=1400, height=1500, patience=90):
        try:
            from selenium import webdriver
            from selenium.webdriver.chrome.service import Service
        except ImportError as error:
            raise NoBrowserError(f"no selenium: pip install selenium ({error})") from error
        programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
        for name, path in programs.items():
            if path is None:
                raise NoBrowserError(f"no {name} on the PATH: apt-get install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = programs["chromium"]
        for flag in (
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "disable-dev-shm-usage",
            "hide-scrollbars",
            "disable-background-networking",
            f"window-size={width},{height}",
        ):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        self.patience, self.downloads = patience, Path(downloads)
        self.driver = webdriver.Chrome(options=options, service=Service(programs["chromedriver"]))
        self.resize(width, height)
        self.driver.get(url)

    def resize(self, width, height):
        """The page's own size: a window is larger by its frame, and never narrower than 500 pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def close(self):
        self.driver.quit()

    def wait(self, what, condition):
        """The first true value of condition(); elements that are not there yet count as false."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except WebDriverException:
                pass
            time.sleep(0.2)
        raise TimeoutError(f"{what} did not come; the page says: {self.text('#message')}")

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.wait(selector, lambda: self.find(selector))[0]

    def text(self, selector) -> str:
        return "\n".join(element.text for element in self.find(selector))

    def wait_for_text(self, selector, part) -> str:
        self.wait(f"{part!r} in {selector}", lambda: part in self.text(selector))
        return self.text(selector)

    def click(self, selector, index=0):
        element = self.wait(selector, lambda: self.find(selector)[index:])[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        self.wait(f"{selector} to be clicked", lambda: element.click() or True)

    def upload(self, selector, path):
        """Into the file box, emptied before."""
        for button in self.find(
            f"{selector} button[aria-label='Clear'], {selector} button[aria-label='Remove this file']"
        ):
            button.click()
        self.one(f"{selector} input[type=file]").send_keys(str(path))

    def type(self, selector, text):
        element = self.one(selector)
        self.driver.execute_script("arguments[0].select()", element)
        element.send_keys(text + "\n")

    def download(self, selector) -> Path:
        """Clicks a link; the file when it is complete."""
        before = set(self.downloads.iterdir())
        self.click(selector)

        def complete():
            return [
                path
                for path in set(self.downloads.iterdir()) - before
                if path.suffix not in (".crdownload", ".tmp") and not path.name.startswith(".")
            ]

        return self.wait("the download", complete)[0]

    def hosts(self) -> set[str]:
        """Servers that the browser has contacted."""
        urls = [
            json.loads(line["message"])["message"]["params"].get("request", {}).get("url", "")
            for line in self.driver.get_log("performance")
            if "requestWillBeSent" in line["message"]
        ]
        return {urllib.parse.urlsplit(url).hostname for url in urls if url.startswith(("http", "ws"))}

    def screenshot(self, path) -> Path:
        """Picture of the window, as a PNG of at most 256 colours."""
        self.driver.execute_script("window.scrollTo(0, 0)")
        time.sleep(1)  # images fade in
        image = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        return path


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:7860", help="where the page is served")
    parser.add_argument("--photo", type=Path, required=True, help="photo to upload")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of demo-1.png to demo-3.png")
    return parser


def main(args) -> None:
    """The photo, refined and made older, at three sizes of the page."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, (width, height) in {"demo-1": (1366, 768), "demo-2": (1920, 1080), "demo-3": (390, 844)}.items():
        visitor = Visitor(args.url, args.output_dir, width=width, height=height, patience=300)
        try:
            visitor.upload("#upload", args.photo.resolve())
            visitor.wait_for_text("#message", "Refined")
            visitor.type("#age input[type=number]", "20")
            visitor.wait_for_text("#readout", "target")
            visitor.screenshot(args.output_dir / f"{name}.png")
        finally:
            visitor.close()


if __name__ == "__main__":
    sys.exit(run(main, build_parser()))
