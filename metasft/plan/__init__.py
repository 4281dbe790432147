"""What a meta-step costs on a machine, by arithmetic: before one is rented, and to judge a measured time by.

:mod:`metasft.plan.flops` counts the operations of one pass, :mod:`metasft.plan.meta_step` those of a meta-step with the
bytes that it moves, sends and holds, and :mod:`metasft.plan.machines` says how fast a machine is at each.
"""
