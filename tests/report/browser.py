#!/usr/bin/env python3
"""Opens a report in a headless Chromium and sees that it works: no errors, the filter, no script, paper.

Usage: browser.py CHROMIUM PAGE PDF

CHROMIUM is spoken to over a pipe (--remote-debugging-pipe), so nothing listens anywhere.
"""
import base64
import json
import os
import subprocess
import sys
import tempfile

PATIENCE = 60


class Browser:
    """A browser with one page."""

    def __init__(self, program, profile):
        to_read, self.to = os.pipe()
        self.back, to_write = os.pipe()
        options = ["--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]

        # The browser reads from 3 and writes to 4; what is made here may be one of them.
        def place():
            high = os.dup2(to_read, 103), os.dup2(to_write, 104)
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        # Another user's settings mean nothing to it, and neither does this user's bus.
        self.child = subprocess.Popen(
            [program, *options], preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self.number, self.buffer, self.events = 0, b"", []
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self.session = None
        self.session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            part = os.read(self.back, 1 << 16)
            if not part:
                sys.exit("report.sh: the browser has ended")
            self.buffer += part
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, parameters=None):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters or {}}
        if getattr(self, "session", None):
            request["sessionId"] = self.session
        os.write(self.to, json.dumps(request).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.number:
                if "error" in message:
                    sys.exit(f"report.sh: {method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def open(self, url):
        self.events.clear()
        self.call("Page.navigate", {"url": url})
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def value(self, script):
        result = self.call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        if "exceptionDetails" in result:
            sys.exit(f"report.sh: {script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def complaints(self):
        """What the page or the browser has complained of, and what was fetched beside the page."""
        found = []
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(parameters["exceptionDetails"])
            elif method in ("Runtime.consoleAPICalled", "Log.entryAdded"):
                found.append(parameters)
            elif method == "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if url != parameters["documentURL"]:
                    found.append({"fetched": url})
        return found


VISIBLE = "[...document.querySelectorAll('#pages tbody tr')].filter((row) => row.checkVisibility()).length"
# What the script waits for before it filters by words.
TYPE = """new Promise((done) => {
  const text = document.getElementById('filter-text');
  text.value = %s;
  text.dispatchEvent(new Event('input'));
  setTimeout(() => done(%s), 400);
})"""
CHOOSE = """(() => {
  const field = document.getElementById('filter-%s');
  field.value = %s;
  field.dispatchEvent(new Event('change'));
  return %s;
})()"""


def same(what, is_, expected):
    if is_ != expected:
        sys.exit(f"report.sh: {what}: {is_!r}; expected {expected!r}")
    print(f"  {what}: {is_!r}")


def main():
    program, page, pdf = sys.argv[1:]
    url = "file://" + os.path.abspath(page)
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(program, profile)
        browser.open(url)
        rows = browser.value(VISIBLE)
        same("all rows are shown", rows == browser.value("document.querySelectorAll('#pages tbody tr').length"), True)
        same("there are rows", rows > 10, True)
        same("the filter is shown", browser.value("document.getElementById('filter').hidden"), False)
        same("rows with 0x28f9000", browser.value(TYPE % ('"0x28F9000"', VISIBLE)), 2)
        same("what is said of it", browser.value("document.getElementById('filter-told').textContent"), f"2 of {rows} rows are shown.")
        same("and AR", browser.value(CHOOSE % ("kind", '"AR"', VISIBLE)), 1)
        same("and removed", browser.value(CHOOSE % ("outcome", '"removed"', VISIBLE)), 0)
        same("all of them again", browser.value(f"(document.getElementById('filter-all').click(), {VISIBLE})"), rows)
        same("events as data", browser.value("JSON.parse(document.getElementById('events').textContent).length > 50"), True)
        same("elements that hostile words made", browser.value("document.querySelectorAll('img, main script:not([type])').length"), 0)
        # A script that got onto the page all the same would not run, and neither would a style apply.
        refused = """new Promise((done) => {
          document.addEventListener('securitypolicyviolation', () => done(window.ran === undefined));
          const script = document.createElement('script');
          script.textContent = 'window.ran = 1';
          document.body.append(script);
          setTimeout(() => done('nothing was refused'), 2000);
        })"""
        complaints = browser.complaints()
        same("complaints", complaints, [])
        same("another script is refused", browser.value(refused), True)

        for width in (320, 640, 1280):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
            browser.call("Emulation.setDeviceMetricsOverride", metrics)
            wide = browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            same(f"the page fits {width} pixels", wide, True)
        for scheme in ("light", "dark"):
            browser.call("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
            dark = browser.value("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]) < 128")
            same(f"it is dark by {scheme}", dark, scheme == "dark")
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
        nameless = [role for role, name in roles if role in ("searchbox", "combobox", "button", "image", "region") and not name]
        same("fields and drawings without a name", nameless, [])
        same("a header of each row", sum(role == "rowheader" for role, _ in roles) >= rows, True)
        browser.call("Emulation.setEmulatedMedia", {"features": []})
        with open(pdf, "wb") as file:
            file.write(base64.b64decode(browser.call("Page.printToPDF", {"printBackground": False})["data"]))

        browser.call("Emulation.setScriptExecutionDisabled", {"value": True})
        browser.open(url)
        tree = json.dumps(browser.call("Accessibility.getFullAXTree")["nodes"])
        same("without script the filter is away", "Words in a row" in tree, False)
        same("without script the pages are there", all(text in tree for text in ("0x28f9000", "0x6a00000")), True)
        os.close(browser.to)
        browser.child.wait(PATIENCE)


if __name__ == "__main__":
    main()
