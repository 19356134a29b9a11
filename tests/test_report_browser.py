"""The report page in a browser, with real clicks, keys and fingers: what a reader does and then sees."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mri_posterior.report_page import ReportContent, build_page
from tests.test_report import UNIT, expected, page_data, synthetic

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("there is no chromium with its chromedriver to click with", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 20  # seconds that a busy machine may take over what takes milliseconds
HEIGHT, WIDTH = 24, 20


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def content() -> ReportContent:
    return synthetic((3, HEIGHT, WIDTH), verdict=json.dumps({"line": "consistent"}))


class Reader:
    """Someone in front of the page."""

    def __init__(self, driver, page: Path):
        self.driver = driver
        self.data = page_data(page.read_text("utf-8"))
        driver.get_log("performance")
        driver.get(page.as_uri())
        self.wait(lambda: self.text("where"))

    def wait(self, condition) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "the page did not do it"
            time.sleep(0.02)

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, id_: str) -> str:
        return self.find(f"#{id_}").get_property("textContent")

    def number(self, id_: str) -> float:
        return float(self.text(id_).replace("\N{MINUS SIGN}", "-"))

    def tile(self, name: str):
        """The panel that shows an image now, by its label."""
        for figure in self.driver.find_elements(By.CSS_SELECTOR, "#tiles .tile"):
            title = figure.find_element(By.CSS_SELECTOR, ".name, select")
            options = title.find_elements(By.CSS_SELECTOR, "option:checked") or [title]
            if options[0].get_property("textContent") == name:
                return figure
        raise AssertionError(f"no panel shows {name}")

    def pixels(self, name: str) -> str:
        canvas = self.tile(name).find_element(By.TAG_NAME, "canvas")
        return self.driver.execute_script("return arguments[0].toDataURL()", canvas)

    def point(self, name: str, row: int, column: int, *actions: str) -> None:
        """Move the pointer to the middle of a pixel of an unzoomed image, then click or double click."""
        canvas = self.tile(name).find_element(By.TAG_NAME, "canvas")
        box = canvas.rect
        across = round(((column + 0.5) / WIDTH - 0.5) * box["width"])
        down = round(((row + 0.5) / HEIGHT - 0.5) * box["height"])
        chain = ActionChains(self.driver, duration=10).move_to_element_with_offset(canvas, across, down)
        for action in actions:
            getattr(chain, action)()
        chain.perform()

    def press(self, *keys: str, on: str = "#tiles") -> None:
        self.find(on).send_keys(*keys)

    def choose(self, label: str) -> None:
        self.find(f"#tiles option[value='{self._choice(label)}']").click()
        self.wait(lambda: self.tile(label))

    def _choice(self, label: str) -> int:
        return [choice["label"] for choice in self.data["tiles"][-1]].index(label)

    def grey(self, label: str, across: float, down: float) -> int:
        """What is drawn at a share of the width and height of a magnitude's canvas."""
        script = """const c = arguments[0], at = [c.width * arguments[1], c.height * arguments[2]];
            return [...c.getContext("2d").getImageData(...at, 1, 1).data]"""
        canvas = self.tile(label).find_element(By.TAG_NAME, "canvas")
        red, green, blue, alpha = self.driver.execute_script(script, canvas, across, down)
        assert red == green == blue and alpha == 255
        return red

    def value_of(self, name: str) -> str:
        return self.tile(name).find_element(By.CSS_SELECTOR, "output").text


@pytest.fixture(scope="module")
def page(tmp_path_factory, content) -> Path:
    # What has a meaning in an address must be harmless in a name.
    path = tmp_path_factory.mktemp("a page") / "sc#n 50% ü_report.html"
    path.write_text(build_page(content), encoding="utf-8")
    return path


@pytest.fixture
def reader(driver, page) -> Iterator[Reader]:
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    driver.set_window_size(1400, 1000)
    reader = Reader(driver, page)
    yield reader
    # Whatever was done: no complaint, and nothing asked of any network.
    assert driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith(("file://", "data:", "blob:"))] == []


def near(reader: Reader, content: ReportContent, slice_: int, row: int, column: int) -> None:
    """The read-out is the result's numbers at a pixel, to half of the stored step and half of the last digit."""
    for name in ("mean", "lower", "upper", "std"):
        digits = len(reader.text(name).partition(".")[2])
        tolerance = 0.5001 * (reader.data["arrays"][name]["step"] + 10.0**-digits)
        wanted = expected(content)[name][slice_, row, column]
        assert reader.number(name) == pytest.approx(wanted, abs=tolerance), name
    assert reader.text("where") == f"slice {content.result.slices[slice_]}, row {row}, column {column}"


