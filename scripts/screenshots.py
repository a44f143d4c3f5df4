"""The pictures of the UI in docs/: three sized-down demo runs, seen in a headless Chromium.

    .venv/bin/python scripts/screenshots.py

Trains below /tmp/demo/outputs, or takes the runs that are there, and writes docs/ui-runs.png and
docs/ui-run.png. A few minutes on 2 CPU cores. The folder's name can be read in the pictures.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parents[1] / "docs"
OUTPUTS = Path("/tmp/demo/outputs")
SWEEP = ["experiment=demo", "dataset.train_chunks=200", "dataset.eval_chunks=50", "epochs=3", "lr=1e-4,3e-4,1e-3"]
COLOURS = ["#0b6e99", "#b5482a", "#3f7d3a"]  # MLflow's own are drawn by lot, and may be alike
PORT = 5099
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
# MLflow opens its chat panel by itself on a first visit.
WITHOUT_CHAT = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""
DRAWN = "count => document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length >= count"


def main() -> None:
    environment = {**os.environ, "MLMX_OUTPUTS": str(OUTPUTS)}
    mlmx = [sys.executable, "-m", "mlmx"]
    if not (OUTPUTS / "mlflow.db").is_file():
        OUTPUTS.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*mlmx, "train", "-m", *SWEEP], env=environment, cwd=OUTPUTS.parent, check=True)
    best = prepare()
    server = subprocess.Popen([*mlmx, "ui", f"port={PORT}"], env=environment, cwd=OUTPUTS.parent)
    try:
        wait_for_port()
        with sync_playwright() as playwright:
            path = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.add_init_script(WITHOUT_CHAT)
            photograph(page, best)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def prepare() -> str:
    """Give the runs colours; returns the id of the best one."""
    client = MlflowClient(f"sqlite:///{OUTPUTS / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'mlmx'")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    for run, colour in zip(runs, COLOURS, strict=True):
        client.set_tag(run.info.run_id, "mlflow.runColor", colour)
    return str(min(runs, key=lambda run: run.data.metrics["eval/loss"]).info.run_id)


def wait_for_port() -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", PORT)) == 0:
                return
        time.sleep(0.2)
    raise SystemExit("the server does not answer")


def photograph(page: Any, best: str) -> None:
    """All runs side by side, then the curves of the best."""
    root = f"http://127.0.0.1:{PORT}/#/experiments/1/runs"
    page.goto(f"{root}?workflowType=machine_learning&compareRunsMode=CHART")
    page.get_by_text("3 matching runs").wait_for()
    page.get_by_label("Toggle sidebar").click()
    page.wait_for_function(DRAWN, arg=9)
    widen_names(page)
    page.wait_for_timeout(3000)  # charts are drawn anew in their new width
    page.screenshot(path=DOCS / "ui-runs.png")

    page.goto(f"{root}/{best}/model-metrics?workflowType=machine_learning")
    page.wait_for_function(DRAWN, arg=4)
    page.wait_for_timeout(3000)
    page.screenshot(path=DOCS / "ui-run.png")


def widen_names(page: Any) -> None:
    """Drag the border between the list and the charts until whole names can be read."""
    handle = page.locator("[data-component-id='mlflow.experiment_page.table_resizer.collapse']").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + 200
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 250, y, steps=8)
    page.mouse.up()
    page.mouse.move(720, 62)  # nothing lights up there


if __name__ == "__main__":
    main()
