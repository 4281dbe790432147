"""One task per reasoning-gym family.

``groups`` says which there are, by kind and group, and which are left out; ``metasft.data.families`` how each is used;
``metasft.data.sources.embedded`` makes the items; ``table`` writes docs/reasoning.md. The sides of the tasks are data:
``data/task_sets/reasoning.yaml``.
"""
