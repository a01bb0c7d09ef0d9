"""The stages of an epoch and the libraries they stand on.

The rule of this package: a **verb** at its top level is a Prefect task, one per stage of an epoch
(``train_classifier``, ``evaluate``, ``mine_failures``, ``vlm_compare``, ``tune_lora``, ``regenerate``);
a **noun** is a library that never imports Prefect and can be used and tested alone.
Imports go one way: flows -> verbs -> nouns -> ``records``, ``store``, ``seeding``.
"""
