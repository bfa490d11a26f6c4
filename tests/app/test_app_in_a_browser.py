"""Every tab of the page in a real, headless Chromium; skipped where that, or Gradio, is not installed."""

import os
import shutil
import socket
import time

import pytest
from conftest import build_tiny_pipeline
from PIL import Image

pytest.importorskip("gradio", reason="the extra `app` is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium, of the extra `dev`, is not installed")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from atlas_diffusers.app.model import Model  # noqa: E402
from atlas_diffusers.app.page import build_page, open_page  # noqa: E402
from atlas_diffusers.app.runs import Runs  # noqa: E402
from atlas_diffusers.app.scratch import scratch_folder  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,1000",
)  # fmt: skip
TABS = ("Generate", "Compare", "Schedules", "Bridge", "Your pictures")
UNNAMED = """
return [...document.querySelectorAll('input, textarea, select, button')].filter(e => e.offsetParent && !(
  e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.title || e.textContent.trim()
)).map(e => e.outerHTML.slice(0, 200))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The runs of a page of a tiny pipeline, and its address."""
    with scratch_folder(), Runs() as runs:
        page = build_page(Model(build_tiny_pipeline(), "tiny"), runs)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        yield runs, open_page(page, "127.0.0.1", port)
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser(served, tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get(served[1])
    wait(driver, lambda: driver.find_elements(By.ID, "generate-go"))
    yield driver
    driver.quit()


def wait(driver, condition, seconds=60):
    return WebDriverWait(driver, seconds, 0.1).until(lambda _: condition())


def resize(driver, width):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
    )


def open_tab(driver, name):
    """A tab, also where there is no room and it stands behind the three dots."""
    click = """
        const named = place => [...document.querySelectorAll(place)].find(e => e.textContent.trim() === arguments[0])
        const shown = document.querySelector('.tab-container:not(.visually-hidden)')
        const tab = [...shown.querySelectorAll('button')].find(e => e.textContent.trim() === arguments[0])
        if (!tab) document.querySelector('.overflow-menu > button').click()
        const found = tab ?? named('.overflow-dropdown button')
        found?.click()
        return Boolean(found)
    """
    wait(driver, lambda: driver.execute_script(click, name))


def value(driver, name):
    return driver.find_element(By.CSS_SELECTOR, f"#{name} textarea, #{name} input").get_attribute("value")


def pictures(driver, name):
    """Alternative texts of the pictures of a gallery or plot that have arrived."""
    loaded = "return [...document.querySelectorAll(arguments[0])].filter(e => e.complete && e.naturalWidth).map(e => e.alt)"
    return driver.execute_script(loaded, f"#{name} img")


def write(driver, label, text):
    """Replace the text of the visible field with this label."""
    script = "return [...document.querySelectorAll('input, textarea')].find(e => e.offsetParent && (" \
             "e.labels?.[0]?.textContent.trim() === arguments[0] || e.getAttribute('aria-label') === arguments[0]))"
    field = driver.execute_script(script, label)
    driver.execute_script("arguments[0].value = ''; arguments[0].dispatchEvent(new Event('input'))", field)
    field.send_keys(text)
    return field


def shoot(driver, name):
    """A screenshot, to look at, where ATLAS_SCREENSHOTS names a folder."""
    if folder := os.environ.get("ATLAS_SCREENSHOTS"):
        driver.save_screenshot(f"{folder}/{name}.png")


def no_errors(driver):
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_generate(browser):
    write(browser, "Prompt", "red heart")
    browser.find_element(By.ID, "generate-go").click()
    wait(browser, lambda: value(browser, "generate-progress") == "3 steps, 3 network calls")
    wait(browser, lambda: pictures(browser, "generate-gallery") == [f"red heart, seed {i}" for i in range(4)])
    shoot(browser, "generate")
    no_errors(browser)


def test_a_mistake_is_answered_in_the_page(browser):
    field = write(browser, "Prompt", "")
    browser.execute_script(
        "arguments[0].value = 'x'.repeat(10000); arguments[0].dispatchEvent(new Event('input'))", field
    )
    browser.find_element(By.ID, "generate-go").click()
    said = "return document.querySelector('[data-testid=toast-body]')?.textContent"
    told = wait(browser, lambda: browser.execute_script(said))
    assert "the prompt has 10,000 characters; allowed are 1,000" in told
    write(browser, "Prompt", "red heart")
    no_errors(browser)


