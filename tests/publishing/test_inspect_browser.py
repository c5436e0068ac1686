"""The page of `longvpo inspect` in a headless Chromium: nothing hostile runs, filters work, everybody can use it.

Where there is no Chromium these tests are skipped; with LONGVPO_REQUIRE_CHROMIUM set, as on the machine that decides
over changes, they fail.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image
from test_inspect import (
    HOSTILE,
    HOSTILE_NAME,
    captions_of,
    hostile_captions,
    hostile_dataset,
    scenes,
    stage2_row,
    write_dataset,
    write_log,
    write_rows,
)

from chromium import Chromium
from conftest import COLOURS
from longvpo_hf.preference import Provenance, VideoPreference
from longvpo_hf.publishing.inspect_page import write_inspect_page
from longvpo_hf.timeline import Clip, Timeline

SHOWN = "[...document.querySelectorAll('article')].filter((row) => row.checkVisibility()).map((row) => {}).join('|')"
QUESTIONS = SHOWN.format("row.querySelector('.question').textContent")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        chromium.size(1200, 900)
        yield chromium


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory, clips: Mapping[str, Clip]) -> Path:
    return write_inspect_page(hostile_dataset(tmp_path_factory.mktemp("hostile") / HOSTILE_NAME, clips)).path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, clips: Mapping[str, Clip]) -> Path:
    """Three rows of Stage 1 with 2, 3 and 4 clips and the anchor at begin, middle and end; one of Stage 2 with 8."""
    names = list(COLOURS)
    rows = []
    for number, (num_clips, anchor) in enumerate(((2, 0), (3, 1), (4, 3))):
        timeline = Timeline(tuple(replace(clips[name], caption=f"a {name} clip") for name in names[:num_clips]))
        origin = Provenance(
            method="longvpo-stage1",
            chosen_view=f"only({anchor})",
            rejected_view=f"without({anchor})",
            answer_model="tiny@1",
            similarities=tuple(1.0 if i == anchor else 0.25 for i in range(num_clips)),
            verdicts=("answers_differ",),
        )
        rows.append(VideoPreference(timeline, f"Question {number}?", "yes " * 400, "no", (anchor,), (anchor,), origin))
    folder = write_dataset(tmp_path_factory.mktemp("data") / "rows", [*rows, stage2_row(clips)])
    drops = [{"reason": "answers_agree", "chosen": "it"}] * 2 + [{"reason": "refusal", "answer": "I cannot"}]
    write_log(folder, drops, {"stages": {"clips": 8, "rows": 4}, "dropped": {"answers_agree": 2, "refusal": 1}})
    return write_inspect_page(folder).path


@pytest.fixture(scope="module")
def captions_page(tmp_path_factory: pytest.TempPathFactory, clips: Mapping[str, Clip]) -> Path:
    """A video of 40 scenes, of which the first has no caption and the last no picture, and one of 2."""
    folder = tmp_path_factory.mktemp("captions") / "captions"
    long = scenes(clips, 40)
    media = Path(clips["red"].path).parent
    gone = Timeline((*long.clips[:-1], replace(long.clips[-1], path=str(media / "gone.mp4"))))
    captions_of(folder, [gone, scenes(clips, 2, "short.mp4")], [""])
    return write_inspect_page(folder, video_root=media).path


def events(browser: Chromium, method: str) -> list[dict[str, Any]]:
    return [event["params"] for event in browser.events if event["method"] == method]


def focused(browser: Chromium) -> str:
    return browser.run("document.activeElement.name || document.activeElement.textContent")


# ------------------------------------------------------------------------------------------------------- hostile text


def test_hostile_text_is_shown_and_never_runs(browser: Chromium, hostile_page: Path) -> None:
    browser.open(hostile_page)
    browser.run("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    browser.wait("document.querySelectorAll('td').length > 0")
    browser.run("new Promise((done) => setTimeout(done, 200))")  # what an `onerror` would take
    assert browser.run("document.title") == f"{HOSTILE_NAME} · longvpo inspect"
    # A NUL is the one character that no HTML parser and no text node of one keeps; from JSON it does come.
    questions = browser.run("[...document.querySelectorAll('.question')].map((question) => question.textContent)")
    assert questions == list(HOSTILE)
    assert browser.run("document.querySelector('h1').textContent") == HOSTILE_NAME
    own = {"img": 2 * len(HOSTILE), "script": 2, "a": 4 + len(HOSTILE) + 1, "style": 1, "iframe": 0}
    for tag, number in own.items():
        assert browser.run(f"document.querySelectorAll('{tag}').length") == number, tag
    assert browser.run(
        "[...document.querySelectorAll('*')].every((e) => e.getAttributeNames().every((n) => !/^on/.test(n)))"
    )
    assert not events(browser, "Page.javascriptDialogOpening")
    assert not events(browser, "Runtime.exceptionThrown")
    assert not events(browser, "Log.entryAdded"), "nothing was refused, because nothing was tried"


def test_hostile_text_is_found_by_search_and_link(browser: Chromium, hostile_page: Path) -> None:
    for number, text in enumerate(HOSTILE):
        words = text.replace("\x00", " ")
        browser.open(hostile_page, f"#q={quote(f'{number}{words.split()[0]}')}")
        assert browser.run("document.title") == f"{HOSTILE_NAME} · longvpo inspect"
        assert text in browser.run(QUESTIONS)


def test_policy_stops_what_escaping_would_let_through(browser: Chromium, page: Path) -> None:
    """The second wall, tried as if the first had a hole."""
    browser.open(page)
    browser.run(
        """new Promise((done) => {
          window.refused = [];
          addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
          document.body.insertAdjacentHTML("beforeend", `<img src="data:," onerror="window.ran = 1">
            <img src="http://127.0.0.1:9/x.png"><iframe src="http://127.0.0.1:9/"></iframe><p style="color: red">`);
          const script = document.createElement("script");
          script.textContent = "window.ran = 2";
          document.body.append(script);
          fetch("http://127.0.0.1:9/").catch(() => setTimeout(done, 100));
        })"""
    )
    assert browser.run("window.ran") is None
    assert set(browser.run("refused")) == {
        "script-src-attr", "script-src-elem", "img-src", "frame-src", "style-src-attr", "connect-src",
    }  # fmt: skip
    assert not [url for url in requested(browser) if url.startswith("http") and not blocked(browser, url)]


def requested(browser: Chromium) -> list[str]:
    return [event["request"]["url"] for event in events(browser, "Network.requestWillBeSent")]


def blocked(browser: Chromium, url: str) -> bool:
    ids = {e["requestId"] for e in events(browser, "Network.requestWillBeSent") if e["request"]["url"] == url}
    return ids <= {e["requestId"] for e in events(browser, "Network.loadingFailed") if e.get("blockedReason") == "csp"}


def test_page_asks_for_nothing_but_itself(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert {url.split(",")[0] for url in requested(browser)} <= {page.as_uri(), "data:image/jpeg;base64", "data:"}
    assert page.as_uri() in requested(browser)


# ------------------------------------------------------------------------------------------------------ what it shows


def test_every_clip_is_drawn_and_marks_are_words(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelectorAll('article').forEach((row) => { row.style.contentVisibility = 'visible'; })")
    browser.wait("[...document.images].every((image) => image.complete && image.naturalWidth === 64)")
    assert browser.run("document.images.length") == 2 + 3 + 4 + 8
    strips = browser.run(
        "[...document.querySelectorAll('.strip')].map((strip) => "
        "[...strip.children].map((clip) => clip.querySelector('.badges')?.textContent ?? ''))"
    )
    assert strips[1] == ["", "★ anchor◆ reference", ""]
    assert strips[3] == ["", "★ evidence", "", "", "", "", "★ evidence", ""]
    assert browser.run("document.querySelectorAll('.strip')[1].querySelectorAll('img')[1].alt") == (
        "Clip 1, 0:04–0:08 of the timeline, anchor and reference"
    )
    top = browser.run("[...document.querySelectorAll('.top')].map((top) => top.textContent)")
    assert "★ anchor: clip 1, middle third◆ reference: clip 1" in top[1]
    assert "★ evidence: clips 1, 6, first and last third◆ reference: the whole timeline" in top[3]
    assert browser.run("document.querySelectorAll('.strip')[1].children[0].textContent") == "0 · 0:00–0:04cosine 0.25"
    browser.run("document.querySelectorAll('details')[1].open = true")
    browser.wait("document.querySelectorAll('td').length > 0")
    provenance = browser.run("document.querySelectorAll('details')[1].textContent")
    for text in ("tiny@1", "without(1)", "answers_differ", "a green clip", "0.250"):
        assert text in provenance


def test_dataset_without_rows_still_says_what_was_dropped(browser: Chromium, tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "rows", [])
    write_log(folder, [{"reason": "refusal"}], {"stages": {"rows": 0}, "dropped": {"refusal": 1}})
    browser.open(write_inspect_page(folder).path)
    assert browser.run("document.getElementById('lead').textContent") == "Showing 0 of 0 rows"
    assert browser.run("document.querySelectorAll('.drop').length") == 1
    assert not events(browser, "Runtime.exceptionThrown")


def test_plots_say_their_numbers(browser: Chromium, page: Path) -> None:
    browser.open(page)
    names = browser.run("[...document.querySelectorAll('#plots svg')].map((plot) => plot.getAttribute('aria-label'))")
    assert [name.split(":")[0].split(",")[0] for name in names] == [
        "Where the evidence stands",
        "Clips per row",
        "Length of a timeline",
        "How like the anchor the others are",
        "What was dropped",
    ]
    assert "2: 1; 3: 1; 4: 1; 5: 0; 6: 0; 7: 0; 8: 1" in names[1]
    assert names[4] == "What was dropped: answers_agree: 2; refusal: 1"
    # Stages count different things: numbers, without bars that would compare them.
    assert browser.run("document.querySelector('.counted figcaption').firstChild.textContent") == "What came through"
    assert browser.run("document.querySelectorAll('.counted dd').length") > 0
    heights = browser.run(
        "[...document.querySelectorAll('#plots svg')[1].querySelectorAll('.bar')]"
        ".map((bar) => bar.getBoundingClientRect().height > 1)"
    )
    assert heights == [True, True, True, False, False, False, True]


# ---------------------------------------------------------------------------------------------------- captioned videos


def test_scenes_are_as_wide_as_they_are_long_and_stand_under_their_summaries(
    browser: Chromium, captions_page: Path
) -> None:
    browser.open(captions_page)
    assert browser.run("document.getElementById('lead').textContent") == (
        "Showing 2 of 2 videos · captions by captioner@1 · summaries by summariser@1"
    )
    boxes = browser.run(
        """[...document.querySelectorAll('article')[0].querySelectorAll('.scenes li')].map((scene) => {
          const box = scene.getBoundingClientRect();
          return [box.left, box.width];
        })"""
    )
    assert len(boxes) == 40
    whole = sum(width for _, width in boxes)
    for index, (left, width) in enumerate(boxes):
        assert width == pytest.approx(whole * (2, 4)[index % 2] / 120, abs=0.6)
        assert left == pytest.approx(boxes[0][0] + sum(width for _, width in boxes[:index]), abs=1)
    lanes = browser.run(
        """[...document.querySelectorAll('article')[0].querySelectorAll('.lane')].map((lane) =>
          [...lane.children].map((bar) => {
            const box = bar.getBoundingClientRect();
            return [bar.textContent, box.left, box.right];
          }))"""
    )
    assert len(lanes) >= 2
    for text, left, right in (bar for lane in lanes for bar in lane):
        span, _, words = text.partition(" ")
        first, last = (int(scene) for scene in span.split("–"))
        assert words == "Colours follow on colours."
        assert left == pytest.approx(boxes[first][0], abs=1)
        assert right == pytest.approx(sum(boxes[last]), abs=1)
    widths = [max(right - left for _, left, right in lane) for lane in lanes]
    assert widths == sorted(widths, reverse=True), "the widest on top"
    assert not events(browser, "Runtime.exceptionThrown")
    assert not events(browser, "Log.entryAdded"), "the policy refused nothing"


def test_a_video_of_few_scenes_is_not_stretched_over_the_page(browser: Chromium, captions_page: Path) -> None:
    browser.size(1400, 900)
    browser.open(captions_page)
    widths = browser.run(
        """[...document.querySelectorAll('article')].map((card) =>
          [...card.querySelectorAll('.scenes img')].map((image) => image.getBoundingClientRect().width))"""
    )
    assert all(widths)
    assert max(width for card in widths for width in card) <= 200  # pictures have at most 160 pixels across
    scenes = browser.run(
        "document.querySelectorAll('article')[1].querySelector('.scenes').getBoundingClientRect().width"
    )
    assert scenes == pytest.approx(150 * 6 / 4, abs=2)  # 6 seconds, of which the median scene has 4 in 150 pixels


def test_scenes_and_summaries_are_read_with_the_keyboard(browser: Chromium, captions_page: Path) -> None:
    browser.open(captions_page)
    read = "document.querySelector('.read').textContent"
    whole = browser.run(read)
    assert whole.startswith("The whole videoScenes #1 to #")
    browser.run("document.querySelectorAll('.scenes button')[3].focus()")
    browser.press("Enter")
    assert browser.run(read).startswith("Scene 3 · 0:08–0:12 · summed up in 1-")
    assert browser.run(read).endswith("Scene 3 shows a colour.")
    assert browser.run("document.querySelectorAll('[aria-pressed=true]').length") == 1
    browser.press("Enter")
    assert browser.run(read) == whole
    browser.run("document.querySelector('.lane button').focus()")
    browser.press("Enter")
    assert browser.run(read).endswith("Colours follow on colours.")
    browser.run("document.querySelectorAll('.scenes button')[0].click()")
    assert browser.run(read) == "Scene 0 · 0:00–0:02This scene has no caption."
    browser.run("document.querySelectorAll('details')[0].open = true")
    browser.wait("document.querySelectorAll('tbody tr').length === 40")
    assert "gone.mp4" in browser.run("document.querySelectorAll('tbody tr')[39].textContent")
    assert browser.run("document.querySelector('.problems').textContent") == (
        "Scene 39 (gone.mp4) has no picture. missing_file: no such file"
    )


def test_videos_are_searched_and_linked(browser: Chromium, captions_page: Path) -> None:
    shown = SHOWN.format("row.querySelector('h3').textContent")
    for fragment, videos in (
        ("", "Video 0|Video 1"),
        ("#q=short.mp4", "Video 1"),
        ("#q=follow+on", "Video 0"),
        ("#min=3", "Video 0"),
        ("#max=2", "Video 1"),
    ):
        browser.open(captions_page, fragment)
        assert browser.run(shown) == videos, fragment
    assert browser.run("document.getElementById('status').textContent") == "1 of the 2 videos on this page match."
    labels = "[...document.querySelectorAll('#filters label')].filter((one) => one.checkVisibility()).length"
    assert browser.run(labels) == 1, "recipes and evidence are of rows"


def test_hostile_captions_are_shown_and_never_run(browser: Chromium, clips: Mapping[str, Clip], tmp_path: Path) -> None:
    folder = hostile_captions(tmp_path / HOSTILE_NAME, clips)
    browser.open(write_inspect_page(folder, video_root=Path(clips["red"].path).parent).path)
    browser.run("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    browser.wait("document.querySelectorAll('td').length > 0")
    browser.run("document.querySelectorAll('.film button').forEach((button) => button.click())")
    browser.run("new Promise((done) => setTimeout(done, 200))")
    assert browser.run("document.title") == f"{HOSTILE_NAME} · longvpo inspect"
    captions = browser.run("[...document.querySelectorAll('.scenes .said')].map((caption) => caption.textContent)")
    assert captions[: len(HOSTILE)] == [" ".join(text.split()) for text in HOSTILE]
    assert browser.run("document.querySelectorAll('img').length") == 14
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert not events(browser, "Runtime.exceptionThrown")
    assert not events(browser, "Log.entryAdded")


# ------------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("fragment", "questions"),
    [
        ("", "Question 0?|Question 1?|Question 2?|Which came first?"),
        ("#q=which+first", "Which came first?"),
        ("#q=QUESTION", "Question 0?|Question 1?|Question 2?"),
        ("#q=a+white+clip", "Question 2?"),
        ("#q=nowhere", ""),
        ("#method=longvpo-stage2", "Which came first?"),
        ("#third=begin", "Question 0?|Which came first?"),
        ("#third=middle", "Question 1?"),
        ("#third=end", "Question 2?|Which came first?"),
        ("#min=3&max=4", "Question 1?|Question 2?"),
        ("#min=3&third=end&method=longvpo-stage1", "Question 2?"),
    ],
)
def test_link_presets_the_filters(browser: Chromium, page: Path, fragment: str, questions: str) -> None:
    browser.open(page, fragment)
    assert browser.run(QUESTIONS) == questions
    number = len(questions.split("|")) if questions else 0
    status = browser.run("document.getElementById('status').textContent")
    assert status.startswith(f"{number} of the 4 rows on this page match." if fragment else "Showing 4 of 4 rows.")


def test_filters_by_hand_leave_a_link_to_share(browser: Chromium, page: Path) -> None:
    browser.open(page)
    for name in ("Skip to the rows", "Plots", "Rows", "Dropped", "q"):
        browser.press("Tab")
        assert focused(browser) == name
    browser.type("question 2?")
    assert browser.run(QUESTIONS) == "Question 2?"
    assert browser.run("location.hash") == "#q=question+2%3F"
    browser.run("location.hash = '#third=begin'")
    browser.wait(f"{QUESTIONS} === 'Question 0?|Which came first?'")
    assert browser.run("document.querySelector('[name=third]').value") == "begin"
    browser.run("document.querySelector('button[type=reset]').focus()")
    browser.press("Enter")
    browser.wait("location.hash === ''")
    assert browser.run(QUESTIONS).count("|") == 3


def test_jump_moves_the_focus_and_keeps_the_filters(browser: Chromium, page: Path) -> None:
    browser.open(page, "#third=middle")
    browser.press("Tab")
    browser.press("Enter")
    assert focused(browser) == "Rows"
    assert browser.run("location.hash") == "#third=middle"
    assert browser.run(QUESTIONS) == "Question 1?"


def test_row_is_worked_with_the_keyboard(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('article a').focus()")
    browser.press("Tab")
    assert focused(browser) == "Show all of 1,600 characters"
    heights = "document.querySelector('.answer.chosen p').getBoundingClientRect().height"
    before = browser.run(heights)
    browser.press("Enter")
    assert focused(browser) == "Show less"
    assert browser.run(heights) > before + 20
    browser.press("Tab")
    assert focused(browser) == "Provenance, verdicts and clips"
    browser.press("Enter")
    browser.wait("document.querySelectorAll('article')[0].querySelectorAll('tbody tr').length === 2")
    browser.run("document.querySelector('article a').focus()")
    browser.press("Enter")
    browser.wait(f"{QUESTIONS} === 'Question 0?'")


def test_drops_are_shown_by_reason(browser: Chromium, page: Path) -> None:
    shown = (
        "[...document.querySelectorAll('.drop')].filter((drop) => drop.checkVisibility())"
        ".map((drop) => drop.textContent)"
    )
    browser.open(page)
    assert len(browser.run(shown)) == 3
    browser.open(page, "#reason=refusal")
    assert browser.run(shown) == [
        "refusal · the model declined instead of asking, answering or describinganswerI cannot"
    ]
    assert browser.run("document.getElementById('drops-status').textContent") == "Showing 1 of 1 drops."
    assert browser.run(QUESTIONS).count("|") == 3, "the rows' filters are their own"


# ------------------------------------------------------------------------------------------------- readers and screens


@pytest.mark.parametrize("shown", ["page", "captions_page"])
def test_everything_one_can_act_on_has_a_name(browser: Chromium, shown: str, request: pytest.FixtureRequest) -> None:
    browser.open(request.getfixturevalue(shown))
    browser.run("document.querySelectorAll('details')[0].open = true")
    browser.wait("document.querySelectorAll('td').length > 0")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "link",
        "button",
        "searchbox",
        "spinbutton",
        "combobox",
        "image",
        "img",
        "article",
        "region",
        "search",
        "list",
    }
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert {"link", "button", "searchbox", "spinbutton", "combobox", "article"} <= {role for role, _ in found}
    assert "image" in {role for role, _ in found}
    assert not [role for role, name in found if not name.strip()]


@pytest.mark.parametrize("shown", ["page", "captions_page"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(
    browser: Chromium, shown: str, scheme: str, request: pytest.FixtureRequest
) -> None:
    browser.colours(scheme)
    browser.open(request.getfixturevalue(shown))
    browser.run("document.querySelector('.film button')?.click()")
    pairs = json.loads(
        browser.run(
            """JSON.stringify([...document.querySelectorAll(`h1, .lead, .question, .top span, .under, .badge,
              .answer h4, .answer p, .told b, summary, small, input, button, #status, .legend, .read h4, .read p,
              .scenes .said, .scenes b`)].map((element) => {
              let behind = element;
              while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
              return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
            }))"""
        )
    )
    worst = min(contrast(*pair) for pair in pairs)
    assert worst >= 4.5, "WCAG 2.2, 1.4.3"
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.1) == (scheme == "dark")
    browser.colours("light")


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, WCAG 2.2."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_page_fits_the_screen(
    browser: Chromium, page: Path, hostile_page: Path, captions_page: Path, width: int, tmp_path: Path
) -> None:
    browser.size(width, 800)
    for path in (page, hostile_page, captions_page):
        browser.open(path)
        browser.run(
            "document.querySelectorAll('article').forEach((row) => { row.style.contentVisibility = 'visible'; })"
        )
        browser.run("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        assert browser.run("document.documentElement.scrollWidth") <= width, path.parent.name
    browser.open(page)
    browser.run("document.getElementById('list').scrollIntoView()")
    browser.wait("document.images[0].complete && document.images[0].naturalWidth > 0")
    browser.screenshot(tmp_path / "page.png")
    browser.size(1200, 900)
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (width, 800)
        seen = image.convert("RGB").getcolors(maxcolors=width * 800)
    assert seen is not None
    red = sum(number for number, (r, g, b) in seen if r > 120 and g < 40 and b < 40)
    assert red > 500, "the red clip is drawn"
