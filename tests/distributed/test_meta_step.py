"""One meta-step of every trainer against the independent reference: 1, 2 and 4 processes, every layout of task groups.

The largest relative errors are printed (``pytest -s`` or the summary of ``make test``).
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from meta_reference import Reference, relative_error
from script_runner import ROOT, must_run

TOLERANCE = 1e-5
CHOSEN = ["q_proj", "down_proj", "lm_head"]  # an adapter on the output layer, too
OFFLOAD_POLICY = "engine.offload_policy=true"  # FSDP2 keeps shards on the host between uses
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
COMMON = [
    "meta.support_samples=24",
    "meta.num_inner_steps=2",
    "meta.meta_batch_size=4",
    "trainer.total_training_steps=4",
    "trainer.resume_mode=disable",
    "trainer.logger=[]",
    "optim.clip_grad=1e9",
]
# All four tasks in one pass: left to itself, a CPU would take some of these alone.
META_LORA = (
    "meta_lora_trainer.py",
    "config_meta_lora_guide",
    ["model.lora_rank=4", "model.lora_alpha=8", "meta.task_batch_limit=4"],
)
FOMAML = ("maml_sft_trainer.py", "config_fomaml_math_science", [])
REPTILE = ("reptile_sft_trainer.py", "config_reptile_math_science", ["meta.reptile_step_size=1.0"])
LORA_ML = ("lora_ml_trainer.py", "config_lora_ml", [*META_LORA[2], "meta.task_lora_rank=1", "meta.task_lora_lr=0.01"])
LR = {"meta_lora": 0.5, "fomaml": 0.05, "reptile": 0.05, "lora_ml": 0.5}
# B starts at zero, so A would have no gradient; a second meta-step has left that special point.
STEPS = 2

WORLDS = {
    1: ["group=1"],
    2: ["group=1", "group=2"],
    4: ["group=1", "group=2", "group=4"],
}
RATES = ["meta.inner_lr_meta_lr=0.2"]  # at the second meta-step every tensor has a rate of its own
MICRO_BATCHES = ["data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=1"]
TOP_LAYER = [
    *("meta.inner_scope=top_layers", "meta.inner_top_layers=1"),
    *("meta.trajectory_weight=0.5", "meta.inner_clip_grad=0.1"),
]
VARIANTS = {
    "packed": [],
    "padded": ["model.use_remove_padding=false"],
    "checkpointed": ["model.enable_gradient_checkpointing=true"],
    "checkpointed_padded": ["model.enable_gradient_checkpointing=true", "model.use_remove_padding=false"],
    "micro_batches": MICRO_BATCHES,
    "token_budget": ["data.max_token_len_per_gpu=160"],  # two or three examples per micro-batch
    "adamw": ["meta.inner_optimizer=adamw"],
    "sum": ["meta.aggregation=sum"],
    # w = 2/3, of gradients before they are clipped; w = 0.5 at the second of four meta-steps.
    "trajectory": ["meta.trajectory_weight=null", "meta.inner_clip_grad=0.1"],
    "trajectory_padded": ["meta.trajectory_weight=[0.7,0.1]", "model.use_remove_padding=false"],
    "one_at_a_time_trajectory": [
        "meta.task_batching=false",
        "meta.task_batch_limit=null",
        "meta.trajectory_weight=null",
        "meta.inner_clip_grad=0.1",
        "model.enable_gradient_checkpointing=true",
    ],
    "episode_shots": ["meta.episode_shots=[2,5]"],  # fewer than an inner batch, and more
    "lora_b": ["meta.inner_scope=lora_b", "meta.trajectory_weight=0.5", "meta.inner_clip_grad=0.1"],
    "lora_b_adamw": ["meta.inner_scope=lora_b", "meta.inner_optimizer=adamw"],
    "exact_lora_b": ["meta.inner_scope=lora_b", "meta.order=2"],
    "one_at_a_time_lora_b": [
        *("meta.inner_scope=lora_b", "meta.trajectory_weight=0.5", "meta.inner_clip_grad=0.1"),
        *("meta.task_batching=false", "meta.task_batch_limit=null"),
    ],
    # Lower layers computed once: shared rows, packed ones, padded ones; more examples of an episode than a micro-batch.
    "top_layer": [*TOP_LAYER, "meta.episode_shots=[2,5]"],
    "top_layer_padded": [*TOP_LAYER, "model.use_remove_padding=false", "model.enable_gradient_checkpointing=true"],
    "top_layer_micro_batches": [*TOP_LAYER, *MICRO_BATCHES],
    "top_layer_token_budget": [*TOP_LAYER, "data.max_token_len_per_gpu=160"],
    "top_layer_adamw": [*TOP_LAYER, "meta.inner_optimizer=adamw"],
    "top_layer_rates_per_step": [*TOP_LAYER, *RATES, "meta.learned_inner_lr=per_tensor_per_step"],
    "one_at_a_time_top_layer": [*TOP_LAYER, "meta.task_batching=false", "meta.task_batch_limit=null"],
    "exact": ["meta.order=2"],
    "exact_adamw": ["meta.order=2", "meta.inner_optimizer=adamw"],
    "exact_last": ["meta.order=2", "meta.second_order_steps=1", "model.use_remove_padding=false"],
    "exact_last_adamw": ["meta.order=2", "meta.second_order_steps=1", "meta.inner_optimizer=adamw"],
    "exact_checkpointed": [
        "meta.order=2",
        "model.enable_gradient_checkpointing=true",
        "data.max_token_len_per_gpu=160",
    ],
    "exact_rates": [*RATES, "meta.order=2", "meta.learned_inner_lr=per_tensor"],
    "exact_last_rates_per_step": [
        *RATES,
        "meta.order=2",
        "meta.second_order_steps=1",
        "meta.learned_inner_lr=per_tensor_per_step",
    ],
    "one_at_a_time_exact": ["meta.order=2", "meta.task_batching=false", "meta.task_batch_limit=null"],
    "rates": [*RATES, "meta.learned_inner_lr=per_tensor"],
    "rates_adamw": [*RATES, "meta.learned_inner_lr=per_tensor", "meta.inner_optimizer=adamw"],
    "rates_per_step": [*RATES, "meta.learned_inner_lr=per_tensor_per_step"],
    "rates_per_step_padded": [
        *RATES,
        "meta.learned_inner_lr=per_tensor_per_step",
        "meta.trajectory_weight=null",  # of no account to the rates, and neither is the sum
        "meta.aggregation=sum",
        "meta.inner_clip_grad=0.1",
        "model.enable_gradient_checkpointing=true",
        "model.use_remove_padding=false",
    ],
    "rates_per_step_adamw": [
        *RATES,
        "meta.learned_inner_lr=per_tensor_per_step",
        "meta.inner_optimizer=adamw",
        "model.enable_gradient_checkpointing=true",
    ],
    "one_at_a_time_rates_per_step": [
        *RATES,
        "meta.learned_inner_lr=per_tensor_per_step",
        "meta.task_batching=false",
        "meta.task_batch_limit=null",
    ],
    "limited_rates": [*RATES, "meta.learned_inner_lr=per_tensor", "meta.task_batch_limit=3"],
    "offloaded": ["engine.param_offload=true", "engine.optimizer_offload=true"],
    # META-LORA runs the variants above with all tasks of a rank in one pass; these are its other ways.
    "automatic": ["meta.task_batch_limit=null"],
    "one_at_a_time": ["meta.task_batching=false", "meta.task_batch_limit=null"],
    "one_at_a_time_checkpointed_padded": [
        "meta.task_batching=false",
        "meta.task_batch_limit=null",
        "model.enable_gradient_checkpointing=true",
        "model.use_remove_padding=false",
    ],
    "limited": ["meta.task_batch_limit=3"],  # a pass of three tasks and one of one
    # Forwards without gradient between inner loops, and shards that stay gathered after a forward; "packed" is the
    # fourth of these: resharded, with the gain measured.
    "no_gain": ["meta.adaptation_gain_freq=0"],
    "gathered": ["engine.reshard_after_forward=false"],
    "gathered_no_gain": ["engine.reshard_after_forward=false", "meta.adaptation_gain_freq=0"],
}
OF_LORA_ML = ("packed", "checkpointed_padded", "micro_batches", "one_at_a_time", "limited")
RESHARDING = ("no_gain", "gathered", "gathered_no_gain")
LEFT_FOR_SLOW = {
    1: (
        *("-checkpointed", "-offloaded", "-no_gain", "-rates", "-rates_adamw", "-rates_per_step_adamw", "-exact_last"),
        *("-trajectory_padded", "-exact_last_adamw", "-exact_rates", "-lora_b_adamw", "-one_at_a_time_lora_b", "-sum"),
        *("-micro_batches", "-padded", "-exact_adamw", "-gathered", "-limited_rates", "-exact_checkpointed"),
        "reptile-group1-adamw",
        *(f"fomaml-group1-{variant}" for variant in ("rates_per_step_padded", "token_budget", "adamw")),
        *("-top_layer_micro_batches", "-top_layer_token_budget", "-top_layer_adamw", "fomaml-group1-top_layer"),
        *("fomaml-group1-top_layer_rates_per_step", "lora_ml-group1-limited"),
        *("fomaml-group1-gathered_no_gain", "reptile-group1-gathered_no_gain", "-exact_lora_b", "-one_at_a_time_exact"),
        *("-one_at_a_time_trajectory", "-one_at_a_time_rates_per_step", "meta_lora-group1-top_layer_rates_per_step"),
        *("fomaml-group1-episode_shots", "fomaml-group1-top_layer_padded", "lora_ml-group1-one_at_a_time"),
    ),
    2: (
        *("group1-checkpointed_padded", "group2-no_gain", "group2-gathered", "group2-gathered_no_gain"),
        *("group1-trajectory", "group1-rates_per_step", "fomaml-group1-packed", "reptile-group1-packed"),
        *("fomaml-group2-rates_per_step", "reptile-group2-packed", "lora_ml-group2-packed"),
        *("-top_layer_token_budget", "-top_layer_micro_batches", "group1-exact"),
        *("fomaml-group2-trajectory", "fomaml-group2-top_layer_padded", "lora_ml-group1-packed"),
    ),
    4: (
        *("-trajectory", "-exact", "-rates_per_step"),
        *("-top_layer_padded", "-top_layer_token_budget", "-top_layer_micro_batches"),
        *("group1-checkpointed_padded", "group4-packed", "group4-no_gain", "group4-gathered"),
        *("fomaml-group1-packed", "fomaml-group2-checkpointed_padded"),
        *("reptile-group1-packed", "reptile-group4-checkpointed_padded", "lora_ml-group1-packed"),
        *("fomaml-group4-gathered_no_gain", "reptile-group4-gathered_no_gain", "lora_ml-group2-checkpointed_padded"),
        *("meta_lora-group4-checkpointed_padded", "reptile-group2-checkpointed_padded"),
    ),
}
"""World size -> endings of the names of layouts that only the slow tier runs."""


def cases_for(world: int, *, whole: bool = False) -> list[dict]:
    """Every method at every group size; all variants with one process, the two most different ones with more.

    Args:
        whole: with those of :data:`LEFT_FOR_SLOW`.
    """
    cases = []
    methods = {"meta_lora": META_LORA, "fomaml": FOMAML, "reptile": REPTILE, "lora_ml": LORA_ML}
    for method, (script, config, extra) in methods.items():
        for group in (int(g.split("=")[1]) for g in WORLDS[world]):
            # All variants on one process; the two most different ones on several, where groups of 2 of 4 need one.
            variants = VARIANTS if world == 1 else ("packed", "checkpointed_padded", "trajectory", "rates_per_step")
            if world > group == 1:
                variants = (*variants, "exact")
            if world == group > 1:
                variants = (*variants, "top_layer_padded", "top_layer_token_budget", "top_layer_micro_batches")
            if (world, group) == (4, 2):
                variants = ("checkpointed_padded",)
            if group == world > 1:
                variants = (*variants, *RESHARDING)
            for variant in variants:
                if method == "lora_ml" and variant not in OF_LORA_ML:
                    continue
                if method in ("fomaml", "reptile") and variant.startswith(
                    ("one_at_a_time", "limited", "automatic", "exact", "lora_b")
                ):
                    continue  # there is no frozen base to share; FOMAML is first order
                if method == "reptile" and variant not in ("packed", "adamw", "checkpointed_padded", *RESHARDING):
                    continue  # its inner loop is the one that the other two run in every variant
                lr = 0.01 if variant.endswith("adamw") else LR[method]
                cases.append(
                    {
                        "name": f"{method}-group{group}-{variant}",
                        "method": method,
                        "variant": variant,
                        "lr": lr,
                        "script": script,
                        "config": config,
                        "steps": STEPS,
                        "overrides": [
                            *COMMON,
                            *extra,
                            *VARIANTS[variant],
                            f"meta.inner_lr={lr}",
                            f"meta.task_group_size={group}",
                        ],
                    }
                )
    return cases if whole else [c for c in cases if not c["name"].endswith(LEFT_FOR_SLOW[world])]


def only_support(task_dir, folder):
    """A copy of the task files without those of the query sets."""
    folder.mkdir()
    for file in task_dir.glob("*_support.parquet"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(tiny_model, untied_model, task_dir, tmp_path_factory):
    """world size -> (cases, folder of what the ranks saw); each world size runs once, all its cases in one launch."""
    done = {}

    def of(world: int, model="tied", *, whole=False):
        key = (world, model, whole)
        if key not in done:
            out = tmp_path_factory.mktemp(f"world{world}")
            path = tiny_model if model == "tied" else untied_model
            cases = cases_for(world, whole=whole)
            if model != "tied":
                cases = [c for c in cases if c["variant"] == "packed"]
                targets = f"model.target_modules=[{','.join(CHOSEN)}]"
                cases += [
                    {**c, "name": f"chosen-{c['name']}", "overrides": [*c["overrides"], targets]}
                    for c in cases
                    if c["name"] == "meta_lora-group1-packed"  # veRL cannot shard an adapted output layer
                ]
                cases += [
                    {**c, "name": f"kept-on-the-host-{c['name']}", "overrides": [*c["overrides"], OFFLOAD_POLICY]}
                    for c in cases
                    if c["name"] in ("meta_lora-group2-packed", "fomaml-group2-packed")
                ]
            if world == 1 and not whole:
                broken = next(c for c in cases if c["name"] == "meta_lora-group1-one_at_a_time_checkpointed_padded")
                cases.append({**broken, "name": "broken", "break": "restore_before_backward"})
                for k0 in ("fomaml-group1-packed", "meta_lora-group1-packed"):
                    case = next(c for c in cases if c["name"] == k0)
                    cases.append(
                        {**case, "name": f"K0-{k0}", "overrides": [*case["overrides"], "meta.num_inner_steps=0"]}
                    )
                case = next(c for c in cases if c["name"] == "reptile-group1-packed")
                cases.append(
                    {**case, "name": "K1-reptile", "overrides": [*case["overrides"], "meta.num_inner_steps=1"]}
                )
                case = next(c for c in cases if c["name"] == "reptile-group1-packed")
                lora = ["model.lora_rank=4", "model.lora_alpha=8", "meta.inner_lr=0.5"]
                for name, ways in (
                    ("lora-reptile", ["meta.task_batch_limit=4"]),
                    ("lora-reptile-one", ["meta.task_batching=false"]),
                ):
                    cases.append({**case, "name": name, "overrides": [*case["overrides"], *lora, *ways]})
                cases.append(
                    {
                        **case,
                        "name": "pseudo-reptile",
                        "overrides": [*case["overrides"], "meta.reptile_update=pseudo_gradient"],
                    }
                )
                case = next(c for c in cases if c["name"] == "meta_lora-group1-rates_per_step")
                frozen = [*case["overrides"], "meta.update_shared=false"]
                cases.append({**case, "name": "frozen", "method": "frozen", "variant": "frozen", "overrides": frozen})
                case = next(c for c in cases if c["name"] == "meta_lora-group1-packed")
                cases.append(
                    {
                        **case,
                        "name": "query-from-support",
                        "overrides": [*case["overrides"], "meta.query_from_support=true", "meta.query_samples=8"],
                        "task_dir": str(only_support(task_dir, out / "tasks")),
                    }
                )
            for case in cases:
                folder = case.get("task_dir", task_dir)
                case["overrides"] = [*case["overrides"], f"model.path={path}", f"meta.task_dir={folder}"]
            description = out / "cases.json"
            description.write_text(json.dumps(cases))
            must_run(ROOT / "tests/support/meta_step_worker.py", description, out, processes=world, timeout=420)
            done[key] = ({c["name"]: c for c in cases}, out, path)
        return done[key]

    return of


@pytest.fixture(scope="module")
def references(task_dir):
    built = {}

    def of(path, lora: bool):
        if (path, lora) not in built:
            built[path, lora] = Reference(path, task_dir, LORA if lora else None)
        return built[path, lora]

    return of


def load(out, case, rank=0):
    return torch.load(out / f"{case['name']}_rank{rank}.pt", weights_only=False)


def optimizer_of(case):
    return "adamw" if case["variant"].endswith("adamw") else "sgd"


def scope_of(case):
    """Whether the tensor of a name is adapted."""
    if "top_layer" in case["variant"]:
        return lambda name: ".layers.1." in name  # of two
    return lambda name: "lora_B" in name or "lora_b" not in case["variant"]


def exact_gradients(reference, case, result):
    steps = 1 if "last" in case["variant"] else None
    settings = case["lr"], optimizer_of(case), steps, result.get("rates"), scope_of(case)
    return reference.exact_gradient(result["theta_before"], result["episodes"], *settings)


def expected(reference, case, result):
    """What the equations give for the last meta-step of ``case``: the meta-gradient, or Reptile's mean difference."""
    theta, episodes = result["theta_before"], result["episodes"]
    optimizer = optimizer_of(case)
    if case["method"] == "lora_ml":
        return reference.joint_gradient(theta, result["own_before"], episodes)[0]
    if case["method"] == "reptile":
        return reference.mean_difference(theta, episodes, case["lr"], optimizer)
    if "exact" in case["variant"]:
        return exact_gradients(reference, case, result)[0]
    aggregation = "sum" if "meta.aggregation=sum" in case["overrides"] else "mean"
    more = {"rates": result.get("rates"), "only": scope_of(case)}
    if "top_layer" in case["variant"]:
        more |= {"trajectory": 0.5, "clip": 0.1, "supports": scope_of(case)}
    if case["variant"].endswith("lora_b"):
        more |= {"trajectory": 0.5, "clip": 0.1}
    if case["variant"] == "rates_per_step_padded":
        more |= {"trajectory": 2 / 3, "clip": 0.1}
    if "trajectory" in case["variant"]:
        padded = case["variant"] == "trajectory_padded"
        more = {"trajectory": 0.5} if padded else {"trajectory": 2 / 3, "clip": 0.1}
    return reference.first_order_gradient(theta, episodes, case["lr"], optimizer, aggregation, **more)


