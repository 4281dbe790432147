"""Publishing an adapted folder, with the hub's own client, on a hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from peft import PeftModel
from tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM

from metasft.adapt import adapt
from metasft.adapt.command import main

NAME = "me/my-adapter"
ROWS = [{"prompt": f"Double {number}", "response": str(2 * number)} for number in range(4)]


class Hub:
    """What ``create_repo`` and ``upload_folder`` ask a hub; weights go by LFS, all else into the commit.

    Attributes:
        repositories: name -> its files, path -> content.
        sent_by_lfs: paths whose content came by LFS.
        commits: how many there were.
        tokens: that came with requests about a repository.
        refuses: part of an address -> HTTP status that requests for it get.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.sent_by_lfs: set[str] = set()
        self.commits = 0
        self.tokens: set[str | None] = set()
        self.refuses: dict[str, int] = {}
        self._objects: dict[str, bytes] = {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments) -> None:
                pass

            def _answer(handler) -> None:
                payload = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
                if handler.path.startswith(("/api/repos/", "/api/models/")):
                    self.tokens.add(handler.headers.get("Authorization"))
                refused = next((status for part, status in self.refuses.items() if part in handler.path), None)
                status, answer = (refused, {"error": "no entry"}) if refused else self.answer(handler.path, payload)
                body = json.dumps(answer).encode()
                handler.send_response(status)
                handler.send_header("Content-Type", "application/json")
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            do_GET = do_POST = do_PUT = _answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, path: str, payload: bytes) -> tuple[int, dict]:
        if path == "/api/repos/create":
            asked = json.loads(payload)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in self.repositories else 200
            self.repositories.setdefault(name, {})
            return status, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            base = re.search(r"^base_model: (.*)$", json.loads(payload)["content"], re.MULTILINE)
            if base is not None and not re.fullmatch(r'"[\w.-]+/[\w.-]+"', base[1]):
                return 400, {"errors": [{"message": f'"base_model" with value {base[1]} is not valid.'}]}
            return 200, {}
        if path.startswith("/store/"):
            self._objects[path.removeprefix("/store/")] = payload
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(payload)["objects"]
            places = [{"upload": {"href": f"{self.url}/store/{one['oid']}"}} for one in objects]
            known = [{**one, "actions": place} for one, place in zip(objects, places, strict=True)]
            return 200, {"transfer": "basic", "objects": known}
        files = self.repositories.get(NAME, {})
        if path == f"/api/models/{NAME}/preupload/main":
            return 200, {"files": [self._upload_mode(one["path"], files) for one in json.loads(payload)["files"]]}
        if path == f"/api/models/{NAME}/commit/main":
            for line in map(json.loads, payload.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self._objects[value["oid"]]
                    self.sent_by_lfs.add(value["path"])
            self.commits += 1
            return 200, {"commitUrl": f"{self.url}/{NAME}/commit/{self._oid}", "commitOid": self._oid}
        if not path.startswith(f"/api/models/{NAME}") or NAME not in self.repositories:
            return 404, {}
        return 200, {"id": NAME, "sha": self._oid, "private": False, "siblings": [], "tags": []}

    @property
    def _oid(self) -> str:
        return f"{self.commits:040x}"

    def _upload_mode(self, path: str, files: dict[str, bytes]) -> dict:
        by_lfs = path.endswith(".safetensors")
        content = files.get(path)
        known = {} if content is None else {"oid": _object_id(content, by_lfs)}
        return {"path": path, "uploadMode": "lfs" if by_lfs else "regular", "shouldIgnore": False, **known}


def _object_id(content: bytes, by_lfs: bool) -> str:
    """As git names it: with LFS, by the bytes alone."""
    if by_lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)  # HF_ENDPOINT as of the import
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage has a protocol of its own
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    thread = threading.Thread(target=found.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join(timeout=10)


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Of an adaptation of a model with a name as the hub has them."""
    monkeypatch.chdir(tmp_path)
    build_tiny_model(tmp_path / "my" / "tiny")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return (
        "--start my/tiny --examples mine.jsonl --output out/mine --device cpu --no-evaluate --lora-rank 2 "
        f"--adaptation-steps 1 --push-to-hub {NAME}"
    ).split()


def test_the_published_folder_is_the_one_that_was_written(hub, flags, tmp_path, capsys):
    assert main(flags) == 0, capsys.readouterr().err
    folder, published = tmp_path / "out" / "mine", hub.repositories[NAME]
    assert published == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {"README.md", "adapt.json", "adapter_config.json", "SHA256SUMS"} < published.keys()
    assert hub.sent_by_lfs == {"adapter_model.safetensors"}
    assert hub.tokens == {"Bearer hf_mine"}

    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in published.items():
        (copy / name).write_bytes(content)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("my/tiny"), copy)

    before = (folder / "adapt.json").stat().st_mtime_ns
    assert main(flags) == 0  # neither adapted nor uploaded again
    assert hub.commits == 1 and (folder / "adapt.json").stat().st_mtime_ns == before


# The repository cannot be created, its files cannot be declared, the weights cannot be stored, the commit fails.
@pytest.mark.parametrize("part", ["/repos/create", "/preupload/", "/store/", "/commit/"])
def test_a_refusal_is_one_line_and_the_next_run_uploads_what_is_there(part, hub, flags, tmp_path, capsys):
    hub.refuses[part] = 403
    assert main(flags) == 1
    out, said = capsys.readouterr()
    assert "failed" not in out  # the adaptation has not
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert f"error: --push-to-hub {NAME} was not published (" in line and "HF_TOKEN" in line
    assert said.endswith(line + "\n") and "Traceback" not in said
    written = (tmp_path / "out" / "mine" / "adapt.json").stat().st_mtime_ns
    hub.refuses.clear()
    assert main(flags) == 0
    assert "adapter_model.safetensors" in hub.repositories[NAME]
    assert (tmp_path / "out" / "mine" / "adapt.json").stat().st_mtime_ns == written


def test_a_hub_that_is_not_there(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert main(flags) == 1
    assert "was not published" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine" / "adapter_model.safetensors").is_file()


def test_from_python_a_refusal_is_among_what_failed(hub, flags, tmp_path):
    hub.refuses["/commit/"] = 403
    settings = {"device": "cpu", "evaluate": False, "lora_rank": 2, "adaptation_steps": 1, "push_to_hub": NAME}
    done = adapt("my/tiny", ROWS, tmp_path / "out", **settings)
    assert list(done.records) == ["examples"] and list(done.failed) == [NAME]


def test_one_task_has_one_repository(tmp_path, tiny_model):
    with pytest.raises(ValueError, match=r"^--push-to-hub publishes the folder of one task: give --examples a file$"):
        adapt(tiny_model, {"a": ROWS, "b": ROWS}, tmp_path / "out", push_to_hub=NAME, device="cpu")
    with pytest.raises(ValueError, match=r"^--push-to-hub is 'adapter': give a name such as user/my-adapter$"):
        adapt(tiny_model, ROWS, tmp_path / "out", push_to_hub="adapter", device="cpu")
    assert not (tmp_path / "out").exists()
