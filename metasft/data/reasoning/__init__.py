"""One task per reasoning-gym family: which families there are, by kind and group, and which are left out.

``metasft.data.families`` says how each is used, ``metasft.data.sources.embedded`` makes the items. The sides of the tasks
are data: ``data/suites/reasoning.yaml``. ``table`` writes docs/reasoning.md.
"""
