"""What the tests of the few-shot evaluation share; a module that needs another ``data_dir`` defines its own."""

from __future__ import annotations

import pytest
from few_shot_data import save_random_adapter, write_unseen_tasks


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_unseen_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    return save_random_adapter(tmp_path_factory.mktemp("adapter"), tiny_model)
