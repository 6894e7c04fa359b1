"""data/corpus.py with data sets on the Hub, against a server on this machine that answers as the Hub does, and that cuts
connections and sends wrong bytes where a test asks for it.

    python -m unittest tests.cli.test_corpus_hub
"""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path

import numpy as np

try:
    import huggingface_hub  # noqa: F401
except ImportError:
    huggingface_hub = None

ROOT = Path(__file__).resolve().parent.parent.parent
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """files: {path: bytes}. cuts: how many more downloads break off in their middle. wrong: paths sent altered."""
    files, cuts, wrong, seen, ranges = {}, 0, set(), [], []
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body, code=200, headers=()):
        self.send_response(code)
        for name, value in [("Content-Length", str(len(body))), *headers]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value):
        self.answer(json.dumps(value).encode(), headers=[("Content-Type", "application/json")])

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        Hub.seen.append((self.command, path))
        if re.fullmatch(r"/api/datasets/me/words(/revision/[^/]+)?", path):
            return self.answer_json({"id": "me/words", "sha": SHA, "siblings": [{"rfilename": name} for name in self.files]})
        if path.startswith("/api/datasets/me/words/tree/"):
            return self.answer_json([{"type": "file", "path": name, "size": len(content), "oid": self.git(content),
                                      **({"lfs": {"oid": self.sha256(content), "size": len(content), "pointerSize": 130}}
                                         if name.endswith(".parquet") else {})} for name, content in self.files.items()])
        match = re.fullmatch(rf"/datasets/me/words/resolve/{SHA}/(.*)", path)
        if not match or match[1] not in self.files:
            return self.answer(b"", 404, [("X-Error-Code", "EntryNotFound" if match else "RepoNotFound")])
        self.send_file(match[1], self.files[match[1]])

    @staticmethod
    def git(content):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @staticmethod
    def sha256(content):
        return hashlib.sha256(content).hexdigest()

    def send_file(self, name, content):
        etag = self.sha256(content) if name.endswith(".parquet") else self.git(content)
        if name in self.wrong:
            content = b"x" + content[1:]
        headers = [("X-Repo-Commit", SHA), ("ETag", f'"{etag}"'), ("Accept-Ranges", "bytes")]
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in [*headers, ("Content-Length", str(len(content)))]:
                self.send_header(key, value)
            return self.end_headers()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        Hub.ranges.append(begin)
        body = content[begin:]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        for key, value in [*headers, ("Content-Length", str(len(body)))]:
            self.send_header(key, value)
        self.end_headers()
        if Hub.cuts > 0:
            Hub.cuts -= 1
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.close()
        self.wfile.write(body)


def lines(file, count):
    return [f"document {i} of file {file}: " + "word " * (i % 7) for i in range(count)]


