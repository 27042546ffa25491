"""The built site's search finds something when the site is opened from a folder, without a server: SITE."""

import os
import shutil
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By


WORD, SECONDS = "padding", 30


def found(page: Path) -> int:
    """How many results a search from this page shows."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,800"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(page.resolve().as_uri())
        field = driver.find_element(By.CSS_SELECTOR, ".md-search__input")
        driver.execute_script("arguments[0].click(); arguments[0].focus()", field)
        field.send_keys(WORD)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if results := driver.find_elements(By.CSS_SELECTOR, ".md-search-result__item"):
                return len(results)
            time.sleep(0.2)
        return 0
    finally:
        driver.quit()


def main() -> None:
    site = Path(sys.argv[1])
    if shutil.which("chromedriver") is None:
        if os.environ.get("CI"):  # which has one: passing over it would hide what is promised
            raise SystemExit("no chromedriver: the site's search cannot be tried.")
        print("no chromedriver here: the site's search was not tried")
        return
    for name in ("index.html", "docs/training.html"):
        if not (count := found(site / name)):
            raise SystemExit(f"{name}: opened from its folder, the search finds nothing for {WORD!r}.")
        print(f"{name}: {count} results for {WORD!r}, from a folder")


if __name__ == "__main__":
    main()
