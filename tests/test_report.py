"""The report of a run: what it says of a folder, that it needs nothing else, and that a browser shows it."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.cli import main
from experiments.folder import hold
from experiments.metrics import METRICS, in_digits
from experiments.refusals import ConfigError
from experiments.report import report, write_report
from experiments.report_curves import CURVES, HEIGHT, POINTS, Curve, Line, panel, thinned
from experiments.report_sections import READING

SHORT = ["--steps", "6", "--log-interval", "2", "--batch-size", "4", "--num-videos", "30", "--agent.width", "16"]
SHORT += ["--evaluate.num-videos", "30", "--evaluate.clips", "32", "--evaluate.tasks", "linear", "finetune"]
SHORT += [
    "--finetune.epochs",
    "2",
    "--finetune.warmup-epochs",
    "1",
    "--finetune.test-clips",
    "1",
    "--finetune.test-crops",
    "1",
]
SHORT += ["--finetune.test-keep-ratios", "1.0", "0.5"]
SECTIONS = [
    "Results", "Curves", "Gallery", "How the mask moves over training", "Favoured positions", "Evaluation",
    "Configuration",
]  # fmt: skip


class Page(HTMLParser):
    """What a page refers to, its images and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self._open = self._cell = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open = tag
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        self.references += [u for _, v in attrs for u in re.findall(r"url\(([^)]*)\)", v or "")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._cell = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        self._cell = "" if tag == self._cell else self._cell

    def handle_data(self, data: str) -> None:
        if self._open == "style":
            self.references += re.findall(r"@import\s+(\S+)|url\(([^)]*)\)", data)
            return
        self.words.append(data)
        if self._open == "h2":
            self.headings.append(data)
        if self._cell:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def pictures(self, *words: str) -> list[Image.Image]:
        """Those whose alt text has all these words."""
        return [_decoded(i["src"] or "") for i in self.images if all(word in (i["alt"] or "") for word in words)]


def _decoded(uri: str) -> Image.Image:
    kind, content = uri.removeprefix("data:").split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert Image.MIME[image.format or ""] == kind
    image.load()
    return image


def add_pictures(folder: Path, size: int = 32, patch: int = 8, heat: bool = True) -> dict[str, np.ndarray]:
    """Snapshots, gallery and favoured positions, as a run leaves them behind; returns the snapshots."""
    rng = np.random.default_rng(0)
    slots, rows = 8, size // patch
    n = slots * rows * rows
    # Coarse, as what a camera sees is
    coarse = rng.integers(0, 255, (6, 16, 4, 4, 3), np.uint8)
    clips = np.stack([[np.array(Image.fromarray(f).resize((size, size), Image.BICUBIC)) for f in c] for c in coarse])
    found = {"clips": clips, "steps": np.arange(10), "visible": np.zeros((10, 6, n), bool)}
    for visible in found["visible"].reshape(-1, n):
        visible[rng.permutation(n)[: n // 10]] = True
    if heat:
        found["heat"] = rng.dirichlet(np.ones(n), (10, 6)).astype(np.float32)
    np.savez(folder / "snapshots.npz", **found)
    share = rng.uniform(0.05, 0.15, n)
    (folder / "positions.json").write_text(json.dumps({"grid": [slots, rows, rows], "share": share.tolist()}))
    (folder / "gallery").mkdir(exist_ok=True)
    for i, clip in enumerate(clips):
        frames = [Image.fromarray(np.concatenate([frame] * 5)) for frame in clip]
        frames[0].save(folder / "gallery" / f"{i}.webp", save_all=True, append_images=frames[1:], duration=125, loop=0)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert main(["run", "quickstart", *SHORT, "--out", str(out)]) == 0
    return out / "quickstart"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run's folder with all that can be in one, to do with as one likes."""
    folder = tmp_path / "here" / "quickstart"
    shutil.copytree(finished, folder)
    add_pictures(folder)
    add_pictures(folder / "random", heat=False)
    (folder / "warnings.txt").write_text("4\tentropy\tit falls; raise agent.ent_coef\n")
    (folder / "bad_videos.txt").write_text("".join(f"/videos/{i}.mp4\tno video stream\n" for i in range(13)))
    return folder


def test_report_has_every_section_in_order_and_the_figures_of_the_summary(run: Path) -> None:
    assert report([str(run)]) == 0
    page = Page(run / "report.html")
    assert page.headings == SECTIONS
    summary = json.loads((run / "summary.json").read_text())
    for name in ("ppo", "random"):
        row = next(row for row in page.rows if row and row[0] == name)
        assert row[1:4] == [in_digits(summary[name], metric) for metric in list(METRICS)[:3]]
    for told in (
        "Finished", "motion", "0.9", "ppo, credit token_motion", "ppo 6 of 6; random 6 of 6", "24, 4 a step",
        "torch 2.", "Step 4, entropy: it falls; raise agent.ent_coef", "13 videos could not be read",
        "/videos/9.mp4", "and 3 more", "tats run config.yaml", "log_interval: 2",
    ):  # fmt: skip
        assert told in page.text, told
    assert "/videos/10.mp4" not in page.text
    tuned = json.loads((run / "downstream" / "motion" / "finetune" / "finetune.json").read_text())
    row = next(row for row in page.rows if row[1:3] == ["finetune", "ppo"])
    assert row[3:] == [f"{tuned[x]:.3f}" for x in ("top1", "top5", "mean_class")] + ["0.067", "30"]
    assert len(page.pictures("confusion")) == 4 and len(page.pictures("tokens kept")) == 2
    assert "Fine-tuning on motion" in page.text


def test_every_figure_and_curve_says_how_to_read_it_and_is_one_that_runs_log(finished: Path) -> None:
    assert READING.keys() == METRICS.keys()
    logged = (finished / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {curve.key for curve in CURVES} <= set(logged)
    source = write_report([finished], finished.parent / "out.html").read_text()
    page = Page(finished.parent / "out.html")
    for curve in CURVES:
        assert curve.healthy in page.text and f"<h3>{curve.heading}</h3>" in source
    last = list(csv.DictReader((finished / "metrics.csv").open()))[-1]
    assert re.search(rf"Motion lift against steps: ppo ends at {float(last['mask/motion_lift']):.3g}, random", source)


def test_page_needs_nothing_but_itself_and_runs_nothing(run: Path) -> None:
    page = Page(write_report([run]))
    assert page.references and all(x.startswith(("data:", "#")) for x in page.references if isinstance(x, str))
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "default-src 'none'" in page.source and "@import" not in page.source
    for image in page.images:
        decoded = _decoded(image["src"] or "")
        assert image["alt"] and decoded.size == (int(image["width"] or 0), int(image["height"] or 0))
    assert len(page.pictures("example")) == 6 and all(image.n_frames == 16 for image in page.pictures("example"))  # type: ignore[attr-defined]


def test_report_of_a_folder_is_the_same_bytes_wherever_and_whenever(run: Path) -> None:
    first = write_report([run]).read_bytes()
    moved = run.parent / "elsewhere" / "quickstart"
    shutil.move(run, moved)
    assert write_report([moved]).read_bytes() == first


def test_moments_show_visible_tokens_in_colour_hidden_ones_in_grey_and_heat_below(run: Path) -> None:
    found = add_pictures(run)
    page = Page(write_report([run]))
    pictures = page.pictures("with the policy's heat below")
    assert len(pictures) == 6
    tile, m, slot = 33, 7, 5  # a clip of 32 pixels and a gap
    for c, picture in enumerate(pictures):
        assert picture.n_frames == 8 and picture.size == (11 * tile, 2 * tile)  # type: ignore[attr-defined]
        picture.seek(slot)
        pixels = np.array(picture.convert("RGB"))
        frame = found["clips"][c, 2 * slot + 1]
        assert (pixels[:32, :32] == frame).all()
        visible = found["visible"][m, c].reshape(8, 4, 4)[slot].repeat(8, 0).repeat(8, 1)
        shown = pixels[:32, (m + 1) * tile :][:, :32]
        assert (shown[visible] == frame[visible]).all() and visible.any() == (shown == frame).all(-1).any()
        hidden = shown[~visible]
        assert (hidden == hidden[:, :1]).all() and hidden.max() <= 0.4 * 255
        heat = found["heat"][m, c].reshape(8, 4, 4)[slot].repeat(8, 0).repeat(8, 1)
        drawn = pixels[tile:, (m + 1) * tile :][:32, :32].astype(int).sum(-1)
        assert drawn.flat[heat.argmax()] == drawn.max() and drawn.flat[heat.argmin()] == drawn.min()


@pytest.mark.parametrize(
    ("shown", "evenness", "collapsed"),
    [
        (lambda t, r, c: 0.125 + 0 * t, 1.0, False),
        (lambda t, r, c: 1.0 * ((r == 0) & (t < 4)), 16 / 128, True),  # the same K = N / 8 tokens in every clip
        (lambda t, r, c: 1.0 * (t == 3), 16 / 128, True),  # one frame only
        (lambda t, r, c: 0.25 * (c < 2), 0.5, False),
    ],
)  # fmt: skip
def test_collapse_on_positions_is_told_from_masks_that_follow_the_clip(
    run: Path, shown: Any, evenness: float, collapsed: bool
) -> None:
    share = shown(*np.mgrid[:8, :4, :4])
    (run / "positions.json").write_text(json.dumps({"grid": [8, 4, 4], "share": share.ravel().tolist()}))
    page = Page(write_report([run]))
    assert f"Spread as evenly as over {evenness:.2f} of all tokens" in page.text
    # The baseline beside it is even
    assert page.text.count("no collapse, which begins below 0.35.") == 2 - collapsed
    assert ("collapsed , for this is below 0.35" in page.text) == collapsed
    assert f"visible in {100 * share.max():.1f} % of clips. Least: " in page.text
    alphas = [np.array(image)[..., 3] for image in page.pictures("ppo, slot")]
    np.testing.assert_allclose(np.stack(alphas) / 255, share / max(share.max(), 0.15), atol=0.02)


def test_curve_is_drawn_where_its_ticks_say(tmp_path: Path) -> None:
    x, y = np.array([10.0, 20, 30, 40]), np.array([0.5, np.nan, 0.3, 0.1])
    drawn = panel(Curve("", "", ""), [Line("a", "red", "", x, y)], "steps", (0.4, "there"))
    assert drawn is not None
    points = np.array([[float(v) for v in p.split()] for p in re.findall(r"[ML]([\d.]+ [\d.]+)", drawn.lines[0].path)])
    assert re.sub(r"[\d. ]+", "", drawn.lines[0].path) == "MhML", "a gap where there is no number, a dot before it"
    for ticks, found, true in (
        (drawn.x_ticks, points[:, 0], [10, 30, 40]),
        (drawn.y_ticks, points[:, 1], [0.5, 0.3, 0.1]),
    ):
        places, values = zip(*((place, float(label)) for place, label in ticks), strict=True)
        np.testing.assert_allclose(np.polyval(np.polyfit(places, values, 1), found), true, atol=0.002 * np.ptp(true))
    assert drawn.mark and points[0, 1] < drawn.mark[0] < points[1, 1] < HEIGHT
    assert panel(Curve("", "", ""), [Line("a", "red", "", x, y * np.nan)], "steps") is None


def test_long_curve_is_thinned_and_hides_no_spike() -> None:
    x = np.arange(10_000.0)
    y = np.sin(x / 900)
    y[1234], y[5000:5100] = 40, np.nan
    few, mean, low, high = thinned(x, y)
    assert len(few) == POINTS and np.nanmax(high) == 40
    assert 3 <= np.isnan(mean).sum() <= 5 and np.isnan(mean[200])
    calm = np.delete(np.arange(POINTS), [int(1234 / 25), *range(199, 205)])
    np.testing.assert_allclose(mean[calm], np.sin(few / 900)[calm], atol=0.01)
    assert (low[calm] <= mean[calm]).all() and (mean[calm] <= high[calm]).all()
    drawn = panel(Curve("", "", ""), [Line("a", "red", "", x, y)], "steps")
    assert drawn is not None and len(drawn.lines[0].band) < 20_000 and drawn.lines[0].band.count("Z") == 2


@pytest.mark.parametrize(
    ("summary", "held", "state"),
    [
        ({}, False, "Finished"),
        ({}, True, "Finished"),  # and probed, say
        ({"interrupted": True}, False, "Interrupted; tats run with --resume goes on"),
        ({"interrupted": True}, True, "At work; this is what there is so far"),  # resumed
        (None, True, "At work; this is what there is so far"),
        (None, False, "Interrupted; tats run with --resume goes on"),  # killed
    ],
)  # fmt: skip
def test_report_tells_whether_the_run_goes_on(
    run: Path, summary: dict[str, bool] | None, held: bool, state: str
) -> None:
    stored = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(stored | summary))
    lock = hold(run) if held else None
    page = Page(write_report([run]))
    assert state in page.text
    assert page.headings == (SECTIONS if summary is not None else SECTIONS[1:])
    if lock:
        lock.release()


def test_report_in_the_midst_of_training_leaves_out_the_line_that_is_being_written(run: Path) -> None:
    for path in run.iterdir():
        if path.name not in ("config.yaml", "metrics.csv"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:3]) + lines[3][:40])
    page = Page(write_report([run]))
    assert page.headings == ["Curves", "Configuration"]
    assert "ppo 4 of 6" in page.text and not page.images
    (run / "metrics.csv").write_text(lines[0])
    assert Page(write_report([run])).headings == ["Configuration"]


def test_what_is_broken_is_named_and_left_out(run: Path) -> None:
    (run / "snapshots.npz").write_bytes((run / "snapshots.npz").read_bytes()[:5000])
    (run / "gallery" / "2.webp").write_bytes(b"RIFF")
    (run / "positions.json").write_text('{"grid": [8, 4, 4], "share": [0.1, 0.1]}')
    (run / "downstream" / "motion" / "linear.json").write_text("{")
    page = Page(write_report([run]))
    notice = page.text.partition("Left out of this report")[2].partition("Results")[0]
    for name in (
        "quickstart/snapshots.npz: ",
        "gallery/2.webp: ",
        "quickstart/positions.json: ",
        "motion/linear.json: ",
    ):
        assert name in notice
    assert page.headings == [name for name in SECTIONS if name != SECTIONS[3]]
    assert len(page.pictures("example")) == 5


def test_names_are_text_whatever_they_are(run: Path) -> None:
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("data: motion", f"data: 'folder:/a/{bad}'"))
    (run / "bad_videos.txt").write_bytes(f"/a/{bad}\xff.mp4\t{bad}\n".encode("latin-1"))
    (run / "warnings.txt").write_text(f'1\t{bad}\t"{bad}\n')
    path = run / "downstream" / "motion" / "linear.json"
    scores = json.loads(path.read_text())
    scores["class_names"] = [f"{bad}\udc80"] * 15
    path.write_text(json.dumps(scores))
    (run / "downstream" / "motion").rename(run / "downstream" / "<b>&amp;\"'")
    page = Page(write_report([run]))
    assert "script" not in page.tags and "b" in page.tags
    assert all((image["src"] or "").startswith("data:image/") and "onerror" not in image for image in page.images)
    assert f"folder:/a/{bad}" in page.text and f"{bad} taken for {bad}" in page.text.replace("?", "")
    assert any("<b>&amp;\"'" in (image["alt"] or "") for image in page.images)


