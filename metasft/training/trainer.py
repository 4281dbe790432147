"""The episodic base trainer: veRL's ``SFTTrainer`` with meta-batches of tasks instead of batches of examples.

Three levels: :meth:`EpisodicSFTTrainer.fit` (the run), :meth:`EpisodicSFTTrainer.train_step` (one meta-step: sample,
run, log), and :meth:`EpisodicSFTTrainer.meta_step` (the algorithm, in the scripts at the repository root).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import random
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from tqdm import tqdm

from metasft.backend.checks import check_adapter, check_language_model, check_optimizer, reading_model
from metasft.backend.devices import get_device_id, get_torch_device
from metasft.backend.engine import (
    MetaFSDPEngine,
    all_reduce_flat,
    build_training_worker,
    copy_to_hdfs,
    full_state_dict_on_rank_0,
)
from metasft.backend.layout_proof import check_stacked, choose_layout, why_not_in_two_parts
from metasft.backend.sft_trainer import SFTTrainer
from metasft.backend.tracking import Tracker
from metasft.checkpoint.exports import export_name, first_not_finite, save_hf_model, save_meta_lora
from metasft.checkpoint.model_folder import check_chat_template, check_vocabulary, fingerprint
from metasft.config.prompts import Prompts, check_arguments, given_arguments
from metasft.config.result_files import SUMMARY_FILE
from metasft.config.training import METHOD_TITLES, MetaConfig, Method
from metasft.data.episodes import EpisodeSampler
from metasft.data.task_sets import TaskFiles, TokenizedSet
from metasft.files.atomic import remove_leftovers, replacing_file
from metasft.files.paths import user_path
from metasft.model.inner_loop import (
    Adaptation,
    InnerLoop,
    InnerScope,
    InnerSettings,
    Rates,
    local_tensor,
    names_of,
    total_norm,
    within_scope,
)
from metasft.model.layouts import Probe
from metasft.model.second_order import Tape
from metasft.model.stacked_lora import TaskBatchedLoRA
from metasft.training.episode_runner import EpisodeRunner
from metasft.training.faults import RunFault, check_theta, first_fault, writing
from metasft.training.inner_rates import InnerRates
from metasft.training.meta_step import MetaBatch, MetaStepResult
from metasft.training.metrics import COUNTS, EpisodeRecord, from_table, step_metrics, to_table
from metasft.training.preemption import Preemption
from metasft.training.resume import (
    RATES_FILE,
    STATE,
    MetricsLog,
    check_layout,
    find_state,
    prune,
    read_learned,
    save_state,
)
from metasft.training.run_summary import peaks_of_ranks, write_summary
from metasft.training.update_rules import MetaGradient
from metasft.training.validation_tasks import LOSS, Measured, fixed_masks, validation_episodes, validation_metrics

logger = logging.getLogger(__name__)


class EpisodicSFTTrainer(SFTTrainer):
    """Meta-trains a model on episodes. Subclasses say what one meta-step computes.

    Args:
        config: the composed Hydra configuration (struct mode off).
        meta: its validated ``meta`` group.
        group_size: ranks per task group, from :func:`metasft.config.training.resolve_task_group`.
        task_files: from :func:`metasft.data.task_sets.find_task_files`.
        validation_files: from :func:`metasft.data.task_sets.find_validation_files`; none without ``trainer.test_freq``.

    Raises:
        ValueError: a setting that only shows once the model is loaded (for instance no module to adapt).
    """

    method: ClassVar[Method]

    def __init__(
        self,
        config: Any,
        *,
        meta: MetaConfig,
        group_size: int,
        task_files: Sequence[TaskFiles],
        validation_files: Sequence[TaskFiles] = (),
    ) -> None:
        self.meta = meta
        self.task_files, self.validation_files = list(task_files), list(validation_files)
        self.validation = validation_episodes(validation_files, meta, config.trainer.seed)
        self.lora = config.model.lora_rank > 0
        config.engine.fsdp_size = group_size
        if self.lora:
            config.checkpoint.save_lora_only = True  # the frozen base is never part of a checkpoint
        self.run_dir = user_path(config.trainer.default_local_dir)
        self.config, self._group_size = config, group_size
        self._state, self.skipped_steps = self._find_state()
        self._preemption = Preemption()
        _seed_everything(config.trainer.seed)
        with _without_line(str(config)):  # veRL prints the whole configuration; it is saved as config.yaml instead
            super().__init__(config)
        self.inner_loop = self._prove_the_passes()
        self.adapted = self._adapted()
        self.episodes = EpisodeRunner(
            self.engine,
            self.inner_loop,
            meta,
            self.support_sets,
            self.query_sets,
            self._batch_settings,
            on_cpu=self.device_name == "cpu",
        )
        self.inner_rates = self._build_inner_rates() if meta.inner_rate_columns else None
        self.learned = self.build_learned()
        if self._state is not None:
            self.engine.use_configured_optimizer()
            for name, learned in self.learned.items():
                learned.load_state_dict(read_learned(self._state / name))
        self._last_saved = self.resume_global_step
        self._updates_since_save = 0

    # ---- seams of veRL's trainer ------------------------------------------------------------------------------------

    def _build_config(self) -> None:
        with reading_model(self.config.model.path):
            super()._build_config()
        check_optimizer(self.optimizer_config)
        if self.meta.inner_rate_columns:
            check_optimizer(self.optimizer_config, "cpu")  # where the rates are
        check_language_model(self.model_config.hf_config, f"model.path={self.config.model.path}")
        if self.lora:
            check_adapter(self.model_config)

    def _build_dataset(self) -> None:
        tokenizer, processor = self.model_config.tokenizer, self.model_config.processor
        if not getattr(tokenizer, "chat_template", None) and not getattr(processor, "chat_template", None):
            raise ValueError(
                f"the tokenizer of model.path={self.config.model.path} has no chat template; set "
                "model.custom_chat_template"
            )
        model = f"model.path={self.config.model.path}"
        self._prompts = Prompts.of(processor or tokenizer, self.config.data)
        given = given_arguments(self.config.data)
        check_arguments(self._prompts.template, given, "data.apply_chat_template_kwargs")
        check_chat_template(processor or tokenizer, model, self._prompts.keywords)
        check_vocabulary(tokenizer, self.model_config.hf_config, model, self._prompts.keywords)
        load = {"tokenizer": tokenizer, "processor": processor, "data_config": self.config.data}
        self.support_sets: dict[str, TokenizedSet] = {}
        self.query_sets: dict[str, TokenizedSet] = {}
        for t in [*self.task_files, *self.validation_files]:
            # A query set out of the support file is the end of one set of examples, which are kept once.
            is_one = t.query is t.support
            examples = TokenizedSet(t.support, t.labelled if is_one else t.support_samples, **load)
            self.support_sets[t.task] = examples
            if t.query is not None:
                self.query_sets[t.task] = examples if is_one else TokenizedSet(t.query, t.query_samples, **load)
        self._check_examples()

    def _check_examples(self) -> None:
        """Find the examples that cannot be computed before hours of meta-steps come to one of them."""
        data = self.config.data
        limit, setting = data.max_length, "data.max_length"
        if data.use_dynamic_bsz and data.max_token_len_per_gpu < limit:
            limit, setting = data.max_token_len_per_gpu, "data.max_token_len_per_gpu"
        sets = dict.fromkeys([*self.support_sets.values(), *self.query_sets.values()])
        hidden = None if dist.get_rank() == 0 else True  # None: shown on a terminal
        for examples in tqdm(sets, desc="checking examples", unit="file", leave=False, disable=hidden):
            examples.check(limit, setting)
            examples.check_template()

    def _build_engine(self) -> None:
        self.training_client = build_training_worker(
            model_config=self.model_config,
            engine_config=self.engine_config,
            optimizer_config=self.optimizer_config,
            checkpoint_config=self.checkpoint_config,
            profiler_config=self.profiler_config,
        )
        self.engine: MetaFSDPEngine = self.training_client.engine

    def _init_engine(self) -> None:
        super()._init_engine()
        # Those of the model folder: a resume state, loaded later, is the run's own.
        parameters = self.engine.module.named_parameters()
        mine = first_not_finite({name: local_tensor(parameter.detach()) for name, parameter in parameters})
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        if (name := next(filter(None, found), None)) is not None:
            raise ValueError(
                f"model.path={self.config.model.path} has numbers that are not finite in {name}; copy the folder "
                "again, or use another model"
            )

    def _prove_the_passes(self) -> Adaptation:
        """Choose how examples and tasks share a pass by what computes the model's own losses on this run's examples."""
        with self.engine.eval_mode(disable_auto_offload=not self._offloads):  # brings parameters that are offloaded
            examples = self._examples_to_prove()
            not_used = choose_layout(self.engine, examples, self._batch_settings)
            inner_loop = self._build_inner_loop(examples, not_used)
            not_used += self._split_the_layers(examples)
        own = self.engine.own_attention
        if self.meta.exact_steps and self.engine.layout.attention == "own" and own not in ("eager", "sdpa"):
            raise ValueError(
                f"meta.order=2: the attention {own} cannot be differentiated twice; set "
                "+model.override_config.attn_implementation=sdpa, or meta.order=1"
            )
        if self.rank == 0:
            rows = {"shared": "packed, with shared openings computed once", "packed": "packed", "padded": "padded"}
            batched = isinstance(inner_loop, TaskBatchedLoRA)
            tasks = "several tasks in a pass" if batched else "one task at a time" if self.lora else "all parameters"
            print(f"rows: {rows[self.engine.layout.rows]}; {tasks} (compared with the model's own losses)", flush=True)
            if steps := self.meta.exact_steps:
                size = sum(parameter.numel() for parameter in inner_loop.parameters) * 4 / 2**20
                each = steps * size * (2 if self.meta.inner_optimizer == "adamw" else 1)
                print(f"order 2 keeps {each:.0f} MiB per task of a pass for {steps} inner steps", flush=True)
            for note in not_used:
                logger.warning("not used: %s", note)
        return inner_loop

    @property
    def _offloads(self) -> bool:
        """Where nothing is offloaded there is nothing to move, and veRL would still collect garbage twice on a CPU."""
        return self.engine.is_param_offload_enabled or self.engine.is_optimizer_offload_enabled

    def _build_inner_loop(self, examples: Sequence[Probe], not_used: list[str]) -> Adaptation:
        meta = self.meta
        settings = InnerSettings(lr=meta.inner_lr, optimizer=meta.inner_optimizer, clip_grad=meta.inner_clip_grad)
        if self.lora and meta.task_batching is not False:
            try:
                stacked = self.engine.batch_tasks(**settings)
                check_stacked(self.engine, stacked, examples, self._batch_settings)
                return stacked
            except ValueError as error:
                self.engine.task_batch = None
                if meta.task_batching:
                    raise ValueError(f"meta.task_batching=true cannot be used: {error}") from error
                not_used.append(f"several tasks in a pass: {error}")
        return InnerLoop(self.engine.trained_parameters(), **settings)

    @cached_property
    def trained_names(self) -> list[str]:
        """Of ``inner_loop.parameters``."""
        return names_of(self.inner_loop.parameters, self.engine.module)

    def _adapted(self) -> list[bool]:
        """Which of them inner steps adapt."""
        with self._naming_the_scope():
            return self._scope.adapted(self.trained_names, self.engine.num_layers)

    @property
    def _scope(self) -> InnerScope:
        return InnerScope(self.meta.inner_scope, self.meta.inner_top_layers)

    @contextlib.contextmanager
    def _naming_the_scope(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"meta.inner_top_layers={self.meta.inner_top_layers}: {error}") from error

    def _split_the_layers(self, examples: Sequence[Probe]) -> list[str]:
        """Let passes start at the lowest layer that inner steps adapt; in words, why they cannot."""
        with self._naming_the_scope():
            lowest = self._scope.lowest_layer(self.engine.num_layers)
        if not lowest:
            return []
        why = "the model has dropout"  # whose masks every inner step draws anew
        if not self.engine.drops_out:
            why = why_not_in_two_parts(self.engine, lowest, examples, self._batch_settings)
        return [f"lower layers computed once for all inner steps: {why}"] if why else []

    def _build_inner_rates(self) -> InnerRates:
        parameters, columns = self.inner_loop.parameters, self.meta.inner_rate_columns
        if columns > 1 and self.rank == 0:
            size = sum(local_tensor(p).numel() * p.element_size() for p in parameters)
            print(
                f"meta.learned_inner_lr={self.meta.learned_inner_lr}: {columns} buffers of {size / 2**20:.1f} MiB for "
                "each task of a pass, of what every inner step changed",
                flush=True,
            )
        tensors = [export_name(name) for name in self.trained_names]
        return InnerRates(tensors, columns, self.meta.inner_lr, self.engine.optimizer_without_decay)

    def build_learned(self) -> Mapping[str, Any]:
        """What the run learns beside theta: file of the resume state -> something with a state dict."""
        return {} if self.inner_rates is None else {RATES_FILE: self.inner_rates}

    def _examples_to_prove(self) -> list[Probe]:
        """The longest example of the run between short ones, of two tasks where there are two."""
        sets = [*self.support_sets.values(), *self.query_sets.values()]
        longest = max((examples[examples.by_length()[-1]] for examples in sets), key=lambda e: len(e["input_ids"]))
        first, *others = self.support_sets.values()
        other = others[0] if others else first
        alike = [first[index] for index in first.by_length()[:2]]
        return [*(Probe(0, tensors) for tensors in (*alike, longest)), Probe(1, other[other.by_length()[0]])]

    def _build_dataloader(self) -> None:
        # veRL's checkpoint handler saves and restores whatever is called train_dataloader.
        self.train_dataloader = EpisodeSampler(
            {t.task: t.support_samples for t in self.task_files},
            {t.task: t.query_samples for t in self.task_files},
            {t.task: t.query_start for t in self.task_files},
            num_inner_steps=self.meta.num_inner_steps,
            inner_batch_size=self.meta.inner_batch_size,
            query_batch_size=self.meta.query_batch_size,
            meta_batch_size=self.meta.meta_batch_size,
            seed=self.config.trainer.seed,
            episode_shots=self.meta.shots_of_an_episode,
        )
        data = self.config.data
        self._batch_settings = {
            "use_remove_padding": self.config.model.use_remove_padding,  # asks; the engine's layout decides
            "use_dynamic_bsz": data.use_dynamic_bsz,
            "max_token_len_per_gpu": data.max_token_len_per_gpu,
            "micro_batch_size_per_gpu": data.micro_batch_size_per_gpu,
            "temperature": 1.0,
            "pad_mode": data.pad_mode,
            "pad_token_id": self.model_config.tokenizer.pad_token_id,
        }

    def _build_ckpt_handler(self) -> None:
        super()._build_ckpt_handler()
        # The sampler's file is named after this rank; task-group ranks would collide, global ranks do not.
        self.ckpt_handler.dp_rank = self.rank
        # veRL's handler would take what the tracker file names, complete or not.
        self.ckpt_handler._determine_resume_path = lambda: None if self._state is None else str(self._state)

    def _find_state(self) -> tuple[Path | None, int]:
        """The state to resume from and the meta-steps that were skipped up to it; (None, 0) at the beginning."""
        settings = self.config.trainer
        state = find_state(self.run_dir, settings.resume_mode, settings.resume_from_path)
        return state, 0 if state is None else check_layout(state, self._layout()).get("skipped_steps", 0)

    def _layout(self) -> dict[str, Any]:
        """What the files of the resume state depend on, besides the model itself."""
        template = self.config.model.custom_chat_template
        return {
            "method": self.method,
            "world_size": dist.get_world_size(),
            "task_group_size": self._group_size,
            "lora_rank": self.config.model.lora_rank,
            "lora_alpha": self.config.model.lora_alpha if self.lora else None,
            "optimizer": f"{self.config.optim.optimizer_impl}.{self.config.optim.optimizer}",
            "learned_inner_lr": self.meta.learned_inner_lr,
            "inner_rate_columns": self.meta.inner_rate_columns,
            "task_lora_rank": self.meta.task_lora_rank if self.method == "lora_ml" else None,
            "seed": self.config.trainer.seed,
            "custom_chat_template": None if template is None else hashlib.sha256(template.encode()).hexdigest()[:16],
            "chat_template_kwargs": given_arguments(self.config.data),
            **self._fingerprints,
        }

    @cached_property
    def _fingerprints(self) -> dict[str, str | None]:
        """Of what the run reads, as rank 0 finds it."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            files = [file for task in self.task_files for file in (task.support, task.query) if file is not None]
            digests = "".join(file.sha256 for file in files)
            found[0] = {
                # All parameters are in the state; a frozen base is not.
                "base_model": fingerprint(self.config.model.path) if self.lora else None,
                "data": hashlib.sha256(digests.encode()).hexdigest()[:16],
            }
        dist.broadcast_object_list(found, src=0)
        return found[0]

    # ---- the run ----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to ``trainer.total_training_steps`` meta-steps, then write the last checkpoint and the summary.

        Asked to stop (SIGTERM), the run saves after the meta-step that is under way and returns.

        Raises:
            CannotTrack: a logger cannot be started.
            RunFault: files cannot be written, ranks differ, or too many meta-steps were skipped.
        """
        log: MetricsLog | None = None  # on rank 0
        is_done = self.resume_global_step >= self.total_training_steps
        tracker = None if is_done else Tracker(self.config)
        with writing("the settings and metrics of the run", self.run_dir):
            if self.rank == 0:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.run_dir)
                if not is_done:
                    (self.run_dir / SUMMARY_FILE).unlink(missing_ok=True)  # of a shorter run
                    with replacing_file(self.run_dir / "config.yaml") as temporary:
                        OmegaConf.save(self.config, temporary)
                log = MetricsLog(self.run_dir / "metrics.jsonl", self.resume_global_step)
        if tracker is None:
            self._nothing_to_do(log)
            return
        earlier_seconds = sum((cost.seconds for cost in log.costs), 0.0) if log is not None else 0.0
        get_torch_device().reset_peak_memory_stats()
        start = time.perf_counter()
        progress = tqdm(
            range(self.resume_global_step + 1, self.total_training_steps + 1),
            initial=self.resume_global_step,
            total=self.total_training_steps,
            desc=METHOD_TITLES[self.method],
            unit="meta-step",
            disable=log is None,
        )
        shown: dict[str, str] = {}
        with self._preemption:
            for step in progress:
                metrics, is_stopping = self.train_step(step)
                is_last = step == self.total_training_steps
                if self.validation and (is_last or step % self.test_freq == 0):
                    metrics |= self.validate(step)
                tracker.track(metrics, step)
                if log is not None:
                    for divergence in log.append({"step": step, **metrics}):
                        logger.warning("%s; %s", divergence.text(), self._calmer_settings())
                    shown |= {"support": _short(metrics, "inner/support_loss"), "query": _query(metrics)}
                    shown |= {"valid": _short(metrics, LOSS)} if LOSS in metrics else {}
                    progress.set_postfix(shown)
                    self._preemption.check_notice(metrics["perf/step_seconds"] + metrics.get("valid/seconds", 0.0))
                is_due = is_last or is_stopping or (self.save_freq > 0 and step % self.save_freq == 0)
                self._check_theta(step, is_due)
                if is_due:
                    checkpoint = self.save(step, log)
                if is_stopping and not is_last:
                    progress.close()
                    if self.rank == 0:
                        print(f"stopped by SIGTERM: meta-step {step} is saved, the same command resumes from it")
                    tracker.finish()
                    return
        seconds, peaks = time.perf_counter() - start + earlier_seconds, peaks_of_ranks()
        with writing("the summary of the run", self.run_dir):
            if log is not None:
                write_summary(self, checkpoint, log, seconds, peaks)
                print(f"{METHOD_TITLES[self.method]} finished: {checkpoint}")
                if log.best is not None:
                    print(self._best(log.best))
                for divergence in log.divergence.found:
                    print(f"but {divergence.text()}")
        tracker.finish()
        dist.barrier()

    def _best(self, best: Measured) -> str:
        """The sentence about the meta-step with the lowest loss on the validation tasks."""
        export = self._export_path(best.step)
        where = str(export) if export.exists() else "not exported (trainer.save_freq=trainer.test_freq exports each)"
        return f"best on the validation tasks: meta-step {best.step}, {best.loss:.4f} nats per response token, {where}"

    def _nothing_to_do(self, log: MetricsLog | None) -> None:
        """The run has its meta-steps; write its summary where it was killed between the last checkpoint and that."""
        done = self.resume_global_step
        with writing("the summary of the run", self.run_dir):
            if log is not None:
                if done == self.total_training_steps and not (self.run_dir / SUMMARY_FILE).is_file():
                    seconds = sum((cost.seconds for cost in log.costs), 0.0)
                    write_summary(self, self._export_path(done), log, seconds)
                print(f"nothing to do: {self.run_dir} already holds meta-step {done}")

    def train_step(self, step: int) -> tuple[dict[str, float], bool]:
        """One meta-step: draw the meta-batch, run this group's episodes, reduce over the groups, update theta.

        Returns:
            The metrics of the step, equal on every rank but for seconds and memory; and whether the run is to stop.
        """
        started = time.perf_counter()
        batch = self._draw(step)
        lr = self.engine.lr_scheduler.get_last_lr()[0]
        rates = {} if self.inner_rates is None else self.inner_rates.metrics()
        with self.engine.train_mode(disable_auto_offload=not self._offloads):
            result = self.meta_step(batch)
        if self.meta.update_shared:
            self.engine.lr_scheduler_step()
        metrics = {**step_metrics(result.rows), **rates}
        metrics["train/lr"] = lr
        if result.grad_norm is not None:
            metrics["meta/grad_norm"] = result.grad_norm
        if result.fault is not None:
            self._count_skipped(step, result.fault)
        else:
            self._updates_since_save += 1
        metrics["meta/skipped_steps"] = self.skipped_steps
        seconds = time.perf_counter() - started
        metrics["perf/step_seconds"] = seconds
        metrics["perf/peak_memory_gb"] = get_torch_device().max_memory_allocated() / 1024**3
        metrics["perf/tokens_per_second"] = metrics["perf/tokens"] / seconds
        return metrics, result.is_stopping

    def validate(self, step: int) -> dict[str, float]:
        """Loss after adaptation on the validation tasks. Theta, ``.grad`` and all random states stay as they are.

        Returns:
            The losses, equal on every rank, in nats per response token; NaN where an adaptation left the finite range.
        """
        started = time.perf_counter()
        per_group = -(-len(self.validation) // self.engine.num_task_groups)
        first = self.engine.task_group_index * per_group
        mine = self.validation[first : first + per_group]
        found: list[Any] = []  # 0-dim tensors, this rank's part of each loss
        with (
            self.engine.train_mode(disable_auto_offload=not self._offloads),
            fixed_masks(self.device_name, self.config.trainer.seed),
        ):
            # With several groups, the last ones may have no episode.
            for records in self.episodes.passes(mine) if mine else ():
                with self.episodes.adapting(records, self._step_rates(are_learned=False)):
                    self.episodes.adapt(records)
                    self.engine.module.eval()
                    self.episodes.measure_after(records)
                    self.engine.module.train()
                found += [record.query_loss_after for record in records]
        losses = torch.zeros(len(self.validation), dtype=torch.float32, device=torch.device(get_device_id()))
        if found:
            losses[first : first + len(mine)] = torch.stack(found) / self.engine.get_data_parallel_size()
        if dist.get_world_size() > 1:
            dist.all_reduce(losses)
        metrics = validation_metrics(losses.tolist())
        metrics["valid/seconds"] = time.perf_counter() - started
        return metrics

    def _draw(self, step: int) -> MetaBatch:
        """The next meta-batch, with the contiguous part of its episodes that this rank's task group works on."""
        episodes = self.train_dataloader.next_meta_batch()
        per_group = len(episodes) // self.engine.num_task_groups
        first = self.engine.task_group_index * per_group
        every = self.meta.adaptation_gain_freq
        return MetaBatch(
            step=step,
            tasks=tuple(episode.task for episode in episodes),
            episodes=episodes[first : first + per_group],
            first=first,
            measures_gain=bool(every and step % every == 0 and self.meta.query_batch_size),
        )

    def _calmer_settings(self) -> str:
        """What to change where a loss grows."""
        meta = self.meta
        is_interpolating = self.method == "reptile" and meta.reptile_update == "interpolate"
        outer = (
            f"meta.reptile_step_size={meta.reptile_step_size}"
            if is_interpolating
            else f"optim.lr={self.config.optim.lr}"
        )
        if self.method == "lora_ml":
            return f"lower {outer}" + (f" or meta.task_lora_lr={meta.task_lora_lr}" if meta.task_lora_lr else "")
        if not meta.num_inner_steps:
            return f"lower {outer}"
        if meta.order == 2:
            return f"lower {outer} or meta.inner_lr={meta.inner_lr}"
        if meta.inner_clip_grad is None:
            return f"lower {outer} or meta.inner_lr={meta.inner_lr}, or set meta.inner_clip_grad"
        return f"lower {outer}, meta.inner_lr={meta.inner_lr} or meta.inner_clip_grad={meta.inner_clip_grad}"

    def _count_skipped(self, step: int, fault: str) -> None:
        self.skipped_steps += 1
        most = self.meta.max_skipped_steps
        if self.skipped_steps > most:
            raise RunFault(
                f"meta-step {step}: {fault}; more than meta.max_skipped_steps={most} meta-steps were skipped, so the "
                f"run ends here: {self._calmer_settings()}, or allow more; the last "
                f"checkpoint is that of meta-step {self._last_saved}"
            )
        if self.rank == 0:
            logger.warning(
                "meta-step %d: %s; theta is left as it was, and the meta-step counts as skipped (%d of at most %d)",
                step,
                fault,
                self.skipped_steps,
                most,
            )

    # ---- pieces of a meta-step --------------------------------------------------------------------------------------

    @abstractmethod
    def meta_step(self, batch: MetaBatch) -> MetaStepResult:
        """Run the episodes of ``batch`` and update theta.

        Called on every rank. An implementation calls :meth:`reduce` once, whatever it computed, and leaves theta and
        all else that is learned as they are where the result names a fault. Inside ``inner_loop.adapting()`` it gives
        every record its ``contribution_norm``, or :meth:`reduce` takes that of the tensors it is given.
        """

    def adapted_gradient_step(self, batch: MetaBatch) -> MetaStepResult:
        """g = aggregate_i g_i, then veRL's optimizer: the step FOMAML and META-LORA share.

        For every task: adapt theta to theta_i on the support set; take the query gradient while theta_i is loaded; put
        theta back. g_i is that gradient, or its weighted mean with those of the inner steps
        (:class:`~metasft.training.update_rules.MetaGradient`). Then one reduction over the task groups, one clip, one
        optimizer step. With task batching the tasks of a pass go through all of it together, each with its own copy of
        theta. Learned inner rates step after theta, along their own gradient.
        """
        weight = 1.0 / self.meta.meta_batch_size if self.meta.aggregation == "mean" else 1.0
        share = self.meta.trajectory_share((batch.step - 1) / max(1, self.total_training_steps - 1))
        meta_gradient = MetaGradient(
            self.inner_loop.parameters,
            weight,
            trajectory=share,
            num_inner_steps=self.meta.num_inner_steps,
            with_support=self.adapted if self.meta.inner_scope == "top_layers" else None,
        )
        updates = self.meta.update_shared
        exact = self.meta.exact_steps
        learns_rates = self.inner_rates is not None and updates
        rates = self._step_rates(are_learned=learns_rates and not exact)
        rate_gradients: list[torch.Tensor] = []
        passes = self.episodes.passes(batch.episodes)
        for records in passes:
            if batch.measures_gain:
                self.episodes.measure_before(records)
            with self.episodes.adapting(records, rates) as adaptation:
                tape = Tape(adaptation) if exact else None
                self.episodes.adapt(records, meta_gradient if share else None, tape)
                # Inside the block: under activation checkpointing the backward recomputes activations from the
                # parameters it finds, so theta must not be back yet.
                self.episodes.query_backward(records)
                if tape is not None:
                    of_steps = self.episodes.backward_through(tape, records)
                    if learns_rates:
                        rate_gradients.append(self._in_columns(of_steps))
                for record, norm in zip(records, adaptation.gradient_norms().unbind(), strict=True):
                    record.contribution_norm = norm
                if rates is not None and rates.are_learned:
                    rate_gradients.append(adaptation.rate_gradients())
            meta_gradient.accumulate()
        # Whatever theta's aggregation, a mean.
        rate_gradient = torch.stack(rate_gradients).sum(0) / self.meta.meta_batch_size if rate_gradients else None
        result = self.reduce(batch, passes, meta_gradient.tensors() if updates else [], rate_gradient)
        if not updates or result.fault is not None:
            return result
        if rate_gradient is not None:
            rate_gradient = rate_gradient.to("cpu")
            if not rate_gradient.isfinite().all():
                return replace(result, fault="the gradient of the learned inner rates is not finite")
        meta_gradient.to_grad()
        result = self.optimizer_step(result)
        if self.inner_rates is not None and rate_gradient is not None and result.fault is None:
            assert self.meta.inner_lr_meta_lr is not None
            self.inner_rates.step(rate_gradient, self.meta.inner_lr_meta_lr * self.engine.schedule_share)
        return result

    def _step_rates(self, *, are_learned: bool) -> Rates | None:
        """Of every trained tensor in the inner steps; None: one for all. What is outside the inner scope stays."""
        rates = None if self.inner_rates is None else Rates(self.inner_rates.values.tolist(), are_learned)
        return within_scope(rates, self.meta.inner_lr, self.adapted)

    def _in_columns(self, of_steps: torch.Tensor) -> torch.Tensor:
        """Derivatives by the logarithms of the rates, [tensors, S], from those of the last inner steps' rates."""
        if self.meta.inner_rate_columns == 1:
            return of_steps.sum(dim=1, keepdim=True)
        return torch.nn.functional.pad(of_steps, (self.meta.num_inner_steps - of_steps.shape[1], 0))

    def reduce(
        self,
        batch: MetaBatch,
        passes: Sequence[Sequence[EpisodeRecord]],
        tensors: Sequence[torch.Tensor],
        rate_gradient: torch.Tensor | None = None,
    ) -> MetaStepResult:
        """The one communication of a meta-step: sum ``tensors`` over the task groups, with the loss table riding along.

        The table has one row per episode of the whole meta-batch; every group fills its own rows. ``rate_gradient``,
        where there are learned inner rates, is summed in place, of shards over the ranks of a group too.

        Returns:
            With a ``fault``, on every rank, when a loss or gradient of any episode is not finite: nobody gets to update
            theta.
        """
        records = [record for records in passes for record in records]
        if records[0].contribution_norm is None:
            norm = total_norm(tensors)
            for record in records:
                record.contribution_norm = norm
        table = to_table(
            records,
            torch.device(get_device_id()),  # not that of theta, which engine.offload_policy keeps on the host
            first=batch.first,
            rows=self.meta.meta_batch_size,
            stopping=self._preemption.requested,
        )
        others = [table] if rate_gradient is None else [table, rate_gradient]
        if self.engine.get_data_parallel_size() > 1:
            # Adapters, and so the gradient of their rates, are whole on every rank.
            all_reduce_flat(others[: 1 if self.lora else 2], self.engine.get_data_parallel_group())
            table[:-1, :-COUNTS] /= self.engine.get_data_parallel_size()
        if self.engine.num_task_groups > 1:
            all_reduce_flat([*tensors, *others], self.engine.mesh["task"].get_group())
        rows, is_stopping = from_table(table, batch.tasks, records)
        return MetaStepResult(rows, is_stopping, fault=first_fault(rows))

    def optimizer_step(self, result: MetaStepResult) -> MetaStepResult:
        """veRL's optimizer along ``.grad``; it leaves theta alone where the norm is not finite, which is a fault."""
        norm = self.engine.optimizer_step()
        fault = None if math.isfinite(norm) else f"the norm of the meta-gradient is {norm}"
        return replace(result, grad_norm=norm, fault=fault)

    # ---- what a run leaves behind -----------------------------------------------------------------------------------

    def save(self, step: int, log: MetricsLog | None = None) -> Path:
        """The export of the method, then the resume state in veRL's layout. Returns the export's path.

        In this order, a run that is killed in between repeats the meta-steps since the last resume state; the other way
        round the export would never be made.

        Args:
            step: meta-steps done.
            log: of rank 0; its lines up to ``step`` belong to the state.

        Raises:
            RunFault: a file cannot be written; the previous checkpoint is intact.
        """
        path = self.export(step)
        with writing("metrics.jsonl", self.run_dir):
            if log is not None:
                log.flush()
        layout = {**self._layout(), "skipped_steps": self.skipped_steps}
        learned = {name: learned.state_dict() for name, learned in self.learned.items()}
        save_state(
            self.run_dir, step, engine=self.engine, sampler=self.train_dataloader, layout=layout, learned=learned
        )
        self._last_saved = step
        with writing(f"the copy of meta-step {step}", self.run_dir):
            if self.rank == 0:
                # Where every meta-step since the last save was skipped, theta may be past saving, and what is kept of
                # earlier ones may be the only way back.
                if self._updates_since_save:
                    best = None if log is None or log.best is None else log.best.step
                    prune(self.run_dir, self._export_names, self.config.trainer.max_ckpt_to_keep, best)
                if self.config.trainer.default_hdfs_dir:
                    copy_to_hdfs(self.run_dir / STATE.format(step=step), self.config.trainer.default_hdfs_dir)
        self._updates_since_save = 0
        return path

    def _check_theta(self, step: int, before_a_save: bool) -> None:
        """Every ``meta.theta_check_freq`` meta-steps, and before a save: ranks that share theta hold the same bits."""
        every = self.meta.theta_check_freq
        if every and (before_a_save or step % every == 0):
            shards = 1 if self.lora else self.engine.get_data_parallel_size()
            compared: list[torch.Tensor] = [*self.inner_loop.parameters]
            device = local_tensor(compared[0]).device
            compared += [tensor.to(device) for learned in self.learned.values() for tensor in learned.tensors()]
            check_theta(compared, shards, torch.device(get_device_id()), step, self._last_saved)

    @property
    def _export_names(self) -> tuple[str, ...]:
        """What one export consists of, with ``{step}`` for the meta-step."""
        if self.lora:
            return (f"{self.method}_checkpoint_step_{{step}}.pt", "adapter_step_{step}")
        return ("step_{step}",)

    def _export_path(self, step: int) -> Path:
        return self.run_dir / self._export_names[0].format(step=step)

    def export(self, step: int) -> Path:
        """Write theta for use outside veRL; called on all ranks, rank 0 writes. Returns the export's path.

        Raises:
            RunFault: it cannot be written.
        """
        adaptation = {
            "method": self.method,
            "inner_lr": self.meta.inner_lr,
            "inner_optimizer": self.meta.inner_optimizer,
            "num_inner_steps": self.meta.num_inner_steps,
            "inner_scope": self.meta.inner_scope,
            "inner_top_layers": self.meta.inner_top_layers,
            "inner_batch_size": self.meta.inner_batch_size,
            "chat_template_kwargs": self._prompts.arguments,
        }
        if self.lora:
            from peft import get_peft_model_state_dict

            # Adapters are whole on every rank (also over a sharded base): nothing to gather.
            tensors = get_peft_model_state_dict(self.engine.module, save_embedding_layers=False)
        else:
            tensors = full_state_dict_on_rank_0(self.engine.module)
        rates = None if self.inner_rates is None else self.inner_rates.by_name()
        with writing(f"the export of meta-step {step}", self.run_dir):
            if self.rank == 0 and self.lora:
                save_meta_lora(
                    self.run_dir,
                    step,
                    self.engine.module,
                    base_model=self.config.model.path,
                    adaptation=adaptation,
                    tensors=tensors,
                    method=self.method,
                    chat_template=self._prompts.template,
                    inner_rates=rates,
                )
            elif self.rank == 0:
                processor = self.model_config.get_processor()
                save_hf_model(
                    self.run_dir / f"step_{step}",
                    tensors,
                    self.model_config.hf_config,
                    processor,
                    {**adaptation, "step": step},
                    inner_rates=rates,
                )
        return self._export_path(step)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _without_line(unwanted: str) -> Iterator[None]:
    """Pass on what is printed to stdout, except the line ``unwanted``."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        print(printed.getvalue().replace(unwanted + "\n", ""), end="", flush=True)


def _short(metrics: dict[str, float], key: str) -> str:
    return f"{metrics[key]:.3f}" if key in metrics else "-"


def _query(metrics: dict[str, float]) -> str:
    before, after = _short(metrics, "meta/query_loss_before"), _short(metrics, "meta/query_loss_after")
    return f"{before}->{after}" if before != "-" else after
