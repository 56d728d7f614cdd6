"""From a recipe and a command line to a trained model, in the order in which a run passes through these files:

recipes/, config.py   the configuration, and overrides of its fields
arguments.py          the command line's other options
checks.py             everything a user can get wrong; gives a RunSpec (run_spec.py)
build.py              model, teacher_table.py, optimizer.py, engine.py, module.py; gives a Trainer
trainer.py            the loop; step.py and gradient_cache.py compute a step, nonfinite.py explains a failed one
run.py                log, save, validate, export; state.py is saved, run_log.py and run_folder.py write files
"""
