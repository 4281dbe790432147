"""Public benchmarks and own data as tasks: where they lie, what is in them, and how an answer is scored.

``source`` says what a source is, ``catalog`` declares those that are known; ``hub``
finds and fetches files, ``reading`` turns them into items; ``suite`` reads task suites, ``local`` own data, ``build``
makes the data files, ``duplicates`` keeps test items out of training; ``commands`` are the flags.
"""
