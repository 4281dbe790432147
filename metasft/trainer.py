"""The episodic base trainer: veRL's ``SFTTrainer`` with meta-batches of tasks instead of batches of examples.

Three levels: :meth:`EpisodicSFTTrainer.fit` (the run), :meth:`EpisodicSFTTrainer.train_step` (one meta-step: sample,
run, log), and :meth:`EpisodicSFTTrainer.meta_step` (the algorithm, in the scripts at the repository root).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import statistics
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from tqdm import tqdm
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils.device import get_torch_device
from verl.utils.tracking import Tracking

from metasft.adaptation import InnerLoop
from metasft.checkpoint import (
    LAYOUT_FILE,
    check_resume_layout,
    prune_exports,
    save_hf_model,
    save_meta_lora,
    size_bytes,
    write_json,
)
from metasft.config import METHOD_TITLES, MetaConfig, Method
from metasft.episodes import Episode, EpisodeSampler
from metasft.lora_batch import TaskBatchedLoRA
from metasft.meta_gradient import MetaGradient
from metasft.task_data import TaskFiles, TokenizedSet
from metasft.verl_backend import (
    MetaFSDPEngine,
    all_reduce_flat,
    build_training_worker,
    full_state_dict_on_rank_0,
    make_batch,
)

logger = logging.getLogger(__name__)


@dataclass
class EpisodeRecord:
    """What one rank saw of one episode. Losses are this rank's part; their mean over the task group is the batch mean.

    Losses stay on the device (0-dim tensors), so that no step of the inner loop waits for it.

    Attributes:
        support_losses: loss before each inner step, K values.
        query_loss_before: query loss at theta (None when not measured).
        query_loss_after: query loss at theta_i (None without a query set).
        tokens: tokens in the forwards that were followed by a backward.
        padding: positions beside them that those forwards computed for nothing.
    """

    task: str
    support_losses: list[torch.Tensor] = field(default_factory=list)
    query_loss_before: torch.Tensor | None = None
    query_loss_after: torch.Tensor | None = None
    tokens: int = 0
    padding: int = 0

    # One row of numbers per episode travels in the all-reduce of the meta-gradient: values, flags of what is set,
    # counts.
    def to_row(self, device: torch.device) -> torch.Tensor:
        losses = self.support_losses
        values = [
            losses[0] if losses else None,
            losses[-1] if losses else None,
            torch.stack(losses).mean() if losses else None,
            self.query_loss_before,
            self.query_loss_after,
        ]
        zero = torch.zeros((), device=device)
        counts = [float(value is not None) for value in values] + [float(self.tokens), float(self.padding)]
        return torch.cat(
            [torch.stack([zero if value is None else value for value in values]), torch.tensor(counts, device=device)]
        )


_ROW_FIELDS = ("support_first", "support_last", "support_mean", "query_before", "query_after")
_ROW_WIDTH = 2 * len(_ROW_FIELDS) + 2


CPU_TOKENS, CPU_TOKENS_ALONE = 512, 256
"""Where tasks in one pass stop gaining on a CPU core (docs/performance.md, one inner step)."""


class EpisodicSFTTrainer(SFTTrainer):
    """Meta-trains a model on episodes. Subclasses say what one meta-step computes.

    Args:
        config: the composed Hydra configuration (struct mode off).
        meta: its validated ``meta`` group.
        group_size: ranks per task group, from :func:`metasft.config.resolve_task_group`.
        task_files: from :func:`metasft.task_data.find_task_files`.

    Raises:
        ValueError: a setting that only shows once the model is loaded (for instance no module to adapt).
    """

    method: ClassVar[Method]

    def __init__(self, config: Any, *, meta: MetaConfig, group_size: int, task_files: Sequence[TaskFiles]) -> None:
        self.meta = meta
        self.task_files = list(task_files)
        self.lora = config.model.lora_rank > 0
        config.engine.fsdp_size = group_size
        if self.lora:
            config.checkpoint.save_lora_only = True  # the frozen base is never part of a checkpoint
        self.run_dir = Path(config.trainer.default_local_dir).expanduser()
        _seed_everything(config.trainer.seed)
        with _without_line(str(config)):  # veRL prints the whole configuration; it is saved as config.yaml instead
            super().__init__(config)
        inner = {"lr": meta.inner_lr, "optimizer": meta.inner_optimizer, "clip_grad": meta.inner_clip_grad}
        self.inner_loop: InnerLoop | TaskBatchedLoRA
        if self.lora and meta.task_batching is not False:
            self.inner_loop = self.engine.batch_tasks(**inner)
        else:
            self.inner_loop = InnerLoop(self.engine.trained_parameters(), **inner)

    # ---- seams of veRL's trainer ------------------------------------------------------------------------------------

    def _build_dataset(self) -> None:
        tokenizer, processor = self.model_config.tokenizer, self.model_config.processor
        if not getattr(tokenizer, "chat_template", None) and not getattr(processor, "chat_template", None):
            raise ValueError(
                f"the tokenizer of model.path={self.config.model.path} has no chat template; set "
                "model.custom_chat_template"
            )
        load = {"tokenizer": tokenizer, "processor": processor, "data_config": self.config.data}
        self.support_sets = {t.task: TokenizedSet(t.support, t.support_samples, **load) for t in self.task_files}
        self.query_sets = {
            t.task: TokenizedSet(t.query, t.query_samples, **load) for t in self.task_files if t.query is not None
        }

    def _build_engine(self) -> None:
        self.training_client = build_training_worker(
            model_config=self.model_config,
            engine_config=self.engine_config,
            optimizer_config=self.optimizer_config,
            checkpoint_config=self.checkpoint_config,
            profiler_config=self.profiler_config,
        )
        self.engine: MetaFSDPEngine = self.training_client.engine

    def _build_dataloader(self) -> None:
        # veRL's checkpoint handler saves and restores whatever is called train_dataloader.
        self.train_dataloader = EpisodeSampler(
            {task: len(examples) for task, examples in self.support_sets.items()},
            {task: len(examples) for task, examples in self.query_sets.items()},
            num_inner_steps=self.meta.num_inner_steps,
            inner_batch_size=self.meta.inner_batch_size,
            query_batch_size=self.meta.query_batch_size,
            meta_batch_size=self.meta.meta_batch_size,
            seed=self.config.trainer.seed,
        )
        data = self.config.data
        self._batch_settings = {
            "use_remove_padding": self.config.model.use_remove_padding,
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
        resume_path = self.ckpt_handler._determine_resume_path()
        if resume_path is not None:
            check_resume_layout(Path(resume_path), self._layout())

    def _layout(self) -> dict[str, Any]:
        """What the files of the resume state depend on, besides the model itself."""
        return {
            "method": self.method,
            "world_size": dist.get_world_size(),
            "task_group_size": self.engine.get_data_parallel_size(),
            "lora_rank": self.config.model.lora_rank,
        }

    # ---- the run ----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to ``trainer.total_training_steps`` meta-steps, then write the last checkpoint and the summary."""
        first_step = self.resume_global_step + 1
        is_logging = self.rank == 0
        tracking = None
        if is_logging:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, self.run_dir / "config.yaml")
            earlier = _keep_metrics_until(self.run_dir / "metrics.jsonl", self.resume_global_step)
            tracking = Tracking(
                project_name=self.config.trainer.project_name,
                experiment_name=self.config.trainer.experiment_name,
                default_backend=OmegaConf.to_container(self.config.trainer.logger)
                if OmegaConf.is_config(self.config.trainer.logger)
                else self.config.trainer.logger,
                config=OmegaConf.to_container(self.config, resolve=True),
            )
        get_torch_device().reset_peak_memory_stats()
        start = time.perf_counter()
        progress = tqdm(
            range(first_step, self.total_training_steps + 1),
            initial=self.resume_global_step,
            total=self.total_training_steps,
            desc=METHOD_TITLES[self.method],
            unit="meta-step",
            disable=not is_logging,
        )
        checkpoint = None
        for step in progress:
            metrics = self.train_step(step)
            if tracking is not None:
                for backend in tracking.logger:
                    # One readable line on the console; everything, per task too, everywhere else.
                    data = {k: v for k, v in metrics.items() if k.count("/") == 1} if backend == "console" else metrics
                    tracking.log(data=data, step=step, backend=[backend])
                with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **metrics}) + "\n")
                progress.set_postfix({"support": _short(metrics, "inner/support_loss"), "query": _query(metrics)})
            is_last = step == self.total_training_steps
            if is_last or (self.save_freq > 0 and step % self.save_freq == 0):
                checkpoint = self.save(step)
        if checkpoint is None:
            if is_logging:
                print(f"nothing to do: {self.run_dir} already holds meta-step {self.resume_global_step}")
            return
        if is_logging:
            seconds = time.perf_counter() - start + sum(record["perf/step_seconds"] for record in earlier)
            self._write_summary(checkpoint, seconds)
            print(f"{METHOD_TITLES[self.method]} finished: {checkpoint}")
            tracking.finish()
        dist.barrier()

    def train_step(self, step: int) -> dict[str, float]:
        """One meta-step: draw the meta-batch, run this group's episodes, reduce over the groups, update theta.

        Returns:
            The metrics of the step, equal on every rank.
        """
        started = time.perf_counter()
        meta_batch = self.train_dataloader.next_meta_batch()
        episodes = self.episodes_of_this_group(meta_batch)
        lr = self.engine.lr_scheduler.get_last_lr()[0]
        self._measure_gain = bool(self.meta.adaptation_gain_freq) and step % self.meta.adaptation_gain_freq == 0
        # Where nothing is offloaded there is nothing to move, and veRL would still collect garbage twice on a CPU.
        offloads = self.engine.is_param_offload_enabled or self.engine.is_optimizer_offload_enabled
        with self.engine.train_mode(disable_auto_offload=not offloads):
            self.step = step
            records, grad_norm = self.meta_step(episodes)
        if self.meta.update_shared:
            self.engine.lr_scheduler_step()
        metrics = self._step_metrics(meta_batch, records)
        metrics["train/lr"] = lr
        if grad_norm is not None:
            metrics["meta/grad_norm"] = grad_norm
            if not np.isfinite(grad_norm):
                logger.warning("meta-step %d: the meta-gradient is not finite; theta was not updated", step)
        seconds = time.perf_counter() - started
        metrics["perf/step_seconds"] = seconds
        metrics["perf/peak_memory_gb"] = get_torch_device().max_memory_allocated() / 1024**3
        metrics["perf/tokens_per_second"] = metrics["perf/tokens"] / seconds
        return metrics

    def episodes_of_this_group(self, meta_batch: Sequence[Episode]) -> Sequence[Episode]:
        """The contiguous part of the meta-batch that this rank's task group works on."""
        per_group = len(meta_batch) // self.engine.num_task_groups
        first = self.engine.task_group_index * per_group
        return meta_batch[first : first + per_group]

    # ---- pieces of a meta-step --------------------------------------------------------------------------------------

    @abstractmethod
    def meta_step(self, episodes: Sequence[Episode]) -> tuple[list[EpisodeRecord], float | None]:
        """Run ``episodes`` and update theta. Returns their records and the norm of the meta-gradient before clipping
        (None when the algorithm has none or theta is not updated)."""

    def passes(self, episodes: Sequence[Episode]) -> Iterator[list[Episode]]:
        """The episodes in the portions that are adapted together: one by one without task batching.

        With it, as many as ``meta.task_batch_limit`` and the memory of one pass allow: ``data.max_token_len_per_gpu``
        tokens, or ``data.micro_batch_size_per_gpu`` examples where micro-batches have a fixed size. Without a limit, a
        pass on a CPU holds :data:`CPU_TOKENS`, and tasks of :data:`CPU_TOKENS_ALONE` or more are alone. Every rank of a
        task group cuts alike, since all of them know all the examples.
        """
        if not isinstance(self.inner_loop, TaskBatchedLoRA):
            yield from ([episode] for episode in episodes)
            return
        limit, budget = self.meta.task_batch_limit, self._pass_budget
        alone = budget + 1
        if limit is None and self.device_name == "cpu" and self.config.data.use_dynamic_bsz:
            # A core's products run at full speed from a few hundred rows on: more of them only take more memory.
            budget, alone = min(budget, CPU_TOKENS), CPU_TOKENS_ALONE
        portion: list[Episode] = []
        used = 0
        for episode in episodes:
            size = self._size_in_a_pass(episode)
            size = budget if size >= alone else size
            if portion and (len(portion) == limit or used + size > budget):
                yield portion
                portion, used = [], 0
            portion.append(episode)
            used += size
        yield portion

    @property
    def _pass_budget(self) -> int:
        """Tokens (examples, without dynamic micro-batches) that one pass of a rank may hold."""
        data = self.config.data
        return data.max_token_len_per_gpu if data.use_dynamic_bsz else data.micro_batch_size_per_gpu

    def _size_in_a_pass(self, episode: Episode) -> int:
        """What the episode's largest batch adds to a pass of one rank, in the unit of :attr:`_pass_budget`."""
        group = self.engine.get_data_parallel_size()
        if not self.config.data.use_dynamic_bsz:
            return max(self.meta.inner_batch_size, self.meta.query_batch_size) // group
        support, query = self.support_sets[episode.task], self.query_sets.get(episode.task)
        sizes = [support.tokens(batch) for batch in episode.support_batches]
        if episode.query_batch:
            sizes.append(query.tokens(episode.query_batch))
        return -(-max(sizes) // group)

    def adapt(self, episodes: Sequence[Episode], records: Sequence[EpisodeRecord]) -> None:
        """The inner loops of the episodes of one pass, inside ``inner_loop.adapting()``: K steps on their supports."""
        sets = [self.support_sets[episode.task] for episode in episodes]
        for indices in zip(*(episode.support_batches for episode in episodes), strict=True):
            batch = self._batch(sets, indices, records)
            losses = self.engine.loss_and_backward(batch, len(episodes))
            for record, loss in zip(records, losses.unbind(), strict=True):
                record.support_losses.append(loss)
            self.inner_loop.step()

    def query_backward(self, episodes: Sequence[Episode], records: Sequence[EpisodeRecord]) -> None:
        """Backward of the query losses at whatever parameters are loaded."""
        for record, loss in zip(records, self._query_losses(episodes, records, backward=True), strict=True):
            record.query_loss_after = loss

    def measure_before(self, episodes: Sequence[Episode], records: Sequence[EpisodeRecord]) -> None:
        """Query losses at theta, for the adaptation gain, every ``meta.adaptation_gain_freq`` meta-steps."""
        if self._measure_gain and self.meta.query_batch_size:
            for record, loss in zip(records, self._query_losses(episodes, records, backward=False), strict=True):
                record.query_loss_before = loss

    def measure_after(self, episodes: Sequence[Episode], records: Sequence[EpisodeRecord]) -> None:
        """Query losses at the adapted parameters, for algorithms that take no gradient there."""
        if self._measure_gain and self.meta.query_batch_size:
            for record, loss in zip(records, self._query_losses(episodes, records, backward=False), strict=True):
                record.query_loss_after = loss

    def _query_losses(
        self, episodes: Sequence[Episode], records: Sequence[EpisodeRecord], *, backward: bool
    ) -> tuple[torch.Tensor, ...]:
        sets = [self.query_sets[episode.task] for episode in episodes]
        batch = self._batch(sets, [episode.query_batch for episode in episodes], records if backward else None)
        run = self.engine.loss_and_backward if backward else self.engine.loss_only
        return run(batch, len(episodes)).unbind()

    def first_order_meta_step(self, episodes: Sequence[Episode]) -> tuple[list[EpisodeRecord], float | None]:
        """g = aggregate_i d/dtheta L(theta_i,K; Q_i), then veRL's optimizer: the step FOMAML and META-LORA share.

        For every task: adapt theta to theta_i on the support set; take the query gradient while theta_i is loaded; put
        theta back. Then one reduction over the task groups, one clip, one optimizer step. With task batching the tasks
        of a pass go through all of it together, each with its own copy of theta.
        """
        weight = 1.0 / self.meta.meta_batch_size if self.meta.aggregation == "mean" else 1.0
        meta_gradient = MetaGradient(self.inner_loop.parameters, weight)
        records = []
        for portion in self.passes(episodes):
            of_pass = [EpisodeRecord(episode.task) for episode in portion]
            self.measure_before(portion, of_pass)
            with self.inner_loop.adapting(len(portion)):
                self.adapt(portion, of_pass)
                # Inside the block: under activation checkpointing the backward recomputes activations from the
                # parameters it finds, so theta must not be back yet.
                self.query_backward(portion, of_pass)
            meta_gradient.take()
            records += of_pass
        if not self.meta.update_shared:
            self.reduce([], records)
            return records, None
        self.reduce(meta_gradient.tensors(), records)
        meta_gradient.hand_over()
        return records, self.engine.optimizer_step()

    def reduce(self, tensors: Sequence[torch.Tensor], records: Sequence[EpisodeRecord]) -> None:
        """The one communication of a meta-step: sum ``tensors`` over the task groups, with the loss table riding along.

        The table has one row per episode of the whole meta-batch; every group fills its own rows.
        """
        device = self.inner_loop.parameters[0].device
        table = torch.zeros(self.meta.meta_batch_size, _ROW_WIDTH, dtype=torch.float32, device=device)
        first = self.engine.task_group_index * len(records)
        table[first : first + len(records)] = torch.stack([record.to_row(device) for record in records])
        if self.engine.get_data_parallel_size() > 1:
            # Losses are means over the ranks of the group; the two counts are sums.
            dist.all_reduce(table, group=self.engine.get_data_parallel_group())
            table[:, :-2] /= self.engine.get_data_parallel_size()
        if self.engine.num_task_groups > 1:
            all_reduce_flat([*tensors, table], self.engine.mesh["task"].get_group())
        self._table = table

    def _batch(
        self,
        sets: Sequence[TokenizedSet],
        indices: Sequence[Sequence[int]],
        records: Sequence[EpisodeRecord] | None = None,
    ) -> Any:
        """This rank's share of the batches of one pass, a task per entry; counts its tokens in ``records``."""
        rank, size = self.engine.get_data_parallel_rank(), self.engine.get_data_parallel_size()
        examples: list[Any] = []
        tasks: list[int] = []
        weights: list[float] = []
        for task, (task_set, chosen) in enumerate(zip(sets, indices, strict=True)):
            share = task_set.batch(chosen[rank::size])
            examples += share
            tasks += [task] * len(share)
            weights += [1.0 / task_set.response_tokens(chosen)] * len(share)
        if records is not None:
            lengths = [len(example["input_ids"]) for example in examples]
            width = 0 if self._batch_settings["use_remove_padding"] else max(lengths)
            for task, length in zip(tasks, lengths, strict=True):
                records[task].tokens += length
                records[task].padding += max(width - length, 0)
        return make_batch(examples, tasks, weights, self._batch_settings)

    def _step_metrics(self, meta_batch: Sequence[Episode], records: Sequence[EpisodeRecord]) -> dict[str, float]:
        width = len(_ROW_FIELDS)
        by_task: dict[str, list[dict[str, float]]] = {}
        for episode, row in zip(meta_batch, self._table.tolist(), strict=True):
            by_task.setdefault(episode.task, []).append(
                {name: row[i] for i, name in enumerate(_ROW_FIELDS) if row[width + i] > 0}
            )
        rows = [row for task_rows in by_task.values() for row in task_rows]
        metrics: dict[str, float] = {}
        for name, key in (
            ("support_mean", "inner/support_loss"),
            ("support_first", "inner/support_loss_first"),
            ("support_last", "inner/support_loss_last"),
            ("query_before", "meta/query_loss_before"),
            ("query_after", "meta/query_loss_after"),
        ):
            _put_mean(metrics, key, rows, name)
            for task, task_rows in by_task.items():
                _put_mean(metrics, f"{key}/{task}", task_rows, name)
        for task, task_rows in [("", rows), *by_task.items()]:
            gains = [
                r["query_before"] - r["query_after"] for r in task_rows if "query_before" in r and "query_after" in r
            ]
            if gains:
                metrics["meta/adaptation_gain" + (f"/{task}" if task else "")] = sum(gains) / len(gains)
        tokens, padding = self._table[:, -2:].sum(dim=0).tolist()
        metrics["perf/tokens"] = int(tokens)
        metrics["perf/padding_fraction"] = padding / (tokens + padding)
        return metrics

    # ---- what a run leaves behind -----------------------------------------------------------------------------------

    def save(self, step: int) -> Path:
        """Resume state in veRL's layout plus the export of the method. Returns the export's path."""
        if self.rank == 0:
            write_json(self.run_dir / f"global_step_{step}" / LAYOUT_FILE, self._layout())
        self.ckpt_handler.save_checkpoint(step)
        path = self.export(step)
        dist.barrier()
        return path

    def export(self, step: int) -> Path:
        """Write theta for use outside veRL; called on all ranks, rank 0 writes. Returns the export's path."""
        adaptation = {
            "method": self.method,
            "inner_lr": self.meta.inner_lr,
            "inner_optimizer": self.meta.inner_optimizer,
            "num_inner_steps": self.meta.num_inner_steps,
            "inner_batch_size": self.meta.inner_batch_size,
        }
        if self.lora:
            from peft import get_peft_model_state_dict

            # Adapters are whole on every rank (also over a sharded base): nothing to gather.
            tensors = get_peft_model_state_dict(self.engine.module, save_embedding_layers=False)
            patterns = (f"{self.method}_checkpoint_step_{{step}}.pt", "adapter_step_{step}")
            if self.rank == 0:
                save_meta_lora(
                    self.run_dir,
                    step,
                    self.engine.module,
                    base_model=self.config.model.path,
                    adaptation=adaptation,
                    tensors=tensors,
                    method=self.method,
                )
        else:
            patterns = ("step_{step}",)
            state_dict = full_state_dict_on_rank_0(self.engine.module)
            if self.rank == 0:
                save_hf_model(
                    self.run_dir,
                    state_dict,
                    self.model_config.hf_config,
                    self.model_config.get_processor(),
                    adaptation,
                    step,
                )
        if self.rank == 0:
            prune_exports(self.run_dir, patterns, self.config.trainer.max_ckpt_to_keep)
        return self.run_dir / patterns[0].format(step=step)

    def _write_summary(self, checkpoint: Path, seconds: float) -> None:
        """``run_summary.json``: what the whole run cost, the parts before a resume included."""
        from importlib.metadata import version

        steps = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        on_cpu = self.device_name == "cpu"
        write_json(
            self.run_dir / "run_summary.json",
            {
                "method": self.method,
                "base_model": self.config.model.path,
                "lora_rank": self.config.model.lora_rank,
                "tasks": [task.task for task in self.task_files],
                "support_samples": self.meta.support_samples,
                "world_size": dist.get_world_size(),
                "task_group_size": self.engine.get_data_parallel_size(),
                "device_name": _device_name(on_cpu),
                "meta_steps": self.total_training_steps,
                "tokens": sum(step["perf/tokens"] for step in steps),
                "seconds_total": seconds,
                "seconds_per_step_median": statistics.median(step["perf/step_seconds"] for step in steps),
                "peak_memory_bytes": get_torch_device().max_memory_allocated(),
                "peak_memory_kind": "rss" if on_cpu else "device",
                "checkpoint": checkpoint.name,
                "checkpoint_bytes": size_bytes(checkpoint),
                "versions": {
                    name: version(name) for name in ("metasft", "verl", "torch", "transformers", "peft", "numpy")
                },
                "seed": self.config.trainer.seed,
            },
        )


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


def _device_name(on_cpu: bool) -> str:
    if not on_cpu:
        return get_torch_device().get_device_name()
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads per process"


def _keep_metrics_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut the metrics back to the meta-step that is resumed from (0: an empty file); returns what is kept."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a run that was killed while writing it
            if record["step"] <= step:
                kept.append(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return kept


def _put_mean(metrics: dict[str, float], key: str, rows: Sequence[dict[str, float]], name: str) -> None:
    values = [row[name] for row in rows if name in row]
    if values:
        metrics[key] = sum(values) / len(values)


def _short(metrics: dict[str, float], key: str) -> str:
    return f"{metrics[key]:.3f}" if key in metrics else "-"


def _query(metrics: dict[str, float]) -> str:
    before, after = _short(metrics, "meta/query_loss_before"), _short(metrics, "meta/query_loss_after")
    return f"{before}->{after}" if before != "-" else after
