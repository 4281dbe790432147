"""Model types beyond Llama: the meta-gradients of tiny random models against the reference, and the published table."""

from __future__ import annotations

import re

import pytest
from script_runner import ROOT, must_run

SCRIPT = ROOT / "tests/support/architectures.py"
# What each is there for.
SAMPLE = {
    "nemotron": "packed",  # chooses its attention class when it is built
    "falcon": "padded",  # so does this, and position ids do not tell its sequences apart
    "diffllama": "packed",
    "lfm2_moe": "padded",  # convolutions over neighbouring tokens; experts
    "gemma3n_text": "shared",  # caps its logits after the output layer
    "mixtral": "shared",  # experts, on which adapters cannot be stacked
}


def rows_of(page):
    """model type -> layouts of META-LORA, the same with order 2 and of the top layer, and FOMAML, of what works."""
    works = page.split("## Not supported")[0]
    return {m[0]: m[1:] for m in re.findall(r"^\| (\S+) " + r"\| ([^|]*) \|[^|]*" * 4 + r"\|$", works, re.M)}


@pytest.mark.slow
def test_a_sample_of_model_types(tmp_path):
    must_run(SCRIPT, *SAMPLE, "doge", "--output", tmp_path / "page.md", timeout=400)
    page = (tmp_path / "page.md").read_text()
    found = rows_of(page)
    assert {name: layouts[3] for name, layouts in found.items() if name in SAMPLE} == SAMPLE
    assert found["nemotron"][0] == "packed, tasks together" and found["mixtral"][0] == "shared"
    assert found["nemotron"][1] == found["nemotron"][0] and found["mixtral"][1] == found["mixtral"][0]
    # With the attention that transformers gives it, each token sees those after it.
    assert re.search(r"\| doge \| .*predicts a token from the tokens after it", page)


@pytest.mark.slow
def test_every_model_type_does_as_the_published_table_says(tmp_path):
    must_run(SCRIPT, "--output", tmp_path / "page.md", timeout=3600)
    published = (ROOT / "docs/architectures.md").read_text()
    found, expected = rows_of((tmp_path / "page.md").read_text()), rows_of(published)
    assert len(expected) > 60
    assert found == expected