def grey_level(content: ReportContent, name: str, row: int, column: int) -> float:
    """Of 255: from 0 to the 99.5th percentile of the reference."""
    value = expected(content)[name][1, row, column] / np.percentile(content.reference / UNIT, 99.5)
    return 255 * min(value, 1)


def test_the_read_out_under_the_pointer(reader, content):
    values = set()
    for name, row, column in (("posterior mean", 3, 17), ("standard deviation", 12, 4), ("zero-filled", 23, 0)):
        reader.point(name, row, column)
        reader.wait(lambda row=row: f"row {row}," in reader.text("where"))
        near(reader, content, 1, row, column)
        values.add(reader.text("mean"))
    assert len(values) == 3


def test_every_panel_has_its_own_value(reader, content):
    reader.point("posterior mean", 10, 8)
    reader.wait(lambda: "row 10," in reader.text("where"))
    at = {name: image[1, 10, 8] for name, image in expected(content).items()}
    at |= {"width": at["upper"] - at["lower"], "error": at["mean"] - at["reference"], "sample": at["sample_1"]}
    step = reader.data["arrays"]["mean"]["step"]
    for choices in reader.data["tiles"]:
        shown = reader.value_of(choices[0]["label"]).replace("\N{MINUS SIGN}", "-")
        # Differences are of two rounded numbers; the last digit is rounded too.
        tolerance = step + 10.0 ** -len(shown.partition(".")[2])
        assert float(shown) == pytest.approx(at[choices[0]["name"]], abs=tolerance), choices[0]["label"]


def test_the_slice_slider_changes_picture_and_numbers(reader, content):
    assert reader.text("slice-value") == "6 (2 of 3)"
    before = reader.pixels("posterior mean")
    reader.press(Keys.ARROW_RIGHT, on="#slice")
    reader.wait(lambda: reader.text("slice-value") == "7 (3 of 3)")
    assert reader.pixels("posterior mean") != before
    near(reader, content, 2, HEIGHT // 2, WIDTH // 2)


def test_the_sample_slider_changes_the_sample_alone(reader):
    before = reader.pixels("sample"), reader.pixels("posterior mean")
    reader.press(Keys.ARROW_RIGHT, on="#sample")
    reader.wait(lambda: reader.text("sample-value") == "2 of 4")
    assert reader.pixels("sample") != before[0]
    assert reader.pixels("posterior mean") == before[1]


def test_flicker_runs_through_the_samples_until_stopped(reader):
    button, numbers, pictures = reader.find("#play"), set(), set()

    def watch() -> bool:
        numbers.add(reader.text("sample-value"))
        pictures.add(reader.pixels("sample"))
        return min(len(numbers), len(pictures)) >= 3

    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    reader.wait(watch)
    button.click()
    assert (button.get_attribute("aria-pressed"), button.text) == ("false", "Flicker")
    stopped = reader.text("sample-value")
    time.sleep(0.6)  # longer than a step
    assert reader.text("sample-value") == stopped


def test_flicker_is_slower_where_less_motion_is_asked_for(reader):
    calm = {"name": "prefers-reduced-motion", "value": "reduce"}
    reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [calm]})
    # The interval itself, for a busy machine's clock says nothing.
    reader.driver.execute_script(
        "window.asked = []; const f = setInterval; setInterval = (g, t) => (asked.push(t), f(g, t))"
    )
    reader.find("#play").click()
    reader.find("#play").click()
    reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    reader.find("#play").click()
    calmly, usually = reader.driver.execute_script("return asked")
    assert calmly >= 1000
    assert 1000 / 3 <= usually < calmly  # no more than three flashes a second in any case


