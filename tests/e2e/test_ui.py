"""``ui`` with real runs: what it serves and to whom, how it ends, and what a person sees in a real browser."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlmx.commands.main import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Server:
    """A running ``python -m mlmx ui``."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def address(self) -> str:
        """The page it tells the user to open."""
        return self.log.read_text().split("MLflow UI on ", 1)[1].split()[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connects(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((host, port)) == 0


@contextlib.contextmanager
def serving(outputs: Path, log: Path, *dials: str) -> Iterator[Server]:
    """``ui`` on a free port, from when it answers; whatever it leaves behind is ended here."""
    port = free_port()
    environment = {**os.environ, "MLMX_OUTPUTS": str(outputs)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where pytest ignores it (&), ui would too
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlmx", "ui", f"port={port}", *dials],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            text=True,
        )
    family: list[psutil.Process] = []
    try:
        end = time.monotonic() + PATIENCE_SECONDS
        while not connects("127.0.0.1", port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        server = Server(process, port, log)
        family = server.descendants
        yield server
    finally:
        for relative in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                relative.terminate()
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path, corpus: Path) -> Path:
    """Outputs of three short trainings, two of them one multirun."""
    outputs = tmp_path_factory.mktemp("ui") / "outputs"
    shutil.copytree(tiny, outputs.parent / "encoder")
    shutil.copy(corpus, outputs.parent / "reviews.jsonl")
    common = ["model.path=encoder", "dataset=files", "dataset.path=reviews.jsonl", "dataset.train_chunks=32"]
    common += ["dataset.eval_chunks=16", "epochs=2", "lr=1e-3", "tracking=local"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("MLMX_OUTPUTS", str(outputs))
        patch.chdir(outputs.parent)  # the names on the page, and on its pictures, are short ones
        assert main(["train", *common, "chunk_size=64", "run_name=the first"]) == 0
        assert main(["train", *common, "-m", "chunk_size=64,128"]) == 0
    return outputs


@pytest.fixture(scope="module")
def server(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(runs, tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running


def results(outputs: Path) -> list[dict[str, Any]]:
    found = sorted((outputs / "train").glob("**/result.json"))
    return [json.loads(path.read_text()) | {"folder": path.parent} for path in found]


# ---------------------------------------------------------------------------------------- the server


def test_serves_this_machine_only(server: Server) -> None:
    assert connects("127.0.0.1", server.port)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        with contextlib.suppress(OSError):
            route.connect(("198.51.100.1", 9))  # sends nothing: asks which address would be used
        own = route.getsockname()[0]
    others = {own, "127.0.0.2"} - {"0.0.0.0", "127.0.0.1"}  # all of 127/8 is this machine, where 0.0.0.0 would answer
    assert not [host for host in others if connects(host, server.port)]
    listening = {
        connection.laddr.ip
        for process in server.descendants
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    # a page of another site that has its name point to 127.0.0.1 gets nothing
    assert status(server, "127.0.0.1") == 200
    assert [status(server, host) for host in ("example.org", "10.example.org:5000", "192.168.example.org")] == [403] * 3


def test_others_are_let_in_only_by_word_and_with_a_warning(runs: Path, tmp_path: Path) -> None:
    """On all addresses it answers to the machine's name, also to a browser's searches, and still runs no jobs."""
    with serving(runs, tmp_path / "log.txt", "host=0.0.0.0", "expose=true") as server:
        assert connects("127.0.0.2", server.port)
        name = f"{socket.gethostname()}:{server.port}"
        assert server.address.startswith(f"http://{name}/")
        assert [status(server, host) for host in (name, "localhost:8080", "example.org", "10.example.org")] == [
            200,
            200,
            403,
            403,
        ]
        assert search(server, name, f"http://{name}") == 200
        assert search(server, name, "http://example.org") == 403
        assert len(server.descendants) == 2
        [warning] = [line for line in server.log.read_text().splitlines() if line.startswith("mlmx: warning: ")]
        assert f"0.0.0.0:{server.port}" in warning


def search(server: Server, host: str, origin: str) -> int:
    """The answer to what a page of ``origin`` asks for to list runs."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        headers = {"Host": host, "Origin": origin, "Content-Type": "application/json"}
        body = json.dumps({"experiment_ids": ["1"]})
        connection.request("POST", "/ajax-api/2.0/mlflow/runs/search", body, headers)
        return connection.getresponse().status


def status(server: Server, host: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request(
            "GET", "/api/2.0/mlflow/experiments/get-by-name?experiment_name=mlmx", headers={"Host": host}
        )
        return connection.getresponse().status


def test_has_no_job_workers(server: Server) -> None:
    commands = [" ".join(process.cmdline()) for process in server.descendants]
    assert len(commands) == 2, commands  # mlflow, and the server process it starts
    assert not [command for command in commands if "huey" in command or "job" in command]


def test_tells_no_one(server: Server) -> None:
    environments = [process.environ() for process in server.descendants]
    assert {environment["MLFLOW_DISABLE_TELEMETRY"] for environment in environments} == {"true"}
    assert {environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] for environment in environments} == {"false"}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="SIGINT"),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.nightly, id="SIGTERM"),
    ],
)
def test_a_signal_ends_all_of_it(number: signal.Signals, code: int, runs: Path, tmp_path: Path) -> None:
    with serving(runs, tmp_path / "log.txt") as server:
        family = server.descendants
        assert len(family) == 2
        visitor = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        with contextlib.closing(visitor):
            visitor.request("GET", "/health")
            visitor.getresponse().read()  # and stays connected, as a browser does
            server.process.send_signal(number)
            assert server.process.wait(60) == code
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        assert not connects("127.0.0.1", server.port)
        assert "Traceback" not in server.log.read_text()


def test_a_taken_port_is_said(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["ui", f"port={port}"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"mlmx: port={port}: ")
    assert f"port={port + 1}" in told.err
    assert told.err.count("\n") == 1


def test_without_runs_there_is_nothing_to_show(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui"]) == 2
    told = capsys.readouterr().err
    assert str(outputs / "mlflow.db") in told
    assert told.count("\n") == 1
    assert not outputs.exists()


# --------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Any]:
    """A page of a headless Chromium; it remembers whom it asked."""
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1440, "height": 900})
        opened.set_default_timeout(PATIENCE_SECONDS * 1000)
        asked: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        opened.asked = asked
        yield opened
        browser.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: those in docs/ are made with ``MLMX_PICTURES=docs``."""
    return Path(os.environ.get("MLMX_PICTURES", tmp_path)).resolve()


def picture(page: Any, path: Path) -> None:
    """A screenshot without the assistant that MLflow opens beside the page."""
    if (close := page.get_by_role("button", name="Close", exact=True)).count():
        close.first.click()
        page.wait_for_timeout(500)
    page.screenshot(path=path)


def unfold(page: Any, name: str) -> None:
    """Show the jobs of the sweep on the page of all runs, which folds them in."""
    link = page.get_by_role("link", name=name)
    page.get_by_role("link", name="sweep · chunk_size").wait_for()
    if not link.count():
        row = page.locator("[role=row]", has=page.get_by_role("link", name="sweep · chunk_size"))
        row.locator("button").first.click()
    link.wait_for()


def text_of(page: Any) -> list[str]:
    """The lines one can read on the page."""
    return [line.strip() for line in page.inner_text("body").splitlines() if line.strip()]


def open_run(page: Any, server: Server, result: dict[str, Any], tab: str = "") -> None:
    root = server.address.split("/runs?")[0]
    page.goto("about:blank")
    page.goto(f"{root}/runs/{result['run_id']}{tab}?workflowType=machine_learning")
    page.get_by_role("heading", name=result["run_name"]).first.wait_for()


@pytest.mark.browser
def test_all_runs_stand_in_one_experiment(
    page: Any, server: Server, runs: Path, pictures: Path, tmp_path: Path
) -> None:
    made = results(runs)
    assert len(made) == 3
    page.goto(server.address)
    page.get_by_text("4 matching runs").wait_for()  # and the sweep that two of them are jobs of
    names = [result["run_name"] for result in made]
    assert names[0] == "the first"
    assert ["chunk 64" in names[1], "chunk 128" in names[2]] == [True, True]
    for name in names:
        unfold(page, name)
    picture(page, pictures / "ui-runs.png")

    page.goto("about:blank")
    page.goto(server.address.split("#")[0] + "#/experiments")
    page.get_by_role("link", name="mlmx", exact=True).wait_for()
    links = page.get_by_role("link").evaluate_all("links => links.map(link => [link.innerText, link.hash])")
    experiments = [name for name, target in links if re.match(r"#/experiments/\d+(\?|$)", target)]
    assert sorted(experiments) == ["Default", "mlmx"]  # MLflow makes Default itself
    page.screenshot(path=tmp_path / "experiments.png")


@pytest.mark.browser
def test_a_run_shows_numbers_and_params(page: Any, server: Server, runs: Path, tmp_path: Path) -> None:
    result = results(runs)[0]
    page.goto("about:blank")
    page.goto(server.address)
    page.get_by_role("link", name=result["run_name"]).click()
    page.get_by_text("eval/perplexity").first.wait_for()
    page.get_by_text("mlm_probability").first.wait_for()
    lines = text_of(page)
    for name in ("train/loss", "eval/loss", "eval/perplexity", "eval/accuracy", "train/learning_rate"):
        assert float(lines[lines.index(name) + 1]) == pytest.approx(result["metrics"][name], rel=1e-9), name
    params = {"chunk_size": "64", "lr": "0.001", "mlm_probability": "0.15", "dataset": "files", "train_chunks": "32"}
    for name, value in params.items():
        assert lines[lines.index(name) + 1] == value
    assert "Finished" in lines
    assert result["command"] in lines  # the description says how to make it again
    picture(page, tmp_path / "run.png")


# (metric, run id, [[step, value], …]) of every line drawn on the page
LINES = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(
    plot => (plot.data || []).filter(line => line.metricKey && line.x && line.x.length > 1)
        .map(line => [line.metricKey, line.uuid, [...line.x].map((x, i) => [x, line.y[i]])]))"""
CURVES = ("train/loss", "eval/loss", "eval/perplexity", "eval/accuracy", "heldout/loss")


def history(result: dict[str, Any]) -> dict[str, list[list[float]]]:
    """[step, value] of each of CURVES, from a run's folder."""
    found: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    for line in (result["folder"] / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in found.keys() & row.keys():
            found[name].append([row["step"], row[name]])
    per_epoch = {"train/loss": 2} | dict.fromkeys(CURVES[1:], 3)  # all but the training's: before it, too
    assert {name: len(points) for name, points in found.items()} == per_epoch
    return found


def drawn(page: Any, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], list[list[float]]]:
    """The lines of (metric, run id), once they are drawn."""
    end = time.monotonic() + PATIENCE_SECONDS
    shown: dict[tuple[str, str], list[list[float]]] = {}
    while time.monotonic() < end and not wanted <= shown.keys():
        page.wait_for_timeout(250)
        shown = {(name, run_id): points for name, run_id, points in page.evaluate(LINES)}
    return {key: points for key, points in shown.items() if key in wanted}


def assert_drawn(page: Any, made: list[dict[str, Any]]) -> None:
    """Every curve of these runs is on the page, point by point."""
    wanted = {(name, one["run_id"]): points for one in made for name, points in history(one).items()}
    shown = drawn(page, set(wanted))
    assert shown.keys() == wanted.keys()
    for key, points in wanted.items():
        assert [step for step, _ in shown[key]] == [step for step, _ in points], key
        assert [value for _, value in shown[key]] == pytest.approx([value for _, value in points]), key


@pytest.mark.browser
def test_a_run_shows_its_curves(page: Any, server: Server, runs: Path, tmp_path: Path) -> None:
    result = results(runs)[-1]
    page.set_viewport_size({"width": 1440, "height": 6000})  # charts are drawn once they come into view
    open_run(page, server, result, "/model-metrics")
    assert_drawn(page, [result])
    page.screenshot(path=tmp_path / "curves.png")


@pytest.mark.browser
def test_the_jobs_of_a_sweep_are_compared(page: Any, server: Server, runs: Path, pictures: Path) -> None:
    """Two runs that are ticked, side by side: what differs, what came out; and the curves of both in one chart."""
    made = results(runs)[1:]
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto("about:blank")
    page.goto(server.address)
    for result in made:
        unfold(page, result["run_name"])
        row = page.locator("[role=row]", has=page.get_by_role("link", name=result["run_name"]))
        row.get_by_role("checkbox").check(force=True)
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    page.get_by_text("chunk_size").first.wait_for()
    said = page.inner_text("body")
    rows = {line.partition("\t")[0]: line.split("\t")[1:] for line in said.splitlines() if "\t" in line}
    assert sorted(rows["chunk_size"], key=int) == ["64", "128"]
    assert rows["lr"] == ["0.001", "0.001"]
    assert {"eval/loss", "heldout/loss", "eval/perplexity"} <= set(said.splitlines())
    picture(page, pictures / "ui-compare.png")

    page.set_viewport_size({"width": 1440, "height": 6000})
    page.goto("about:blank")
    page.goto(f"{server.address}&compareRunsMode=CHART")
    assert_drawn(page, made)
    page.set_viewport_size({"width": 1440, "height": 1200})
    picture(page, pictures / "ui-charts.png")


@pytest.mark.browser
def test_a_run_shows_its_files(page: Any, server: Server, runs: Path, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 1440, "height": 900})
    open_run(page, server, results(runs)[0], "/artifacts")
    page.get_by_text("config.yaml").first.wait_for()
    lines = text_of(page)
    for name in ("plots", "config.yaml", "metrics.jsonl", "result.json", "data.json", "train.log"):
        assert name in lines
    page.get_by_text("plots", exact=True).click()
    page.get_by_text("perplexity.png", exact=True).click()
    page.wait_for_function("[...document.images].some(image => image.naturalWidth >= 700)")  # 7 inches at 110 dpi
    page.screenshot(path=tmp_path / "plot.png")
    page.get_by_text("config.yaml", exact=True).first.click()
    page.get_by_text("mlm_probability: 0.15").first.wait_for()
    page.screenshot(path=tmp_path / "files.png")
    elsewhere = [
        url for url in page.asked if not url.startswith((f"http://127.0.0.1:{server.port}/", "data:", "blob:"))
    ]
    assert [url for url in elsewhere if url != "about:blank"] == []
