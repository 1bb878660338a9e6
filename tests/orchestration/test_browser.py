"""What a person does in the UI, done by a headless browser on the real web server and daemon."""

import re
import time

import dagster as dg
import pytest
from served import Dagster, browser_page, dagster, needs_browser, toys, write_profile
from test_jobs_end_to_end import is_running
from toy_ground import Ground
from waiting import wait_for

pytestmark = [pytest.mark.services, needs_browser]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    return toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def served(ground):
    every_minute = {**ground.environment, "M2M_REEVALUATION_CRON": "* * * * *"}
    with dagster(ground.folder, every_minute) as served:
        yield served


@pytest.fixture
def page():
    with browser_page() as page:
        yield page


def open_page(page, served: Dagster, path: str) -> None:
    page.goto(f"{served.url}/{path}", wait_until="domcontentloaded")


def materialize(page, served: Dagster, asset: str) -> str:
    """Press the button on the asset's page; returns the new run."""
    before = {run["runId"] for run in served.runs()}
    open_page(page, served, f"assets/{asset}")
    page.locator("button:has-text('Materialize')").first.click()
    return wait_for(lambda: next((run["runId"] for run in served.runs() if run["runId"] not in before), None))


def status(served: Dagster, run_id: str) -> str:
    return next(run["status"] for run in served.runs() if run["runId"] == run_id)


def test_an_asset_is_made_watched_and_looked_at(page, served):
    run = materialize(page, served, "filtered_captions")
    open_page(page, served, f"runs/{run}")
    page.get_by_text("filter-captions: python").first.wait_for()  # its log, as it goes
    page.get_by_text("RUN_SUCCESS").first.wait_for()

    open_page(page, served, "assets/filtered_captions")
    page.get_by_text("Show Markdown").first.click()
    picture = page.locator("img[src^='data:image/png']").first
    picture.wait_for()
    assert picture.evaluate("image => image.complete && image.naturalWidth") == 1

    open_page(page, served, "assets/filtered_captions?view=checks")
    page.get_by_text("counts_add_up").first.click()
    page.get_by_text("Passed").first.wait_for()
    assert page.get_by_text("Succeeded").count() == 2


def test_a_run_is_cancelled_and_its_process_is_gone_within_five_seconds(page, served, ground):
    write_profile(ground, "filter-captions: {act: sleep}")
    try:
        run = materialize(page, served, "filtered_captions")
        asleep = ground.outputs / "asleep"
        stage = int(wait_for(lambda: asleep.exists() and asleep.read_text()))
        open_page(page, served, f"runs/{run}")
        page.get_by_role("button", name="Terminate").first.click()
        page.get_by_role("button", name="Terminate 1 run").click()
        asked = time.monotonic()
        wait_for(lambda: not is_running(stage), 30)
        seconds = time.monotonic() - asked
        wait_for(lambda: status(served, run) == dg.DagsterRunStatus.CANCELED.value)
    finally:
        write_profile(ground)
    assert seconds <= 5, f"gone after {seconds:.1f} s"


def test_the_schedule_is_switched_on_and_ticks(page, served):
    open_page(page, served, "locations/toy_definitions/schedules/reevaluation")
    page.get_by_role("checkbox").locator("..").first.click()
    try:
        run = wait_for(lambda: next((run for run in served.runs() if run["jobName"] == "evaluation_job"), None), 100)
    finally:
        page.get_by_role("checkbox").locator("..").first.click()
    tags = {tag["key"]: tag["value"] for tag in run["tags"]}
    assert tags["dagster/schedule_name"] == "reevaluation" and tags["dagster/priority"] == "-1"
    open_page(page, served, "locations/toy_definitions/schedules/reevaluation")
    page.get_by_text(re.compile("1 run requested|Requested")).first.wait_for()


def test_the_page_of_an_asset_of_12238_partitions_is_there_within_five_seconds(page, tmp_path):
    """The paper's own number of shards (configs/paper.yaml)."""
    ground = toys(tmp_path, shards=12_238)
    with dagster(tmp_path, ground.environment) as served:
        seconds = []
        for _ in range(3):  # the first visit also loads the UI itself
            open_page(page, served, "runs")
            page.get_by_role("link", name="Catalog").first.wait_for()
            started = time.monotonic()
            open_page(page, served, "assets/mis_shards?view=partitions")
            page.get_by_text("12,238").first.wait_for()
            seconds.append(time.monotonic() - started)
    assert min(seconds) <= 5, seconds
