"""One search of the adaptation per model type: which evaluation searches, for the others to adapt as it chose.

A scale with ``evaluate.search`` has optimizer and learning rate of the adaptation chosen for every shot count
(``evaluate_few_shot.py --search-adaptation``), once per model type and output folder: every arm of the type is adapted
alike, with ``--adaptation-settings`` of the file that the search leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from metasft.experiments.suites import Arm, Scale


class Search(NamedTuple):
    """The evaluation that searches for a model type.

    Attributes:
        run: its name.
        arm: the arm it evaluates; None where it is of an earlier plan of the output folder.
        reason: why it is this one, where the scale names another arm; else empty.
    """

    run: str
    arm: str | None
    reason: str = ""


def choose_searches(arms: Sequence[Arm], scale: Scale, finished: Mapping[str, str]) -> dict[str, Search]:
    """Model type -> the evaluation that searches, for the types that the scale names and ``arms`` has.

    A search that has finished in the output folder serves whatever follows there. Else it is the first seed of the
    scale's arm, or where that arm is not planned, of the first arm of the type that is.

    Args:
        finished: model type -> name of the evaluation whose search has finished in the output folder.

    Raises:
        ValueError: the scale's arm is of another model type.
    """
    searches: dict[str, Search] = {}
    for model_type, wanted in (scale.evaluate.search.arms if scale.evaluate.search else {}).items():
        planned = {arm.name: arm for arm in arms}
        if wanted in planned and planned[wanted].model_type != model_type:
            raise ValueError(
                f"evaluate.search.arms.{model_type} of the scale {scale.name} is {wanted}, whose model type is "
                f"{planned[wanted].model_type}: name an arm of {model_type}"
            )
        of_type = [arm for arm in arms if arm.model_type == model_type]
        if not of_type:
            continue
        arm = planned.get(wanted, of_type[0])
        task = f"{arm.tasks[0]}-" if arm.tasks else ""
        run = f"evaluate-{arm.name}-{task}seed{scale.seeds[0]}"
        if model_type in finished and finished[model_type] != run:
            searches[model_type] = Search(finished[model_type], None, "has searched in this output folder already")
        else:
            reason = "" if arm.name == wanted else f"{wanted}, which the scale names, is in none of these suites"
            searches[model_type] = Search(run, arm.name, reason)
    return searches
