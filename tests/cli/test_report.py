"""scripts/report.py: what is on the page is what the run wrote, and the page works in a browser without any network.

    make && python -m unittest tests.cli.test_report

The tests of the page need Chromium (Debian: chromium) and are skipped without it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tests.lib.runs import BINARY, TIMEOUT, Case, lines_of

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# What the page is asked to do, and what it answers: in an element that --dump-dom shows.
QUESTIONS = """<script>
const answer = {charts: reportCharts.map(c => ({title: c.title, series: c.series.map(s => ({label: s.label, x: s.steps, at: s.x, y: s.y}))}))};
const chart = charts[0].chart, key = k => chart.canvas.dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true}));
const press = text => [...document.querySelectorAll("button")].find(b => b.textContent === text).click();
key("Home");
answer.tip = chart.tip.textContent;
key("+");
answer.zoomed = charts.map(c => c.chart.view);
key("0");
answer.whole = chart.view;
const drag = (type, x) => chart.canvas.dispatchEvent(new PointerEvent(type, {clientX: chart.canvas.getBoundingClientRect().left + x, button: 0, pointerId: 1}));
chart.canvas.setPointerCapture = () => {};
drag("pointerdown", 100), drag("pointermove", 200), drag("pointerup", 200);
answer.dragged = chart.view;
press("all");
for (const name of ["tokens", "time", "log x", "log y"]) { press(name); answer[name] = reportCharts[0].series.map(s => s.x); }
answer.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
answer.drawn = chart.canvas.getContext("2d").getImageData(0, 0, chart.canvas.width, chart.canvas.height).data.some(v => v);
const out = document.createElement("pre");
out.id = "answer";
out.textContent = JSON.stringify(answer);
document.body.append(out);
</script>"""


def report(*args, code=0):
    done = subprocess.run([sys.executable, ROOT / "scripts/report.py", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


class Report(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_dir = cls.tmp / "one"
        subprocess.run([BINARY, "train", cls.config, f"run.dir={cls.run_dir}", "run.eval_every=5", "run.sample_every=10",
                        "run.log_norms_every=4", "--profile", "3"], check=True, capture_output=True, cwd=cls.tmp)
        cls.other = cls.tmp / "two"
        cls.other.mkdir()
        rows = lines_of(cls.run_dir / "metrics.jsonl")
        for row in rows:
            row["skipped"] = row["step"] == 7
        (cls.other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "lo')
        cls.page = cls.tmp / "report.html"
        report(cls.run_dir, cls.other, "--out", cls.page)

    def embedded(self, page):
        text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1]
        return json.loads(text)

    def browse(self, page, width, height):
        """(the page's answers, whether the page asked for anything). The browser's own requests have no initiator."""
        asked = self.tmp / "asked.html"
        asked.write_text(page.replace("</body>", QUESTIONS + "</body>"))
        log = self.tmp / "network.json"
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            done = subprocess.run(
                [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={profile}",
                 "--proxy-server=127.0.0.1:9", f"--window-size={width},{height}", f"--log-net-log={log}",
                 "--virtual-time-budget=2000", "--dump-dom", asked.as_uri()],
                capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, "HOME": profile})
        answer = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.S)
        self.assertTrue(answer, done.stdout[-2000:] + done.stderr[-2000:])
        initiators = set(re.findall(r'"initiator":"([^"]*)"', log.read_text())) - {"not an origin"}
        return json.loads(answer[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), bool(initiators)

    @unittest.skipUnless(CHROMIUM, "needs Chromium")
    def test_in_a_browser(self):
        page = self.page.read_text()
        self.assertIn("default-src 'none'", page)
        # With an image from elsewhere, to show that a request would be seen.
        loose = page.replace("img-src data:", "img-src *").replace("</body>", '<img src="http://127.0.0.1/a.png"></body>')
        for text, width, height, asks in ((loose, 1280, 900, True), (page, 500, 800, False)):
            answer, asked = self.browse(text, width, height)
            self.assertEqual(asked, asks)
            self.assertLessEqual(answer["wide"], 0)  # nothing to scroll sideways
            self.assertTrue(answer["drawn"])
        rows = [row for row in lines_of(self.run_dir / "metrics.jsonl") if "loss" in row]
        evals = [row for row in lines_of(self.run_dir / "metrics.jsonl") if "val_loss" in row]
        curves = {(c["title"], s["label"]): s for c in answer["charts"] for s in c["series"]}
        logged = curves["Loss", "one train, as logged"]
        self.assertEqual((logged["x"], logged["y"]), ([r["step"] for r in rows], [r["loss"] for r in rows]))
        validation = curves["Loss", "one validation"]
        self.assertEqual((validation["at"], validation["y"]), ([r["step"] for r in evals], [r["val_loss"] for r in evals]))
        for title, key in (("Gradient norm", "grad_norm"), ("Learning rate", "lr"), ("Tokens per second", "tokens_per_second")):
            self.assertEqual(curves[title, "one"]["y"], [r[key] for r in rows], key)
        self.assertEqual(curves["Gradient norm", "two skipped"]["at"], [7])
        parts = {part: [r["grad_norms"][part] for r in rows if "grad_norms" in r] for part in ("mix", "mlp")}
        self.assertEqual({part: curves["Gradient norm by part", f"one {part}"]["y"] for part in parts}, parts)
        # The keys and the pointer: the first step under the cursor, all charts zoomed, and back.
        self.assertIn("step 1", answer["tip"])
        self.assertIn(f"{rows[0]['loss']:.6g}"[:6], answer["tip"])
        self.assertEqual(len({json.dumps(view) for view in answer["zoomed"]}), 1)
        self.assertIsNotNone(answer["zoomed"][0])
        self.assertIsNone(answer["whole"])
        self.assertIsNotNone(answer["dragged"])
        self.assertIn([r["tokens"] for r in rows], answer["tokens"])
        self.assertEqual(len(answer["time"][0]), len(rows))

    def test_contents(self):
        data = self.embedded(self.page)
        one, two = data["runs"]
        self.assertEqual([one["name"], two["name"]], ["one", "two"])
        self.assertEqual(one["config"]["train.steps"], "20")
        self.assertEqual(one["starts"][0]["command"].split()[:2], ["train_iha", "train"])
        self.assertIn("cpu", one["starts"][0]["device"])
        self.assertGreater(one["memory"]["optimizer"], 0)
        self.assertGreater(one["peak"], 1e6)
        self.assertEqual([s[0] for s in one["samples"]], [10, 20])
        self.assertIn("linear_backward", [row[0] for row in one["profile"]])
        self.assertEqual([s["step"] for s in two["skipped"]], [7])
        self.assertEqual((two["config"], two["starts"], two["memory"]), ({}, [], None))

    def test_a_million_steps(self):
        """Under 5 MB, every point a line of the file, extremes included."""
        folder = self.tmp / "long"
        folder.mkdir()
        lines, spike = [], 654321
        for step in range(1, 10 ** 6 + 1):
            loss = 99.5 if step == spike else 3 + 1000 / (step + 100) + step % 7 / 100
            lines.append(f'{{"step": {step}, "loss": {loss:.9g}, "lr": 0.001, "grad_norm": 1.5, "tokens": {step * 2048}, '
                         f'"tokens_per_second": 1234.5, "mfu": null, "skipped": false}}\n')
        (folder / "metrics.jsonl").write_text("".join(lines))
        page = self.tmp / "long.html"
        report(folder, "--out", page)
        self.assertLess(page.stat().st_size, 5_000_000)
        run = self.embedded(page)["runs"][0]
        self.assertLess(len(run["step"]), 5000)
        self.assertIn(spike, run["step"])
        for i in range(0, len(run["step"]), 100):
            self.assertEqual(run["loss"][i], json.loads(lines[run["step"][i] - 1])["loss"])
        self.assertEqual((run["step"][0], run["step"][-1]), (1, 10 ** 6))
        self.assertAlmostEqual(run["seconds"][-1], 2048e6 / 1234.5, delta=1)

    def test_text_is_not_markup(self):
        folder = self.tmp / "<b>&"
        shutil.copytree(self.run_dir, folder, symlinks=True)
        (folder / "samples.txt").write_text("---- step 3\n</script><script>alert(1)</script> @SCRIPT@\n")
        page = self.tmp / "markup.html"
        report(folder, "--out", page)
        self.assertEqual(page.read_text().count("</script>"), 2)
        self.assertEqual(self.embedded(page)["runs"][0]["samples"], [[3, "</script><script>alert(1)</script> @SCRIPT@"]])

    def test_bad_input(self):
        empty = self.tmp / "empty"
        empty.mkdir(exist_ok=True)
        (empty / "metrics.jsonl").write_text("\n[]\n{}\n")
        for args, says in (((self.tmp / "nowhere",), "nowhere"), ((empty,), "no line of a training step"),
                           ((self.run_dir, "--out", self.tmp / "no/such/folder.html"), "no/such"), ((), "RUN")):
            done = report(*args, code=2)
            self.assertEqual((done.stdout, len(done.stderr.splitlines())), ("", 1), done.stderr)
            self.assertIn(says, done.stderr)


if __name__ == "__main__":
    unittest.main()
