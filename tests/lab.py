"""JupyterLab and a real browser, for tests and measurements of the user interface."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

CHROMIUM = Path("/usr/bin/chromium")
TOKEN = "test"
SIZE = {"width": 1280, "height": 900}


def notebook(path: Path, *cells: str) -> None:
    """Write a notebook of code cells."""
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(content, path)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Run JupyterLab on a folder; yield its address."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = os.environ | {
        name: str(folder / ".jupyter")
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR")
    }
    settings = folder / ".jupyter" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    log = (folder / "lab.log").open("w")
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--allow-root",
    ]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        _wait(f"http://127.0.0.1:{port}/api?token={TOKEN}", process, folder / "lab.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


@contextmanager
def browser() -> Iterator:
    """Yield a page of a headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
        )
        page = chromium.new_page(viewport=SIZE)
        page.set_default_timeout(90_000)
        yield page
        chromium.close()


def run_all(page, address: str, name: str) -> None:
    """Open a notebook and run all its cells from the menu."""
    page.goto(f"{address}/lab/tree/{name}?token={TOKEN}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.locator(".jp-StatusBar-Widget").get_by_text("| Idle").wait_for()  # the kernel is ready
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    dialog = page.locator(".jp-Dialog button.jp-mod-accept")  # JupyterLab sometimes asks for the kernel
    started = page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-prompt").first
    for _ in range(300):
        if started.inner_text().strip() != "[ ]:":
            return
        if dialog.count():
            dialog.click()
        page.wait_for_timeout(200)
    raise RuntimeError(f"{name}: cells did not run within a minute")


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")