def test_compare(browser, tmp_path):
    open_tab(browser, "Compare")
    write(browser, "Numbers of steps", "2, 4")
    browser.find_element(By.ID, "compare-go").click()
    wait(browser, lambda: value(browser, "compare-progress").startswith("6 of 6"))
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    for name in ("csv", "png"):
        browser.find_element(By.ID, f"compare-{name}").click()
        wait(browser, (tmp_path / f"comparison.{name}").is_file)
    assert (tmp_path / "comparison.csv").read_text().startswith("sampler,steps,network calls,seconds,distance\n")
    assert "DDIM" in browser.execute_script("return document.querySelector('#compare-table').textContent")
    assert pictures(browser, "compare-sheet") == ["red heart, seed 0"]
    shoot(browser, "compare")
    no_errors(browser)


def test_schedules(browser):
    open_tab(browser, "Schedules")
    browser.find_element(By.ID, "schedules-go").click()
    wait(browser, lambda: value(browser, "schedules-told") == "2 drawn" and pictures(browser, "schedules-plot"))
    source = "return document.querySelector('#schedules-plot img').src"
    before = browser.execute_script(source)
    box = [e for e in browser.find_elements(By.CSS_SELECTOR, "input[type=checkbox]") if e.is_displayed()][0]
    box.click()
    wait(browser, lambda: browser.execute_script(source) != before)
    shoot(browser, "schedules")
    no_errors(browser)


def test_bridge_with_uploads(browser, tmp_path):
    for i in range(9):
        Image.new("RGB", (8, 8), (25 * i, 0, 90)).save(tmp_path / f"{i}.png")
    open_tab(browser, "Bridge")
    browser.find_element(By.CSS_SELECTOR, "#bridge-source input").click()
    options = wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "[role=option]"))
    next(option for option in options if "uploaded" in option.text).click()
    upload = wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "input[type=file][multiple]"))[0]
    upload.send_keys("\n".join(str(file) for file in sorted(tmp_path.glob("*.png"))))
    wait(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ".file-preview tr")) == 9)
    browser.find_element(By.ID, "bridge-go").click()
    wait(browser, lambda: value(browser, "bridge-told").startswith("9 references; "))
    wait(browser, lambda: len(pictures(browser, "bridge-coupled")) == 8 and pictures(browser, "bridge-plot"))
    shoot(browser, "bridge")
    no_errors(browser)


def test_nothing_hides_and_everything_has_a_name(browser):
    for width in (390, 1280):
        resize(browser, width)
        for tab in TABS:
            open_tab(browser, tab)
            time.sleep(0.3)  # the tab slides in
            shoot(browser, f"{tab}-{width}")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width, tab
            assert browser.execute_script(UNNAMED) == [], tab


def test_training_ends_when_its_tab_is_closed(browser, served, tmp_path, monkeypatch):
    """Last: it leaves the page."""
    (tmp_path / "mine").mkdir()
    for i in range(9):
        Image.new("RGB", (32, 32), (25 * i, 0, 90)).save(tmp_path / "mine" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    open_tab(browser, "Your pictures")
    write(browser, "Folder of pictures on this computer", str(tmp_path / "nothing"))
    browser.find_element(By.ID, "pictures-look").click()
    wait(browser, lambda: "does not exist" in browser.find_element(By.TAG_NAME, "body").text)
    write(browser, "Folder of pictures on this computer", str(tmp_path / "mine"))
    browser.find_element(By.ID, "pictures-look").click()
    wait(browser, lambda: value(browser, "pictures-told").startswith("9 pictures"))
    wait(browser, lambda: "flow_matching" in browser.find_element(By.ID, "pictures-recipe").text)
    browser.find_element(By.ID, "pictures-go").click()
    wait(browser, lambda: value(browser, "pictures-status").startswith("training: step"))
    shoot(browser, "pictures")
    run = next(iter(served[0].of_session.values()))
    assert run.is_running
    browser.find_element(By.ID, "pictures-stop").click()
    wait(browser, lambda: "stop" in value(browser, "pictures-status"))
    no_errors(browser)
    browser.get("about:blank")
    wait(browser, lambda: not run.is_running)
    assert served[0].of_session == {}
