"""The command line: messages on stderr, results on stdout, one JSON document, and the exit codes of the contract."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny_model import VOCABULARY

from qpert.runtime import cli
from qpert.runtime.cli import run
from qpert.runtime.sessions.providers import PROVIDERS, available_providers

TINY = ["--max-length", "32", "--tokenizer", str(VOCABULARY), "--vision-heads", "2", "--qformer-heads", "2"]


@pytest.fixture
def refused(capsys):
    """Runs a command line that has to be refused, and returns its message."""

    def check(arguments, code=2):
        assert run([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == "", "a refused command prints no result"
        assert "Traceback" not in captured.err
        return captured.err

    return check


# export


def test_an_unknown_architecture_is_refused(refused, tmp_path):
    message = refused(["export", "blip3", "--out", tmp_path / "b"])
    assert "error: unknown model family 'blip3', expected one of blip2, clip, coca, siglip" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "x.pth does not exist"),
        (b"", "x.pth is empty"),
        (b"<html>404</html>", "is a web page"),
        (b"PK\x03\x04 and no more", "is truncated"),
        (b"\x80\x02nonsense" * 99, "x.pth is corrupt, truncated or not a checkpoint"),
    ],
)
def test_a_missing_or_unreadable_checkpoint_is_refused_and_leaves_nothing(refused, tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.pth").write_bytes(content)
    assert message in refused(["export", "blip2", "--checkpoint", tmp_path / "x.pth", "--out", tmp_path / "b"])
    assert {path.name for path in tmp_path.iterdir()} <= {"x.pth"}


def test_a_name_that_is_no_checkpoint_is_refused_with_the_names_that_are(refused, tmp_path):
    message = refused(["export", "blip2", "--checkpoint", "cocoo", "--out", tmp_path / "b"])
    assert "'cocoo' is not a checkpoint" in message
    assert "coco, pretrain, pretrain_vitL" in message


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("60", "image size 60 is not a multiple of the patch size 14; nearest multiples: 56 and 70"),
        ("0", "got image size 0, expected at least 1 pixel"),
        ("-14", "got image size -14, expected at least 1 pixel"),
        ("7", "image size 7 is not a positive multiple of the patch size 14"),
        ("big", "Invalid value for '--image-size'"),
    ],
)
@pytest.mark.parametrize("checkpoint", ["demo", "tiny"])
def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused(
    refused, tiny_weights, tmp_path, size, message, checkpoint
):
    source = ["--checkpoint", tiny_weights, *TINY] if checkpoint == "tiny" else ["--checkpoint", "demo"]
    assert message in refused(["export", "blip2", *source, "--image-size", size, "--out", tmp_path / "b"])
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_exists_is_refused_and_left_alone(refused, tiny_bundle, copy_of):
    folder = copy_of(tiny_bundle)
    before = sorted(folder.rglob("*"))
    message = refused(["export", "blip2", "--out", folder])
    assert f"{folder} exists; pass --force to replace it, or another --out" in message
    assert sorted(folder.rglob("*")) == before


def test_a_folder_that_is_no_bundle_is_refused_even_with_force(refused, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    message = refused(["export", "blip2", "--out", tmp_path / "home", "--force"])
    assert "exists and is not a bundle; --force replaces bundles only" in message
    assert (tmp_path / "home" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-batch", "0"], "--max-batch is 0, expected at least 1"),
        (["--max-boxes", "0"], "--max-boxes is 0, expected at least 1"),
        (["--max-text", "-1"], "--max-text is -1, expected at least 1"),
        (["--max-length", "2"], "--max-length is 2, expected at least 3"),
        (["--max-length", "33"], "--max-length is 33, expected at most the checkpoint's 32 position embeddings"),
        (["--threshold", "1.5"], "threshold is 1.5; expected a contribution ratio between 0 and 1"),
        (["--threshold", "nan"], "threshold is nan"),
        (["--alpha", "inf"], "alpha is inf"),
        (["--samples", "1"], "got 1 samples, expected at least 2"),
        (["--precision", "int4"], "'int4' is not one of 'fp32', 'fp16', 'bf16'"),
        (["--perturb", "itm"], "'itm' is not one of"),
        (["--tokenizer", "/no/vocab.txt"], "/no/vocab.txt does not exist"),
        (["--qformer-heads", "5"], "5 Q-Former heads do not divide the width 32"),
        (["--nonsense"], "No such option"),
    ],
)
def test_options_that_cannot_be_met_are_refused(refused, tiny_weights, tmp_path, options, message):
    arguments = ["export", "blip2", "--checkpoint", tiny_weights, *TINY, *options, "--out", tmp_path / "b"]
    assert message in refused(arguments)
    assert list(tmp_path.iterdir()) == []


def test_exporting_without_the_export_extra_says_what_to_install(refused, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    message = refused(["export", "blip2", "--out", tmp_path / "b"], code=3)
    assert "exporting needs onnxscript, not installed here; pip install 'qpert[export]'" in message


def test_export_prints_one_json_document_on_stdout_and_everything_else_on_stderr(stock_export):
    assert stock_export.code == 0
    document = json.loads(stock_export.out)
    assert document["bundle"] == str(stock_export.folder)
    on_disk = json.loads((stock_export.folder / "manifest.json").read_text())
    assert {key: value for key, value in document.items() if key != "bundle"} == on_disk
    assert f"next: qpert verify {stock_export.folder}" in stock_export.err
    assert document["perturbation"]["stages"] == "none"
    assert "object_masks" not in json.dumps(document["graphs"])


def test_the_manifest_holds_the_exact_command(stock_export):
    command = json.loads(stock_export.out)["command"]
    assert command.startswith("qpert export blip2 --checkpoint /")
    assert command.endswith(f"--max-batch 3 --max-text 6 --max-length 12 --out {stock_export.folder} --json")


# inspect


def test_inspect_prints_the_manifest_and_whether_the_files_are_right(tiny_bundle, copy_of, capsys):
    folder = copy_of(tiny_bundle)
    assert run(["inspect", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("files_ok") is True
    assert document.pop("engines") == []
    assert document == json.loads((folder / "manifest.json").read_text())
    (folder / "onnx" / "text.onnx").write_bytes(b"x")
    assert run(["inspect", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["files_ok"] is False


def test_inspect_tells_a_person_which_file_was_altered_or_is_missing(tiny_bundle, copy_of, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = copy_of(tiny_bundle)
    (folder / "onnx" / "text.onnx").write_bytes(b"x")
    (folder / "tokenizer.json").unlink()
    assert run(["inspect", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("onnx/text.onnx" in line and "ALTERED" in line for line in lines)
    assert any("tokenizer.json" in line and "missing" in line for line in lines)
    assert any("onnx/vision.onnx" in line and "ok" in line for line in lines)
    assert any("not verified yet" in line for line in lines)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_manifest_from_a_newer_schema_is_refused(refused, tiny_bundle, copy_of, edit_manifest, command):
    folder = copy_of(tiny_bundle)
    edit_manifest(folder, lambda values: values.update(schema_version=99))
    assert "schema version 99, this qpert reads up to 2; upgrade qpert" in refused([command, folder])


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_a_path_that_leaves_the_bundle_is_refused(refused, tiny_bundle, copy_of, edit_manifest, command, name):
    folder = copy_of(tiny_bundle)
    edit_manifest(folder, lambda values: values["files"].update({name: "0" * 64}))
    message = refused([command, folder])
    assert f"the manifest names '{name}', which is outside the bundle" in message
    assert "do not trust this bundle" in message


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_link_that_leaves_the_bundle_is_refused(refused, tiny_bundle, copy_of, command):
    folder = copy_of(tiny_bundle)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tiny_bundle / "tokenizer.json")  # even with the right content
    assert "'tokenizer.json', which is outside the bundle" in refused([command, folder])


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_that_is_no_bundle_is_refused(refused, tmp_path, command):
    message = refused([command, tmp_path / "nothing"])
    assert "expected a" in message
    assert "that `qpert export` made" in message or "made by `qpert export`" in message


# verify


def test_verify_refuses_a_file_whose_hash_differs(refused, tiny_bundle, copy_of):
    folder = copy_of(tiny_bundle)
    data = folder / "onnx" / "vision.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    assert "vision.data was altered: its SHA-256 is" in refused(["verify", folder])


def test_a_provider_that_this_machine_lacks_exits_3(refused, tiny_bundle):
    absent = next(name for name in PROVIDERS if name not in available_providers())
    message = refused(["verify", tiny_bundle, "--provider", absent], code=3)
    assert f"provider '{absent}' was asked for" in message
    assert "CPUExecutionProvider" in message


def test_a_checkpoint_without_a_live_reference_is_refused(refused, tiny_bundle, tiny_weights):
    message = refused(["verify", tiny_bundle, "--checkpoint", tiny_weights])
    assert "--checkpoint is for a live reference; add --reference torch, hf, lavis or open_clip" in message


def test_another_checkpoint_than_the_exported_one_is_refused(refused, tiny_bundle):
    message = refused(["verify", tiny_bundle, "--reference", "torch", "--checkpoint", "demo"])
    assert "SHA-256" in message
    assert "pass that one as --checkpoint" in message


def test_a_live_reference_without_torch_says_what_to_install(tiny_bundle):
    program = "import sys; sys.modules['torch'] = None; from qpert.runtime import cli; sys.exit(cli.run(sys.argv[1:]))"
    arguments = ["verify", str(tiny_bundle), "--reference", "torch"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "a live reference (torch) needs" in done.stderr
    assert "pip install 'qpert[export]'" in done.stderr


def test_samples_that_cannot_be_read_are_refused_by_name(refused, tiny_bundle, copy_of, edit_manifest):
    from qpert.runtime.files import sha256_of

    folder = copy_of(tiny_bundle)
    path = folder / "samples.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    edit_manifest(folder, lambda values: values["files"].update({"samples.safetensors": sha256_of(path)}))
    assert "samples.safetensors cannot be read as recorded samples" in refused(["verify", folder])


def test_verify_prints_one_json_document_writes_its_reports_and_enters_the_verdict(
    tiny_bundle, copy_of, capsys, tmp_path
):
    folder = copy_of(tiny_bundle)
    assert run(["verify", str(folder), "--json", "--html", str(tmp_path / "page.html")]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["verdict"], document["level"], document["reference"]) == ("pass", "tensor", "recorded")
    assert all(set(gate) == {"name", "value", "limit", "pass"} and gate["pass"] for gate in document["gates"])
    assert "comparing with the outputs recorded at export" in captured.err
    assert json.loads((folder / "reports" / "verify.json").read_text()) == document
    page = (folder / "reports" / "verify.html").read_text()
    assert page == (tmp_path / "page.html").read_text()
    assert "image_query: max abs difference" in page
    assert run(["inspect", str(folder), "--json"]) == 0
    verification = json.loads(capsys.readouterr().out)["verification"]
    assert (verification["verdict"], verification["reference"], verification["provider"]) == ("pass", "recorded", "cpu")


def test_verify_tells_a_person_the_verdict_and_every_gate(tiny_bundle, copy_of, capsys):
    assert run(["verify", str(copy_of(tiny_bundle))]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(
        "Parity with PyTorch, as recorded at export: PASS\nLevel tensor, fp32 on cpu against the "
    )
    assert "itm: max abs difference" in captured.out


def test_verify_of_a_bundle_that_cannot_be_written_says_so_and_gives_its_verdict(tiny_bundle, copy_of, capsys):
    folder = copy_of(tiny_bundle)
    shutil.rmtree(folder / "reports", ignore_errors=True)
    (folder / "reports").write_text("in the way")
    before = (folder / "manifest.json").read_text()
    assert run(["verify", str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "pass"
    assert "the report was not saved" in captured.err
    assert (folder / "manifest.json").read_text() == before


def test_a_page_that_cannot_be_written_is_an_error_without_a_traceback(refused, tiny_bundle, copy_of):
    message = refused(["verify", copy_of(tiny_bundle), "--html", "/no/such/folder/page.html"])
    assert "--html /no/such/folder/page.html cannot be written" in message


def test_verify_against_the_torch_reference_passes_on_recorded_and_on_fresh_inputs(
    demo_bundle, copy_of, edit_manifest, capsys
):
    folder = copy_of(demo_bundle)

    def narrow(values):  # verification takes as long as the largest batch is large
        for graph in values["graphs"].values():
            for axis, most in {"B": 3, "I": 3, "T": 9}.items():
                if axis in graph["ranges"]:
                    graph["ranges"][axis]["max"] = most

    edit_manifest(folder, narrow)
    assert run(["verify", str(folder), "--reference", "torch", "--seed", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    failed = [gate["name"] for gate in document["gates"] if not gate["pass"]]
    assert (document["verdict"], document["reference"], failed) == ("pass", "torch", [])
    cases = {row["case"] for row in document["comparisons"]}
    assert {"many_boxes", "recorded many_boxes", "longest", "recorded longest"} <= cases


@pytest.mark.slow
def test_verify_of_perturb_both_passes(both_bundle, copy_of, capsys):
    assert run(["verify", str(copy_of(both_bundle)), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"itm: zero weights against no boxes", "itm: max abs difference"} <= {
        gate["name"] for gate in document["gates"]
    }
    assert any(row["graph"] == "itm" and row["perturbed"] for row in document["comparisons"])


def test_verify_of_perturb_none_passes(stock_export, copy_of, capsys):
    assert run(["verify", str(copy_of(stock_export.folder)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "pass"


# the edge itself


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("qpert.runtime.sessions.doctor.platform.platform", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["doctor"])


def test_an_interrupt_exits_130_in_one_line(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("qpert.runtime.cli.doctor.examine", interrupt)
    assert run(["doctor"]) == 130
    captured = capsys.readouterr()
    assert captured.err.strip() == "interrupted"
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["nonsense"], ["verify"], ["inspect", "a", "b"], ["--nonsense"]])
def test_usage_that_is_wrong_exits_2(refused, arguments):
    assert "Usage: qpert" in refused(arguments)


COMMANDS = ["export", "verify", "eval", "calibrate", "quantize", "build"]
COMMANDS += ["index", "search", "bench", "inspect", "doctor"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_on_stdout_and_exits_0(command, capsys):
    assert run([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: qpert" in out
    if not command:
        assert all(f"\n  {name} " in out for name in COMMANDS)


def test_users_warnings_are_one_line_and_libraries_warnings_none(monkeypatch, capsys):
    import warnings

    from qpert.runtime.errors import QpertWarning

    def examine():
        warnings.warn("two boxes were clipped", QpertWarning, stacklevel=1)
        warnings.warn("old API", UserWarning, stacklevel=1)
        np.array([1.0]) / np.array([0.0])
        return []

    monkeypatch.setattr("qpert.runtime.cli.doctor.examine", examine)
    assert run(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "warning: two boxes were clipped\n"
    assert json.loads(captured.out) == {}


def test_qpert_export_is_qpert_export(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["qpert-export", "blip3"])
    with pytest.raises(SystemExit) as caught:
        cli.export_main()
    assert caught.value.code == 2
    assert "unknown model family 'blip3'" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["qpert", "inspect", os.devnull])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
