"""Trains a model, from a recipe and a command line. A run uses these files in this order:

recipes/, config.py   define the configuration, and override its fields
arguments.py          parses the other options of the command line
checks.py             checks what the user gave, and returns a RunSpec (run_spec.py)
build.py              builds everything, with teacher_table.py, optimizer.py, engine.py, module.py; returns a Trainer
trainer.py            runs the training loop; step.py or gradient_cache.py computes a step
nonfinite.py          finds the worker that produced a NaN or an infinite number
run.py                logs, saves, validates, exports; with state.py, run_log.py, run_folder.py
"""
