"""A first run on a GPU: tests, gradients against the reference, a table of speed and memory. Offline, in short parts.

What the machine needs
----------------------
Linux, a CUDA GPU, this folder, and a Python (3.11 or later) with torch (2.7 or later) and transformers. Beside them
the packages of gpu_requirements.txt, without what those would install themselves: some 225 MB of wheels, ray, pyarrow
and scipy most of it. No weights: models are random, in the shapes of SmolLM2-135M and Qwen2.5-0.5B, and their
tokenizer knows bytes. Only the parts rules.* need a real model, and are left out without --model.

On a machine with a package index, and with the same version of Python::

    python benchmarks/gpu_run.py --pack gpu_pack [--model models/SmolLM2-135M-Instruct]

leaves pieces of at most 60 MB there: wheels.tar.00, .01, ..., and with --model model.tar.00, ... Bring them over, a
few at a time if need be, and put them together::

    python benchmarks/gpu_run.py --unpack gpu_pack     # pip install --no-index --no-deps; the model to gpu_pack/model

The run
-------
As often as it takes::

    python benchmarks/gpu_run.py --budget-seconds 540  # [--parts gradients meta_step.bf16] [--model gpu_pack/model]

Every part ends within 300 seconds (--part-seconds) and writes <output>/<part>.json with its state, seconds and result;
its log is <output>/<part>.log. Finished parts are skipped; failed ones, and what was cut short, are tried again.
<output>/table.md shows what there is. --copy-to FOLDER copies all of it after every part, where only one folder comes
back from the machine. Remove a part's JSON to measure it again.

The parts rules.seed1, rules.seed2 and rules.seed3 are experiments of several trainings and evaluations, which take
longer than a part may: what is finished stays in <output>/rules_seed<N>, and the same command goes on there.

Into docs/performance.md, on the machine that has docs/performance.json::

    python benchmarks/bench.py --take-in results/gpu_run

takes the finished parts of a run on a GPU that was no rehearsal. Models of the 0.5B shape have no place there.

``--device cpu --tiny`` rehearses everything without a GPU, where tests/gpu skips itself. For that metasft has to be
installed (``pip install --no-deps -e .``): it brings veRL's CPU platform. On a GPU it runs from this folder as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":  # run as a script: its modules are those of a package
    sys.path[0] = str(ROOT)

from benchmarks.arms import WORKLOADS, Settings, write_random_model  # noqa: E402

REQUIREMENTS = ROOT / "benchmarks" / "gpu_requirements.txt"

SHAPES = {"135m": "smollm2-135m", "05b": "qwen2.5-0.5b"}
"""In the names of parts -> as metasft.plan knows it."""
WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "for", "was", "on", "are", "as", "with", "his", "they")
LEAST_SECONDS = 45
"""With less of the budget left, no further part is started."""
LEAVING_SECONDS = 20
"""What an experiment gets to note how far it has come, out of the time of its part."""

RULES_ARMS = ("rules_base", "rules_lora_mixed", "rules_meta_lora", "rules_in_context")
RANDOM_WEIGHTS, RANDOM_WORDS = "random weights", "random words"


class Failed(Exception):
    """A part did not do what it should; the message says why, ``result`` is what there is of it."""

    def __init__(self, why: str, result: Any = None) -> None:
        super().__init__(why)
        self.result = result


class OutOfTime(Exception):
    """The time ended before the part did, which goes on when it is tried again."""


@dataclass
class Run:
    """What the parts are run with.

    Attributes:
        output: folder of the results, the models and the data.
        device: ``cuda`` or ``cpu``.
        tiny: a random model of two layers and a few small cells, to rehearse.
        model, task_dir: in place of random weights of the 135M shape, and of random words; None for those.
        part_seconds: limit of a part; ``ends``: when the budget does, on the clock of ``time.monotonic``.
        part: that is under way, and when it began.
    """

    output: Path
    device: str
    tiny: bool
    model: Path | None
    task_dir: Path | None
    part_seconds: float
    ends: float
    part: str = ""
    began: float = 0.0

    def command(self, *arguments: object, codes: Sequence[int] = (0,), resumes: bool = False) -> int:
        """Run Python with ``arguments`` in a process group of its own, its output in the part's log.

        Args:
            codes: exit codes that are no failure.
            resumes: started again it goes on: it is asked to end before it is ended.

        Raises:
            Failed: it ended with a code that is not among ``codes``, or took longer than a part may.
            OutOfTime: the budget ended, or, where it ``resumes``, the time of the part.
        """
        environment = {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_"))
            },
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/support")]),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        if self.device == "cpu":
            environment |= {"VERL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with (self.output / f"{self.part}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            limit = min(self.began + self.part_seconds, self.ends)
            seconds = limit - time.monotonic() - (LEAVING_SECONDS if resumes else 0)
            try:
                code = process.wait(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                if resumes:
                    process.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=LEAVING_SECONDS)
                if resumes or limit == self.ends:
                    raise OutOfTime from None
                raise Failed(f"it took longer than {self.part_seconds:g} seconds") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code not in codes:
            raise Failed(self.how_it_ended(code))
        return code

    def how_it_ended(self, code: int) -> str:
        """The exit code, and the last line of the part's log."""
        lines = (self.output / f"{self.part}.log").read_text(errors="replace").splitlines()
        return f"exit code {code}: {next((line for line in reversed(lines) if line.strip()), '')}"

    def model_folder(self, shape: str) -> Path:
        """A model of that shape, made where it is not there yet."""
        if shape == "135m" and self.model is not None:
            return self.model
        folder = self.output / "models" / ("tiny" if self.tiny else shape)
        if not (folder / "finished").exists():
            from metasft.tiny_model import build_tiny_model

            if self.tiny:
                build_tiny_model(folder)
            else:
                write_random_model(SHAPES[shape], folder)
            (folder / "finished").touch()
        return folder

    def tasks_folder(self) -> Path:
        """Four tasks, examples of different lengths, written where they are not there yet."""
        if self.task_dir is not None:
            return self.task_dir
        folder = self.output / "tasks"
        if not (folder / "finished").exists():
            _write_tasks(folder, tasks=4, support=16 if self.tiny else 100, query=12)
            (folder / "finished").touch()
        return folder

    def circumstances(self) -> dict[str, int]:
        """Settings of every part that its results are published with."""
        threads = 1 if self.device == "cpu" else max(1, (os.cpu_count() or 2) // 2)
        return {"threads": threads, "seed": 1, "repeats": 2 if self.tiny else 5}

    def settings(self, shape: str, dtype: str, token_counts: Sequence[int] | None = None) -> dict[str, Any]:
        return asdict(
            Settings(
                model=str(self.model_folder(shape).resolve()),
                task_dir=str(self.tasks_folder().resolve()),
                device=self.device,
                dtype=dtype,
                largest_cell=64 * 1024,
                token_counts=token_counts,
                cell_seconds=20.0,
                quick=self.tiny,
                **self.circumstances(),
            )
        )


def _write_tasks(folder: Path, *, tasks: int, support: int, query: int) -> None:
    import random

    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    for task in range(tasks):
        rows = []
        for number in range(support + query):
            prompt, response = f"{task} {number} {text(8, 40)}", text(3, 15)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            rows.append({"messages": messages, "prompt": prompt, "response": response, "answer": response})
            rows[-1] |= {"task": f"task{task}", "data_source": "words", "example_id": f"task{task}-{number}"}
        pd.DataFrame(rows[:support]).to_parquet(folder / f"task{task}_support.parquet")
        pd.DataFrame(rows[support:]).to_parquet(folder / f"task{task}_query.parquet")


# ---------------------------------------------------------------------------------------------------------- the parts


def environment(run: Run) -> dict[str, Any]:
    """What the machine has, and that everything can be imported."""
    from importlib.metadata import PackageNotFoundError, version

    run.command(
        "-c", "import metasft.training.trainer, maml_sft_trainer, meta_lora_trainer, benchmarks.sections.__main__"
    )
    import torch

    found: dict[str, Any] = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    found["versions"] = {}
    for name in ("torch", "transformers", *_requirements()):
        with suppress(PackageNotFoundError):  # of those that only the parts rules.* need
            found["versions"][name] = version(name)
    if run.device == "cuda":
        from metasft.model.stacked_lora import choose_strategy

        found |= {
            "cuda": torch.version.cuda,
            "gpus": [
                {
                    "name": torch.cuda.get_device_name(i),
                    "capability": list(torch.cuda.get_device_capability(i)),
                    "bytes": torch.cuda.get_device_properties(i).total_memory,
                }
                for i in range(torch.cuda.device_count())
            ],
            "ragged_products_in_bf16": choose_strategy(torch.device("cuda"), torch.bfloat16, [16, 64]),
        }
    return found


def tests(file: str) -> Callable[[Run], dict[str, Any]]:
    """A file of tests/gpu: outcomes, and the relative errors that its tests measured."""

    def run_tests(run: Run) -> dict[str, Any]:
        report = run.output / f"{run.part}.xml"
        report.unlink(missing_ok=True)
        run.command("-m", "pytest", "-q", f"tests/gpu/{file}", f"--junitxml={report}", codes=(0, 1))
        result: dict[str, Any] = {"passed": [], "failed": [], "skipped": [], "relative_errors": {}}
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.get("name", "")
            kinds = {child.tag for child in case}
            failed = kinds & {"failure", "error"}
            result["failed" if failed else "skipped" if "skipped" in kinds else "passed"].append(name)
            for entry in case.iter("property"):
                result["relative_errors"][name] = float(entry.get("value", "nan"))
        if result["failed"]:
            raise Failed(f"{len(result['failed'])} tests failed: {', '.join(result['failed'])}", result)
        return result

    return run_tests


GRADIENT_CASES = {
    # name -> method, dtype, overrides, largest relative error
    "meta_lora, fp32": ("meta_lora", "fp32", ["meta.task_batch_limit=4"], 1e-4),
    "meta_lora, fp32, one task at a time": ("meta_lora", "fp32", ["meta.task_batching=false"], 1e-4),
    "meta_lora, bf16": ("meta_lora", "bf16", ["meta.task_batch_limit=4"], 0.1),
    "fomaml, fp32": ("fomaml", "fp32", [], 1e-4),
    "fomaml, bf16": ("fomaml", "bf16", [], 0.1),
}


def gradients(run: Run) -> dict[str, Any]:
    """META-LORA's and FOMAML's meta-gradients against the independent reference, which runs on the CPU in fp32."""
    from benchmarks.arms import SCRIPTS, precision

    model, task_dir = run.model_folder("135m"), run.tasks_folder()
    rates = {"meta_lora": 0.005, "fomaml": 1e-3}
    cases = []
    for name, (method, dtype, overrides, _) in GRADIENT_CASES.items():
        script, _, config = SCRIPTS[method]
        lora = ["model.lora_rank=16", "model.lora_alpha=32"] if method == "meta_lora" else []
        fixed = {
            "model.path": model.resolve(),
            "meta.task_dir": task_dir.resolve(),
            "meta.support_samples": 16,
            "meta.query_samples": 12,
            "meta.num_inner_steps": 2,
            "meta.inner_lr": rates[method],
            "meta.meta_batch_size": 2,
            "meta.inner_batch_size": 2,
            "meta.query_batch_size": 2,
            "trainer.total_training_steps": 4,
            "trainer.resume_mode": "disable",
            "trainer.logger": "[]",
            "trainer.default_local_dir": (run.output / "checkpoints").resolve(),
            "optim.clip_grad": 1e9,
        }
        settings = [f"{key}={value}" for key, value in fixed.items()]
        settings += [*precision(dtype, lora=bool(lora)), *lora, *overrides]
        # B is 0 at the start, and A has no gradient there: the second meta-step has left that point.
        cases.append({"name": name, "script": f"{script}.py", "config": config, "steps": 2, "overrides": settings})
    folder = run.output / "gradients"
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    run.command(*torchrun, "tests/support/meta_step_worker.py", folder / "cases.json", folder)

    import torch

    sys.path.insert(0, str(ROOT / "tests/support"))
    from meta_reference import Reference, relative_error

    result: dict[str, Any] = {}
    for adapter in ({"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, None):
        reference = Reference(model, task_dir, adapter)
        for name, (method, _, _, allowed) in GRADIENT_CASES.items():
            if (method == "meta_lora") is (adapter is not None):
                seen = torch.load(folder / f"{name}_rank0.pt", weights_only=True)
                theta = {n: t.float() for n, t in seen["theta_before"].items()}
                expected = reference.first_order_gradient(theta, seen["episodes"], rates[method])
                result[name] = {"relative_error": relative_error(seen["gradient"], expected), "allowed": allowed}
    wrong = [name for name, found in result.items() if not found["relative_error"] < found["allowed"]]
    if wrong:
        raise Failed(f"not the reference's gradient: {', '.join(wrong)}", result)
    shutil.rmtree(folder)
    return result


def section(
    name: str, shape: str, dtype: str, token_counts: Sequence[int] | None = None
) -> Callable[[Run], dict[str, Any]]:
    """A section of ``benchmarks/bench.py``: arms whose gradients are compared, then timed in turn."""

    def measure(run: Run) -> dict[str, Any]:
        job, out = run.output / f"{run.part}.job", run.output / f"{run.part}.out"
        job.write_text(json.dumps(run.settings(shape, dtype, token_counts)))
        run.command("-m", "benchmarks.sections", name, job, out)
        return _result_of(job, out)["result"]

    return measure


def memory(shape: str, arm: str) -> Callable[[Run], dict[str, Any]]:
    """Peak memory of one arm in a process of its own."""

    def measure(run: Run) -> dict[str, Any]:
        from benchmarks.sections.memory import MEMORY_ARMS

        job, out = run.output / f"{run.part}.job", run.output / f"{run.part}.out"
        size = {"tasks": 2, "inner_steps": 1} if run.tiny else {"tasks": 4, "inner_steps": 2}
        size |= {"batch": 4, "support_samples": 16 if run.tiny else 100}
        settings = run.settings(shape, MEMORY_ARMS[arm]["dtype"])
        job.write_text(json.dumps({"settings": settings, **size, "arm": MEMORY_ARMS[arm]}))
        run.command("-m", "benchmarks.workers", "memory", job, out)
        return {**size, **_result_of(job, out)}

    return measure


def rules(seed: int) -> Callable[[Run], dict[str, Any]]:
    """The suite ``rules`` with one seed: what its report says of META-LORA and of what a user would try first."""

    def measure(run: Run) -> dict[str, Any]:
        assert run.model is not None, "choose_parts leaves these parts out without a model"
        folder = run.output / f"rules_seed{seed}"
        plan = ("--suite", "rules", "--scale", _scale(run), "--seeds", seed, "--arms", *RULES_ARMS)
        where = ("--model", run.model.resolve(), "--output-dir", folder, "--retry-failed")
        code = run.command("run_experiments.py", *plan, *where, codes=(0, 1), resumes=True)
        file = folder / "report" / "report.json"
        if not file.is_file():
            raise Failed(run.how_it_ended(code))
        report = json.loads(file.read_text())
        arms = {arm: {k: report["arms"][arm][k] for k in ("label", "status", "scores")} for arm in RULES_ARMS}
        result = {"folder": str(folder), "arms": arms}
        missing = [f"{arm}: {found['status']}" for arm, found in arms.items() if found["status"] != "measured"]
        if missing:
            raise Failed("; ".join(missing), result)
        return result

    return measure


def _scale(run: Run) -> str | Path:
    """The scale ``cpu``, in a rehearsal ``smoke``; on a GPU a copy in which trainings and evaluations have one, so that
    one runs at a time."""
    name = "smoke" if run.tiny else "cpu"
    if run.device == "cpu":
        return name
    import yaml

    scale = yaml.safe_load((ROOT / "data" / "experiments" / "scales" / f"{name}.yaml").read_text())
    scale["title"] = f"The settings of the scale {name} on a GPU"
    for kind in ("train", "train_lora", "evaluate"):
        scale["runs"][kind]["gpus"] = 1
    file = run.output / f"{name}_on_gpu.yaml"
    file.write_text(yaml.safe_dump(scale, sort_keys=False))
    return file


def _result_of(job: Path, out: Path) -> dict[str, Any]:
    content = json.loads(out.read_text())
    job.unlink()
    out.unlink()
    return content


def _parts() -> dict[str, Callable[[Run], dict[str, Any]]]:
    arms = ("meta_lora_{}", "meta_lora_{}_one_at_a_time")
    memory_arms = [arm.format(dtype) for dtype in ("bf16", "fp32") for arm in arms]
    memory_arms += ["fomaml_fp32", "fomaml_bf16_autocast", "peft_loop_fp32", "verl_sft_fp32"]
    return {
        "environment": environment,
        "tests_products": tests("test_products_gpu.py"),
        "tests_meta_step": tests("test_meta_step_gpu.py"),
        "gradients": gradients,
        **{f"meta_step.{dtype}": section("peft_loop", "135m", dtype) for dtype in ("bf16", "fp32")},
        **{f"fomaml.{dtype}": section("fomaml", "135m", dtype) for dtype in ("bf16", "fp32")},
        "update_rule.bf16": section("update_rule", "135m", "bf16"),
        "top_layers.bf16": section("top_layers", "135m", "bf16"),
        **{f"memory.{arm}": memory("135m", arm) for arm in memory_arms},
        **{
            f"inner_step_{tokens}.{dtype}": section("inner_step", "135m", dtype, [tokens])
            for tokens in sorted(WORKLOADS)
            for dtype in ("bf16", "fp32")
        },
        "meta_step_05b.bf16": section("peft_loop", "05b", "bf16"),
        "fomaml_05b.bf16": section("fomaml", "05b", "bf16"),
        **{f"memory_05b.{arm}": memory("05b", arm) for arm in ("meta_lora_bf16", "fomaml_bf16_autocast")},
        **{f"rules.seed{seed}": rules(seed) for seed in (1, 2, 3)},
    }


PARTS = _parts()


def choose_parts(named: Sequence[str] | None, model: Path | None) -> list[str]:
    """The parts to run: those ``named``, or all; without a model those that need one are left out."""
    chosen = list(PARTS if named is None else named)
    lacking = [name for name in chosen if name.startswith("rules.")] if model is None else []
    if named is not None and lacking:
        print(f"gpu_run: not run, for want of --model: {', '.join(lacking)}", flush=True)
    return [name for name in chosen if name not in lacking]


# ------------------------------------------------------------------------------------------------------- running them


def run_parts(run: Run, names: Sequence[str], copy_to: Path | None) -> int:
    """Run what is not finished; returns how many parts failed."""
    failures = 0
    left = [name for name in names if _state(run.output, name) != "finished"]
    for number, name in enumerate(left):
        if run.ends - time.monotonic() < LEAST_SECONDS:
            print(f"gpu_run: the budget is used up; left: {', '.join(left[number:])}", flush=True)
            break
        print(f"gpu_run: {name}", flush=True)
        run.part, run.began = name, time.monotonic()
        (run.output / f"{name}.log").unlink(missing_ok=True)
        record: dict[str, Any] = {"part": name, "device": run.device, "tiny": run.tiny}
        record |= {"model": str(run.model or RANDOM_WEIGHTS), "task_dir": str(run.task_dir or RANDOM_WORDS)}
        record |= {**run.circumstances(), "started": datetime.now(UTC).isoformat()}
        try:
            record |= {"state": "finished", "result": PARTS[name](run)}
        except OutOfTime:
            record |= {"state": "cut short"}
        except Failed as error:
            record |= {"state": "failed", "error": str(error), "result": error.result}
        except Exception as error:  # one part that cannot be measured must not end the others
            record |= {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        record["seconds"] = round(time.monotonic() - run.began, 1)
        failures += record["state"] == "failed"
        print(f"gpu_run: {name}: {record['state']} after {record['seconds']} s {record.get('error', '')}", flush=True)
        temporary = run.output / f"{name}.json.new"
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(run.output / f"{name}.json")
        (run.output / "table.md").write_text(table(run.output))
        if copy_to is not None:
            copy_to.mkdir(parents=True, exist_ok=True)
            for file in [f for kind in ("*.json", "*.log", "*.md") for f in run.output.glob(kind)]:
                shutil.copy(file, copy_to)
    return failures


def _state(output: Path, name: str) -> str | None:
    return (_read(output, name) or {}).get("state")


def _read(output: Path, name: str) -> dict[str, Any] | None:
    file = output / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def table(output: Path) -> str:
    """What the finished parts say, as Markdown."""
    records = {name: record for name in PARTS if (record := _read(output, name))}
    results = {name: record["result"] for name, record in records.items() if record["state"] == "finished"}
    blocks = [
        "# A run on one GPU" if all(r["device"] == "cuda" for r in records.values()) else "# A rehearsal on a CPU"
    ]
    if "environment" in results:
        gpus = [
            f"{g['name']} ({g['capability'][0]}.{g['capability'][1]})" for g in results["environment"].get("gpus", [])
        ]
        versions = results["environment"]["versions"]
        blocks.append(
            f"{', '.join(gpus) or 'CPU'}; torch {versions['torch']}, transformers {versions['transformers']}."
        )
    rows = [
        [name, record["state"], f"{record['seconds']:g}", record.get("error", "")] for name, record in records.items()
    ]
    blocks.append(_markdown(["part", "state", "seconds", "error"], rows))
    errors = {name: found["relative_error"] for name, found in results.get("gradients", {}).items()}
    errors |= results.get("tests_meta_step", {}).get("relative_errors", {})
    if errors:
        rows = [[name, f"{error:.1e}"] for name, error in errors.items()]
        blocks.append(_markdown(["meta-gradient against the reference", "relative error"], rows))
    rows = [row for name, result in results.items() for row in _speeds(name, result)]
    if rows:
        blocks.append(_markdown(["part", "arm", "seconds", "tokens/s", "over META-LORA batched"], rows))
    rows = [
        [name, f"{found['peak_bytes'] / 2**20:.0f}"] for name, found in results.items() if name.startswith("memory")
    ]
    if rows:
        blocks.append(_markdown(["one process, which holds the whole model", "peak MiB"], rows))
    blocks += _scores({name: result["arms"] for name, result in results.items() if name.startswith("rules.")})
    return "\n\n".join(blocks) + "\n"


def _scores(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of the arms' accuracy, mean over the tasks, for every number of shots; nothing without parts."""
    accuracy = {
        (part, found["label"]): {
            score["shots"]: score["accuracy"] for score in found["scores"] if score["task"] == "all"
        }
        for part, arms in parts.items()
        for found in arms.values()
    }
    shots = list(dict.fromkeys(number for of_arm in accuracy.values() for number in of_arm))
    rows = [
        [*names, *(f"{of_arm[number]:.1%}" if number in of_arm else "" for number in shots)]
        for names, of_arm in accuracy.items()
    ]
    header = ["part", "arm", *(f"accuracy, shots: {number}" for number in shots)]
    return [_markdown(header, rows)] if rows else []


def _speeds(name: str, result: Mapping[str, Any]) -> Iterator[list[str]]:
    kind = name.partition(".")[0].removesuffix("_05b")
    if kind == "meta_step":
        for arm, seconds in result["seconds"].items():
            over = result["ratio"].get(arm, {"median": 1.0})["median"]
            yield [name, arm, f"{seconds['median']:.4f}", f"{result['tokens_per_second'][arm]:.0f}", f"{over:.2f}"]
    elif kind == "fomaml":
        for optimizer, values in result["inner_optimizers"].items():
            batched = values["seconds"]["batched"]["median"]
            for arm, seconds in values["seconds"].items():
                s = seconds["median"]
                yield [
                    name,
                    f"{arm}, {optimizer} inside",
                    f"{s:.4f}",
                    f"{values['tokens'] / s:.0f}",
                    f"{s / batched:.2f}",
                ]
    elif kind == "update_rule":
        for rule, seconds in result["seconds"].items():
            over = result["ratio"].get(rule, {"median": 1.0})["median"]
            yield [name, rule, f"{seconds['median']:.4f}", "", f"{over:.2f}"]
    elif kind == "top_layers":
        for use, arms in result["seconds"].items():
            for scope, seconds in arms.items():
                over = result["ratio"][use].get(scope, {"median": 1.0})["median"]
                yield [name, f"{use}, layers: {scope}", f"{seconds['median']:.4f}", "", f"{over:.2f}"]
    elif kind.startswith("inner_step"):
        for cell in result["cells"]:
            for arm, seconds in cell["seconds"].items():
                over = cell["ratio"].get(arm, {"median": 1.0})["median"]
                what = f"{arm}, T = {cell['tasks']}, {cell['tokens']} tokens"
                yield [name, what, f"{seconds['median']:.4f}", f"{cell['tokens_per_second'][arm]:.0f}", f"{over:.2f}"]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


# ------------------------------------------------------------------------------------------------------- the packages


def _requirements() -> list[str]:
    lines = REQUIREMENTS.read_text().splitlines()
    return [line.partition("==")[0] for line in lines if not line.startswith("#")]


def pack(folder: Path, model: Path | None, piece_bytes: int) -> None:
    """Download the wheels, and cut them and a model folder into pieces."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    # Not `pip download`: one of them is published as source alone.
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(wheels)]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "-r", str(REQUIREMENTS)], check=True)
    cut(wheels, folder / "wheels.tar", piece_bytes)
    if model is not None:
        cut(model, folder / "model.tar", piece_bytes)


def cut(folder: Path, whole: Path, piece_bytes: int) -> None:
    """Write ``folder`` as ``<whole>.00``, ``.01``, ..."""
    with tarfile.open(whole, "w") as archive:
        archive.add(folder, arcname=whole.stem)
    with whole.open("rb") as content:
        number = 0
        while block := content.read(piece_bytes):
            Path(f"{whole}.{number:02d}").write_bytes(block)
            number += 1
    whole.unlink()


def unpack(folder: Path) -> None:
    """Put the pieces in ``folder`` together, and install the wheels."""
    for name in sorted({piece.name.partition(".tar.")[0] for piece in folder.glob("*.tar.*")}):
        whole = folder / f"{name}.tar"
        with whole.open("wb") as content:
            for piece in sorted(folder.glob(f"{name}.tar.*")):
                content.write(piece.read_bytes())
        with tarfile.open(whole) as archive:
            archive.extractall(folder, filter="data")
        whole.unlink()
    if (folder / "wheels").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--find-links", str(folder / "wheels"), "-r", str(REQUIREMENTS)], check=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("results/gpu_run"), help="default: %(default)s")
    add("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"all, or of {', '.join(PARTS)}")
    add("--budget-seconds", type=float, default=float("inf"), help="end after this long (default: no limit)")
    add("--part-seconds", type=float, default=300.0, help="limit of a part (default: %(default)g)")
    add("--model", type=Path, help="a Hugging Face folder in place of random weights of the 135M shape")
    add("--task-dir", type=Path, help="prepared tasks in place of random words")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    add("--tiny", action="store_true", help="a model of two layers and a few small cells")
    add("--copy-to", type=Path, metavar="FOLDER", help="copy results and logs there after every part")
    add("--pack", type=Path, metavar="FOLDER", help="download the packages into pieces, and do nothing else")
    add("--unpack", type=Path, metavar="FOLDER", help="install them from pieces, and do nothing else")
    add("--piece-mb", type=float, default=60.0, help="largest piece (default: %(default)g)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a part failed, 2 for an unusable setting."""
    arguments = _parser().parse_args(argv)
    if arguments.pack is not None:
        pack(arguments.pack, arguments.model, int(arguments.piece_mb * 1e6))
        return 0
    if arguments.unpack is not None:
        unpack(arguments.unpack)
        return 0
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("gpu_run: torch sees no CUDA device; --device cpu --tiny rehearses without one", file=sys.stderr)
            return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    run = Run(
        output=arguments.output.resolve(),
        device=arguments.device,
        tiny=arguments.tiny,
        model=arguments.model,
        task_dir=arguments.task_dir,
        part_seconds=arguments.part_seconds,
        ends=time.monotonic() + arguments.budget_seconds,
    )
    failures = run_parts(run, choose_parts(arguments.parts, arguments.model), arguments.copy_to)
    print(f"gpu_run: wrote {arguments.output / 'table.md'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
