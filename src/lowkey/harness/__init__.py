"""lm-eval over compressed caches: the adapter, the protocols, and where a prompt is split.

lm-eval comes with the extra `eval`. Only `model`, `suite_tasks`, `tasks` and `run` import it. May import
every room but `cli`, `planner`, `report`, `conversion`, `export` and `pretraining`.
"""
