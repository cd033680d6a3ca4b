"""The browser that other tests look through sees what goes wrong in a page."""

PAGE = """<!doctype html><title>t</title><h1 id="a">one</h1>
<button onclick="document.getElementById('a').textContent = 'two'">next</button>
<script>console.error("broken"); setTimeout(() => { throw new Error("thrown") })</script>
<img src="http://example.invalid/x.png"><img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAAC">"""


def test_errors_and_requests_are_recorded(open_page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(PAGE)
    visit = open_page(file)
    assert visit.inner_text("#a") == "one"
    visit.click("text=next")
    assert visit.inner_text("#a") == "two"
    visit.wait_for_load_state("networkidle")
    assert {"broken", "thrown"} <= set(visit.errors)
    assert [r for r in visit.requests if not r.startswith("data:")] == [
        file.as_uri(),
        "http://example.invalid/x.png",
    ]
    assert visit.screenshot().startswith(b"\x89PNG")


def test_pages_know_width_and_colour_scheme(open_page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text("<!doctype html><title>t</title>")
    visit = open_page(file, width=400, dark=True)
    assert visit.evaluate("innerWidth") == 400
    assert visit.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert visit.errors == []