def measured(case, result):
    if case["method"] != "reptile":
        return result["gradient"]
    # eps = 1 annealed over 4 meta-steps: 0.75 at the second.
    return {n: (result["theta_after"][n] - t) / 0.75 for n, t in result["theta_before"].items()}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["most", "every layout"])
def test_meta_gradient_matches_the_reference(world, whole, outcomes, references):
    cases, out, path = outcomes(world, whole=whole)
    errors = {}
    for case in cases.values():
        if case["name"] not in {c["name"] for c in cases_for(world, whole=whole)}:
            continue
        result = load(out, case)
        reference = references(path, "lora" in case["method"])
        errors[case["name"]] = relative_error(measured(case, result), expected(reference, case, result))
        assert result["lowest_layer"] == ("top_layer" in case["variant"])  # those below are computed once
    worst = max((name for name in errors if not name.endswith("adamw")), key=errors.get)
    print(f"\n{world} processes: {len(errors)} layouts, largest relative error {errors[worst]:.1e} ({worst})")
    for name, error in errors.items():
        # Adam's first step is g / (|g| + 1e-8): where a gradient is zero to rounding, its sign is too, and Reptile's
        # result is that step itself.
        tolerance = 1e-3 if name.startswith("reptile") and name.endswith("adamw") else TOLERANCE
        if name.endswith("exact_adamw"):  # the derivative of that step is 1 / (|g| + 1e-8): rounding, up to 1e8 times
            tolerance = 5e-3  # tests/unit/test_second_order.py compares in fp64
        assert error < tolerance, (name, f"{error:.1e}")


