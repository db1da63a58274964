"""The page of `id3-optim compare`: it opens from disk in a browser, alone, and shows what the results say."""

import pytest
from browser import chromium
from compare_command import words
from train_command import run, save_train_files

from id3_optim.cli import main

pytest.importorskip("plotly", reason="needs plotly: extra plot")
EVERY = {"score-budget", "score-entries", "learning-curves", "learning-rates", "time", "memory", "allocation"}
EVERY |= {"tensor-sparsity", "entropy", "overlap", "thresholds", "eps-exp"}
SIZES = {"phone": (390, 844), "desktop": (1280, 800)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    files = save_train_files(folder)
    command = words(files, folder / "r.sqlite", "--page", folder / "page.html", "--budgets", 100, 300)
    methods = ["id3", "full", "random", "id3:exp=0.5"]
    command[command.index("--methods") + 1 : command.index("--methods") + 4] = methods
    assert main(command) == 0
    return folder / "r.sqlite"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


class Opened:
    """A page in a browser, and all that went wrong or left it."""

    def __init__(self, browser, path, size):
        self.faults, self.requests = [], []
        self.page = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)))
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelectorAll('.plot:not(:has(.main-svg))').length === 0")


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_page_opens_alone_without_a_fault(results, browser, size):
    path = results.with_name("page.html")
    opened = Opened(browser, path, size)
    assert opened.faults == [] and opened.requests == [path.as_uri()]
    assert {plot.get_attribute("id") for plot in opened.page.query_selector_all(".plot")} == EVERY
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "scrolls sideways"
    for plot in opened.page.query_selector_all(".plot"):
        box = plot.query_selector(".main-svg").bounding_box()
        assert 300 <= box["width"] <= size[0] and box["height"] >= 300, plot.get_attribute("id")


def test_every_curve_has_its_points(results, browser):
    page = Opened(browser, results.with_name("page.html"), SIZES["desktop"]).page
    counts = page.evaluate(
        "Object.fromEntries(Object.keys(FIGURES).map(n => [n, document.getElementById(n).data.length]))"
    )
    assert counts["learning-curves"] == 3 * 2 + 1 and counts["tensor-sparsity"] == 3 * 2
    assert counts["score-entries"] == 3 * 2 + 1 and counts["score-budget"] == 4
    assert counts["allocation"] == 3 * 2 and counts["overlap"] == 1
    assert page.query_selector_all("tbody tr").__len__() == 3 * 2 + 1
    drawn = page.evaluate("document.querySelectorAll('#learning-curves .scatterlayer .trace').length")
    assert drawn == 3 * 2 + 1


def test_a_method_can_be_hidden_in_all_figures(results, browser):
    opened = Opened(browser, results.with_name("page.html"), SIZES["phone"])
    box = opened.page.query_selector("input[data-method='id3:exp=0.5']")
    hidden = "Object.keys(FIGURES).map(n => document.getElementById(n).data.filter(t => t.visible === false))"
    box.click()
    names = opened.page.evaluate(f"{hidden}.slice(0, 4).flat().map(trace => trace.meta)")
    assert set(names) == {"id3:exp=0.5"} and len(names) >= 6
    box.click()
    assert opened.page.evaluate(f"{hidden}.slice(0, 4).flat()") == [] and opened.faults == []


def test_plot_makes_one_figure_alone(results, browser, tmp_path, capsys):
    path = tmp_path / "one.html"
    assert run(capsys, ["plot", str(results), "--output", str(path), "--figure", "overlap"])[0] == 0
    opened = Opened(browser, path, SIZES["desktop"])
    assert [plot.get_attribute("id") for plot in opened.page.query_selector_all(".plot")] == ["overlap"]
    (z,) = opened.page.evaluate("document.getElementById('overlap').data.map(trace => trace.z)")
    labels = opened.page.evaluate("document.getElementById('overlap').data[0].x")
    assert len(labels) == 3 * 2 and labels[0] == "id3, seed 0"
    assert opened.page.evaluate("document.querySelector('#overlap .main-svg').clientWidth") > 300
    assert z is not None


def test_a_figure_that_is_none_is_refused(results, capsys, tmp_path):
    target = tmp_path / "p.html"
    code, _, error = run(capsys, ["plot", str(results), "--output", str(target), "--figure", "none"])
    assert code == 2 and "--figure: expected names of score-budget" in error and not target.exists()
    code, _, error = run(capsys, ["plot", str(results), "--output", str(results)])
    assert code == 2 and "--output: expected another file than the results" in error


def test_shared_entries():
    import numpy as np

    from id3_optim.cli.compare.maps import shared

    assert shared(np.array([1, 2, 3, 4]), np.array([3, 4])) == 1.0
    assert shared(np.array([1, 2]), np.array([2, 9, 10])) == 0.5
    assert shared(np.array([]), np.array([1])) == 0.0


def test_no_name_ends_the_script_or_the_markup(results):
    from id3_optim.cli.compare.page import page
    from id3_optim.cli.compare.store import Store

    with Store(results, create=False) as store:
        plan = store.plan()
        text = page(plan, store.results(plan), lambda trial: store.active(plan, trial))
    figures = text[text.index("const FIGURES") :]
    assert figures.count("</") == figures.count("</script>") + 2  # </body>, </html>
