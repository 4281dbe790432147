"""veRL: its engine with task groups, a CPU platform, tracking. The only room that imports it."""