@pytest.mark.parametrize(
    ("world", "whole"), [(1, False), (2, False), *(pytest.param(w, True, marks=pytest.mark.slow) for w in WORLDS)]
)
def test_the_gradient_of_learned_rates_matches_the_reference(world, whole, outcomes, references):
    cases, out, path = outcomes(world, whole=whole)
    errors = {}
    for case in cases.values():
        if "rates" not in case["variant"]:
            continue
        results = [load(out, case, rank) for rank in range(world)]
        result = results[0]
        rates = result["rates"]
        assert len({tuple(rate.tolist()) for rate in rates.values()}) > 1, "the rates are all the same"
        assert {len(rate) for rate in rates.values()} == {2 if "per_step" in case["variant"] else 1}
        reference = references(path, case["method"] == "meta_lora")
        clip = 0.1 if case["variant"] in ("rates_per_step_padded", "top_layer_rates_per_step") else None
        settings = result["theta_before"], result["episodes"], rates, optimizer_of(case), clip, scope_of(case)
        exact = "exact" in case["variant"]
        gradient = exact_gradients(reference, case, result)[1] if exact else reference.rate_gradient(*settings)
        errors[case["name"]] = relative_error(result["rate_gradient"], gradient)
        for other in results[1:]:
            assert all(torch.equal(other["rates_after"][name], rate) for name, rate in result["rates_after"].items())
    worst = max(errors, key=errors.get)
    print(f"\n{world} processes: {len(errors)} layouts, largest error of the rates {errors[worst]:.1e} ({worst})")
    for name, error in errors.items():
        assert error < TOLERANCE, (name, f"{error:.1e}")


