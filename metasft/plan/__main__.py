"""python -m metasft.plan: see metasft/plan/command.py."""

import sys

from metasft.plan.command import main

sys.exit(main())