def test_comparison_lays_runs_side_by_side_and_tells_what_differs(
    run: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("ent_coef: 0.1", "ent_coef: 0.2"))
    monkeypatch.chdir(tmp_path)
    assert report([str(finished), str(run)]) == 0
    page = Page(tmp_path / "comparison.html")
    above = f"{finished.parent.name}/quickstart"
    assert page.headings == SECTIONS
    assert page.rows[0] == ["", above, "here/quickstart"] and "comparison of 2 runs" in page.text
    assert page.rows[-1] == ["agent.ent_coef", "0.1", "0.2"] and page.rows[-2] == ["setting", above, "here/quickstart"]
    assert {f"{above}, ppo", f"{above}, random", "here/quickstart, ppo"} <= set(
        re.findall(r"</svg> (.*?) <b>", page.source)
    )
    assert write_report([finished, run], tmp_path / "x.html") == tmp_path / "x.html"
    same = Page(write_report([run, run], tmp_path / "y.html"))
    assert "The runs have the same settings." in same.text


def test_baseline_within_a_run_has_a_report_of_its_own(run: Path) -> None:
    page = Page(write_report([run / "random"]))
    assert page.headings == SECTIONS and (run / "random" / "report.html").is_file()
    assert [row[0] for row in page.rows if row[0] in ("ppo", "random")] == ["random"]
    assert "random 6 of 6" in page.text and "Below each clip" not in page.text