@pytest.mark.parametrize("world", WORLDS)
def test_every_task_has_a_lora_of_its_own(world, outcomes, references):
    """Its gradient is the reference's; those of other tasks stay, and the ranks of theta that it fills."""
    cases, out, path = outcomes(world)
    found = [case for case in cases.values() if case["method"] == "lora_ml"]
    for case in found:
        results = [load(out, case, rank) for rank in range(world)]
        result = results[0]
        gradients = references(path, True).joint_gradient(
            result["theta_before"], result["own_before"], result["episodes"]
        )[1]
        assert relative_error(result["own_gradient"], gradients) < TOLERANCE, case["name"]
        assert all(any(t.any() for n, t in own.items() if "lora_B" in n) for own in result["own_before"].values())
        for task, own in result["own_after"].items():
            changed = any(not torch.equal(own[n], before) for n, before in result["own_before"][task].items())
            assert changed == (task in gradients), (case["name"], task)
        for other in results[1:]:
            for task, own in result["own_after"].items():
                assert all(torch.equal(other["own_after"][task][n], tensor) for n, tensor in own.items())
        for name, tensor in result["theta_after"].items():
            part = tensor[-1:] if "lora_A" in name else tensor[:, -1:]
            before = result["theta_before"][name]
            assert torch.equal(part, before[-1:] if "lora_A" in name else before[:, -1:])
    assert found


