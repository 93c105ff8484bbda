"""`qpert eval --method`: JSON, page, exit codes."""

import json
import re
import shlex
from pathlib import Path

import pytest
from evaluation_sets import write_set

from qpert.runtime.cli import run

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "methods.md"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "set")


@pytest.fixture
def evaluated(tiny_bundle, copy_of, root, tmp_path, capsys):
    """Runs `eval` on one copy of the tiny bundle: its exit code, stdout and stderr."""
    bundle = copy_of(tiny_bundle)

    def evaluated(*options):
        arguments = ["eval", bundle, "--dataset", root, "--threads", 1, "--rerank", 2, *options]
        code = run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    evaluated.bundle = bundle
    return evaluated


def numbers(report):
    """What has to be the same each time."""
    return {key: value for key, value in report.items() if key not in ("seconds", "resumed", "environment")}


def test_q_pert_is_the_default_and_its_result_is_that_of_no_option(evaluated):
    code, out, _ = evaluated("--json")
    assert code == 0
    plain = json.loads(out)
    assert plain["method"]["name"] == "q-pert"
    assert "methods" not in plain
    assert numbers(json.loads(evaluated("--method", "q-pert", "--json")[1])) == numbers(plain)


def test_several_methods_are_listed_and_one_keeps_the_shape(evaluated, tmp_path):
    plain = json.loads(evaluated("--json")[1])
    code, out, said = evaluated("--method", "q-pert, oes,none", "--html", tmp_path / "page.html", "--json")
    assert code == 0, said
    found = json.loads(out)
    assert [one["method"]["name"] for one in found["methods"]] == ["q-pert", "oes", "none"]
    same = ("t2i", "i2t", "small", "bins", "itc", "images", "texts", "itm_pairs", "perturbation", "boxes", "method")
    assert {key: found[key] for key in same} == {key: plain[key] for key in same}
    assert {"differences", "bootstrap", "table_a"} <= set(found)
    assert json.loads((evaluated.bundle / "reports" / "eval.json").read_text()) == found
    page = (tmp_path / "page.html").read_text()
    assert page == (evaluated.bundle / "reports" / "eval.html").read_text()
    assert "OEs" in page
    code, out, _ = evaluated("--method", "none", "--json")
    alone = json.loads(out)
    assert code == 0
    assert numbers(found["methods"][2]) == {key: value for key, value in numbers(alone).items() if key != "table_a"}
    assert alone["boxes"] == "no boxes"


def test_choices_are_options_and_recorded(evaluated):
    options = ("--or-q-pert-boxes", "span", "--oes-pooling", "crop", "--oes-similarity", "mean", "--oes-joins", "final")
    code, out, said = evaluated("--method", "or-q-pert,oes", *options, "--json")
    assert code == 0, said
    found = [one["method"]["choices"] for one in json.loads(out)["methods"]]
    assert found[0] == {"or-q-pert-boxes": "span"}
    assert found[1] == {"oes-pooling": "crop", "oes-similarity": "mean", "oes-joins": "final"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "qpert"), "--method has qpert; expected one or more of q-pert, or-q-pert, oes, none"),
        (("--method", "oes,oes"), "name each method once"),
        (("--method", "oes", "--boxes", "none"), "--method oes needs boxes"),
        (("--method", "or-q-pert", "--or-q-pert-boxes", "each"), "stages 'both'"),
        (("--method", "oes", "--oes-pooling", "roi"), "roi"),
        (("--method", "oes", "--oes-joins", "final", "--rerank", 0), "nothing is re-ranked"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(evaluated, options, words, own_cache):
    before = sorted(own_cache.rglob("evaluation.json"))
    code, out, said = evaluated(*options)
    assert (code, out) == (2, "")
    assert words in said
    assert sorted(own_cache.rglob("evaluation.json")) == before
    assert not (evaluated.bundle / "reports" / "eval.json").exists()


def test_a_person_gets_the_methods_side_by_side(evaluated):
    code, out, _ = evaluated("--method", "none,q-pert")
    assert code == 0
    for words in ("Against Q-Pert", "no boxes", "mR@1", "The paper's Table A", "What the paper leaves open"):
        assert words in out


def test_the_guides_command_makes_its_page(demo_bundle, copy_of, tmp_path, monkeypatch, capsys):
    copy_of(demo_bundle).rename(tmp_path / "qpert-blip2-demo-fp32")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    words = shlex.split(block)
    assert run([*words[1:], "--threads", "1"]) == 0
    assert "no boxes" in capsys.readouterr().out
    assert "Against Q-Pert" in (tmp_path / "methods.html").read_text()
