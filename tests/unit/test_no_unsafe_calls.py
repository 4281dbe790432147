"""Our own source never unpickles, evaluates or runs what it reads: checked on its syntax tree."""

from __future__ import annotations

import ast
import re

import pytest
from script_runner import ROOT

FOLDERS = ("metasft", "benchmarks", "scripts", "lm_eval_tasks")
SOURCES = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))])
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "pty"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("os", "system"),
    ("os", "popen"),
    ("pickle", "load"),
    ("pickle", "loads"),
    ("pickle", "Unpickler"),
    ("pd", "read_pickle"),
    ("torch", "jit"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "full_load"),
    ("yaml", "unsafe_load"),
    ("yaml", "Loader"),
    ("yaml", "FullLoader"),
    ("yaml", "UnsafeLoader"),
    ("shutil", "unpack_archive"),
    ("tempfile", "mktemp"),
}
PARQUET = {"read_table", "read_parquet", "ParquetFile", "ParquetDataset"}
"""Read in ``metasft.files.untrusted`` alone, which looks at the size first; benchmarks and harness tasks read their
own."""


def _constant(call: ast.Call, name: str):
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def faults_of(source: str, name: str = "x.py") -> list[str]:
    """What is wrong with a source text, one line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        where = f"{name}:{getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            found += [where + f"imports {m}" for m in (module, *(a.name for a in node.names)) if m in MODULES]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in ATTRIBUTES:
                found.append(where + f"{node.value.id}.{node.attr}")
            if node.attr in PARQUET and name.startswith("metasft/") and name != "metasft/files/untrusted.py":
                found.append(where + f"{node.value.id}.{node.attr} outside metasft.files.untrusted")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in BUILTINS:
            found.append(where + f"{called}()")
        if called == "torch.load" and _constant(node, "weights_only") is not True:
            found.append(where + "torch.load without weights_only=True")
        if re.fullmatch(r"Auto\w+\.from_pretrained", called) and _constant(node, "trust_remote_code") is not False:
            found.append(where + f"{called} without trust_remote_code=False")
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not off:
                found.append(where + f"{called}({keyword.arg}=...)")
    return found


def test_our_source_is_clean():
    assert len(SOURCES) > 80
    faults = [f for s in SOURCES for f in faults_of(s.read_text(encoding="utf-8"), s.relative_to(ROOT).as_posix())]
    assert faults == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "import pickle",
        "from pickle import loads",
        "import a, dill",
        "pickle.load(file)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(compile(text, 'x', 'exec'))",
        "subprocess.run(line, shell=True)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "load(name, trust_remote_code=config.trust)",
        "os.system('true')",
    ],
)
def test_the_check_sees(line):
    assert faults_of(line), line


def test_parquet_is_read_in_one_place():
    assert faults_of("pq.read_table(path)", "metasft/new.py")
    assert not faults_of("pq.read_table(path)", "metasft/files/untrusted.py")
    assert not faults_of("torch.load(path, weights_only=True)\nmodel.eval()\nyaml.safe_load(text)", "metasft/new.py")
