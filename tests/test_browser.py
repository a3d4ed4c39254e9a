"""The pages in a real browser: they work at every width, and load nothing from other hosts."""

import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, free_port

from metaalign_rl.cli.evaluate import evaluate, write_report
from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Sampling
from metaalign_rl.core.files import append_jsonl, read_jsonl, read_log, write_jsonl
from metaalign_rl.core.rows import read_rows
from metaalign_rl.evaluation.gold_metrics import judge_all
from metaalign_rl.monitoring.metric_registry import PARTS
from metaalign_rl.monitoring.rollout_table import read_rollouts
from metaalign_rl.report import build as build_report

sync_api = pytest.importorskip("playwright.sync_api")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:  # pip cannot install it. .ci/run installs it with apt; a laptop may lack it.
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A browser tab. The test fails if its page requests anything from another host, or if its script fails."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    elsewhere: list[str] = []
    errors: list[str] = []

    def route(route: Any) -> None:
        if re.match(r"file:|http://127\.0\.0\.1[:/]", route.request.url):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    context.route("**/*", route)
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert elsewhere == []
    assert errors == []


# The report.


@pytest.fixture
def report(page: Any, tiny_run: Path) -> Any:
    page.goto((tiny_run / "report.html").as_uri())
    return page


def disagrees(sample: dict[str, Any]) -> bool:
    return (sample["proxy"] >= 0.5) != sample["gold"]


def test_the_rollout_browser_finds_a_known_response(report: Any, tiny_run: Path) -> None:
    known = read_rollouts(tiny_run / "rollouts").to_pylist()[-1]
    report.fill("#rollouts input[name=text]", known["row"])
    report.fill("#rollouts input[name=step_from]", str(known["step"]))
    answers = report.locator("#rollouts .sample .answer").all_inner_texts()
    assert (known["answer"].strip() or "(empty)") in [answer.strip() for answer in answers]
    assert f"governing tier: {known['tier']}" in report.inner_text("#rollouts .sample >> nth=0")


def test_filters_narrow_the_rollouts_by_tier_relation_step_and_disagreement(report: Any, tiny_run: Path) -> None:
    kept = read_rollouts(tiny_run / "rollouts").to_pylist()

    def found() -> int:
        return int(report.inner_text("#rollouts .count").split()[0])

    assert found() == len(kept)
    report.select_option("select[name=agreement]", "disagree")
    assert found() == sum(map(disagrees, kept))
    report.select_option("select[name=agreement]", "")
    report.select_option("select[name=tier]", "system")
    assert found() == sum(sample["tier"] == "system" for sample in kept)
    report.select_option("select[name=relation]", "conflict")
    assert found() == sum(sample["relation"] == "conflict" for sample in kept)
    report.fill("input[name=step_to]", "1")
    assert found() == sum(sample["relation"] == "conflict" and sample["step"] == 1 for sample in kept)


def test_every_chart_is_drawn_and_shows_the_values_under_the_pointer(report: Any) -> None:
    charts = report.locator("figure.chart")
    assert charts.count() >= 8
    assert charts.locator("svg path.line").count() >= charts.count()
    chart = report.locator("figure[data-chart=gold_proxy]")
    chart.locator("svg").hover(position={"x": 60, "y": 60})
    assert re.search(r"gold [\d.]+\s*proxy [\d.]+", chart.locator(".legend").inner_text())


def test_the_rollouts_can_be_filtered_by_reward_and_sorted_by_length(report: Any, tiny_run: Path) -> None:
    kept = read_rollouts(tiny_run / "rollouts").to_pylist()
    middle = round(statistics.median(sample["reward"] for sample in kept), 3)
    report.fill("input[name=reward_from]", str(middle))
    expected = sum(round(sample["reward"], 3) >= middle for sample in kept)
    assert int(report.inner_text("#rollouts .count").split()[0]) == expected
    report.fill("input[name=reward_from]", "")
    report.select_option("select[name=sort]", "longest first")
    lengths = [int(found) for found in re.findall(r"(\d+) tokens", report.inner_text("#rollouts .list"))]
    assert lengths == sorted((sample["tokens"] for sample in kept), reverse=True)[: len(lengths)]


