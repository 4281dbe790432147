"""Small copies of the public benchmarks, in exactly their published layout and schema, and a hub that serves them.

Every question is made up here: nothing is taken from a dataset.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WORDS = (
    "apple",
    "river",
    "stone",
    "lamp",
    "cloud",
    "train",
    "violin",
    "garden",
    "winter",
    "ticket",
    "ladder",
    "mirror",
)


def _words(index: int, salt: str, count: int = 9) -> str:
    """Some words that differ from item to item, so that items are no near-duplicates of each other."""
    digest = hashlib.sha256(f"{salt}/{index}".encode()).digest()
    return " ".join(WORDS[byte % len(WORDS)] for byte in digest[:count])


def write_parquet(path: Path, rows: list[dict[str, Any]], features: Any) -> None:
    """Rows as a parquet file with the schema and metadata that the hub's own conversion writes."""
    import pyarrow.parquet as pq
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(Dataset.from_list(rows, features=features).data.table, path)


def math_row(index: int, subject: str, split: str) -> dict[str, str]:
    left, right = 10 + index, 3 + index % 7
    return {
        "problem": f"A {subject} exercise ({_words(index, subject + split)}): what is ${left} + {right}$?",
        "level": f"Level {1 + index % 5}",
        "type": subject.replace("_", " ").title(),
        "solution": f"Adding gives ${left} + {right} = \\boxed{{{left + right}}}$.",
    }


def write_math(
    root: Path, subjects: tuple[str, ...], train: int = 40, test: int = 30, owner: str = "EleutherAI"
) -> None:
    from datasets import Features, Value

    features = Features({name: Value("string") for name in ("problem", "level", "type", "solution")})
    name = "hendrycks_math" if owner == "EleutherAI" else "MATH-lighteval"
    for subject in subjects:
        for split, count in (("train", train), ("test", test)):
            rows = [math_row(index, subject, split) for index in range(count)]
            write_parquet(root / owner / name / subject / f"{split}-00000-of-00001.parquet", rows, features)


def write_math_500(root: Path, extra: tuple[dict[str, Any], ...] = ()) -> None:
    folder = root / "HuggingFaceH4" / "MATH-500"
    folder.mkdir(parents=True)
    rows = [
        {
            "problem": f"Held out ({_words(i, 'five hundred')}): double {i}.",
            "solution": f"It is \\boxed{{{2 * i}}}.",
            "answer": str(2 * i),
            "subject": "Algebra",
            "level": 1 + i % 5,
            "unique_id": f"test/algebra/{i}.json",
        }
        for i in range(8)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *extra]))