def test_zoom_and_pan_are_those_of_all_images(reader, content):
    labels = [choices[0]["label"] for choices in reader.data["tiles"]]
    before = {label: reader.pixels(label) for label in labels}
    reader.point("posterior mean", 6, 6, "double_click")
    reader.wait(lambda: reader.text("zoom-value") == "2.0×")  # noqa: RUF001
    zoomed = {label: reader.pixels(label) for label in labels}
    assert all(zoomed[label] != before[label] for label in labels)
    # Twice as large about pixel (6, 6), where (8, 9) is at twice its distance from there, in every panel.
    at = ((6.5 + 2 * 3) / WIDTH, (6.5 + 2 * 2) / HEIGHT)
    for name, label in (("reference", "reference"), ("zero_filled", "zero-filled"), ("sample_1", "sample")):
        assert reader.grey(label, *at) == pytest.approx(grey_level(content, name, 8, 9), abs=1.5)
    # The pixel under the pointer stays there, in the other panels too.
    reader.point("standard deviation", 6, 6)
    near(reader, content, 1, 6, 6)

    canvas = reader.tile("sample").find_element(By.TAG_NAME, "canvas")
    chain = ActionChains(reader.driver, duration=10).move_to_element(canvas).click_and_hold().move_by_offset(-60, -60)
    chain.release().perform()
    assert all(reader.pixels(label) != zoomed[label] for label in labels)
    reader.find("#reset").click()
    reader.wait(lambda: reader.text("zoom-value") == "1.0×")  # noqa: RUF001
    reader.point("posterior mean", 20, 3)
    reader.wait(lambda: "row 20, column 3" in reader.text("where"))


def test_buttons_zoom_and_the_wheel_alone_does_not(reader):
    reader.find("#zoom-in").click()
    reader.wait(lambda: reader.text("zoom-value") == "1.5×")  # noqa: RUF001
    canvas = reader.tile("sample").find_element(By.TAG_NAME, "canvas")
    ActionChains(reader.driver).scroll_to_element(canvas).move_to_element(canvas).perform()
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    origin = ScrollOrigin.from_element(canvas)
    ActionChains(reader.driver).scroll_from_origin(origin, 0, -100).perform()
    assert reader.text("zoom-value") == "1.5×"  # noqa: RUF001
    chain = ActionChains(reader.driver).key_down(Keys.CONTROL).scroll_from_origin(origin, 0, -100)
    chain.key_up(Keys.CONTROL).perform()
    reader.wait(lambda: reader.text("zoom-value") not in ("1.5×", ""))  # noqa: RUF001
    reader.find("#zoom-out").click()


def test_level_and_window_change_magnitudes_and_colour_range_the_maps(reader):
    grey, coloured = reader.pixels("posterior mean"), reader.pixels("standard deviation")
    reader.press(Keys.PAGE_DOWN, on="#window")
    reader.wait(lambda: reader.pixels("posterior mean") != grey)
    assert reader.pixels("standard deviation") == coloured
    grey = reader.pixels("posterior mean")
    reader.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, on="#range")
    reader.wait(lambda: reader.pixels("standard deviation") != coloured)
    assert reader.pixels("posterior mean") == grey
    assert reader.text("range-value") == "1.26×"  # noqa: RUF001


def test_the_keyboard_does_everything(reader, content):
    rows, columns = HEIGHT // 2, WIDTH // 2
    reader.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_LEFT, Keys.SHIFT + Keys.ARROW_UP)
    reader.wait(lambda: f"row {rows + 2 - 10}, column {columns - 1}" in reader.text("where"))
    near(reader, content, 1, rows - 8, columns - 1)
    reader.wait(lambda: reader.text("where") in reader.text("spoken") and reader.text("mean") in reader.text("spoken"))

    # At the edge the cursor stays.
    reader.press(*[Keys.SHIFT + Keys.ARROW_UP] * 3)
    reader.wait(lambda: "row 0," in reader.text("where"))
    near(reader, content, 1, 0, columns - 1)


@pytest.mark.parametrize(
    ("key", "id_", "value"),
    [
        (Keys.PAGE_DOWN, "slice-value", "7 (3 of 3)"),
        (Keys.PAGE_UP, "slice-value", "5 (1 of 3)"),
        ("]", "sample-value", "2 of 4"),
        ("[", "sample-value", "4 of 4"),
        ("+", "zoom-value", "1.3×"),  # noqa: RUF001
        (" ", "play", "Stop"),
    ],
)
def test_keys(reader, key, id_, value):
    reader.press(key)
    reader.wait(lambda: reader.text(id_) == value)