def test_rates_are_left_alone_where_theta_is(outcomes):
    cases, out, _ = outcomes(1)
    result = load(out, cases["frozen"])
    assert "rates_after" not in result and "gradient" not in result
    metrics = result["metrics"]
    for name in ("mean", "least", "largest"):
        assert metrics[f"inner/rate_{name}"] == pytest.approx(cases["frozen"]["lr"], rel=1e-6)


@pytest.mark.slow
def test_untied_model_with_biases_over_two_processes(outcomes, references, task_dir):
    cases, out, path = outcomes(2, "untied")
    for case in cases.values():
        result = load(out, case)
        if case["name"].startswith("chosen"):
            reference = Reference(path, task_dir, {**LORA, "target_modules": CHOSEN})
        else:
            reference = references(path, "lora" in case["method"])
        assert relative_error(measured(case, result), expected(reference, case, result)) < TOLERANCE, case["name"]


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_holds_the_same_parameters(world, outcomes):
    cases, out, _ = outcomes(world)
    for case in cases.values():
        first = load(out, case, 0)
        for rank in range(1, world):
            other = load(out, case, rank)
            assert all(torch.equal(first["theta_after"][n], other["theta_after"][n]) for n in first["theta_after"]), (
                case
            )
            assert first["metrics"].keys() == other["metrics"].keys()
            losses = [k for k in first["metrics"] if "loss" in k or "gain" in k]
            assert all(first["metrics"][k] == other["metrics"][k] for k in losses)


