#!/usr/bin/env bash
# From nothing to a few-shot curve in a few minutes on 2 cores: data, META-LORA on the embedded model, evaluation, plot.
# `make quickstart` calls it with the environment's bin folder on the PATH. Small settings: it shows that everything
# works; the results worth quoting are in docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=results/quickstart
RUN=checkpoints/quickstart
# A bf16 base halves the memory traffic; adapters and their optimizer stay in fp32 either way.
BF16="engine.model_dtype=bf16 engine.mixed_precision.param_dtype=bf16"
STEPS=6
rm -rf "$RUN"  # a folder holds one run
mkdir -p "$OUT"

echo "== 1/4 data: five training tasks, two unseen tasks"
python prepare_math_science_data.py --output-dir data/math_science_meta --support-ratio 0.15 --query-ratio 0.25 --skip-existing

echo "== 2/4 META-LORA: $STEPS meta-steps on two processes, one task group each"
# shellcheck disable=SC2086
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 meta_lora_trainer.py \
    --config-path data/math_science_meta --config-name config_meta_lora_example $BF16 \
    meta.num_inner_steps=5 meta.inner_batch_size=2 trainer.total_training_steps=$STEPS \
    trainer.default_local_dir=$RUN

echo "== 3/4 few-shot evaluation on unseen tasks: the base model and the meta-learned adapter"
EVAL="--eval-tasks calculus theorem_proving --n-shots 0 5 25 --n-runs 1 --limit 12 --max-new-tokens 20 --adaptation-steps 6 --dtype bfloat16 --overwrite"
# The two evaluations share nothing: one core each.
# shellcheck disable=SC2086
OMP_NUM_THREADS=1 python evaluate_few_shot.py --model-type base --model-path models/SmolLM2-135M-Instruct \
    --output-dir $OUT/base $EVAL > $OUT/base.log 2>&1 &
BASE=$!
# shellcheck disable=SC2086
OMP_NUM_THREADS=1 python evaluate_few_shot.py --model-type meta_lora \
    --model-path $RUN/meta_lora_checkpoint_step_$STEPS.pt --output-dir $OUT/meta_lora $EVAL
wait $BASE || { cat $OUT/base.log; exit 1; }

echo "== 4/4 comparison"
python compare_methods.py --results base=$OUT/base meta_lora=$OUT/meta_lora --summaries meta_lora=$RUN/run_summary.json \
    --task all --output $OUT/comparison.png --table $OUT/comparison.md
echo
echo "plot:    $OUT/comparison.png"
echo "table:   $OUT/comparison.md"
echo "adapter: $RUN/adapter_step_$STEPS (a PEFT folder)"