def test_the_tab_key_reaches_everything_and_shows_where_it_is(reader):
    ActionChains(reader.driver).send_keys(Keys.TAB).perform()
    reached = []
    for _ in range(60):
        focused = reader.driver.switch_to.active_element
        if focused.tag_name == "body":
            break
        reached.append(focused.get_attribute("id") or focused.accessible_name or focused.tag_name)
        assert focused.accessible_name, focused.get_attribute("outerHTML")
        assert focused.value_of_css_property("outline-style") not in ("none", ""), reached[-1]
        ActionChains(reader.driver).send_keys(Keys.TAB).perform()
    wanted = (
        "slice",
        "sample",
        "play",
        "level",
        "window",
        "range",
        "zoom-out",
        "zoom-in",
        "reset",
        "tiles",
        "Settings",
    )
    assert set(wanted) <= set(reached)


def test_maps_of_the_chains_can_be_chosen(reader, content):
    reader.choose("R-hat")
    reader.point("R-hat", 9, 9)
    reader.wait(lambda: "row 9," in reader.text("where"))
    array = reader.data["arrays"]["rhat"]
    wanted = content.result.diagnostics["rhat"][1, 9, 9]
    shown = reader.value_of("R-hat")
    assert float(shown) == pytest.approx(wanted, abs=0.5001 * array["step"] + 10.0 ** -len(shown.partition(".")[2]))
    reader.point("R-hat", 0, 0)
    reader.wait(lambda: reader.value_of("R-hat") == "\N{EN DASH}")


def test_what_lies_beyond_the_interval(reader, content):
    wanted = expected(content)
    above, below = wanted["reference"] - wanted["upper"], wanted["lower"] - wanted["reference"]
    row, column = np.unravel_index(np.argmax(above[1]), above[1].shape)
    assert above[1, row, column] > 0
    reader.choose("reference beyond interval")
    for excess, sign in ((above, 1), (below, -1)):
        row, column = np.unravel_index(np.argmax(excess[1]), excess[1].shape)
        reader.point("reference beyond interval", int(row), int(column))
        reader.wait(lambda row=row, column=column: f"row {row}, column {column}" in reader.text("where"))
        shown = float(reader.value_of("reference beyond interval").replace("\N{MINUS SIGN}", "-"))
        assert shown == pytest.approx(sign * excess[1, row, column], abs=2 * reader.data["arrays"]["mean"]["step"])


def test_one_image_can_be_enlarged(reader):
    width = reader.tile("posterior mean").rect["width"]
    button = reader.tile("posterior mean").find_element(By.TAG_NAME, "button")
    button.click()
    reader.wait(lambda: reader.tile("posterior mean").rect["width"] > 2 * width)
    button.click()
    reader.wait(lambda: reader.tile("posterior mean").rect["width"] == pytest.approx(width, abs=1))


def test_on_a_phone(reader):
    """One column of text, two images side by side, nothing wider than the screen; two fingers zoom."""
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    reader.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    reader.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2})
    try:
        assert reader.driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert all(
            figure.rect["width"] > 150 for figure in reader.driver.find_elements(By.CSS_SELECTOR, "#tiles .tile")
        )
        canvas = reader.tile("posterior mean").find_element(By.TAG_NAME, "canvas")
        reader.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        box = reader.driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", canvas)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind, apart in (("touchStart", 20), ("touchMove", 30), ("touchMove", 40), ("touchEnd", None)):
            points = [] if apart is None else [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
            reader.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        reader.wait(lambda: float(reader.text("zoom-value")[:-1]) == pytest.approx(2, abs=0.1))
    finally:
        reader.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_in_print_the_middle_slice_stands_still(reader):
    reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not reader.find("#tiles").is_displayed()
    pictures = reader.driver.find_elements(By.CSS_SELECTOR, ".still img")
    assert len(pictures) == len(reader.data["tiles"])
    for picture in pictures:
        assert picture.is_displayed()
        assert (picture.get_property("naturalWidth"), picture.get_property("naturalHeight")) == (WIDTH, HEIGHT)
    assert reader.find(".still h2").text == "Slice 6"


def test_colours_are_those_of_the_window(reader, content):
    reader.point("reference", 0, 0)
    at = (10.5 / WIDTH, 12.5 / HEIGHT)
    assert reader.grey("reference", *at) == pytest.approx(grey_level(content, "reference", 12, 10), abs=1.5)


def test_a_browser_that_cannot_inflate_is_told(driver, reader):
    """An old browser gets a sentence, not an empty page."""
    source = {"source": "delete window.DecompressionStream"}
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", source)
    try:
        driver.refresh()
        reader.wait(lambda: "needs a browser of 2023" in reader.text("failure"))
        assert reader.find("#failure").is_displayed()
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