@unittest.skipUnless(huggingface_hub, "needs huggingface_hub")
class CorpusHub(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        cls.server.handle_error = lambda *_: None  # clients that go away
        threading.Thread(target=cls.server.serve_forever, daemon=True).start()
        cls.temporary = tempfile.TemporaryDirectory()
        cls.tmp = Path(cls.temporary.name)
        cls.texts = [lines(i, 3000) for i in range(3)]
        Hub.files = {f"data/train-{i}.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
                     for i, texts in enumerate(cls.texts)}
        Hub.files["README.md"] = b"# words"

    @classmethod
    def tearDownClass(cls):
        cls.server.shutdown()
        cls.server.server_close()
        cls.temporary.cleanup()

    def setUp(self):
        Hub.cuts, Hub.wrong, Hub.seen, Hub.ranges = 0, set(), [], []
        self.out = Path(tempfile.mkdtemp(dir=self.tmp)) / "words"

    def corpus(self, *args, code=0, name="me/words"):
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}", "HF_HOME": str(self.tmp / "home"),
                       "HF_HUB_DISABLE_XET": "1", "CORPUS_RETRY_SECONDS": "0.01", "NO_PROXY": "*", "HF_TOKEN": ""}
        done = subprocess.run([sys.executable, ROOT / "data/corpus.py", name, "--tokenizer", "bytes", "--out", self.out,
                               *map(str, args)], capture_output=True, text=True, timeout=180, env=environment)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done

    def tokens(self, split):
        parts = []
        for path in sorted(self.out.glob(f"{split}_*.bin")):
            content = path.read_bytes()
            self.assertEqual(np.frombuffer(content[:12], "<i4")[2], (len(content) - 1024) // 2)
            parts.append(np.frombuffer(content[1024:], "<u2"))
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def expected(self, files=3):
        return [token for texts in self.texts[:files] for text in texts for token in [*text.encode(), 256]]

    def test_whole(self):
        done = self.corpus("--tokens", "10M", "--val-fraction", 0)
        self.assertEqual(self.tokens("train").tolist(), self.expected())
        self.assertIn("fewer than 10,000,000", done.stdout)
        self.assertIn(f"train = {self.out}/train_*.bin\ntokenizer = bytes\n", done.stdout)
        self.assertEqual(sorted(path.name for path in self.out.iterdir()), ["dataset.json", "train_000000.bin"])
        self.assertIn("already holds shards", self.corpus("--tokens", "10M", code=2).stderr)

    def test_no_more_than_asked(self):
        self.corpus("--tokens", 5000, "--shard-tokens", 2000)
        self.assertEqual(len(self.tokens("train")) + len(self.tokens("val")), 5000)
        fetched = {path for command, path in Hub.seen if command == "GET" and "/resolve/" in path}
        self.assertEqual([Path(path).name for path in fetched], ["train-0.jsonl"])

    def test_cut_connections(self):
        Hub.cuts = 3
        self.corpus("--tokens", "10M", "--val-fraction", 0)
        self.assertEqual(self.tokens("train").tolist(), self.expected())
        self.assertEqual(Hub.cuts, 0)

    def test_a_cut_download_is_continued(self):
        """The library writes 10 MB at a time: a file of 24 MB that breaks off at 12 MB goes on from there."""
        row = json.dumps({"text": "word " * 2000}).encode() + b"\n"
        files, Hub.files, Hub.cuts = Hub.files, {"data/train-0.jsonl": row * (24_000_000 // len(row))}, 1
        try:
            self.corpus("--tokens", 5000, "--val-fraction", 0)
        finally:
            Hub.files = files
        self.assertEqual(len(self.tokens("train")), 5000)
        self.assertEqual(Hub.ranges[0], 0)
        self.assertGreater(Hub.ranges[1], 5_000_000)  # not begun again

    def test_gone_for_good_and_continued(self):
        Hub.cuts = 10 ** 6
        done = self.corpus("--tokens", "10M", "--val-fraction", 0, code=1)
        self.assertEqual(len([line for line in done.stderr.splitlines() if line.startswith("corpus.py: ")]), 1)
        self.assertIn("the same command continues", done.stderr)
        self.assertEqual(list(self.out.glob("*.bin*")), [])
        Hub.cuts = 0
        self.corpus("--tokens", "10M", "--val-fraction", 0)
        self.assertEqual(self.tokens("train").tolist(), self.expected())

    def test_wrong_bytes(self):
        Hub.wrong = {"data/train-1.jsonl"}
        done = self.corpus("--tokens", "10M", code=1)
        self.assertIn("train-1.jsonl", done.stderr)
        self.assertIn("hash", done.stderr)
        self.assertEqual(list(self.out.glob("*.bin*")), [])
        self.assertEqual(list(self.out.rglob("train-1.jsonl")), [])  # the next run downloads it again

    def test_bad_input(self):
        for args, name, says in ((["--tokens", "1M"], "me/nothing", "no such data set"), ([], "me/words", "--tokens N is missing"),
                                 (["--tokens", "many"], "me/words", "--tokens many"), (["--tokens", "1M"], "finweb", "did you mean fineweb"),
                                 (["--tokens", "1M", "--files", "x.*"], "me/words", "no file matches"),
                                 (["--tokens", "1M", "--field", "body"], "me/words", "body"),
                                 (["--tokens", "1e15"], "me/words", "GB are free"), (["--tokens", "1M"], "gcide", "--tokens is for")):
            with self.subTest(says):
                done = self.corpus(*args, name=name, code=2)
                errors = [line for line in done.stderr.splitlines() if line.startswith("corpus.py: ")]
                self.assertEqual(len(errors), 1, done.stderr)
                self.assertIn(says, errors[0])


if __name__ == "__main__":
    unittest.main()