@pytest.mark.parametrize("world", [2, 4])
def test_a_meta_batch_on_several_ranks_equals_one_rank(world, outcomes):
    one, out_one, _ = outcomes(1)
    several, out_several, _ = outcomes(world)
    for case in several.values():
        same = one[f"{case['method']}-group1-{case['variant']}"]
        a, b = load(out_one, same), load(out_several, case)
        assert a["episodes"] == b["episodes"]
        # Relative to how far a meta-step moves, which is the stricter of the two scales.
        moved = {n: a["theta_after"][n] - a["theta_before"][n] for n in a["theta_after"]}
        moved_b = {n: b["theta_after"][n] - b["theta_before"][n] for n in b["theta_after"]}
        assert relative_error(b["theta_after"], a["theta_after"]) < TOLERANCE, case["name"]
        assert relative_error(moved_b, moved) < 1e-2, case["name"]
        for key in ("inner/support_loss", "meta/query_loss_before", "meta/query_loss_after"):
            assert (key in a["metrics"]) is (key in b["metrics"])
            if key not in a["metrics"]:
                continue  # not measured
            assert b["metrics"][key] == pytest.approx(a["metrics"][key], rel=1e-5), (case["name"], key)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_theta_is_bit_identical_when_the_optimizer_steps(world, outcomes):
    """Every inner loop of the meta-step has put theta back, and none has leaked into another task."""
    cases, out, _ = outcomes(world)
    checked = 0
    for case in cases.values():
        for rank in range(world):
            result = load(out, case, rank)
            if "theta_at_optimizer" in result:
                before, at = result["theta_before"], result["theta_at_optimizer"]
                assert all(torch.equal(before[n], at[n]) for n in before), (case["name"], rank)
                checked += 1
    assert checked >= 4 * world


