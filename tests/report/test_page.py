"""The page in a real browser."""

import pytest

from dssk.commands.report import main
from tests.report.conftest import make_run, row


def shades(visit) -> list[str]:
    return visit.eval_on_selector_all("#context span", "spans => spans.map(s => s.style.backgroundColor)")


def maps(visit) -> list[str]:
    return visit.eval_on_selector_all("#maps canvas", "maps => maps.map(m => m.toDataURL())")


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (400, True)])
def test_it_renders_without_errors_and_fetches_nothing(open_page, report, width, dark):
    visit = open_page(report, width=width, dark=dark)
    visit.wait_for_load_state("networkidle")
    assert visit.errors == []
    assert [r for r in visit.requests if not r.startswith("data:")] == [report.as_uri()]
    assert visit.evaluate("document.documentElement.scrollWidth") == width
    assert visit.locator("figure svg").count() == 7
    assert all(box["width"] > 250 for box in (f.bounding_box() for f in visit.locator("figure svg").all()))
    texts = visit.inner_text("main")
    for part in ("with context", "prompted", "25.0 ×", "bigcode/starcoderbase-7b", "2.6 ×"):
        assert part in texts
    assert "–90.0" not in texts  # intervals stand where there are some


def test_its_policy_lets_its_own_script_reach_nothing(open_page, report):
    fetch = "address => fetch(address).then(() => 'reached', () => 'refused')"
    assert open_page(report).evaluate(fetch, "data:text/plain,x") == "refused"


def test_one_goes_through_the_samples(open_page, report):
    visit = open_page(report)
    assert visit.inner_text("#position") == "1 / 8"
    assert visit.inner_text("#question") == "when was mill 0 built"
    assert visit.inner_text("#verdict") == "✓ right"
    visit.click("#next")
    assert visit.inner_text("#question") == "when was mill 1 built"
    assert (visit.inner_text("#answer"), visit.inner_text("#gold")) == ("1600", "1701")
    assert visit.inner_text("#verdict") == "✗ wrong"
    assert visit.inner_text("#context") == "context: Mill 1 was built in 1701 by Ann."
    assert "".join(visit.locator("#context .mark").all_inner_texts()).strip() == "1701"
    visit.click("#sample summary")
    assert visit.inner_text("#others dd") == "guess 1"
    for _ in range(6):
        visit.click("#next")
    assert visit.inner_text("#position") == "8 / 8"
    assert visit.is_disabled("#next")
    visit.click("#previous")
    assert visit.inner_text("#question") == "when was mill 6 built"
    assert visit.errors == []


def test_samples_are_filtered_and_searched(open_page, report):
    visit = open_page(report)
    visit.click("[data-filter=wrong]")
    assert visit.inner_text("#position") == "1 / 4"
    assert visit.inner_text("#verdict") == "✗ wrong"
    visit.fill("#search", "MILL 5")
    assert visit.inner_text("#position") == "1 / 1"
    assert visit.inner_text("#answer") == "about 1705"
    visit.click("[data-filter=right]")
    assert visit.is_visible("text=No sample fits.")
    assert not visit.is_visible("#sample")
    visit.fill("#search", "")
    assert visit.inner_text("#position") == "1 / 4"
    assert visit.errors == []


def test_block_head_and_token_change_the_heat_map(open_page, report):
    visit = open_page(report)
    drawn = []
    for head in range(3):
        visit.select_option("#head", str(head))
        drawn.append(maps(visit))
    assert len({str(images) for images in drawn}) == 3
    assert len(drawn[0]) == 2
    visit.select_option("#block", "1")
    for select in (
        lambda: visit.select_option("#block", "0"),
        lambda: visit.select_option("#head", "1"),
        lambda: visit.click("#answer-tokens button:nth-child(3)"),
        lambda: visit.click("#maps button:nth-of-type(2)"),
    ):
        before = shades(visit)
        select()
        assert any(before)
        assert shades(visit) != before
    assert visit.input_value("#block") == "1"
    assert visit.inner_text("#peak").startswith("most attended")
    assert visit.errors == []


def test_an_answer_without_tokens_has_no_heat_map(open_page, report):
    visit = open_page(report)
    visit.fill("#search", "mill 3")
    assert visit.inner_text("#answer") == "(nothing)"
    assert not visit.is_visible("#head")
    assert not visit.is_visible("#maps")
    visit.fill("#search", "mill 4")
    assert visit.is_visible("#maps")
    assert visit.errors == []


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script><!--",
    """"'><img src=x onerror="window.hacked = 1"> &lt;b&gt; {{ 7 * 7 }} \\u003c ${hacked} \u2028 \x00""",
    "\u202eقال الطالب\u202c مرحبا 👩‍👩‍👧",
]


def test_hostile_texts_are_inert(open_page, narrow_base, tmp_path):
    predictions = [
        row(i, f"{text} is what it says", text, [text], text)
        | {"id": text, "answer_class": text, "other": {"prediction": text}}
        for i, text in enumerate(HOSTILE)
    ]
    predictions.append(row(9, "ten thousand " * 780, "how many", ["thousand"], "thousand"))
    folder = make_run(tmp_path / "run <img src=x onerror=alert(1)> $x$", narrow_base, predictions)
    main([str(folder)])
    visit = open_page(folder / "report.html")
    assert visit.locator("main h2").count() == 5
    for i, text in enumerate(HOSTILE, 1):
        assert visit.text_content("#question") == text
        assert visit.text_content("#context") == f"context: {text} is what it says"
        assert visit.text_content("#answer") == text.strip() or visit.text_content("#answer") == text
        direction = visit.eval_on_selector("#question", "e => getComputedStyle(e).direction")
        assert direction == ("rtl" if "قال" in text else "ltr")
        visit.click("#next")
        assert visit.inner_text("#position") == f"{i + 1} / 5"
    assert visit.locator("#context span").count() == 10_149
    visit.select_option("#head", "1")
    assert any(shades(visit))
    assert visit.evaluate("window.hacked") is None
    assert visit.evaluate("document.documentElement.scrollWidth") == 1200
    assert visit.errors == []
    assert len(visit.requests) == 1
