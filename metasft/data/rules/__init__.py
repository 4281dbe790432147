"""Hidden rules: small deterministic tasks whose prompts never say what is asked, so that only the examples can tell.

``rule`` holds the registry and makes items; ``numbers``, ``words``, ``dates``, ``units``, ``labels``, ``formats`` and
``tables`` hold the rules by kind; ``inputs`` draws what they are applied to. ``source`` makes the rules a source of
suites, ``table`` writes docs/rules.md. The sides of the tasks are data: ``data/task_sets/rules.yaml``.
"""
