"""Which library builds for which GPUs, and what is refused before any work is done."""

from __future__ import annotations

import pytest

from qpert.exporter.engines.targets import Target, parse_targets, plan_build
from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.sessions.gpus import Gpu
from qpert.runtime.sessions.tensorrt import libraries as flavors

L4 = Gpu("NVIDIA L4", "580.65", "8.9")
H200 = Gpu("NVIDIA H200", "580.65", "9.0")


class Library:
    """Stands in for a library where only whether it is installed matters."""

    __version__ = "10.14.1"


@pytest.fixture
def installed(monkeypatch):
    """Says which libraries are installed."""

    def choose(*modules):
        def import_module(name):
            if name in modules:
                return Library
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(flavors.importlib, "import_module", import_module)

    return choose


def plan(flavor="auto", target="auto", precision="fp16", gpu=None):
    return plan_build(flavor=flavor, target=target, precision=precision, gpu=gpu)


def names(made):
    return [target.name for target in made.targets]


def test_a_comma_separates_engines_and_a_plus_joins_architectures_in_one():
    assert parse_targets("sm80, sm86+sm89") == (Target(("sm80",)), Target(("sm86", "sm89")))


@pytest.mark.parametrize("text", ["", "sm8", "ampere", "sm80,", "SM80", "sm80;sm89", "../sm80", "current,sm80"])
def test_what_is_no_architecture_is_refused_in_words(text):
    with pytest.raises(InputError, match="expected auto, current, or architectures such as sm80,sm89"):
        parse_targets(text)


@pytest.mark.parametrize("text", ["sm80,sm80", "sm80+sm80", "sm80+sm89,sm80+sm89"])
def test_a_target_named_twice_is_refused(text):
    with pytest.raises(InputError) as caught:
        parse_targets(text)
    assert caught.value.code == "engine-target-twice"


def test_without_a_gpu_auto_builds_for_every_architecture_that_rtx_can_build_for(installed):
    installed("tensorrt", "tensorrt_rtx")
    made = plan()
    assert made.flavor.name == "rtx"
    assert names(made) == ["sm75", "sm80+sm86+sm89+sm120+sm121"]
    assert "TensorRT builds only on the GPU that will run the engine" in made.why


def test_bfloat16_leaves_out_the_architecture_that_has_none(installed):
    installed("tensorrt_rtx")
    assert names(plan(precision="bf16")) == ["sm80+sm86+sm89+sm120+sm121"]
    with pytest.raises(UnavailableError, match="sm75 has no bf16 ") as caught:
        plan(target="sm75", precision="bf16", flavor="rtx")
    assert caught.value.code == "precision-unsupported"


def test_with_a_gpu_auto_takes_classic_tensorrt_for_that_gpu_and_says_why(installed):
    installed("tensorrt", "tensorrt_rtx")
    made = plan(gpu=L4)
    assert (made.flavor.name, names(made)) == ("classic", ["sm89"])
    assert made.why == "it is installed and times its kernels on this machine's NVIDIA L4"
    assert made.folder(made.targets[0]) == "sm89-classic10.14.1"


def test_with_a_gpu_and_rtx_alone_auto_takes_rtx_and_says_what_was_missing(installed):
    installed("tensorrt_rtx")
    made = plan(gpu=L4)
    assert (made.flavor.name, names(made)) == ("rtx", ["sm89"])
    assert made.why == "the other library cannot: TensorRT is not installed; pip install 'qpert[trt]'"


def test_architectures_of_other_gpus_are_built_with_rtx(installed):
    installed("tensorrt", "tensorrt_rtx")
    made = plan(target="sm80,sm120", gpu=L4)
    assert (made.flavor.name, names(made)) == ("rtx", ["sm80", "sm120"])
    assert "the target is sm80, this machine's GPU is sm89" in made.why


def test_hopper_is_classic_tensorrts(installed):
    installed("tensorrt", "tensorrt_rtx")
    assert plan(target="sm90", gpu=H200).flavor.name == "classic"
    with pytest.raises(UnavailableError, match=r"TensorRT-RTX builds for sm75, .*sm121, not for sm90"):
        plan(flavor="rtx", target="sm90", gpu=H200)


def test_where_nothing_builds_for_a_target_every_reason_is_told(installed):
    installed("tensorrt", "tensorrt_rtx")
    with pytest.raises(UnavailableError) as caught:
        plan(target="sm90")
    assert "TensorRT builds only on the GPU that will run the engine: the target is sm90" in str(caught.value)
    assert "TensorRT-RTX builds for sm75" in str(caught.value)
    assert (caught.value.exit_code, caught.value.code) == (3, "engine-target-unavailable")


def test_without_any_tensorrt_both_installations_are_named(installed):
    installed()
    with pytest.raises(UnavailableError) as caught:
        plan(gpu=L4)
    assert "pip install 'qpert[trt]'" in str(caught.value)
    assert "pip install 'qpert[rtx]'" in str(caught.value)


def test_the_current_gpu_needs_a_gpu(installed):
    installed("tensorrt_rtx")
    assert names(plan(target="current", gpu=L4)) == ["sm89"]
    with pytest.raises(UnavailableError) as caught:
        plan(target="current")
    assert caught.value.code == "gpu-missing"


def test_classic_tensorrt_builds_one_engine_for_one_gpu(installed):
    installed("tensorrt")
    with pytest.raises(UnavailableError, match=r"sm89\+sm90, this machine's GPU is sm89") as caught:
        plan(flavor="classic", target="sm89+sm90", gpu=L4)
    assert caught.value.code == "engine-target-other-gpu"


def test_a_library_that_is_installed_and_cannot_be_loaded_is_told_apart(monkeypatch):
    def import_module(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(flavors.importlib, "import_module", import_module)
    with pytest.raises(UnavailableError, match=r"is installed and cannot be loaded \(libnvinfer\.so\.10"):
        plan(flavor="classic", gpu=L4)


def test_an_unknown_flavour_is_bad_input():
    with pytest.raises(InputError, match="got TensorRT flavour 'trt', expected one of classic, rtx"):
        plan(flavor="trt")
