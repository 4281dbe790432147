"""What was measured, told: statistics, figures, tables and pages from the files that evaluations, trainings and
benchmarks left. Nothing here imports torch or veRL, trains, or evaluates a model."""
