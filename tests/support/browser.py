"""A headless Chromium on MLflow's own web page."""

# Rules of this file: Chromium and its driver are those of the system, nothing is ever downloaded; no host but 127.0.0.1
# is reached. Every wait is for something on the page, with a deadline. It knows nothing of runqueue.

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from support import watchdog
from support.mlflow_server import HOST, clean_environment

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
PATIENCE = 60.0
"""Seconds for what takes one or two where nothing is wrong; a loaded machine is no defect."""

_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it refuses to run as root with one
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers give it little
    "--window-size=1500,860",
    "--force-device-scale-factor=1",
    "--lang=en-US",
    f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {HOST}",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    # As with a mouse: without one, charts show tools of their own all the time.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
)

_SETTINGS = {
    "mlflow.workflowType_v1": '"machine_learning"',  # else it begins with what is for agents
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",  # else the assistant covers a quarter of it
}
"""What the page remembers of a user who has seen it before; a version of MLflow that knows nothing of it ignores it."""


class Page:
    """
    A browser. It is a context manager, and is started on entry.

    Args:
        uri: The server's address.
        profile: A folder for the browser's own files.
    """

    def __init__(self, uri: str, profile: Path) -> None:
        self._uri = uri
        self._profile = profile

    def __enter__(self) -> Self:
        assert CHROMIUM is not None and DRIVER is not None
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*_FLAGS, f"--user-data-dir={self._profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        own_group = {"start_new_session": True}
        service = Service(DRIVER, env=clean_environment() | {"SE_OFFLINE": "true"}, popen_kw=own_group)
        self._driver = Chrome(options=options, service=service)
        self._service = service.process.pid
        watchdog.guard(self._service)
        script = "".join(f"localStorage.setItem({json.dumps(k)}, {json.dumps(v)});" for k, v in _SETTINGS.items())
        self._driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._driver.quit()
        watchdog.release(self._service)

    def open(self, path: str) -> None:
        """Load a page, e.g. "experiments/0/runs"."""
        self._driver.get("about:blank")  # another fragment of the same address would not load it
        self._driver.get(f"{self._uri}/#/{path}")

    def run(self, script: str, *arguments: object) -> Any:
        """Run JavaScript on the page; return its value."""
        return self._driver.execute_script(script, *arguments)

    def lines(self) -> list[str]:
        """Return the visible text by lines."""
        return self._driver.find_element(By.TAG_NAME, "body").text.splitlines()

    def shows(self, *lines: str) -> bool:
        """Return whether these lines follow each other on the page."""
        there = self.lines()
        return any(tuple(there[at : at + len(lines)]) == lines for at in range(len(there)))

    def click(self, xpath: str) -> None:
        """Wait until the element of this XPath is there, and click it."""

        def clicked(_: object) -> bool:
            found = self._driver.find_elements(By.XPATH, xpath)
            if not found:
                return False
            found[0].click()
            return True

        self._waiting().until(clicked, f"nothing to click at {xpath}")

    def wait(self, condition: Callable[[], _T], what: str) -> _T:
        """Wait until a condition of the page holds. The error shows the page as it is."""
        try:
            return self._waiting().until(lambda _: condition())
        except Exception as error:
            raise AssertionError(f"{what}: not on the page, but\n" + "\n".join(self.lines())) from error

    def foreign_addresses(self) -> set[str]:
        """Return the addresses of other hosts that the page has requested since the last call."""
        asked = set()
        for entry in self._driver.get_log("performance"):  # type: ignore[no-untyped-call]
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.add(message["params"]["request"]["url"])
        own = (f"{self._uri}/", "data:", "blob:", "about:", "chrome:")
        return {url[:200] for url in asked if not url.startswith(own)}

    def screenshot(self, path: Path) -> None:
        assert self._driver.save_screenshot(str(path))

    def _waiting(self) -> WebDriverWait[Chrome]:
        passing = (StaleElementReferenceException, ElementClickInterceptedException)
        return WebDriverWait(self._driver, PATIENCE, poll_frequency=0.1, ignored_exceptions=passing)
