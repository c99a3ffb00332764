"""`upcycle` and `checkpoint`: models made of models, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_folders import tensors_of, write_folder

from megatron_moe.cli import main
from megatron_moe.config.loading import load
from megatron_moe.convert.models import open_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "dense", "llama")


@pytest.fixture(scope="module")
def mixture(dense: Path) -> Path:
    out = dense.parent / "mixture"
    assert main(["upcycle", str(dense), str(out), "--experts", "4", "--noise", "0.1"]) == 0
    return out


def test_an_upcycled_model_is_exported_as_a_mixture_that_transformers_has(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copies"
    assert main(["upcycle", str(dense), str(out), "--experts", "4", "--top-k", "2"]) == 0
    assert "Its first logits are those of the dense model." in capsys.readouterr().out
    assert main(["export", str(out), str(tmp_path / "exported")]) == 0
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40).reshape(2, 20)
    logits = []
    for folder in (dense, tmp_path / "exported"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(tokens).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


def test_keys_of_the_mixture_and_its_experiment(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    argv = ["upcycle", str(dense), str(out), "--experts", "8", "--granularity", "2"]
    assert main([*argv, "moe.moe_layer_freq=2", "moe.moe_aux_loss_coeff=0.002"]) == 0
    experiment = load(out / "experiment.yaml").experiment
    width = open_model(dense).experiment.model.ffn_hidden_size
    assert experiment.moe is not None and width is not None
    assert (experiment.moe.moe_ffn_hidden_size, experiment.moe.moe_router_topk) == (width // 2, 4)
    assert (experiment.moe.moe_layer_freq, experiment.moe.moe_aux_loss_coeff) == (2, 0.002)


def test_advice_needs_no_output_and_names_both_computes(
    dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["upcycle", str(dense), "--experts", "8", "--advise", "--dense-tokens", "2e12"]
    assert main([*argv, "--moe-tokens", "1e11"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Upcycle: ") and "C_dense" in printed and "C_MoE" in printed
    assert main(argv) == 2
    assert "--moe-tokens" in capsys.readouterr().err


def test_one_expert_taken_out_is_the_dense_model_again(dense: Path, tmp_path: Path) -> None:
    assert main(["upcycle", str(dense), str(tmp_path / "copies"), "--experts", "4"]) == 0
    for which, name in ((["--expert", "3"], "one"), (["--mean"], "mean")):
        out = tmp_path / name
        assert main(["checkpoint", "dense", str(tmp_path / "copies"), str(out), *which]) == 0
        assert main(["checkpoint", "diff", str(out), str(dense)]) == 0


def test_a_difference_is_shown_largest_first(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bf16"
    assert main(["checkpoint", "cast", str(mixture), str(out), "--dtype", "bf16"]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "diff", str(mixture), str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    sizes = [float(line.split()[-2]) for line in lines if line.startswith(("decoder.", "embedding."))]
    assert len(sizes) > 5 and sizes == sorted(sizes, reverse=True) and 1e-4 < sizes[0] < 1e-2


def test_an_average_lies_between_its_models(mixture: Path, dense: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    argv = ["upcycle", str(dense), str(other), "--experts", "4", "--noise", "0.1", "--seed", "7"]
    assert main(argv) == 0
    out = tmp_path / "average"
    argv = ["checkpoint", "average", str(out), str(mixture), str(other), "--shares", "3", "1"]
    assert main(argv) == 0
    name = "decoder.layers.0.mlp.experts.2.linear_fc2.weight"
    one, two, mean = (open_model(path).weights.read(name) for path in (mixture, other, out))
    torch.testing.assert_close(mean, 0.75 * one + 0.25 * two, rtol=1e-6, atol=1e-7)


def test_an_expert_is_taken_out_as_a_file(mixture: Path, tmp_path: Path) -> None:
    out = tmp_path / "expert.safetensors"
    assert main(["checkpoint", "extract", str(mixture), str(out), "*.layers.1.*.experts.3.*"]) == 0
    tensors = tensors_of(tmp_path)
    assert {*tensors} == {f"decoder.layers.1.mlp.experts.3.linear_fc{i}.weight" for i in (1, 2)}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, open_model(mixture).weights.read(name))


def test_parts_of_one_matrix_are_taken_out_of_a_hugging_face_folder(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "deepseek_v2")
    out = tmp_path / "out" / "all.safetensors"
    assert main(["checkpoint", "extract", str(source), str(out), "*"]) == 0
    assert {*tensors_of(out.parent)} == {*open_model(source).weights.inventory()}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["upcycle", "{mixture}", "{out}", "--experts", "4"], "has 4 experts already"),
        (["upcycle", "{dense}", "--experts", "4"], "OUT: name the checkpoint folder"),
        (["upcycle", "{dense}", "{mixture}", "--experts", "4"], "is there already"),
        (["upcycle", "{dense}", "{out}", "--experts", "4", "--granularity", "7"], "does not divide"),
        (["upcycle", "{dense}", "{out}", "--experts", "4", "--top-k", "5"], "moe.moe_router_topk"),
        (["upcycle", "{out}", "{out}", "--experts", "4"], "no such folder"),
        (
            ["upcycle", "{dense}", "{out}", "--experts", "4", "moe=null"],
            "override moe: is no key of the mixture",
        ),
        (
            ["upcycle", "{dense}", "{out}", "--experts", "4", "moe.num_moe_experts=8"],
            "is what --experts says",
        ),
        (["checkpoint", "dense", "{dense}", "{out}", "--mean"], "is a dense model already"),
        (["checkpoint", "dense", "{mixture}", "{out}", "--expert", "4"], "the experts 0 to 3"),
        (["checkpoint", "average", "{out}", "{dense}", "{mixture}"], "cannot be averaged"),
        (["checkpoint", "average", "{out}", "{dense}", "--shares", "1", "2"], "2 numbers for 1 model"),
        (["checkpoint", "extract", "{dense}", "{out}.safetensors", "nothing"], "no weight has such a name"),
        (["checkpoint", "extract", "{dense}", "{out}", "*"], "ending in .safetensors"),
        (["checkpoint", "rename", "{dense}", "{out}", "decoder=x"], "are missing"),
        (["checkpoint", "rename", "{dense}", "{out}", "(=x"], "is no regular expression"),
        (["checkpoint", "rename", "{dense}", "{out}", r"decoder=\9"], "invalid group reference"),
        (["checkpoint", "extract", "{dense}", "{dense}/config.json/x.safetensors", "*"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_and_nothing_is_written(
    arguments: list[str],
    problem: str,
    dense: Path,
    mixture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"dense": dense, "mixture": mixture, "out": tmp_path / "out"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
