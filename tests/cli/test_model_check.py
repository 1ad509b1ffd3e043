"""`tinyvllm models --check`: what it says of models, and of files and directories that are none."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from tests.builders import GGUFTweaks, write_json, write_safetensors, write_tiny_gguf, write_tiny_hf_llama
from tests.families.mlx import MODELS, write_mlx
from tests.families.recipe import write_gguf, write_hf
from tests.families.recipes import RECIPES
from tests.families.recipes.gemma3 import write_multimodal_hf
from tinyvllm.arrays import Format
from tinyvllm.cli.commands import app
from tinyvllm.cli.model_check import parse_size
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.model_check import examine_files


@pytest.fixture(autouse=True)
def models_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYVLLM_MODELS", str(tmp_path / "no-models"))
    monkeypatch.delenv("DEV", raising=False)


def run(path: Path | str, *flags: str) -> Any:
    given = flags if "--device-memory" in flags else ("--device-memory", "1GiB", *flags)
    return CliRunner().invoke(app, ["models", "--check", str(path), *given], env={"COLUMNS": "200"})


def check(path: Path, *flags: str) -> dict[str, Any]:
    done = run(path, "--json", *flags)
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == (0 if document["runs"] else 1)
    return document


def test_a_gguf_file_is_described(tmp_path: Path) -> None:
    tweaks = GGUFTweaks(quant_of={"ffn_down": "Q6_K"})
    files = write_tiny_gguf(tmp_path / "tiny.gguf", quant="Q4_0", tweaks=tweaks, hidden=64, ffn=256)
    found = check(files.path, "--device", "CUDA")
    assert (found["runs"], found["architecture"], found["source"]) == (True, "llama", "GGUF file")
    rows = {(row["part"], row["format_name"]): row for row in found["weights"]}
    assert {name for _, name in rows} == {"Q4_0", "Q6_K", "float32"}
    down = rows["feed-forward", "Q6_K"]
    assert down["num_tensors"] == found["layers"]
    assert down["file_bytes"] == down["num_weights"] / 256 * 210
    assert found["weight_bytes"] == sum(row["device_bytes"] for row in found["weights"])
    assert found["general_kernels"]["CUDA"] == [] and found["has_chat_template"] is True
    assert found["device"]["context"] == found["max_position"]
    assert "no reasoning of earlier messages: the template leaves it out" in found["chat_template_limits"]


def test_people_are_shown_the_same(tmp_path: Path) -> None:
    done = run(write_mlx(tmp_path / "mlx", MODELS["llama"]).path)
    assert done.exit_code == 0, done.stdout
    texts = ("MLX directory, family llama", "mlx-6bit-g32", "KiB for every token", "METAL: fused", "it runs")
    for text in (*texts, "chat template: no tools"):
        assert text in done.stdout


def test_recurrent_layers_cost_a_state_for_every_sequence(tmp_path: Path) -> None:
    files = write_gguf(tmp_path / "tiny.gguf", RECIPES["qwen3_5"])
    found = check(files.path)
    matrices, convolution = 4 * 32 * 32, 4 * (2 * 2 * 32 + 4 * 32)  # elements of each of three layers
    assert found["state_bytes"] == 3 * 4 * (matrices + convolution)
    assert {one["part"] for one in found["weights"]} >= {"attention", "recurrence"}
    assert "state of 3 recurrent layers" in run(files.path).stdout


def test_windows_cost_what_they_keep(tmp_path: Path) -> None:
    found = check(write_hf(tmp_path / "gemma", RECIPES["gemma3"]).path)
    window = RECIPES["gemma3"].config["sliding_window"]
    assert {one["window"] for one in found["kv_cache"]} == {None, window}
    assert sum(one["num_layers"] for one in found["kv_cache"]) == found["layers"]


def test_the_tensors_of_every_family_are_those_that_it_loads(tmp_path: Path) -> None:
    for name, recipe in RECIPES.items():
        report = examine_files(write_hf(tmp_path / name, recipe), "CPU")
        assert report.num_weights > 0, name


def test_experts_are_a_part_of_their_own_of_which_few_are_active(tmp_path: Path) -> None:
    recipe = RECIPES["qwen3_moe"]
    found = check(write_hf(tmp_path / "sparse", recipe).path)
    parts = {row["part"]: row for row in found["weights"]}
    assert parts["experts"]["num_tensors"] == 2 * 3 and parts["router"]["num_tensors"] == 2
    in_experts = 2 * recipe.config["num_experts"] * 3 * recipe.config["moe_intermediate_size"] * 64
    assert parts["experts"]["num_weights"] == in_experts
    assert found["active_parameters"] == found["parameters"] - in_experts * 5 // 8
    done = run(write_hf(tmp_path / "again", recipe).path)
    assert " active) parameters" in done.stdout.replace("\n", " ")


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    found = check(write_multimodal_hf(tmp_path / "gemma", RECIPES["gemma3"]).path)
    assert found["runs"] and any("vision tower" in line for line in found["left_out"])


def test_a_format_without_a_fused_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format that files have has one today, so this one is said to have none."""

    def uncovered(form: Format) -> str:
        return "a grid" if form.name == "IQ3_XXS" else ""

    monkeypatch.setattr("tinyvllm.execution.model_check.uncovered", uncovered)
    files = write_tiny_gguf(tmp_path / "tiny.gguf", quant="Q4_0", hidden=256, ffn=256)
    shapes = {"blk.0.ffn_up.weight": "IQ3_XXS"}
    found = check(replace_types(files.path, tmp_path / "grid.gguf", shapes))
    (line,) = found["general_kernels"]["CUDA"]
    assert line == "products of IQ3_XXS, which has a grid"
    assert found["general_kernels"]["CPU"] == []


