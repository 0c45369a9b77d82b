"""What the watched browser of the other tests notices: a fault that it missed would pass everywhere."""

from support.browser import axe

PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>t</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'"></head>
<body><main><h1>A page</h1>{}</main></body></html>"""
FREE = PAGE.replace("default-src 'none'", "img-src *; script-src 'unsafe-inline'")


def _file(folder, text):
    path = folder / "page's name.html"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_quiet_page_has_no_faults(open_page, tmp_path):
    seen = open_page(_file(tmp_path, PAGE.format("<p>Text</p>")))
    assert seen.page.locator("h1").inner_text() == "A page"
    assert seen.faults() == {}
    assert axe(seen.page) == []


def test_a_blocked_script_is_a_violation(open_page, tmp_path):
    seen = open_page(_file(tmp_path, PAGE.format("<script>window.x = 1</script>")), clean=False)
    assert seen.page.evaluate("typeof window.x") == "undefined"
    assert "script-src-elem" in "".join(seen.faults()["violations"])
    assert "Content Security Policy" in "".join(seen.faults()["console"])


def test_requests_errors_dialogs_and_messages_are_noted(open_page, tmp_path):
    body = "<img src='https://example.invalid/a.png' alt='' onerror='window.y = 1'>"
    body += "<script>console.log('said'); alert('asked'); null.x</script>"
    seen = open_page(_file(tmp_path, FREE.format(body)), clean=False)
    faults = seen.faults()
    assert faults["requests"] == ["https://example.invalid/a.png"]
    assert faults["dialogs"] == ["asked"]
    assert "null" in faults["errors"][0]
    assert "log: said" in faults["console"]


def test_axe_finds_what_cannot_be_read(open_page, tmp_path):
    body = "<p><font color='#eeeeee'>pale</font></p><button></button>"
    found = axe(open_page(_file(tmp_path, PAGE.format(body)), clean=False).page)
    assert {line.split()[0] for line in found} == {"color-contrast", "button-name"}


def test_a_page_without_scripts_can_be_read(open_page, tmp_path):
    page = _file(tmp_path, FREE.format("<script>document.body.remove()</script>"))
    seen = open_page(page, scripts=False)
    assert seen.page.locator("h1").inner_text() == "A page"