def test_runs_that_cannot_be_reported_on_are_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for args, said in (
        ([tmp_path / "no"], "no: not there; give the folder of a run, such as runs/quickstart"),
        ([tmp_path / "file"], "file: a file; give the folder"),
        ([run.parent], rf"here: not the folder of a run: it holds none of config.yaml, .* such as {run}$"),
        ([run, run / "gallery"], "gallery: not the folder of a run"),
        ([run, "--out", tmp_path], "is a folder; give a file, such as"),
        ([run, "--out", tmp_path / "no" / "x.html"], "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            report([str(arg) for arg in args])
    with pytest.raises(ConfigError, match="the folder of a run comes first"):
        write_report([])
    assert not list(tmp_path.rglob("*.partial"))


def test_report_imports_no_torch(run: Path) -> None:
    code = "import sys; from experiments.report import report; report(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, timeout=60)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no chromium, or no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "hide-scrollbars", "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as opened:
        yield opened


def check_in(browser: Any, path: Path, width: int, shots: Path, dark: bool = False) -> list[str]:
    """Open a report in a window of that width; returns the headings that can be seen."""
    scheme = "dark" if dark else "light"
    for command, arguments in (
        ("setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}),
        ("setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}),
    ):
        browser.execute_cdp_cmd(f"Emulation.{command}", arguments)
    browser.get(path.resolve().as_uri())
    browser.execute_async_script(
        "Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(arguments[arguments.length - 1])"
    )
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    named = os.environ.get("TATS_SCREENSHOTS")
    for folder in (shots, *([Path(named)] if named else [])):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{path.parent.name}-{path.stem}-{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
    assert browser.get_log("browser") == []
    found = browser.execute_script(
        """
        const seen = e => e.checkVisibility() && e.getBoundingClientRect().width > 0
        const root = document.documentElement
        const light = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)
        const letters = [...document.querySelectorAll("svg text")].filter(seen).map(
            e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)
        const words = [...document.querySelectorAll("p, td, dd, dt, figcaption, h1, h2, h3, li, code")].filter(seen)
        return {
            headings: [...document.querySelectorAll("h1, h2")].filter(seen).map(e => e.textContent),
            unseen: [...document.images].filter(i => !i.naturalWidth).map(i => i.alt),
            images: document.images.length,
            width: root.scrollWidth, view: window.innerWidth,
            smallest: Math.min(...letters, ...words.map(e => parseFloat(getComputedStyle(e).fontSize))),
            light,
        }
        """
    )
    assert found["unseen"] == [] and found["images"] > 0
    assert found["view"] == width and found["width"] <= width, "the page scrolls sideways"
    assert found["smallest"] >= 10.5, "in pixels"
    assert found["light"] < 150 if dark else found["light"] > 600
    headings: list[str] = found["headings"]
    return headings


def test_browser_shows_the_report_wide_and_narrow(run: Path, browser: Any, tmp_path: Path) -> None:
    path = write_report([run])
    for width in (1280, 400):
        assert check_in(browser, path, width, tmp_path) == ["quickstart", *SECTIONS]


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_browser_shows_reports_of_every_kind(run: Path, browser: Any, tmp_path: Path, width: int, dark: bool) -> None:
    large = tmp_path / "large"
    shutil.copytree(run, large)
    config = (large / "config.yaml").read_text()
    (large / "config.yaml").write_text(
        config.replace("size: 32", "size: 224", 1).replace("patch_size: 8", "patch_size: 16")
    )
    add_pictures(large, 224, 16)
    add_pictures(large / "random", 224, 16, heat=False)
    (large / "summary.json").unlink()
    path = write_report([large])
    assert check_in(browser, path, width, tmp_path, dark) == ["quickstart", *SECTIONS[1:]]
    assert path.stat().st_size < 8e6
    compared = write_report([run, large, run / "random"], tmp_path / "comparison.html")
    assert check_in(browser, compared, width, tmp_path, dark)[1:] == SECTIONS