def replace_types(source: Path, target: Path, types: dict[str, str]) -> Path:
    """A copy in which some tensors are zeros of another type."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if tensor.name in types:
            kind = gguf.GGMLQuantizationType[types[tensor.name]]
            size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
            rows, columns = int(tensor.shape[1]), int(tensor.shape[0])
            data = np.zeros((rows, columns // size * num_bytes), np.uint8)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_too_little_memory_is_a_problem_with_numbers(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "hf")
    found = check(files.path, "--device-memory", "100KiB")
    assert not found["runs"] and "no room for KV blocks: 0.00 GiB free" in found["problem"]
    assert found["architecture"] == "llama", "and it is described all the same"


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GiB", 16 << 30), ("24 GB", 24 * 10**9), ("1.5g", 1_500_000_000), ("1000", 1000), (None, None)],
)
def test_sizes(text: str | None, size: int | None) -> None:
    assert parse_size(text) == size


def test_a_bad_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TinyvllmError, match=r"--device-memory is 'lots': give a size such as 16GiB or 24GB"):
        parse_size("lots")


# ---- Files and directories that are no model, or none that runs ----


def adapter(path: Path) -> Path:
    path.mkdir()
    write_json(path / "adapter_config.json", {"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    write_safetensors(path / "adapter_model.safetensors", {"base_model.x.lora_A.weight": np.zeros((2, 4), np.float32)})
    return path


def pipeline(path: Path) -> Path:
    path.mkdir()
    write_json(path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    return path


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def pickled(path: Path) -> Path:
    path = path.with_suffix(".bin")
    path.write_bytes(pickle.dumps({"weight": 1}))
    return path


def pickled_directory(path: Path) -> Path:
    files = write_tiny_hf_llama(path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    return files.path


def single_file(path: Path) -> Path:
    return write_tiny_hf_llama(path).path / "model.safetensors"


def cut_gguf(path: Path) -> Path:
    files = write_tiny_gguf(path.with_suffix(".gguf"), hidden=64)
    files.path.write_bytes(files.path.read_bytes()[:-5000])
    return files.path


def garbage_gguf(path: Path) -> Path:
    path = path.with_suffix(".gguf")
    path.write_bytes(b"GGUF" + np.random.default_rng(1).bytes(5000))
    return path


def empty_gguf(path: Path) -> Path:
    path = path.with_suffix(".gguf")
    path.touch()
    return path


def projector(path: Path) -> Path:
    return write_header_only(path, {"general.type": "mmproj"}, "clip")


def gguf_adapter(path: Path) -> Path:
    return write_header_only(path, {"general.type": "adapter", "adapter.type": "lora"}, "llama")


def write_header_only(path: Path, metadata: dict[str, str], architecture: str) -> Path:
    path = path.with_suffix(".gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_string(key, value)
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(**settings: Any) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        files = write_tiny_hf_llama(path)
        config = json.loads((path / "config.json").read_text())
        write_json(path / "config.json", config | settings)
        return files.path

    return write


def edited(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """A directory whose tensors were changed after config.json was written."""

    def write(path: Path) -> Path:
        files = write_tiny_hf_llama(path)
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors")
        return files.path

    return write


DOWN = "model.layers.1.mlp.down_proj.weight"


def without(name: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        files = write_tiny_hf_llama(path)
        (path / name).unlink()
        return files.path

    return write


def broken_json(path: Path) -> Path:
    files = write_tiny_hf_llama(path)
    (path / "config.json").write_text("{")
    return files.path


def cut_safetensors(path: Path) -> Path:
    files = write_tiny_hf_llama(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    return files.path


def act_order(path: Path) -> Path:
    """GPTQ with rows in another order than the file's."""
    files = write_tiny_hf_llama(path, hidden=64)
    rows, columns = 64, 64
    name = "model.layers.0.self_attn.q_proj"
    tensors = load_file(path / "model.safetensors")
    del tensors[f"{name}.weight"]
    tensors[f"{name}.qweight"] = np.zeros((columns // 8, rows), np.int32)
    tensors[f"{name}.qzeros"] = np.zeros((columns // 32, rows // 8), np.int32)
    tensors[f"{name}.scales"] = np.zeros((columns // 32, rows), np.float16)
    tensors[f"{name}.g_idx"] = np.random.default_rng(0).permutation(columns).astype(np.int32) // 32
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}
    write_json(path / "config.json", config | {"quantization_config": settings})
    return files.path


ODD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "LoRA adapter": (
        adapter,
        "is a LoRA adapter of org/base, not a model: serve that model with --enable-lora --lora-modules",
    ),
    "diffusion pipeline": (pipeline, "is a StableDiffusionPipeline pipeline, which makes images or video"),
    "empty directory": (empty, "is an empty directory: download the model into it"),
    "pickle": (pickled, "is a pickle file, which can run code when it is read: convert it"),
    "directory of pickles": (pickled_directory, "has its weights as pickle files (pytorch_model.bin)"),
    "one safetensors file": (single_file, "is one file of a model: give its directory"),
    "cut GGUF": (cut_gguf, "is cut short or damaged"),
    "garbage after the magic": (garbage_gguf, "has GGUF version"),
    "empty GGUF": (empty_gguf, "is empty: download it again"),
    "image encoder": (projector, "is the image encoder of a model (mmproj), not the model"),
    "LoRA adapter in GGUF": (gguf_adapter, "is a LoRA adapter in GGUF format, not a model: merge it"),
    "unknown class": (changed(architectures=["BertForMaskedLM"]), "which is not supported; known: LlamaForCausalLM"),
    "unknown method": (
        changed(quantization_config={"quant_method": "hqq"}),
        "quant_method is 'hqq', which is not supported; known: mlx, fp8",
    ),
    "act-order": (act_order, "was quantized in activation order"),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer.json"),
    "no weights": (without("model.safetensors"), "has no *.safetensors: download its weights in that format"),
    "broken config.json": (broken_json, "cannot read"),
    "cut safetensors": (cut_safetensors, "is cut short or damaged"),
    "a tensor is missing": (edited(lambda tensors: tensors.pop(DOWN)), f"odd has no tensor {DOWN} (shape (64, 96))"),
    "another shape": (
        edited(lambda tensors: tensors.update({DOWN: np.zeros((32, 96), np.float32)})),
        f"tensor {DOWN} has shape (32, 96), but the model's settings ask for (64, 96)",
    ),
    "a tensor too many": (
        edited(lambda tensors: tensors.update({"model.extra.weight": np.zeros((4, 4), np.float32)})),
        "odd has 1 tensor(s) that this architecture does not use: model.extra.weight",
    ),
    "a width that no kernel reads": (
        lambda path: write_tiny_hf_llama(path, heads=3, kv_heads=3, head_dim=16).path,
        "self_attn.o_proj.weight has 48 columns, but kernels read 32 at a time",
    ),
    "more layers in config.json": (changed(num_hidden_layers=5), "odd has no tensor model.layers."),
    "fewer layers in config.json": (changed(num_hidden_layers=1), "tensor(s) that this architecture does not use"),
    "a setting of a wrong type": (changed(num_attention_heads="many"), "num_attention_heads is 'many'"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_does_not_run_is_named_with_what_to_do(tmp_path: Path, what: str) -> None:
    write, text = ODD[what]
    path = write(tmp_path / "odd")
    found = check(path)
    assert not found["runs"] and text in found["problem"], found["problem"]
    done = run(path)
    assert done.exit_code == 1 and "it does not run" in done.stdout and "Traceback" not in done.output


def test_no_path_and_no_name() -> None:
    done = run("/no/such/model")
    assert done.exit_code == 1 and "there is no file or directory /no/such/model" in done.stdout


def test_an_error_of_a_library_is_not_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyvllm.execution import model_check

    def fail(*args: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(model_check, "open_checkpoint", fail)
    found = check(write_tiny_hf_llama(tmp_path / "hf").path)
    assert "cannot be read (IndexError: list index out of range): download it again" in found["problem"]
