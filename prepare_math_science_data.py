"""Prepare the episodic math and science data: support, query and test files for every task.

    python prepare_math_science_data.py --output-dir ./data/math_science_meta --support-ratio 0.15 --query-ratio 0.25

writes, from verifiable problem generators, most of them of reasoning-gym (nothing is downloaded):

    meta_train/<task>_support.parquet  <task>_query.parquet  <task>_test.parquet    tasks for meta-training
    meta_train/<task>_full.parquet                                                  with --full-samples
    meta_test/<task>_support.parquet   <task>_test.parquet                          unseen tasks: shot pool, test set
    meta_valid/<task>_support.parquet  <task>_test.parquet                          validation tasks: likewise
    manifest.json                                                                   source, settings, SHA-256 of files

and, in the output folder, configs for the standard-LoRA baselines: ``meta_train/<task>_train.yaml`` and
``baseline_lora_mixed.yaml``, with --full-samples also those of the full-data yardstick, ``<task>_full.yaml`` and
``baseline_lora_mixed_full.yaml``. The default folder has those that come with the project beside it; they are never
rewritten. The ratios are shares of --samples-per-task: 0.15 gives 100 support examples, 0.45 gives 300. The same flags
give the same bytes.

Public benchmarks and own data make the same files (docs/sources.md):

    python prepare_math_science_data.py --suite guide_public --dry-run what would be fetched from the hub
    python prepare_math_science_data.py --benchmark bbh --local-dir ~/datasets
    python prepare_math_science_data.py --source local --mapping my_tasks.yaml

The hidden rules (docs/rules.md) and the reasoning tasks (docs/reasoning.md) need no network: ``--suite rules``,
``--suite reasoning``. ``--suite guide`` names what the command makes without flags.
"""

import sys

from metasft.cli.requirements import require

require("pyarrow", "reasoning_gym", "pydantic", "yaml")

from metasft.data.command import main  # noqa: E402  (after the check above)

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