def test_restoring_theta_before_the_backward_is_caught(outcomes, references):
    """The mistake that raises nothing: under activation checkpointing the backward reads the parameters it finds."""
    cases, out, path = outcomes(1)
    case = cases["broken"]
    result = load(out, case)
    error = relative_error(measured(case, result), expected(references(path, True), case, result))
    print(f"\ntheta restored before the query backward: relative error {error:.2f}")
    assert error > 1000 * TOLERANCE


@pytest.mark.parametrize("world", [1, 2, 4])
def test_meta_lora_leaves_the_base_alone(world, outcomes):
    cases, out, _ = outcomes(world)
    for case in cases.values():
        if case["method"] != "meta_lora":
            continue
        result = load(out, case)
        assert result["base_fingerprint"], "there is a base to leave alone"
        assert not result["base_grads"] and not result["base_in_optimizer"]
        assert all("lora_" in name for name in result["gradient"])
        untouched = load(out, next(c for c in cases.values() if c["method"] == "meta_lora"))
        assert result["base_fingerprint"] == untouched["base_fingerprint"]


@pytest.mark.parametrize("method", ["fomaml", "meta_lora"])
def test_without_inner_steps_it_is_multi_task_sft(method, outcomes, references):
    cases, out, path = outcomes(1)
    result = load(out, cases[f"K0-{method}-group1-packed"])
    reference = references(path, method == "meta_lora")
    theta, tasks = result["theta_before"], result["episodes"]
    plain = {n: torch.zeros_like(t) for n, t in theta.items()}
    for task, support, query in tasks:
        assert support == ()
        gradient, _ = reference.gradient(theta, reference.examples(task, "query", query))
        for n, g in gradient.items():
            plain[n] += g / len(tasks)
    assert relative_error(result["gradient"], plain) < TOLERANCE