def write_gsm8k(root: Path, train: int = 60, test: int = 40) -> None:
    from datasets import Features, Value

    features = Features({"question": Value("string"), "answer": Value("string")})
    for split, count in (("train", train), ("test", test)):
        rows = []
        for i in range(count):
            a, b = 20 + i, 2 + i % 9
            total = a * b * 40
            rows.append(
                {
                    "question": f"Ann packs {_words(i, 'gsm' + split)}: {a} boxes of {b * 40}. How many pieces?",
                    "answer": f"There are {a} * {b * 40} = <<{a}*{b * 40}={total}>>{total} pieces.\n#### {total:,}",
                }
            )
        write_parquet(root / "openai" / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet", rows, features)


def numina_row(i: int, **changes: Any) -> dict[str, Any]:
    row = {
        "problem": f"Differentiate ({_words(i, 'numina')}): ${i + 2}x^{{{i + 3}}}$.",
        "solution": f"By the power rule the derivative is ${(i + 2) * (i + 3)}x^{{{i + 2}}}$.",
        "answer": f"{(i + 2) * (i + 3)}x^{{{i + 2}}}",
        "problem_type": "Calculus",
        "question_type": "math-word-problem",
        "problem_is_valid": "Yes",
        "solution_is_valid": "Yes",
        "source": "olympiads",
        "synthetic": False,
    }
    return {**row, **changes}


NUMINA_UNUSABLE = (
    {"problem_type": "Algebra"},
    {"question_type": "proof", "answer": "proof"},
    {"question_type": "MCQ"},
    {"answer": "notfound"},
    {"problem_is_valid": "Incomplete"},
    {"synthetic": True},
    {"problem": "See ![](https://example.org/picture.png)"},
)


def write_numina(root: Path, count: int = 60) -> None:
    """Two shards; usable and unusable rows mixed."""
    from datasets import Features, Value

    features = Features({name: Value("string") for name in numina_row(0)} | {"synthetic": Value("bool")})
    rows = [numina_row(i) for i in range(count)]
    for position, changes in enumerate(NUMINA_UNUSABLE):
        rows.insert(3 * position, numina_row(1000 + position, **changes))
    middle = len(rows) // 2
    for shard, part in enumerate((rows[:middle], rows[middle:])):
        path = root / "AI-MO" / "NuminaMath-1.5" / "data" / f"train-0000{shard}-of-00002.parquet"
        write_parquet(path, part, features)


def write_theoremqa(root: Path, count: int = 60) -> None:
    from datasets import Features, Image, Value

    features = Features(
        {"Question": Value("string"), "Answer": Value("string"), "Answer_type": Value("string"), "Picture": Image()}
    )
    kinds = (
        ("bool", lambda i: str(i % 2 == 0)),
        ("integer", lambda i: str(7 * i)),
        ("float", lambda i: f"{i / 8 + 0.125}"),
        ("list of integer", lambda i: f"[{i}, {i + 1}]"),
        ("list of float", lambda i: f"[{i}.5, {i + 1}.25]"),
        ("option", lambda i: "(b)"),
    )
    rows = []
    for i in range(count):
        kind, answer = kinds[i % len(kinds)]
        question = f"By the theorem of {_words(i, 'theorem')}, what follows for n = {i}?"
        rows.append({"Question": question, "Answer": answer(i), "Answer_type": kind, "Picture": None})
    rows.append({"Question": "What is in the picture?", "Answer": "3", "Answer_type": "integer", "Picture": _png()})
    write_parquet(root / "TIGER-Lab" / "TheoremQA" / "data" / "test-00000-of-00001.parquet", rows, features)


def _png() -> dict[str, Any]:
    from PIL import Image as Pictures

    buffer = io.BytesIO()
    Pictures.new("RGB", (2, 2)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_deeptheorem(root: Path, count: int = 40) -> None:
    from datasets import Features, List, Value

    variant = {"question": Value("string"), "response": Value("string"), "truth_value": Value("bool")}
    texts = ("source", "ori_question", "ori_solution", "rationale", "informal_theorem", "informal_theorem_qa", "proof")
    features = Features(
        {
            "id": Value("int64"),
            **{name: Value("string") for name in texts},
            "domain": List(Value("string")),
            "difficulty": Value("float64"),
            "truth_value": Value("bool"),
            "pos": variant,
            "neg": variant,
        }
    )
    rows = []
    for i in range(count):
        statement, truth = f"The number {i} is even ({_words(i, 'deep')}).", i % 2 == 0
        side = {"question": statement, "response": "By parity.", "truth_value": truth}
        rows.append(
            {
                "id": i,
                **{name: f"{name} {i}" for name in texts},
                "informal_theorem": statement,
                "proof": f"Divide {i} by two. Hence \\boxed{{{'proved' if truth else 'disproved'}}}",
                "domain": ["Number Theory"],
                "difficulty": 4.0 + i % 3,
                "truth_value": truth,
                "pos": side,
                "neg": side,
            }
        )
    write_parquet(root / "Jiahao004" / "DeepTheorem" / "data" / "train-00000-of-00001.parquet", rows, features)


def write_mmlu(root: Path, subjects: tuple[str, ...], test: int = 30) -> None:
    from datasets import ClassLabel, Features, List, Value

    features = Features(
        {
            "question": Value("string"),
            "subject": Value("string"),
            "choices": List(Value("string")),
            "answer": ClassLabel(names=["A", "B", "C", "D"]),
        }
    )
    for subject in subjects:
        for split, count in (("test", test), ("validation", 5), ("dev", 5)):
            rows = [
                {
                    "question": f"In {subject}, which one goes with {_words(i, subject + split)}?",
                    "subject": subject,
                    "choices": [f"{WORDS[(i + k) % 12]} {k}" for k in range(4)],
                    "answer": i % 4,
                }
                for i in range(count)
            ]
            write_parquet(root / "cais" / "mmlu" / subject / f"{split}-00000-of-00001.parquet", rows, features)


def _labelled(
    name: str, question: Callable[[int, str], str], labels: str, splits: tuple[tuple[str, int], ...], key: str
):
    from datasets import Features, List, Value

    features = Features(
        {
            "id": Value("string"),
            key: Value("string"),
            "choices": {"text": List(Value("string")), "label": List(Value("string"))},
            "answerKey": Value("string"),
        }
    )
    for split, count in splits:
        rows = [
            {
                "id": f"{name}_{split}_{i}",
                key: question(i, split),
                "choices": {
                    "text": [f"{WORDS[(i + k) % 12]} {i + k}" for k in range(len(labels))],
                    "label": list(labels),
                },
                "answerKey": labels[i % len(labels)],
            }
            for i in range(count)
        ]
        yield split, rows, features


def write_arc(root: Path) -> None:
    for subset, labels in (("ARC-Easy", "ABCD"), ("ARC-Challenge", "1234")):
        splits = (("train", 30), ("validation", 10), ("test", 30))
        for split, rows, features in _labelled(
            subset, lambda i, s, name=subset: f"Which of these ({_words(i, name + s)})?", labels, splits, "question"
        ):
            write_parquet(root / "allenai" / "ai2_arc" / subset / f"{split}-00000-of-00001.parquet", rows, features)


def write_openbookqa(root: Path) -> None:
    splits = (("train", 30), ("validation", 10), ("test", 30))
    for split, rows, features in _labelled(
        "obqa", lambda i, s: f"A {_words(i, 'book' + s)} needs", "ABCD", splits, "question_stem"
    ):
        write_parquet(root / "allenai" / "openbookqa" / "main" / f"{split}-00000-of-00001.parquet", rows, features)


def write_sciq(root: Path) -> None:
    from datasets import Features, Value

    names = ("question", "distractor3", "distractor1", "distractor2", "correct_answer", "support")
    features = Features({name: Value("string") for name in names})
    for split, count in (("train", 30), ("validation", 10), ("test", 30)):
        rows = [
            {
                "question": f"What holds up the {_words(i, 'sciq' + split)}?",
                "distractor1": f"air {i}",
                "distractor2": f"sand {i}",
                "distractor3": f"light {i}",
                "correct_answer": f"stone {i}",
                "support": f"Stone number {i} is what holds things up." if i % 2 else "",
            }
            for i in range(count)
        ]
        write_parquet(root / "allenai" / "sciq" / "data" / f"{split}-00000-of-00001.parquet", rows, features)


def bbh_row(task: str, i: int) -> dict[str, str]:
    if task == "boolean_expressions":
        return {"input": f"not ( True ) and {'not ' * i}False is", "target": str(i % 2 == 1)}
    if task == "object_counting":
        return {"input": f"I have {_words(i, task)}. How many things do I have?", "target": str(9 + i % 3)}
    if task == "word_sorting":
        words = _words(i, task, 4).split()
        return {"input": f"Sort these words {i}: List: {' '.join(words)}", "target": " ".join(sorted(words))}
    options = "\n".join(f"({letter}) day {i + k}" for k, letter in enumerate("ABC"))
    return {"input": f"In {task}, which day comes after {i}?\nOptions:\n{options}", "target": f"({'ABC'[i % 3]})"}


def write_bbh(root: Path, tasks: tuple[str, ...], count: int = 60) -> None:
    from datasets import Features, Value

    features = Features({"input": Value("string"), "target": Value("string")})
    for task in tasks:
        rows = [bbh_row(task, i) for i in range(count)]
        write_parquet(root / "SaylorTwift" / "bbh" / task / "test-00000-of-00001.parquet", rows, features)


def write_mgsm(root: Path, languages: tuple[str, ...], count: int = 60) -> None:
    from datasets import Features, Value

    features = Features(
        {
            "question": Value("string"),
            "answer": Value("string"),
            "answer_number": Value("int32"),
            "equation_solution": Value("string"),
        }
    )
    for language in languages:
        rows = [
            {
                "question": f"[{language}] {_words(i, language)}: {i} + {i}?",
                "answer": None,
                "answer_number": 2 * i,
                "equation_solution": None,
            }
            for i in range(count)
        ]
        write_parquet(root / "juletxara" / "mgsm" / language / "test-00000-of-00001.parquet", rows, features)


def write_everything(root: Path) -> None:
    """Copies of every source of the catalog."""
    from metasft.data.sources import catalog

    write_math(root, catalog.MATH_SUBJECTS)
    write_math(root, catalog.MATH_SUBJECTS, owner="DigitalLearningGmbH")
    write_math_500(root)
    write_gsm8k(root)
    write_numina(root)
    write_theoremqa(root)
    write_deeptheorem(root)
    write_mmlu(root, catalog.MMLU_SUBJECTS)
    write_arc(root)
    write_openbookqa(root)
    write_sciq(root)
    write_bbh(root, catalog.BBH_TASKS)
    write_mgsm(root, catalog.LANGUAGES)


# ---- a hub ----------------------------------------------------------------------------------------------------------


class LoopbackHub:
    """The parts of the hub's interface that listing and fetching a dataset use, over a folder of copies.

    Attributes:
        failures: repository, or ``<repository>:resolve`` for downloads alone -> (HTTP status, headers) to answer.
        truncate: path -> number of times that a download of it breaks off half way.
        requests: (method, path, Range header) of every request.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.failures: dict[str, tuple[int, dict[str, str]]] = {}
        self.truncate: dict[str, int] = {}
        self.requests: list[tuple[str, str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_POST(self) -> None:
                hub.answer(self, body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def serving(self) -> Iterator[LoopbackHub]:
        # Each test would wait half a second for the default interval to end.
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join(timeout=10)

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        address = urlparse(request.path)
        path = unquote(address.path)
        self.requests.append((request.command, path, request.headers.get("Range", "")))
        payload = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        match = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(\w[\w-]*)/([^/]+)(?:/(.*))?)?", path)
        if match is None:
            return self._send(request, 404, b"{}")
        repository, verb, revision, rest = match.groups()
        folder = self.root / repository
        failure = self.failures.get(repository) or (
            self.failures.get(f"{repository}:resolve") if verb == "resolve" else None
        )
        if failure:
            return self._send(request, failure[0], b"{}", failure[1])
        if not folder.is_dir():
            return self._send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision == "no-such-revision":
            return self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if verb == "resolve":
            return self._resolve(request, folder / rest, rest, body, _commit(revision))
        if verb in ("tree", "paths-info"):
            wanted = files
            if verb == "paths-info":
                form = json.loads(payload) if payload[:1] == b"{" else parse_qs(payload.decode())
                wanted = [name for name in files if name in form.get("paths", [])]
            else:
                wanted = [name for name in files if name.startswith(rest or "")]
            entries = [self._entry(folder / name, name) for name in wanted]
            return self._send(request, 200, json.dumps(entries).encode())
        info = {
            "id": repository,
            "sha": _commit(revision),
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name, "size": (folder / name).stat().st_size} for name in files],
        }
        return self._send(request, 200, json.dumps(info).encode())

    def _entry(self, path: Path, name: str) -> dict[str, Any]:
        return {"type": "file", "oid": _etag(path), "size": path.stat().st_size, "path": name}

    def _resolve(self, request: BaseHTTPRequestHandler, path: Path, name: str, body: bool, commit: str) -> None:
        if not path.is_file():
            return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        content, total = path.read_bytes(), path.stat().st_size
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or total - 1)
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{min(end, total - 1)}/{total}"
        if body and self.truncate.get(name):
            self.truncate[name] -= 1
            request.close_connection = True
            return self._send(request, status, content[: len(content) // 2], headers, length=len(content))
        return self._send(request, status, content if body else b"", headers, length=len(content))

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content) if length is None else length))
        request.end_headers()
        if request.command != "HEAD":  # a body would be taken for the head of the next answer
            request.wfile.write(content)


def _commit(revision: str | None) -> str:
    """A commit is itself, a branch has one fixed commit."""
    return revision if revision and re.fullmatch(r"[0-9a-f]{40}", revision) else COMMIT


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