@pytest.fixture
def hacked_run(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run with the curves of a longer, failed run. Its page may contain only a few responses."""
    folder = tmp_path / "hacked"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("checkpoints", "controls", "data.*"))
    last = list(read_log(folder / "metrics.jsonl"))[-1]
    curves = [{**last, "step": step, "proxy": 0.5 + step / 200, "gold": 0.9 - step / 200} for step in range(1, 41)]
    write_jsonl(folder / "metrics.jsonl", curves)
    fault = {"time": "2026-01-01T00:00:00", "who": "rollout engine 1", "what": "died", "cause": "<b>killed</b>"}
    append_jsonl(folder / "faults.jsonl", {**fault, "step": 7, "action": "replaced"})
    monkeypatch.setattr("metaalign_rl.report.rollouts.IN_PAGE", 5)
    monkeypatch.setattr("metaalign_rl.report.rollouts.PER_SCRIPT", 10)
    build_report(RunFolder(folder), "overall")
    return folder


def test_a_page_loads_the_other_responses_from_the_files_next_to_it(page: Any, hacked_run: Path) -> None:
    kept = read_rollouts(hacked_run / "rollouts").to_pylist()
    page.goto((hacked_run / "report.html").as_uri())
    assert f"5 of the {len(kept)} saved responses" in page.inner_text("#rollouts")
    page.click(f"text=Load all {len(kept)}")
    sync_api.expect(page.locator("#rollouts .loading")).to_have_text(f"{len(kept)} responses loaded.")
    page.select_option("select[name=tier]", "user")
    found = int(page.inner_text("#rollouts .count").split()[0])
    assert found == sum(sample["tier"] == "user" for sample in kept)
    page.fill("input[name=text]", kept[-1]["row"])
    page.select_option("select[name=tier]", "")
    assert kept[-1]["row"] in page.inner_text("#rollouts .sample >> nth=0")


def test_a_page_that_was_moved_alone_says_which_folder_is_missing(page: Any, hacked_run: Path) -> None:
    shutil.rmtree(hacked_run / "rollouts_page")
    page.goto((hacked_run / "report.html").as_uri())
    page.click("text=Load all")
    page.locator("#rollouts .loading", has_text="Folder rollouts_page not found. Put it next to this page.").wait_for()
    assert page.inner_text("#rollouts .count").startswith("5 responses")


def test_alarms_and_faults_are_listed_and_marked_on_their_curves(page: Any, hacked_run: Path) -> None:
    page.goto((hacked_run / "report.html").as_uri())
    assert "ALARM at step 20: reward hacking since step 1" in page.inner_text(".alarms")
    assert page.locator("figure[data-chart=gold_proxy] .mark").count() == 1
    assert page.locator("figure[data-chart=kl] .mark").count() == 0
    assert page.locator("figure[data-chart=seconds] .mark").count() == 1
    assert "<b>killed</b>" in page.inner_text(".faults")  # as text


def test_the_seconds_of_a_steps_parts_are_stacked(report: Any, tiny_run: Path) -> None:
    step = list(read_log(tiny_run / "metrics.jsonl"))[-1]
    parts = [part for part in PARTS if f"seconds_{part}" in step]
    assert report.locator("figure[data-chart=seconds] path.area").count() == len(parts)
    found = report.inner_text("figure[data-chart=seconds] .legend")
    for part in parts:
        shown = float(re.findall(rf"{part} ([\d.e-]+)", found)[0])
        assert shown == pytest.approx(step[f"seconds_{part}"], rel=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_of_a_failed_run_fits_a_phone_in_light_and_dark(page: Any, hacked_run: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 800})
    page.goto((hacked_run / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page_color, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    darkness = [sum(map(int, re.findall(r"\d+", color))) for color in (page_color, ink)]
    assert (darkness[0] < darkness[1]) == (scheme == "dark")


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_the_report_fits_every_width(report: Any, width: int) -> None:
    report.set_viewport_size({"width": width, "height": 800})
    report.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert report.evaluate("document.documentElement.scrollWidth") <= width


# The pages of `metaalign-rl evaluate`.


def evaluation_of(folder: Path, data: Path, output: Path) -> Path:
    """Write the page of a reward model's evaluation on pairs, or of a policy's evaluation on its responses."""
    if data.stem == "held_out_pairs":
        evaluate(str(folder / "reward"), data, output, Config(), Sampling())
    else:
        rows, answers = list(read_rows(data)), read_jsonl(folder / "evaluation" / "ppo_sampled.jsonl")
        judged = judge_all(rows, [record["answer"] for _, record in answers])
        write_report("a policy", data, output, judged, Sampling())
    return output / "evaluation.html"


@pytest.mark.parametrize("rows", ["held_out_pairs", "held_out_prompts"])
def test_an_evaluations_page_fits_every_width(page: Any, tiny_run: Path, tmp_path: Path, rows: str) -> None:
    page.goto(evaluation_of(tiny_run, tiny_run / "data" / f"{rows}.jsonl", tmp_path).as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    for width in (360, 768, 1440):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


# The chat.


@pytest.fixture(scope="module")
def chat_address(tiny_run: Path) -> Iterator[str]:
    """The address that a real `metaalign-rl chat --web` prints."""
    words = ["chat", str(tiny_run), "--web", "--port", str(free_port()), "--user", "please be casual."]
    command = [sys.executable, "-m", "metaalign_rl", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = next((found[0] for line in server.stdout if (found := re.search(r"http://\S+", line))), None)
        assert address, "the chat printed no address"
        yield address
        server.terminate()


def test_the_page_starts_with_the_given_tiers(page: Any, chat_address: str) -> None:
    page.goto(chat_address)
    assert [area.input_value() for area in page.locator("[name=user_info]").all()] == ["please be casual."] * 2


def test_one_question_is_answered_and_scored_under_two_meta_prompts(page: Any, chat_address: str) -> None:
    page.goto(chat_address)
    left, right = (page.locator(f"[data-side={side}]") for side in ("left", "right"))
    left.locator("[name=system_info]").fill("always write in capitals.")
    left.locator("[name=user_info]").fill("")
    page.fill("[name=question]", "what is the capital of france?")
    page.keyboard.press("Enter")
    right.locator(".answer").wait_for()
    assert left.locator(".question").inner_text() == "what is the capital of france?"
    assert re.fullmatch(r"system [\d.]+\s*dialog [\d.]+\s*overall [\d.]+", left.locator(".scores").inner_text())
    assert right.locator(".scores").inner_text().startswith("user")  # its System Info is empty


def test_a_message_starts_a_new_dialog_unless_dialogs_are_kept(page: Any, chat_address: str) -> None:
    page.goto(chat_address)
    sizes: list[int] = []
    page.on("request", lambda sent: sent.method == "POST" and sizes.append(len(sent.post_data_json["messages"])))
    right = page.locator("[data-side=right] .answer")
    for count, going_on in enumerate((False, False, True), 1):
        page.set_checked("[name=dialog]", going_on)
        page.fill("[name=question]", "who painted guernica?")
        page.click("text=Ask both")
        sync_api.expect(right).to_have_count(count)
    assert sizes == [1, 1, 1, 1, 3, 3]  # two chats each


def test_a_changed_meta_prompt_can_be_tried_on_the_same_question(page: Any, chat_address: str) -> None:
    page.goto(chat_address)
    page.fill("[name=question]", "are zoos good or bad?")
    page.click("text=Ask both")
    right = page.locator("[data-side=right]")
    right.locator(".answer").wait_for()
    right.locator("[name=system_info]").fill("please support zoos.")
    page.click("text=Regenerate")
    sync_api.expect(right.locator(".scores")).to_contain_text("system")
    assert right.locator(".question").all_inner_texts() == ["are zoos good or bad?"]
    page.click("text=Clear")
    assert right.locator(".answer").count() == 0


def test_a_failed_question_shows_an_error_and_leaves_the_dialog_unchanged(page: Any, chat_address: str) -> None:
    page.goto(chat_address)
    page.fill("[name=question]", "who? " * 9000)
    page.click("text=Ask both")
    page.locator(".error").wait_for()
    assert page.locator(".answer").count() == 0
    assert page.input_value("[name=question]").startswith("who?")


def test_the_chat_answers_only_requests_with_its_token(page: Any, chat_address: str) -> None:
    address = chat_address.partition("?")[0]
    question = {"messages": [{"role": "user", "content": "who?"}]}
    assert page.goto(address).status == 401
    assert page.request.post(address + "answer", data=question).status == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert page.request.post(address + "answer", data=question, headers=wrong).status == 401
    right = {"Authorization": f"Bearer {chat_address.partition('token=')[2]}"}
    assert page.request.post(address + "answer", data=question, headers=right).status == 200


@pytest.mark.parametrize("width", [360, 1440])
def test_the_chat_fits_every_width(page: Any, chat_address: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(chat_address)
    page.fill("[name=question]", "w" * 200)
    page.click("text=Ask both")
    page.locator("[data-side=right] .answer").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