def test_a_query_set_out_of_the_support_examples(outcomes, task_dir, tmp_path):
    """The last 8 of 24, by their rows in the support file."""
    cases, out, path = outcomes(1)
    case = cases["query-from-support"]
    result = load(out, case)
    for task, support, query in result["episodes"]:
        assert {row for batch in support for row in batch} <= set(range(16)) and set(query) <= set(range(16, 24))
        for kind in ("support", "query"):
            shutil.copy(task_dir / f"{task}_support.parquet", tmp_path / f"{task}_{kind}.parquet")
    reference = Reference(path, tmp_path, LORA)
    assert relative_error(measured(case, result), expected(reference, case, result)) < TOLERANCE


def test_one_step_reptile_is_the_joint_step_up_to_scale(outcomes, references):
    cases, out, path = outcomes(1)
    case = cases["K1-reptile"]
    result = load(out, case)
    reference = references(path, False)
    theta, tasks = result["theta_before"], result["episodes"]
    joint = {n: torch.zeros_like(t) for n, t in theta.items()}
    for task, support, _ in tasks:
        gradient, _ = reference.gradient(theta, reference.examples(task, "support", support[0]))
        for n, g in gradient.items():
            joint[n] -= case["lr"] * g / len(tasks)
    assert relative_error(measured(case, result), joint) < 1e-4  # a difference of parameters: rounding at theta's scale


def test_reptile_on_lora_and_as_a_pseudo_gradient(outcomes, references):
    cases, out, path = outcomes(1)
    case = {**cases["lora-reptile"], "lr": 0.5}
    result = load(out, case)
    assert all("lora_" in name for name in result["theta_before"])
    difference = references(path, True).mean_difference(result["theta_before"], result["episodes"], 0.5)
    assert relative_error(measured(case, result), difference) < TOLERANCE

    case = cases["pseudo-reptile"]
    result = load(out, case)
    difference = references(path, False).mean_difference(result["theta_before"], result["episodes"], case["lr"])
    assert relative_error(result["gradient"], {n: -d for n, d in difference.items()}) < 1e-4


def test_passes_hold_what_the_settings_allow(outcomes):
    """Sizes of the passes of a meta-step, as (tasks, tokens of the largest batch of each)."""
    cases, out, _ = outcomes(1)
    passes = {name: load(out, cases[name])["passes"] for name in cases if name.startswith("meta_lora-group1")}
    assert [len(p) for p in passes["meta_lora-group1-packed"]] == [4]
    assert [len(p) for p in passes["meta_lora-group1-limited"]] == [3, 1]
    assert [len(p) for p in passes["meta_lora-group1-one_at_a_time"]] == [1, 1, 1, 1]
    for name, most in (("automatic", 512), ("token_budget", 160)):
        for sizes in passes[f"meta_lora-group1-{name}"]:
            assert len(sizes) == 1 or sum(sizes) <= most, (name, sizes)
    assert all(len(sizes) == 1 or max(sizes) < 256 for sizes in passes["meta_lora-group1-automatic"])


def test_packed_batches_have_no_padding_and_padded_ones_say_how_much(outcomes):
    cases, out, _ = outcomes(1)
    for case in cases.values():
        fraction = load(out, case)["metrics"]["perf/padding_fraction"]
        padded = "model.use_remove_padding=false" in case["overrides"]
        assert 0 < fraction < 1 if padded else fraction == 0, case["name"]


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_do_not_ask_each_other_for_single_numbers(world, outcomes):
    """Each answer would be a wait for the device; what a rank can count itself it does."""
    cases, out, _ = outcomes(world)
    for case in cases.values():
        for rank in range(world):
            assert not [c for c in load(out, case, rank)["collectives"] if c[0] == "all_reduce" and c[2] == 1], case


@pytest.mark.parametrize("world", [2, 4])
def test_one_reduction_between_task_groups_per_meta_step(world, outcomes):
    """Inside the inner loop nobody talks to another group; at the end there is one all-reduce, whatever K."""
    cases, out, _ = outcomes(world)
    case = cases["meta_lora-group1-packed"]
    for rank in range(world):
        result = load(out, case, rank)
        between_ranks = [call for call in result["collectives"] if call[1] > 1]
        size = sum(g.numel() for g in result["gradient"].values())
        assert [name for name, _, _ in between_ranks] == ["all_reduce"]
        assert between_ranks[0][1] == world
        assert size <= between_ranks[0][2] < size + 100  # the gradients, and one short row of losses per episode
